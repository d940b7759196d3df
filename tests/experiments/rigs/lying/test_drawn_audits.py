"""Audits of samples that are drawn anew: the formula holds, and not for a sampler that prefers some calls."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.edge.witness.audit_sample import AUDIT_FOLDER, AuditSample, packed, read_sample
from isthmus.experiments.harness.rig_settings import AuditSettings
from isthmus.experiments.rigs.lying import drawn_audits as module
from isthmus.experiments.rigs.lying.audited_cloud import AuditedCloud, fits
from isthmus.experiments.rigs.lying.drawn_audits import DrawnAudits, drawn_audits
from isthmus.experiments.rigs.lying.lies import LyingExecutor
from isthmus.experiments.rigs.lying.tenants import Remembered, Work, call, replay
from isthmus.privacy.transcript.detection import probability_of_catching

CALLS, SAMPLE, TRIALS, LARGEST = 16, 3, 80, 4
LiedTo = tuple[Path, Remembered, int]


@pytest.fixture(scope="module")
def lied_to(tmp_path_factory: pytest.TempPathFactory) -> LiedTo:
    """A run of one tenant, who has replayed it, and how many of its calls were altered."""
    folder = tmp_path_factory.mktemp("lied_to")
    settings = AuditSettings(model=str(tiny_checkpoint("llama", folder / "llama")), edge_layers="1:1", threads=1)
    cloud = AuditedCloud(settings, folder, "none")
    liar = LyingExecutor(cloud._model.executor, "noise", 0.25)
    (run,) = call(cloud._bench, cloud._model, liar, Work("noise", 1, CALLS, 32, breaks=True)).runs
    ((report, replayer),) = replay(cloud._bench, cloud._model, [run])
    assert report.replayed == CALLS
    return run, replayer, len(report.lies)


def drawn(lied_to: LiedTo, seed: int = 0) -> tuple[DrawnAudits, bool, bool]:
    """The audits; whether they caught the cloud as predicted; whether they met its largest calls as predicted."""
    run, replayer, altered = lied_to
    found = drawn_audits(run, replayer, SAMPLE, TRIALS, seed)
    met = found.meeting(found.by_size[:LARGEST])
    return found, fits(found.caught, TRIALS, found.predicted(altered)), fits(met, TRIALS, found.predicted(LARGEST))


def test_the_sampler_of_runs_catches_as_often_as_predicted(lied_to: LiedTo) -> None:
    run, _, altered = lied_to
    found, caught, met = drawn(lied_to)
    assert (caught, met, {len(each) for each in found.kept}) == (True, True, {SAMPLE})
    assert len(set(found.kept)) > TRIALS / 2  # each audit has a sample of its own
    assert found.predicted(altered) == pytest.approx(probability_of_catching(CALLS, altered, SAMPLE))
    assert drawn(lied_to)[0] == found  # by the seed
    assert drawn(lied_to, 1)[0].kept != found.kept
    sizes = {(each.session, each.exchange): len(packed(each.question)) for each in read_sample(run / AUDIT_FOLDER)}
    assert len(set(sizes.values())) > 4
    assert sizes[found.by_size[0]] == max(sizes.values())
    assert {each.name for each in run.iterdir() if each.is_dir()} == {AUDIT_FOLDER}


class RoomDecides(AuditSample):
    """Keeps as many as have room by their own sizes, as an earlier release did."""

    def _drop(self) -> None:
        while sum(path.stat().st_size for _, path in self._kept) > self._budget:
            negated, path = heapq.heappop(self._kept)
            self._state.limit = -negated
            path.unlink()


class NoneLarge(AuditSample):
    """Leaves out calls that are larger than most."""

    def offer(self, *given: Any) -> None:
        if len(packed(given[2])) < self._budget / SAMPLE / 4:
            super().offer(*given)


def first(folder: Path, budget: int, random: Callable[[int], bytes]) -> AuditSample:
    """Keeps the first calls."""
    numbers = itertools.count()
    return AuditSample(folder, budget, random=lambda count: next(numbers).to_bytes(count))


def test_a_sampler_that_room_decides_for_keeps_now_more_and_now_fewer(
    lied_to: LiedTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AuditSample", RoomDecides)
    assert len({len(each) for each in drawn(lied_to)[0].kept}) > 1


@pytest.mark.parametrize("sampler", [NoneLarge, first])
def test_a_sampler_that_prefers_some_calls_is_not_as_predicted(
    lied_to: LiedTo, monkeypatch: pytest.MonkeyPatch, sampler: Any
) -> None:
    monkeypatch.setattr(module, "AuditSample", sampler)
    _, caught, met = drawn(lied_to)
    assert not (caught and met)
