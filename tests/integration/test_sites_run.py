"""`edge train` with sites and chosen codecs, against a real cloud in this process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.train_runs import Runs, cloud_for_runs, interrupted
from support.run_folders import adapter, assert_same_run
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import load_tokenizer
from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.edge import cloud_link
from isthmus.edge.client.link import Link
from isthmus.edge.client.site_answerer import SiteAnswerer
from isthmus.edge.cloud_link import open_link
from isthmus.edge.codecs.auto_codec import AutoCodec
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Batches, load_data
from isthmus.edge.sites.live_sites import DECISIONS, LiveSites, site_costs
from isthmus.edge.split_run import train_over
from isthmus.edge.training.evaluation import evaluate
from isthmus.protocol import messages as m
from isthmus.training.run_checkpoint import load

Log = list[dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("sited"), layers=5) as started:
        yield started


def whole_loss(runs: Runs, out: Path, config: TrainConfig) -> float:
    """The validation loss of the whole model, in one process, with a run's adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(runs.model, dtype=torch.float32)
    tuned = load_adapter(model, out / "adapter")
    data = load_data(config, load_tokenizer(runs.model))
    return evaluate(tuned, Batches(data.validation, config.batch, data.pad_id))


# Live sites -----------------------------------------------------------------------------------------------------------

STEPS = 150
REVIVED: dict[str, Any] = {
    "sites": "all",
    "site_policy": "kill-revive",
    "target_modules": "q_proj,v_proj,down_proj",
    "site_traffic": 0.5,
    "site_computation": 0.55,
    "steps": STEPS,
    "accumulate": 1,
    "save_every": 50,
    "keep_checkpoints": 9,
    "schedule": "constant",
}


@dataclass
class Asked:
    """What the cloud asked of sites in each step, by their names, and the numbers that crossed for them."""

    links: list[Link] = field(default_factory=list)
    names: dict[int, set[str]] = field(default_factory=dict)
    numbers: Counter[int] = field(default_factory=Counter)


@pytest.fixture(scope="module")
def revived(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Asked]:
    """An undisturbed run with kill-and-revive, and what crossed for its sites."""
    pytest.importorskip("tensorboard")
    out, asked = tmp_path_factory.mktemp("revived"), Asked()
    config = runs.config(out, report_to="tensorboard", **REVIVED)
    real = SiteAnswerer.answer

    def noting(self: SiteAnswerer, question: m.SiteQuestion) -> m.SiteAnswer:
        answer = real(self, question)
        names = {self.sites.sites[number].name for number in question.sites}
        asked.names.setdefault(question.id.step, set()).update(names)
        asked.numbers[question.id.step] += sum(
            torch.Size(each.shape).numel() for each in (*question.tensors, *answer.tensors)
        )
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteAnswerer, "answer", noting)
        with open_link(config) as link:
            train_over(link, config)
    return out, asked


def decisions(out: Path) -> Log:
    return [json.loads(line) for line in (out / DECISIONS).read_text().splitlines()]


def policy_state(out: Path, step: int = STEPS) -> dict[str, Any]:
    (state,) = load(out / f"checkpoint-{step}").entries["observers"]
    return dict(state)


def shares(state: dict[str, Any]) -> dict[str, float]:
    accounting = state["accounting"]
    return {name: value / accounting["always_on"][name] for name, value in accounting["spent"].items()}


@pytest.mark.long
def test_a_run_keeps_its_budgets(revived: tuple[Path, Asked]) -> None:
    spent = shares(policy_state(revived[0]))
    assert 0.3 < spent["traffic"] <= 0.5
    assert 0.3 < spent["computation"] <= 0.55


def test_dead_sites_are_not_asked_and_live_ones_cost_what_was_planned(runs: Runs, revived: tuple[Path, Asked]) -> None:
    out, asked = revived
    log = decisions(out)
    assert [line["step"] for line in log] == sorted(line["step"] for line in log)
    assert any(line["killed"] for line in log)
    assert any(line["revived"] for line in log[1:])
    every = {name for line in log for name in line["scores"]}
    assert len(every) == 9
    assert set().union(*(asked.names[step] for step in range(1, log[0]["step"] + 1))) == every  # all warm up
    for before, after in zip(log, [*log[1:], {"step": STEPS}], strict=True):
        for step in range(before["step"] + 1, after["step"] + 1):
            assert asked.names[step] == set(before["live"])
    # The accounts, which predict from shapes alone, are what has crossed.
    config = runs.config(out)
    with open_link(config) as link:
        model: Any = link.load_model()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=config_targets(), task_type="CAUSAL_LM"))
    costs = site_costs(model, model.find_sites())
    data = load_data(config, load_tokenizer(runs.model))
    batches = [batch for epoch in range(17) for batch in Batches(data.train, 2, data.pad_id, 0).epoch(epoch)]
    for step in range(1, STEPS):  # questions of the evaluation at the end are counted with the last one
        positions = batches[step - 1]["input_ids"].numel()
        assert asked.numbers[step] == costs.cost(asked.names[step]).traffic * positions, step


