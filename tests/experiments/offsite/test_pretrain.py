"""A pretrained tiny model: it learns, and it is an ordinary folder that the rest of the project takes."""

from __future__ import annotations

import io
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.models.small_tasks import table_settings, task_folder

from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from isthmus.experiments.harness.emulator_settings import PretrainSettings
from isthmus.experiments.harness.single_process import whole
from isthmus.experiments.offsite import pretrain as pretraining
from isthmus.experiments.offsite.pretrain import run_pretrain
from isthmus.experiments.offsite.table import run_table


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The {word} sat on the mat, said the cat.\n" for word in ("cat", "dog", "owl") * 60))
    return path


def settings(text: Path, out: Path, **values: object) -> PretrainSettings:
    defaults = {"family": "gpt2", "steps": 12, "layers": 4, "hidden": 32, "vocabulary": 300, "batch": 8, "length": 24}
    return PretrainSettings(text=text, out=out, threads=1, **{**defaults, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "opt", "gemma2"])
def test_it_learns_and_reads_back(text: Path, tmp_path: Path, family: str) -> None:
    out = tmp_path / "model"
    report = run_pretrain(settings(text, out, family=family), console=Console(file=io.StringIO()))
    assert report["held_out_loss_after"] < report["held_out_loss_before"] - 0.5
    checkpoint = resolve(str(out))
    tokenizer = load_tokenizer(checkpoint.folder)
    assert tokenizer.decode(tokenizer("The owl sat.")["input_ids"]) == "The owl sat."
    assert SplitPlan.parse("1:1", checkpoint.config.num_hidden_layers).cloud.stop == 3
    ids = torch.tensor([tokenizer("The cat sat on the mat, said the cat.\n" * 2)["input_ids"]])
    with torch.no_grad():
        assert whole(checkpoint)(input_ids=ids, labels=ids).loss.item() < report["held_out_loss_before"] - 0.5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_bits(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """GPT-2 drops out, so the random state matters."""
    expected = run_pretrain(settings(text, tmp_path / "straight"), console=Console(file=io.StringIO()))
    measure = pretraining._Pretraining.measure

    def act(task: Any, step: int) -> Any:
        if step == 6:
            signal.raise_signal(number)
        return measure(task, step)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining._Pretraining, "measure", act)
        with pytest.raises(KeyboardInterrupt, match=r"after step 5 of 12.*checkpoint-5: repeat the command to go on"):
            run_pretrain(settings(text, tmp_path / "model"), console=Console(file=io.StringIO()))
    work = tmp_path / "model.part"
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-5"]
    assert not (tmp_path / "model").exists()
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.002 and is now 0\.001.*model\.part"):
        run_pretrain(settings(text, tmp_path / "model", learning_rate=1e-3))
    torch.manual_seed(99)
    report = run_pretrain(settings(text, tmp_path / "model"), console=Console(file=io.StringIO()))
    assert {**report, "seconds": 0} == {**expected, "seconds": 0}
    names = ("straight", "model")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in names)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not work.exists()


def test_a_loss_that_is_not_finite_ends_the_run(text: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"lower the learning rate.*model\.part.*another --out"):
        run_pretrain(settings(text, tmp_path / "model", learning_rate=1e30))


def test_the_table_runs_on_it(text: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    run_pretrain(settings(text, model, steps=2), console=Console(file=io.StringIO()))
    data = task_folder(tmp_path / "data")
    tables = {"preset": ["fidelity"], "text": text, "public": 200, "private": 20, "rows": "plug-in"}
    table = table_settings(model, data, tmp_path / "out", **tables, split_layers="1:1")
    (row,) = run_table(table, console=Console(file=io.StringIO()))["runs"]
    assert (row["metric"], row["preset"]) == ("completion_loss", "fidelity")


def test_bad_settings_are_named(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'bert' is not supported"):
        run_pretrain(settings(text, tmp_path / "model", family="bert"))
    with pytest.raises(ConfigError, match="multiple of 32"):
        run_pretrain(settings(text, tmp_path / "model", hidden=40))
    with pytest.raises(ConfigError, match="exists"):
        run_pretrain(settings(text, tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        run_pretrain(settings(tmp_path / "gone.txt", tmp_path / "model"))
    assert not (tmp_path / "model").exists()
