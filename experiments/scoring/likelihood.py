"""lm-eval's harness on the models of this project: whole ones, and edge's models over an emulator or a span.

lm-eval (EleutherAI's Language Model Evaluation Harness) is an optional package. Its model interface is what others'
tasks run through, and what the multiple-choice tasks of the table run through. Nothing here asks the hub for a model;
a task of lm-eval's own may load its data from there.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.common.errors import ConfigError, DataError
from isthmus.edge.config.data_config import Precision
from isthmus.experiments.scoring.tasks import Question

_TASK = "isthmus_choices"


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model makes of a list of questions, in their order.

    Attributes:
        right: Whether the likeliest answer is the right one (lm-eval's `acc`).
        losses: Negative log-likelihood of the right answer, in nats.
    """

    right: tuple[bool, ...]
    losses: tuple[float, ...]
    tokens: tuple[int, ...]


def answer_questions(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, batch: int, precision: Precision
) -> Answers:
    """Let a model choose by likelihood, through lm-eval.

    Args:
        model: A causal LM, plain, split or PEFT.

    Raises ConfigError where the package lm-eval is missing.
    """
    require_lm_eval()
    from datasets import Dataset  # lm-eval depends on it
    from lm_eval import evaluator
    from lm_eval.api.task import ConfigurableTask

    lm = language_model(model, tokenizer, batch=batch, precision=precision)
    documents = [
        {"prompt": question.prompt, "choices": list(question.choices), "answer": question.answer}
        for question in questions
    ]
    config = {
        "task": _TASK,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": lambda document: document["prompt"],
        "doc_to_choice": lambda document: document["choices"],
        "doc_to_target": lambda document: document["answer"],
        "target_delimiter": "",  # an answer begins with its own space
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    with quiet():
        task = ConfigurableTask(config=config)
        results = evaluator.evaluate(lm, {_TASK: task}, bootstrap_iters=0, log_samples=True)
    samples = sorted(results["samples"][_TASK], key=lambda sample: sample["doc_id"])
    losses, tokens = [], []
    for question, sample in zip(questions, samples, strict=True):
        losses.append(-float(sample["filtered_resps"][question.answer][0]))
        tokens.append(len(lm._encode_pair(question.prompt, question.choices[question.answer])[1]))
    return Answers(tuple(bool(sample["acc"]) for sample in samples), tuple(losses), tuple(tokens))


def run_tasks(
    lm: Any, names: Sequence[str], *, include_path: Path | None, limit: int | None
) -> dict[str, dict[str, float]]:
    """Run lm-eval's tasks, or those of a folder of YAML files, without examples in the prompt unless a task has some.

    Args:
        include_path: Folder with further tasks; None for lm-eval's own alone.

    Returns:
        Metric -> value for each task.

    Raises:
        ConfigError: There is no such task, or the package lm-eval is missing.
        DataError: A task's data cannot be loaded.
    """
    require_lm_eval()
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    with quiet():
        manager = None
        if include_path is not None:
            manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if manager is None or not set(names) <= set(manager.all_tasks):
            # Reading lm-eval's own thousands of files takes a while.
            manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            where = f" or in {include_path}" if include_path else "; give --include-path for tasks of your own"
            raise ConfigError(f"there is no task {name!r} in lm-eval{where}")
    with quiet():
        try:
            loaded = manager.load(list(names))
        except (OSError, ValueError, LookupError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"the data of {', '.join(names)} cannot be loaded ({reason}): check the connection, or the files that "
                "the task names"
            ) from error
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=0)
        results = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    return {
        name: {
            metric.removesuffix(",none"): float(value)
            for metric, value in figures.items()
            if isinstance(value, int | float) and "stderr" not in metric and metric not in ("alias", "sample_len")
        }
        for name, figures in results["results"].items()
    }


def language_model(model: Any, tokenizer: Any, *, batch: int, precision: Precision) -> Any:
    """A model behind lm-eval's interface.

    Args:
        model: A causal LM, plain, split or PEFT. It is put in eval mode.
        precision: What the forward computes in; likelihoods are always of fp32.

    Raises ConfigError where the package lm-eval is missing.
    """
    require_lm_eval()
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):  # type: ignore[misc]  # a class of an optional package
        """lm-eval's own model for transformers, for models that keep no key-value cache."""

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
            with torch.no_grad(), autocast:
                return self.model(input_ids=inps, use_cache=False).logits

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
            from lm_eval.models.utils_hf import stop_sequences_criteria

            options = {name: value for name, value in kwargs.items() if name not in ("temperature", "do_sample")}
            if kwargs.get("do_sample") and kwargs.get("temperature"):
                options |= {"do_sample": True, "temperature": kwargs["temperature"]}
            else:
                options |= {"do_sample": False}
            criteria = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
            with torch.no_grad(), autocast:
                return self.model.generate(
                    input_ids=context,
                    max_length=max_length,
                    stopping_criteria=criteria,
                    pad_token_id=self.tokenizer.pad_token_id,
                    use_cache=False,
                    **options,
                )

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def get_model_info(self) -> dict[str, Any]:
            return {}  # the hub would be asked for it

    model.eval()
    with quiet():
        return LanguageModel(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, softmax_dtype=torch.float32
        )


def require_lm_eval() -> None:
    """Make sure that lm-eval is there, before a long run rather than in its middle.

    Raises ConfigError where it is missing.
    """
    try:
        with quiet():
            import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError("scoring by likelihood needs the package lm-eval: pip install 'isthmus[lm-eval]'") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's log, bars and prints: standard output is for results."""
    import warnings

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
