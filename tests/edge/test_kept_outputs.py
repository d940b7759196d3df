"""`emulator tune` on a preset's package: above the emulator alone, from outputs that are computed once a text, and with
dp-sgd."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulator.packages import tiny_package
from support.models.tiny import tiny_checkpoint
from support.run_folders import adapter, assert_same_run, losses, same
from torch import Tensor

from isthmus.backbone.adapters.adapter_files import adapter_digest
from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.edge import emulator_run
from isthmus.edge.config.settings import MOST_WIDTH
from isthmus.edge.config.training_config import TuneConfig, load_config
from isthmus.edge.data.batches import Batch
from isthmus.edge.emulator_run import KEPT, run_tuning
from isthmus.edge.span_cache.cache_check import fingerprint
from isthmus.edge.span_cache.kept_outputs import MemoryRows
from isthmus.edge.training import methods
from isthmus.edge.training.defended_run import DefendedRun
from isthmus.edge.training.step_rule import BatchLoss
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.package.intake import check_adapter
from isthmus.emulator.package.manifest import Tuning
from isthmus.emulator.package.package import Package
from isthmus.privacy.defences.accountant import epsilon, sampled_epsilon
from isthmus.privacy.defences.private_gradients import PrivateGradients
from isthmus.training.run_checkpoint import load

ADVICE = Tuning(learning_rate=0.02, steps=5, rank=3, warmup_steps=1)
TAKEN = ("layers", "steps", "warmup_steps", "rank", "target_modules", "learning_rate")
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
    packages: Callable[..., Package], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("learning_rate", "warmup_steps", "rank", "layers", "target_modules")
    run_tuning(config(packages(), data, tmp_path / "advised"))
    settings = load(tmp_path / "advised" / "checkpoint-5").settings
    linears = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert [settings[name] for name in names] == [0.02, 1, 3, "above", linears]
    line = f"--layers above --steps 5 --warmup-steps 1 --rank 3 --target-modules {','.join(linears)} "
    said = capsys.readouterr().err
    assert f"Settings advised by the package: {line}--learning-rate 0.02\n" in said, said
    sites = {name.split("layers.")[1].rpartition(".lora_")[0] for name in adapter(tmp_path / "advised")}
    assert len(sites) == 3 * len(linears)
    assert {site.partition(".")[0] for site in sites} == {"3", "4", "5"}

    flags = {"learning_rate": 1e-3, "warmup_steps": 0, "rank": 2, "layers": "4-5", "target_modules": "q_proj"}
    run_tuning(config(packages(), data, tmp_path / "said", epochs=1, **flags))
    assert "Settings advised" not in capsys.readouterr().err
    settings = load(tmp_path / "said" / "checkpoint-3").settings
    assert [settings[name] for name in names] == [1e-3, 0, 2, [4, 5], ["q_proj"]]

    run_tuning(config(packages(advised=False), data, tmp_path / "older", steps=1))
    settings = load(tmp_path / "older" / "checkpoint-1").settings
    assert [settings[name] for name in names] == [1e-3, 0, 8, None, None]
    assert any("layers.0." in name for name in adapter(tmp_path / "older"))


def test_a_run_trains_below_where_the_owner_advises_it(
    packages: Callable[..., Package], data: Path, tmp_path: Path
) -> None:
    refused = packages()
    advice = ADVICE.model_copy(update={"layers": "all"})
    allowed = replace(refused, manifest=refused.manifest.model_copy(update={"tuning": advice}))
    advised, said = emulator_run._as_advised(config(allowed, data, tmp_path), allowed, allowed.load_model())
    assert "--layers all" in said
    tuned = methods.build_peft(
        allowed.load_model(), advised, layers=emulator_run._trained_layers(advised, allowed.plan)
    )
    assert emulator_run.tuned_below(tuned) is not None
    emulator_run._refuse_below(tuned, allowed)
    with pytest.raises(ConfigError, match="lies below the emulator"):
        emulator_run._refuse_below(tuned, refused)


def test_advice_is_held_to_the_bounds_of_a_run(packages: Callable[..., Package], data: Path, tmp_path: Path) -> None:
    advice = ADVICE.model_copy(update={"rank": MOST_WIDTH + 1})
    wide = replace(packages(), manifest=packages().manifest.model_copy(update={"tuning": advice}))
    options, model = config(packages(), data, tmp_path), packages().load_model()
    with pytest.raises(ConfigError, match=f"advice does not fit this run: rank = {MOST_WIDTH + 1}") as refused:
        emulator_run._as_advised(options, wide, model)
    assert "\n" not in str(refused.value)
    advised, _ = emulator_run._as_advised(options, packages(), model)
    assert advised == options.model_copy(update={name: getattr(advised, name) for name in TAKEN})


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
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
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


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[TuneConfig], None]:
    """Begins a run, and stops it after step 4."""
    after_step = methods.after_step

    def interrupt(model: Any, step: int) -> None:
        after_step(model, step)
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    def run(options: TuneConfig) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(methods, "after_step", interrupt)
            with pytest.raises(KeyboardInterrupt, match="after step 4 of"):
                run_tuning(options)

    return run


def test_a_run_that_is_stopped_goes_on_bit_for_bit(
    packages: Callable[..., Package],
    data: Path,
    tmp_path: Path,
    rows: list[int],
    stopped: Callable[[TuneConfig], None],
) -> None:
    run_tuning(config(packages(), data, tmp_path / "straight"))
    stopped(config(packages(), data, tmp_path / "stopped"))
    kept = tmp_path / "stopped" / KEPT / "rows.bin"
    whole = kept.read_bytes()
    kept.write_bytes(bytes(200) + whole[200:])  # a row that a crash has damaged
    rows.clear()
    run_tuning(config(packages(), data, tmp_path / "stopped", resume=True))
    assert rows == [1]
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert not kept.exists()


def test_a_run_that_goes_on_with_room_for_nothing_leaves_no_rows(
    packages: Callable[..., Package], data: Path, tmp_path: Path, stopped: Callable[[TuneConfig], None]
) -> None:
    stopped(config(packages(), data, tmp_path / "run"))
    assert (tmp_path / "run" / KEPT).exists()
    run_tuning(config(packages(), data, tmp_path / "run", resume=True, keep_outputs_gib=0))
    assert not (tmp_path / "run" / KEPT).exists()


def test_what_is_refused_neither_makes_nor_deletes_rows(
    packages: Callable[..., Package], data: Path, tmp_path: Path, stopped: Callable[[TuneConfig], None]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("Ticket", "Bill"))
    stopped(config(packages(), data, tmp_path / "run"))
    rows = tmp_path / "run" / KEPT / "rows.bin"
    before = rows.read_bytes()
    with pytest.raises(CheckpointError, match="data"):
        run_tuning(config(packages(), other, tmp_path / "run", resume=True))
    for source in (data, other):
        with pytest.raises(ConfigError, match="holds a run"):
            run_tuning(config(packages(), source, tmp_path / "run"))
    assert before
    assert rows.read_bytes() == before
    run_tuning(config(packages(), data, tmp_path / "run", resume=True))
    with pytest.raises(ConfigError, match="holds a run"):
        run_tuning(config(packages(), data, tmp_path / "run"))
    assert not rows.parent.exists()


def test_rows_in_memory_take_so_many_bytes_at_most() -> None:
    rows, row = MemoryRows(2 * 3 * 8 * 4), torch.arange(24.0).reshape(3, 8)
    assert [rows.put(key, row) for key in (b"a", b"b", b"b", b"c")] == [True, True, True, False]
    assert [kept is not None for kept in map(rows.get, (b"a", b"b", b"c"))] == [True, True, False]
    found = rows.get(b"b", (3, 8))
    assert found is not None
    assert found.equal(row)


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


# dp-sgd ---------------------------------------------------------------------------------------------------------------

PRIVATE: dict[str, Any] = {
    "defence": "dp-sgd:clip=0.5,sigma=2",
    "epochs": 2,
    "save_every": 3,
    "target_modules": "q_proj",
}
TRAINED = 8


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("ab" * 32)
    return path


def test_dp_sgd_takes_examples_one_by_one_and_says_what_it_guarantees(
    packages: Callable[..., Package],
    data: Path,
    tmp_path: Path,
    rows: list[int],
    key: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[list[int] | None] = []
    added: list[int] = []
    draw, add = DefendedRun.drawn, PrivateGradients.add
    monkeypatch.setattr(DefendedRun, "drawn", lambda self: (drawn.append(draw(self)), drawn[-1])[1])
    monkeypatch.setattr(PrivateGradients, "add", lambda self, found: (added.append(len(found)), add(self, found))[1])
    report = run_tuning(config(packages(), data, tmp_path / "run", **PRIVATE, defence_key=key))
    # Each text once: those that were drawn, and the held-out ones.
    assert rows == [1] * (len({place for each in drawn for place in each or ()}) + TEXTS - TRAINED)
    assert len(added) == sum(len(each or ()) for each in drawn)
    first, drawn[:] = list(drawn), []
    assert report.epsilon == sampled_epsilon(2, 3 / TRAINED, 6, 1e-5) < epsilon(math.sqrt(6) / 2, 1e-5)
    of = "of the adapters, of each example, in the data or blanked out; nothing is sent, only this run counts, and "
    of += "batches are Poisson samples of rate 0.375, whose amplification is counted"
    said = f"epsilon {report.epsilon:.3g} at delta 1e-05, {of}"
    assert f"differential privacy: {said}" in capsys.readouterr().err
    assert said in report.lines(tmp_path)
    folder = tmp_path / "run" / "adapter"
    told = json.loads((folder / "isthmus_tuning.json").read_text())
    for name in ("defences", "epsilon", "delta", "guarantee"):
        assert told[name] == json.loads((tmp_path / "run" / "report.json").read_text())[name]
    check_adapter(folder, (packages().id,), packages().folder, packages().plan)

    run_tuning(config(packages(), data, tmp_path / "again", **PRIVATE, defence_key=key, keep_outputs_gib=0))
    assert_same_run(tmp_path / "run", tmp_path / "again")
    assert len(drawn) == report.steps == 6
    assert drawn == first
    assert adapter_digest(folder) == adapter_digest(tmp_path / "again" / "adapter")
    first = {**PRIVATE, "epochs": None, "steps": 1, "schedule": "constant"}
    for name, more in (("ours", {"defence_key": key}), ("other", {})):
        run_tuning(config(packages(), data, tmp_path / name, **first, **more))
    assert not same(adapter(tmp_path / "ours"), adapter(tmp_path / "other"))


def test_a_private_run_that_is_stopped_goes_on_with_the_same_noise_and_guarantee(
    packages: Callable[..., Package], data: Path, tmp_path: Path, key: Path, stopped: Callable[[TuneConfig], None]
) -> None:
    private = {**PRIVATE, "defence_key": key}
    run_tuning(config(packages(), data, tmp_path / "straight", **private))
    stopped(config(packages(), data, tmp_path / "stopped", **private))
    for wrong, why in (
        ({"defence": ()}, "defence was"),
        ({"defence": "dp-sgd:clip=0.5,sigma=1"}, "defence was"),
        ({"defence_key": None}, "another key"),
    ):
        with pytest.raises(CheckpointError, match=why):
            run_tuning(config(packages(), data, tmp_path / "stopped", **{**private, **wrong, "resume": True}))
    run_tuning(config(packages(), data, tmp_path / "stopped", **private, resume=True, eval_every=4))
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    straight, gone_on = (adapter_digest(tmp_path / name / "adapter") for name in ("straight", "stopped"))
    assert straight == gone_on  # with what they say of the guarantee


@pytest.mark.parametrize("values", [{"method": "prompt"}, {"method": "full", "layers": "all"}], ids=str)
def test_dp_sgd_below_the_emulator_and_by_other_methods(
    packages: Callable[..., Package], data: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    report = run_tuning(
        config(packages(below=True), data, tmp_path / "run", **PRIVATE | values | {"epochs": 1, "batch": 8})
    )
    assert report.epsilon == pytest.approx(epsilon(1 / 2, 1e-5))  # all of 8 are in the one step


def test_a_step_has_all_that_are_drawn_or_noise_alone(
    packages: Callable[..., Package], data: Path, tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter([[0, 2, 3, 5, 7], [], [4]])
    monkeypatch.setattr(DefendedRun, "drawn", lambda _: next(drawn))
    sizes: list[list[int]] = []
    over = BatchLoss.over

    def noted(self: BatchLoss, step: int, batches: Sequence[Batch], *rest: Any) -> float:
        sizes.append([len(batch["input_ids"]) for batch in batches])
        return over(self, step, batches, *rest)

    monkeypatch.setattr(BatchLoss, "over", noted)
    options = {**PRIVATE, "epochs": None, "steps": 3, "batch": 2, "defence_key": key}
    report = run_tuning(config(packages(), data, tmp_path / "run", **options))
    assert sizes == [[2, 2, 1], [], [1]]
    assert report.epsilon == sampled_epsilon(2, 2 / TRAINED, 3, 1e-5)
    _, empty, _ = losses(tmp_path / "run")
    assert (empty["loss"], empty["tokens"]) == (0, 0)
    assert empty["grad_norm"] > 0


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"defence": "gaussian:clip=1,sigma=1"}, "defence gaussian changes what is sent, and tuning on a package"),
        ({"defence": ["dp-sgd:clip=1,sigma=1", "smoothing:share=.1"]}, "defence smoothing changes what is sent"),
        ({"defence": "dp-sgd:clip=1,sigma=1", "optimizer": "mezo"}, "optimizer mezo has none"),
        ({"defence": "dp-sgd:clip=1"}, "sigma: field required"),
        ({"defence": "dp-sgd:clip=1,sigma=1", "start_from": "run/adapter"}, "leave out --start-from"),
    ],
    ids=str,
)
def test_other_defences_have_nothing_to_defend(values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        load_config(None, {"package": "p", "data": "d", **values}, TuneConfig)
    assert "\n" not in str(refused.value)