def config_targets() -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in (1, 2, 3) for name in _NAMES]


_NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def test_the_curves_show_what_is_live_and_what_it_has_cost(revived: tuple[Path, Asked]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, asked = revived
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    live = {event.step: event.value for event in events.Scalars("sites/live")}
    assert live == {step: len(names) for step, names in asked.names.items() if step}
    final = shares(policy_state(out))
    for name in ("traffic", "computation", "groups"):
        assert events.Scalars(f"sites/{name}")[-1].value == pytest.approx(final[name])


def test_the_adapter_is_the_live_sites_and_what_was_reported(runs: Runs, revived: tuple[Path, Asked]) -> None:
    out, _ = revived
    live = set(decisions(out)[-1]["live"])
    saved = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter(out)}
    own = {f"model.layers.{layer}.{name}" for layer in (0, 4) for name in _NAMES}
    assert saved == live | own
    assert set(json.loads((out / "adapter" / "adapter_config.json").read_text())["target_modules"]) == saved
    report = json.loads((out / "report.json").read_text())
    assert report["loss_after"] < report["loss_before"]
    assert whole_loss(runs, out, runs.config(out)) == pytest.approx(report["loss_after"], rel=1e-6)
    # The checkpoint goes on with all of them.
    names = " ".join(load(out / f"checkpoint-{STEPS}").parameters)
    assert all(name in names for name in decisions(out)[0]["scores"])


@pytest.mark.long
def test_dead_sites_that_are_leased_act_on_in_the_run_and_in_its_adapter(runs: Runs, tmp_path: Path) -> None:
    report = runs.train(tmp_path / "run", **{**REVIVED, "steps": 60}, lend_dead=True)
    trained = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter(tmp_path / "run")}
    log = decisions(tmp_path / "run")
    assert set(log[-1]["live"]) < set(log[-1]["scores"]) <= trained
    assert whole_loss(runs, tmp_path / "run", runs.config(tmp_path)) == pytest.approx(report.loss_after, rel=1e-6)


def test_dead_sites_stand_still(revived: tuple[Path, Asked]) -> None:
    out, asked = revived
    early, late = (load(out / f"checkpoint-{step}").parameters for step in (100, 150))
    for name in decisions(out)[0]["scores"]:
        moved = any(not torch.equal(early[each], late[each]) for each in early if f".{name}." in each)
        assert moved == any(name in asked.names[step] for step in range(101, 151)), name


@pytest.mark.long
def test_a_run_goes_on_in_the_middle_as_if_nothing_had_been(
    runs: Runs, revived: tuple[Path, Asked], tmp_path: Path
) -> None:
    out, _ = revived
    interrupted(runs, tmp_path, 63, **REVIVED)
    (tmp_path / DECISIONS).write_text("what came after the checkpoint\n")
    with pytest.raises(CheckpointError, match="total steps was 150 and is now 160"):
        runs.train(tmp_path, **{**REVIVED, "steps": 160, "resume": True})
    runs.train(tmp_path, resume=True, **REVIVED)
    assert_same_run(tmp_path, out)
    assert decisions(tmp_path) == decisions(out)
    assert policy_state(tmp_path) == policy_state(out)


@pytest.mark.parametrize("policy", ["random", "even"])
def test_a_fixed_choice_trains_its_sites_alone(runs: Runs, tmp_path: Path, policy: str) -> None:
    values = {**REVIVED, "site_policy": policy, "steps": 4, "accumulate": 2}
    report = runs.train(tmp_path / "straight", **values)
    state = policy_state(tmp_path / "straight", 4)
    assert 0 < shares(state)["traffic"] <= 0.5
    live = state["policy"]["live"]
    if policy == "even":
        assert all(name.endswith("v_proj") for name in live)
    saved = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter(tmp_path / "straight")}
    assert {name for name in saved if name.split(".")[2] in "123"} == set(live)
    config = runs.config(tmp_path / "straight")
    assert whole_loss(runs, tmp_path / "straight", config) == pytest.approx(report.loss_after, rel=1e-6)
    assert decisions(tmp_path / "straight") == []
    interrupted(runs, tmp_path / "broken", 3, **values)
    runs.train(tmp_path / "broken", resume=True, **values)
    assert_same_run(tmp_path / "broken", tmp_path / "straight")


