"""`emulator tune` on a preset's package: above the emulator alone, from outputs that are computed once a text."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.emulator.packages import tiny_package
from support.models.tiny import tiny_checkpoint
from support.run_folders import adapter, assert_same_run, losses
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.edge import emulator_run
from isthmus.edge.config.training_config import TuneConfig, load_config
from isthmus.edge.emulator_run import KEPT, run_tuning
from isthmus.edge.span_cache.cache_check import fingerprint
from isthmus.edge.training import methods
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.package.manifest import Tuning
from isthmus.emulator.package.package import Package
from isthmus.training.run_checkpoint import load

ADVICE = Tuning(learning_rate=0.02, steps=5, rank=3, warmup_steps=1)
TEXTS = 10
TINY = 1e-5
"""GiB that hold some of the rows: 10 KiB, and a row takes 2 KiB."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Package]:
    models: dict[str, Path] = {}
    made: dict[tuple[Any, ...], Package] = {}

    def get(family: str = "llama", *, advised: bool = True, below: bool = False) -> Package:
        if family not in models:
            models[family] = tiny_checkpoint(family, tmp_path_factory.mktemp(family))
        if (family, advised, below) not in made:
            folder = tmp_path_factory.mktemp("packages") / "package"
            advice = ADVICE if advised else None
            made[family, advised, below] = tiny_package(
                folder, models[family], plan="1:3", tuning=advice, adapters_below=below
            )
        return made[family, advised, below]

    return get


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"Ticket {'no ' * (i % 4)}{i}:", "completion": f" answer {i**3}"} for i in range(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(package: Package, data: Path, out: Path, **values: Any) -> TuneConfig:
    needed = {"package": package.folder, "signer": str(package.signer), "data": str(data), "out": out}
    return load_config(None, {**needed, "threads": 1, "batch": 3, "validation_split": 0.2, **values}, TuneConfig)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each forward of an emulator has had."""
    seen: list[int] = []
    forward = Emulator.forward

    def counted(self: Emulator, hidden: Tensor, *inputs: Any) -> Tensor:
        seen.append(len(hidden))
        return forward(self, hidden, *inputs)

    monkeypatch.setattr(Emulator, "forward", counted)
    return seen


# What the owner advises -----------------------------------------------------------------------------------------------


def test_a_run_goes_by_the_owners_advice_and_flags_win(
    packages: Callable[..., Package], data: Path, tmp_path: Path
) -> None:
    names = ("learning_rate", "warmup_steps", "rank", "layers", "target_modules")
    run_tuning(config(packages(), data, tmp_path / "advised"))
    settings = load(tmp_path / "advised" / "checkpoint-5").settings
    linears = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert [settings[name] for name in names] == [0.02, 1, 3, "above", linears]
    sites = {name.split("layers.")[1].rpartition(".lora_")[0] for name in adapter(tmp_path / "advised")}
    assert len(sites) == 3 * len(linears)
    assert {site.partition(".")[0] for site in sites} == {"3", "4", "5"}

    flags = {"learning_rate": 1e-3, "warmup_steps": 0, "rank": 2, "layers": "4-5", "target_modules": "q_proj"}
    run_tuning(config(packages(), data, tmp_path / "said", epochs=1, **flags))
    settings = load(tmp_path / "said" / "checkpoint-3").settings
    assert [settings[name] for name in names] == [1e-3, 0, 2, [4, 5], ["q_proj"]]

    run_tuning(config(packages(advised=False), data, tmp_path / "older", steps=1))
    settings = load(tmp_path / "older" / "checkpoint-1").settings
    assert [settings[name] for name in names] == [1e-3, 0, 8, None, None]
    assert any("layers.0." in name for name in adapter(tmp_path / "older"))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"layers": "0,3-5"}, r"layers\.0\.\S+ is trainable"),
        ({"layers": "all", "method": "bottleneck"}, r"layers\.0\.\S+ is trainable"),
        ({"layers": "all", "method": "full"}, r"layers\.0\.\S+ is trainable"),
        ({"method": "prompt"}, r"prompt\S+ is trainable"),
        ({"layers": "2"}, r"layers has layer 2, which is not the edge's"),
    ],
    ids=str,
)
def test_what_would_learn_below_is_refused(
    packages: Callable[..., Package], data: Path, tmp_path: Path, values: dict[str, str], what: str
) -> None:
    with pytest.raises(ConfigError, match=what) as refused:
        run_tuning(config(packages(), data, tmp_path / "run", **values))
    assert "\n" not in str(refused.value)
    if "trainable" in what:
        assert "--layers above" in str(refused.value)
        run_tuning(config(packages(below=True), data, tmp_path / "run", steps=1, **values))


def test_an_adapter_below_to_go_on_from_is_refused(
    packages: Callable[..., Package], data: Path, tmp_path: Path
) -> None:
    run_tuning(config(packages(advised=False), data, tmp_path / "older", steps=1))
    with pytest.raises(ConfigError, match="lies below the emulator"):
        run_tuning(config(packages(), data, tmp_path / "run", start_from=tmp_path / "older" / "adapter"))


@pytest.mark.parametrize("method", ["full", "bottleneck"])
def test_other_methods_above_are_trained_from_kept_outputs(
    packages: Callable[..., Package], data: Path, tmp_path: Path, rows: list[int], method: str
) -> None:
    report = run_tuning(config(packages(), data, tmp_path / "run", method=method))
    assert report.steps == 5
    assert rows == [1] * TEXTS


# Kept outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "values"),
    [("llama", {}), ("gemma3_text", {"precision": "bf16", "dropout": 0.3})],
    ids=["llama", "gemma3, bf16, dropout above"],
)
def test_each_text_is_computed_once_and_the_bits_are_those_of_a_run_that_keeps_nothing(
    packages: Callable[..., Package],
    data: Path,
    tmp_path: Path,
    rows: list[int],
    capsys: pytest.CaptureFixture[str],
    family: str,
    values: dict[str, Any],
) -> None:
    values = {"epochs": 2, "eval_every": 4, **values}
    report = run_tuning(config(packages(family), data, tmp_path / "kept", **values))
    assert rows == [1] * TEXTS
    assert not (tmp_path / "kept" / KEPT).exists()
    assert "No room" not in capsys.readouterr().err
    told = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert told["first_epoch_step_s"] == report.first_epoch_step_s
    assert told["later_epoch_step_s"] == report.later_epoch_step_s
    assert report.first_epoch_step_s is not None
    assert report.later_epoch_step_s is not None
    assert 3 * report.first_epoch_step_s + 3 * report.later_epoch_step_s == pytest.approx(report.seconds)
    for gib, room in ((0.0, "no store"), (TINY, "some room")):
        rows.clear()
        run_tuning(config(packages(family), data, tmp_path / room, keep_outputs_gib=gib, **values))
        assert len(rows) > TEXTS
        assert capsys.readouterr().err.count("No room for further outputs") == (1 if gib else 0)
        assert_same_run(tmp_path / "kept", tmp_path / room)


def test_a_batch_gives_the_same_but_for_rounding(
    packages: Callable[..., Package], data: Path, tmp_path: Path, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tuning(config(packages(), data, tmp_path / "rows"))
    rows.clear()
    monkeypatch.setattr(emulator_run, "_kept_outputs", lambda *_: contextlib.nullcontext())
    run_tuning(config(packages(), data, tmp_path / "batches"))
    assert max(rows) == 3
    ours, theirs = ([line["loss"] for line in losses(tmp_path / name)] for name in ("rows", "batches"))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_run_that_is_stopped_goes_on_bit_for_bit(
    packages: Callable[..., Package], data: Path, tmp_path: Path, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tuning(config(packages(), data, tmp_path / "straight"))
    after_step = methods.after_step

    def interrupt(model: Any, step: int) -> None:
        after_step(model, step)
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(methods, "after_step", interrupt)
        with pytest.raises(KeyboardInterrupt, match="after step 4 of 5"):
            run_tuning(config(packages(), data, tmp_path / "stopped"))
    kept = tmp_path / "stopped" / KEPT / "rows.bin"
    whole = kept.read_bytes()
    kept.write_bytes(bytes(200) + whole[200:])  # a row that a crash has damaged
    rows.clear()
    run_tuning(config(packages(), data, tmp_path / "stopped", resume=True))
    assert rows == [1]
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert not kept.exists()


def test_where_something_random_acts_below_nothing_is_kept(
    packages: Callable[..., Package], data: Path, tmp_path: Path, rows: list[int]
) -> None:
    run_tuning(config(packages("gpt2"), data, tmp_path / "run"))
    assert max(rows) == 3


def test_kept_rows_belong_to_the_emulators_weights(packages: Callable[..., Package]) -> None:
    model = packages().load_model()
    emulator = model.remote_layers.span
    before = fingerprint(model, emulator)
    assert before == fingerprint(model, packages().load_emulator()) != fingerprint(model)
    next(iter(emulator.parameters())).data[0] += 1
    assert fingerprint(model, emulator) != before
