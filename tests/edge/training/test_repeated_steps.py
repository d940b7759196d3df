"""Steps of a run under defences that are made again: what they show, and that it is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.train_runs import Runs, cloud_for_runs, interrupted
from support.models.small_training import IDENTITY, config, data
from support.models.tiny import tiny_checkpoint
from support.run_folders import assert_same_run
from torch import Tensor

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.edge import split_run
from isthmus.edge.cloud_link import open_link
from isthmus.edge.run_files.release_log import RELEASES_FILE
from isthmus.edge.training import defended_run
from isthmus.edge.training.defended_run import exposure_of
from isthmus.privacy.defences.accountant import Exposure, guarantee
from isthmus.privacy.defences.defence_options import read_defence
from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.recording.traffic import Traffic, read_traffic

NOISY = "gaussian:clip=1,sigma=0.5,gradient_clip=1e-3,gradient_sigma=0.5"
QUIET = "gaussian:clip=1,sigma=50,gradient_clip=1e-3,gradient_sigma=50"


def killed(runs: Runs, out: Path, step: int, **values: Any) -> None:
    """A run whose process ends in a step as by a power cut: nothing is saved."""

    def end(_question: str, _phase: str) -> None:
        if link.step == step:
            raise RuntimeError("killed")  # no error that the loop knows

    with open_link(config := runs.config(out, **values)) as link:
        link.observer = end
        with pytest.raises(RuntimeError, match="killed"):
            split_run.train_over(link, config)
    assert not list(out.glob("checkpoint-*"))


@contextmanager
def lying(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Clouds change their answers to forwards while the block runs."""

    @contextmanager
    def lied_to(model: Any, *rest: Any) -> Iterator[Any]:
        honest = model.remote_layers.span
        model.remote_layers.span = lambda *inputs: change(honest(*inputs))
        with defended_run.defended_run(model, *rest) as defended:
            yield defended

    with monkeypatch.context() as patch:
        patch.setattr(split_run, "defended_run", lied_to)
        yield


def shown(out: Path) -> dict[str, int]:
    """What has been counted of the only run of a folder."""
    (counts,) = json.loads((out / RELEASES_FILE).read_text()).values()
    return dict(counts)


@pytest.fixture
def exposures(monkeypatch: pytest.MonkeyPatch) -> list[Exposure]:
    """What runs have gone by when they said what they guarantee."""
    found: list[Exposure] = []

    def noted(*arguments: Any) -> Exposure:
        found.append(exposure_of(*arguments))
        return found[-1]

    monkeypatch.setattr(defended_run, "exposure_of", noted)
    return found


def gradients(recorded: Traffic, step: int) -> list[list[Tensor]]:
    """Those of a step, by the sessions that sent it, in the order of their calls."""
    found: dict[str, list[Tensor]] = {}
    for each in recorded.backwards:
        if each.step == step:
            found.setdefault(each.session, []).append(each.gradient)
    return [*found.values()]