@pytest.mark.long
def test_micro_batches_in_flight_and_live_sites_go_together(runs: Runs, tmp_path: Path) -> None:
    values = {**REVIVED, "steps": 40, "accumulate": 2, "batch": 1}
    for overlap in (1, 2):
        runs.train(tmp_path / str(overlap), overlap=overlap, **values)
    assert_same_run(tmp_path / "2", tmp_path / "1")
    assert decisions(tmp_path / "2") == decisions(tmp_path / "1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 10}, "a run of 10 steps is too short"),
        ({"site_traffic": 0.01}, "raise the budget"),
        ({"site_policy": "even", "site_computation": 0.001}, "allows not even one site"),
        ({"sites": "0"}, "layer 0 is not the cloud's"),
    ],
)
def test_sites_that_cannot_be_chosen_are_refused(
    runs: Runs, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        runs.train(tmp_path, **{**REVIVED, **values})
    assert not (tmp_path / "adapter").exists()


# Codecs that are chosen -----------------------------------------------------------------------------------------------


def test_the_chosen_codecs_are_those_of_every_link_and_are_told(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Link] = []
    used: dict[int, set[str]] = {}

    def noted(config: TrainConfig) -> Link:
        link = open_link(config)
        opened.append(link)
        link.observer = lambda question, phase: void(
            used.setdefault(link.step, set()).add(str(link.codecs)) if question in ("forward", "backward") else None
        )
        return link

    monkeypatch.setattr(cloud_link, "open_link", noted)
    every_step = {"save_every": 1, "keep_checkpoints": 9}
    config = runs.config(tmp_path, codec="auto:0.999", codec_every=2, overlap=2, sites="all", steps=5, **every_step)
    with noted(config) as link:
        train_over(link, config)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("codecs from step")]
    assert [line.split()[3] for line in said] == ["1", "3", "5"]
    chosen = [line.split(": ")[1].rsplit(", ", 2)[0] for line in said]
    assert chosen[0] != "fp32"
    assert len(opened) == 2
    for step, text in ((2, chosen[0]), (4, chosen[1])):  # steps that tried none
        assert used[step] == {text}
    assert [str(each.codecs) for each in opened] == [chosen[2]] * 2
    (state,) = load(tmp_path / "checkpoint-3").entries["observers"]
    assert (state["codecs"], state["chosen_at"]) == (chosen[1], 2)


def test_a_run_with_chosen_codecs_resumes_with_the_same_at_the_same_steps(runs: Runs, tmp_path: Path) -> None:
    values: dict[str, Any] = {"codec": "auto:0.9999", "codec_every": 2, "sites": "2", "dropout": 0.1, "steps": 5}
    runs.train(tmp_path / "straight", **values)
    interrupted(runs, tmp_path / "broken", 4, **values)
    runs.train(tmp_path / "broken", resume=True, **values)
    assert_same_run(tmp_path / "broken", tmp_path / "straight")
    ours, theirs = (load(tmp_path / name / "checkpoint-5").entries["observers"] for name in ("broken", "straight"))
    assert ours == theirs


@pytest.mark.parametrize("values", [{"dropout": 0.2, "sites": "all"}, {"optimizer": "lora-fa"}, {"optimizer": "mezo"}])
@pytest.mark.long
def test_a_choice_of_fp32_changes_no_bit(runs: Runs, tmp_path: Path, values: dict[str, Any]) -> None:
    runs.train(tmp_path / "fixed", **values)
    runs.train(tmp_path / "auto", codec="auto:0.99999999999999", codec_every=1, **values)
    (state,) = load(tmp_path / "auto" / "checkpoint-3").entries["observers"]
    assert state["codecs"] == "fp32"
    assert_same_run(tmp_path / "auto", tmp_path / "fixed")


def test_codecs_are_chosen_for_the_sites_of_the_coming_step(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for cls, name in ((LiveSites, "sites"), (AutoCodec, "codecs")):
        real = cls.before_step
        monkeypatch.setattr(cls, "before_step", lambda self, step, r=real, n=name: void(order.append(n), r(self, step)))
    runs.train(tmp_path, **{**REVIVED, "site_policy": "random", "steps": 1, "codec": "auto"})
    assert order == ["sites", "codecs"]


def void(*_: object) -> None:
    """Nothing."""
