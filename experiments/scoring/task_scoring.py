"""What a model scores on a task, document by document, and the work of `isthmus emulator score`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
from isthmus.common.errors import ConfigError, NonFiniteError
from isthmus.edge.config.data_config import Precision
from isthmus.edge.data.batches import IGNORED, Encoded, collate
from isthmus.edge.training.evaluation import to_device
from isthmus.edge.training.precision import computing_in
from isthmus.emulator.package.build import pick_device
from isthmus.emulator.package.package import open_package
from isthmus.experiments.harness.bench_flags import names_of, precision_of
from isthmus.experiments.harness.emulator_settings import ScoreSettings
from isthmus.experiments.harness.single_process import whole
from isthmus.experiments.scoring.likelihood import answer_questions, language_model, require_lm_eval, run_tasks
from isthmus.experiments.scoring.scores import Score
from isthmus.experiments.scoring.tasks import Task


def score_task(model: Any, tokenizer: Any, task: Task, *, batch: int, precision: Precision) -> dict[str, Score]:
    """Score a model on a task's held-out part.

    Args:
        model: A causal LM, plain, split or PEFT. It is in eval mode meanwhile.
        precision: What the forward computes in; losses and likelihoods are of fp32.

    Returns:
        A score for each of the task's metrics.

    Raises:
        ConfigError: The task needs the package lm-eval, which is missing.
        NonFiniteError: A loss is NaN or infinite.
    """
    training = model.training
    model.eval()
    try:
        if not task.questions:
            sums, counts = document_losses(model, task.held_out, task.pad_id, batch=batch, precision=precision)
            scores = {metric: Score(metric, sums, counts) for metric in task.metrics}
        else:
            answers = answer_questions(model, tokenizer, task.questions, batch=batch, precision=precision)
            ones = tuple(1.0 for _ in task.questions)
            scores = {
                "accuracy": Score("accuracy", tuple(map(float, answers.right)), ones),
                "completion_loss": Score("completion_loss", answers.losses, tuple(map(float, answers.tokens))),
            }
    finally:
        model.train(training)
    for metric, score in scores.items():
        if not math.isfinite(score.value):
            raise NonFiniteError(f"the {metric} on {task.name} is {score.value}: look at the model, or lower the rate.")
    return scores


@torch.no_grad()
def document_losses(
    model: Any, documents: Sequence[Encoded], pad_id: int, *, batch: int, precision: Precision
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The loss of each document, summed over its labels, in nats, and the number of its labels."""
    order = sorted(range(len(documents)), key=lambda index: len(documents[index].input_ids))  # little padding
    sums, counts = [0.0] * len(documents), [0.0] * len(documents)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = to_device(collate([documents[row] for row in rows], pad_id), model)
        labels = inputs.pop("labels")[:, 1:]
        with computing_in(precision, model):
            logits = model(**inputs, use_cache=False).logits
        logits = logits[:, -inputs["input_ids"].shape[1] :]  # a learned prompt stands before the tokens
        losses = cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels.shape)
        for row, loss, kept in zip(rows, losses.sum(1).tolist(), (labels != IGNORED).sum(1).tolist(), strict=True):
            sums[row], counts[row] = loss, float(kept)
    return tuple(sums), tuple(counts)


def run_score(settings: ScoreSettings) -> dict[str, Any]:
    """Run lm-eval's tasks on a whole model, on a package's emulator, or on either with an adapter.

    Returns:
        `model`, `adapter` (whether there is one) and `tasks`: metric -> value for each.

    Raises:
        ConfigError: Neither or both of model and package are given, a task is unknown, or lm-eval is missing.
        DataError: A task's data cannot be loaded.
    """
    if (settings.model is None) == (settings.package is None):
        raise ConfigError("give either --model or --package: a whole model, or an emulator of its middle")
    tasks, precision = names_of(settings.tasks, "tasks"), precision_of(settings.precision, "precision")
    device = pick_device(settings.device)
    require_lm_eval()
    if settings.package is not None:
        package = open_package(settings.package)
        model, tokenizer, digest = package.load_model(), package.load_tokenizer(), package.digest
        model.remote_layers.span.to(device)
        what = f"{package.model} over the emulator {package.manifest.recipe}, keep {package.manifest.keep:g}"
        if package.bridge_file.exists():
            what += f", with your bridge {package.bridge_file}"
    else:
        checkpoint = resolve(str(settings.model))
        model, tokenizer, digest = whole(checkpoint), load_tokenizer(checkpoint.folder), checkpoint.digest()
        what = checkpoint.name
    if settings.adapter is not None:
        model = load_adapter(model, settings.adapter, digest=digest)
    model = model.to(device)
    lm = language_model(model, tokenizer, batch=settings.batch, precision=precision)
    return {
        "model": what,
        "adapter": settings.adapter is not None,
        "tasks": run_tasks(lm, tasks, include_path=settings.include_path, limit=settings.limit),
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    print(f"{result['model']}{', with the adapter' if result['adapter'] else ''}")
    for name, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            print(f"{name:24} {metric:16} {value:.4f}")
