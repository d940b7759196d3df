"""lm-eval on this project's models: its accuracy is a hand-written count of likelihoods."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulator.packages import tiny_package, tuned
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import ConfigError, DataError
from isthmus.edge.data.batches import encode
from isthmus.edge.data.readers import Example
from isthmus.experiments.harness.emulator_settings import ScoreSettings
from isthmus.experiments.harness.single_process import whole
from isthmus.experiments.scoring.likelihood import answer_questions, require_lm_eval
from isthmus.experiments.scoring.task_scoring import document_losses, run_score
from isthmus.experiments.scoring.tasks import Question

# Found without being imported: that takes seconds, in each process that collects.
pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra `lm-eval`)")

QUESTIONS = tuple(
    Question(
        f"Question: {'why ' * (i % 4 + 1)}{i}?\nAnswer:", (f" no {i}", " maybe so", f" {'y' * (i % 3 + 1)}"), i % 3
    )
    for i in range(14)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("llama", tmp_path_factory.mktemp("model")), "tiny")


@torch.no_grad()
def loss_by_hand(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    context = tokenizer(prompt)["input_ids"]
    tokens = context + tokenizer(answer, add_special_tokens=False)["input_ids"]
    logs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    rest = range(len(context), len(tokens))
    return -sum(float(logs[place - 1, tokens[place]]) for place in rest), len(rest)


def test_accuracy_and_losses_equal_a_count_by_hand(checkpoint: Checkpoint) -> None:
    model, tokenizer = whole(checkpoint), load_tokenizer(checkpoint.folder)
    found = answer_questions(model, tokenizer, QUESTIONS, batch=4, precision="fp32")
    for index, question in enumerate(QUESTIONS):
        losses = [loss_by_hand(model, tokenizer, question.prompt, choice) for choice in question.choices]
        best = min(range(len(losses)), key=lambda choice: losses[choice][0])
        assert found.right[index] == (best == question.answer)
        assert found.losses[index] == pytest.approx(losses[question.answer][0], abs=1e-3)
        assert found.tokens[index] == losses[question.answer][1]
    assert 0 < sum(found.right) < len(QUESTIONS)


def test_an_edge_model_over_its_span_answers_as_the_whole_one(checkpoint: Checkpoint) -> None:
    plan = SplitPlan.parse("1:2", 6)
    edge = load_edge_parts(checkpoint, plan, load_span(checkpoint, plan))
    tokenizer = load_tokenizer(checkpoint.folder)
    answers = [
        answer_questions(model, tokenizer, QUESTIONS, batch=4, precision="fp32") for model in (edge, whole(checkpoint))
    ]
    assert answers[0] == answers[1]


def test_document_losses_equal_the_models_own(checkpoint: Checkpoint) -> None:
    model, tokenizer = whole(checkpoint), load_tokenizer(checkpoint.folder)
    examples = [Example("ab" * (i + 1), " cd" * (4 - i)) for i in range(4)]
    documents, _ = encode(examples, tokenizer, 64)
    sums, counts = document_losses(model, documents, 0, batch=3, precision="fp32")
    for document, total, count in zip(documents, sums, counts, strict=True):
        labels = torch.tensor([document.labels])
        own = model(input_ids=torch.tensor([document.input_ids]), labels=labels).loss
        assert total / count == pytest.approx(own.item(), abs=1e-4)


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    rows = [{"q": question.prompt, "c": list(question.choices), "a": question.answer} for question in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n  cache_dir: {tmp_path / 'cache'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\n"
        "doc_to_target: a\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 1\n"
    )
    return tmp_path


def test_a_task_of_ones_own_runs_on_the_whole_model(checkpoint: Checkpoint, own_task: Path) -> None:
    settings = ScoreSettings(tasks="mine", model=str(checkpoint.folder), include_path=own_task, batch=4)
    found = answer_questions(whole(checkpoint), load_tokenizer(checkpoint.folder), QUESTIONS, batch=4, precision="fp32")
    assert run_score(settings)["tasks"]["mine"]["acc"] == pytest.approx(sum(found.right) / len(QUESTIONS))


def test_a_task_runs_on_an_emulator_and_on_the_plug_in(checkpoint: Checkpoint, own_task: Path, tmp_path: Path) -> None:
    package = tiny_package(tmp_path / "package", checkpoint.folder)
    adapter = tuned(package, tmp_path / "adapter")
    tokenizer = package.load_tokenizer()
    cases = {
        ScoreSettings(tasks="mine", package=package.folder): package.load_model(),
        ScoreSettings(tasks="mine", package=package.folder, adapter=adapter): load_adapter(
            package.load_model(), adapter
        ),
        ScoreSettings(tasks="mine", model=str(checkpoint.folder), adapter=adapter): load_adapter(
            whole(checkpoint), adapter, digest=package.digest
        ),
    }
    for settings, model in cases.items():
        found = answer_questions(model, tokenizer, QUESTIONS, batch=4, precision="fp32")
        said = run_score(dataclasses.replace(settings, include_path=own_task, batch=4))
        assert said["tasks"]["mine"]["acc"] == pytest.approx(sum(found.right) / len(QUESTIONS))
        assert said["adapter"] is (settings.adapter is not None)


def test_what_cannot_be_scored_is_said(checkpoint: Checkpoint, own_task: Path) -> None:
    with pytest.raises(ConfigError, match="either --model or --package"):
        run_score(ScoreSettings(tasks="mine"))
    (own_task / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be loaded"):
        run_score(ScoreSettings(tasks="mine", model=str(checkpoint.folder), include_path=own_task))


def test_an_unknown_task_is_named(checkpoint: Checkpoint, own_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # lm-eval's own tasks are thousands of files, which take a while to read.
    tasks = pytest.importorskip("lm_eval.tasks")
    few = partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: few(include_path=include_path))
    with pytest.raises(ConfigError, match="no task 'other'"):
        run_score(ScoreSettings(tasks="other", model=str(checkpoint.folder), include_path=own_task))


def test_without_lm_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'isthmus\[lm-eval\]'"):
        require_lm_eval()
