"""Audits of one run, each of a sample that is drawn anew, by the sampler that runs have.

The run has kept all of its calls. They are offered again, in its order, to an `AuditSample` that is as empty as at a
run's begin and has room for few of them. The calls have different sizes, so that a sampler that prefers small ones, or
early ones, would be found out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from isthmus.edge.audit.audit_run import audit
from isthmus.edge.audit.replay import Replayer
from isthmus.edge.witness.audit_sample import AUDIT_FOLDER, AuditSample, SampledCall, packed, read_sample
from isthmus.privacy.transcript.detection import probability_of_catching
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, read_transcript

AT_A_TIME = 8
"""Audits; most of their time they wait until the disk has what they keep: with 4 to 16 at a time one took 0.06 to
0.13 s, alone 0.42 s."""
Name = tuple[bytes, int]
"""Of a call: its session's id, and its number there."""


@dataclass(frozen=True, slots=True)
class DrawnAudits:
    """What became of them.

    Attributes:
        by_size: All calls of the run, the largest first.
        kept: What each sample has kept.
        caught: How many audits have found a lie.
    """

    by_size: tuple[Name, ...]
    kept: tuple[frozenset[Name], ...]
    caught: int

    def predicted(self, altered: int) -> float:
        """The share of audits that meet one of so many calls, by the formula for what each sample has kept."""
        chances = [probability_of_catching(len(self.by_size), altered, len(kept)) for kept in self.kept]
        return math.fsum(chances) / len(chances)

    def meeting(self, calls: Sequence[Name]) -> int:
        """How many samples have one of these calls or more."""
        return sum(not kept.isdisjoint(calls) for kept in self.kept)


def drawn_audits(run: Path, replayer: Replayer, calls: int, trials: int, seed: int) -> DrawnAudits:
    """Audit a run many times.

    Args:
        run: Its folder, with its transcript and all of its calls.
        replayer: Who computes; asked by several threads.
        calls: How many there is room for, were all as large as the run's largest.
        trials: How many audits.
        seed: Of the samples' random numbers.
    """
    transcript = read_transcript(run / TRANSCRIPT_FILE)
    places = {each.session.id: place for place, each in enumerate(transcript.sessions)}
    recorded = sorted(read_sample(run / AUDIT_FOLDER), key=lambda call: (places[call.session], call.exchange))
    adapters = {_name(call): [packed(each) for each in call.adapters] for call in recorded}
    sizes = {
        _name(call): sum(map(len, (*adapters[_name(call)], packed(call.question), packed(call.answer))))
        for call in recorded
    }
    budget = calls * max(sizes.values())

    def one(trial: int) -> tuple[frozenset[Name], bool]:
        draw = random.Random(f"{seed} {trial}")  # noqa: S311  # is no secret, and the same each time
        with TemporaryDirectory(dir=run) as folder:
            kept = Path(folder, AUDIT_FOLDER)
            sample = AuditSample(kept, budget, random=draw.randbytes)
            for call in recorded:
                name = _name(call)
                sample.offer(*name, call.question, call.answer, lambda message: message, adapters[name])
            return frozenset(map(_name, read_sample(kept))), bool(audit(transcript, kept, replayer).lies)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        kept, caught = zip(*pool.map(one, range(trials)), strict=True)
    by_size = tuple(sorted(sizes, key=lambda name: sizes[name], reverse=True))
    return DrawnAudits(by_size, kept, sum(caught))


def _name(call: SampledCall) -> Name:
    return call.session, call.exchange