def test_a_step_that_is_resumed_shows_nothing_without_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloud that answers it otherwise gets other noise; one that answers the same gets the same messages."""
    (tmp_path / "cloud").mkdir()
    (tmp_path / "recording").mkdir()
    clip, deviation = 1e-3, 5e-2
    with cloud_for_runs(tmp_path / "cloud", recorder=Recorder(tmp_path / "recording", 64 << 20)) as runs:
        killed(runs, tmp_path / "out", 2, defence=[QUIET])
        killed(runs, tmp_path / "out", 2, defence=[QUIET], resume=True)
        with lying(monkeypatch, lambda answer: answer + torch.linspace(-1, 1, answer.shape[-1])):
            killed(runs, tmp_path / "out", 2, defence=[QUIET], resume=True)
    first, again, otherwise = gradients(read_traffic(tmp_path / "recording"), 1)
    assert len(first) == 4
    assert all(map(torch.equal, first, again))
    for one, other in zip(first, otherwise, strict=True):
        difference = (one - other)[one.abs().sum(-1) > 0]  # padding is sent as zeros
        assert difference.std() == pytest.approx(2**0.5 * deviation, rel=0.15)
        assert difference.norm(dim=-1).min() > 100 * clip  # without noise, it is at most 2 * clip


def test_a_step_that_is_begun_again_in_a_process_goes_back_and_counts_again(tmp_path: Path) -> None:
    said: list[str] = []
    sent: list[Tensor] = []
    sums: list[Tensor] = []
    added = 0.0

    def span(hidden: Tensor, *_: Tensor | None) -> Tensor:
        assert said[-1].startswith("differential privacy")  # before anything is sent
        sent.append(hidden.detach().clone())
        return hidden + added

    model = load_edge_parts(tiny_checkpoint("llama", tmp_path / "model"), SplitPlan.parse("2:2", 6), span)
    options = config(tmp_path, dropout=0.0, defence=[QUIET, "dp-sgd:clip=1,sigma=1"])
    with defended_run.defended_run(model, model, options, IDENTITY, data(), None, said.append) as defended:
        assert defended is not None
        for step, added in ((1, 0.0), (1, 0.0), (1, 1.0), (2, 1.0), (4, 1.0)):  # of three steps in each epoch
            defended.before_step(step)
            private = defended.private_gradients()
            assert private is not None
            model(torch.arange(5, 10)[None], use_cache=False)
            private.add([torch.zeros(9)])
            sums += private.mean()
            if added:
                defended.after_step(step)
    assert torch.equal(sent[0], sent[1])
    assert torch.equal(sent[0], sent[2])
    assert torch.equal(sums[0], sums[1])
    # The control: other answers, and the next step, have other noise.
    assert not torch.equal(sums[0], sums[2])
    assert not torch.equal(sent[0], sent[3])
    assert [line.startswith("differential privacy") for line in said] == [False, False, True]  # said once
    # Step 1 three times, step 2 in the same epoch, and step 4, which does not follow on it.
    assert shown(tmp_path) == {"epochs": 4, "evaluations": 0}


def test_a_run_that_was_killed_goes_on_bit_for_bit(runs: Runs, tmp_path: Path) -> None:
    """From the beginning, and from a checkpoint that is older than its last step."""
    whole, part, key = tmp_path / "whole", tmp_path / "part", tmp_path / "key"
    key.write_text("ab" * 32)
    options: dict[str, Any] = {"defence": [NOISY, "dp-sgd:clip=1,sigma=0.1"], "defence_key": key, "eval_every": 2}
    runs.train(whole, **options)
    killed(runs, part, 3, **options)
    interrupted(runs, part, 2, resume=True, **options)
    runs.train(part, resume=True, **options)
    assert_same_run(part, whole)


def test_epsilon_grows_with_each_resume(runs: Runs, tmp_path: Path, exposures: list[Exposure]) -> None:
    whole = runs.train(tmp_path / "whole", defence=[QUIET])
    assert whole.epsilon is not None
    planned = exposures[-1]
    assert (planned.forwards, planned.backwards, planned.steps, planned.held_out) == (1, 1, 1, 2)
    assert shown(tmp_path / "whole") == {"epochs": 1, "evaluations": 2}  # the control: as planned

    out = tmp_path / "out"
    interrupted(runs, out, 2, defence=[QUIET])
    assert (out / RELEASES_FILE).stat().st_mode & 0o777 == 0o600
    interrupted(runs, out, 3, defence=[QUIET], resume=True)
    report = runs.train(out, defence=[QUIET], resume=True)
    assert shown(out) == {"epochs": 3, "evaluations": 2}
    found = exposures[-1]
    assert (found.forwards, found.backwards, found.steps, found.held_out) == (3, 3, 3, 2)
    said = guarantee([read_defence(QUIET)], found)
    assert said is not None
    assert report.epsilon == said.epsilon
    assert report.epsilon > whole.epsilon


def test_epsilon_grows_where_a_process_died_before_a_checkpoint(
    runs: Runs, tmp_path: Path, exposures: list[Exposure]
) -> None:
    """By all the epochs that it had begun. It grows without --resume, too: the folder's key is the same."""
    once = runs.train(tmp_path / "whole", steps=7, defence=[QUIET]).epsilon
    assert once is not None
    out = tmp_path / "out"
    killed(runs, out, 7, steps=7, defence=[QUIET])
    assert shown(out) == {"epochs": 3, "evaluations": 1}
    killed(runs, out, 1, steps=7, defence=[QUIET])
    assert shown(out) == {"epochs": 4, "evaluations": 2}
    report = runs.train(out, steps=7, defence=[QUIET], resume=True)
    assert (exposures[-1].forwards, exposures[-1].held_out) == (7, 4)
    assert shown(out) == {"epochs": 7, "evaluations": 4}
    assert (report.epsilon or 0) > once


def test_evaluations_at_each_new_end_are_counted(tmp_path: Path, exposures: list[Exposure]) -> None:
    """A run with a constant learning rate may be made longer, and each process ends with an evaluation."""
    (tmp_path / "cloud").mkdir()
    (tmp_path / "recording").mkdir()
    noisy: dict[str, Any] = {"schedule": "constant", "accumulate": 1, "defence": ["gaussian:clip=1,sigma=50"]}
    with cloud_for_runs(tmp_path / "cloud", "0:2", recorder=Recorder(tmp_path / "recording", 64 << 20)) as runs:
        for steps in (1, 2, 3):
            runs.train(tmp_path / "out", steps=steps, resume=steps > 1, **noisy)
    assert exposures[-1].held_out == 4
    sent = read_traffic(tmp_path / "recording").forwards
    # Nothing is trained below the cut, so that all forwards look alike. Those of evaluations belong to no step of
    # their own: two of them, of one micro-batch each, surround the first step, and one follows on each of the others.
    assert len({each.hidden.numpy().tobytes() for each in sent}) == len(sent) == 3 + 4


def test_a_run_that_has_ended_says_what_was_sent(runs: Runs, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 1, "validation_split": 0, "defence": [QUIET]}
    killed(runs, tmp_path / "out", 1, **options)
    report = runs.train(tmp_path / "out", resume=True, **options)
    again = runs.train(tmp_path / "out", resume=True, **options)
    assert shown(tmp_path / "out") == {"epochs": 2, "evaluations": 0}
    assert again.epsilon == report.epsilon is not None


def test_what_sends_nothing_counts_for_nothing_and_other_runs_for_themselves(
    runs: Runs, tmp_path: Path, exposures: list[Exposure]
) -> None:
    out = tmp_path / "out"
    killed(runs, out, 1, defence=[QUIET])
    killed(runs, out, 1, defence=[QUIET], learning_rate=1e-3)
    interrupted(runs, out, 2, defence=[QUIET])
    before = (out / RELEASES_FILE).read_text()
    assert sorted(each["epochs"] for each in json.loads(before).values()) == [1, 2]
    with pytest.raises(ConfigError, match="holds a run"):
        runs.train(out, defence=[QUIET])
    with pytest.raises(CheckpointError, match="learning_rate"):
        runs.train(out, defence=[QUIET], learning_rate=1e-3, resume=True)
    assert (out / RELEASES_FILE).read_text() == before
    runs.train(out, defence=[QUIET], resume=True)
    assert exposures[-1].forwards == 3


def test_a_resume_cannot_forget_what_was_sent(runs: Runs, tmp_path: Path) -> None:
    interrupted(runs, tmp_path / "out", 3, defence=[QUIET])
    (tmp_path / "out" / RELEASES_FILE).rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=f"{RELEASES_FILE}, which counts what it has sent, is missing"):
        runs.train(tmp_path / "out", defence=[QUIET], resume=True)
    (tmp_path / "aside").rename(tmp_path / "out" / RELEASES_FILE)
    runs.train(tmp_path / "out", defence=[QUIET], resume=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": {"epoch": 1}}', '{"a": {"epochs": -1}}', '{"a": 1}'])
def test_a_damaged_count_ends_the_run_before_anything_is_sent(runs: Runs, tmp_path: Path, text: str) -> None:
    (tmp_path / RELEASES_FILE).write_text(text)
    with pytest.raises(ConfigError, match=f"{RELEASES_FILE}, which counts what the run has sent, cannot be read"):
        runs.train(tmp_path, defence=[QUIET])
    assert (tmp_path / RELEASES_FILE).read_text() == text
