"""One cloud of the measurement of audits, honest or lying: its calls, who computes them again, and what is judged."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any
from zlib import crc32

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.checkpoints.weight_quantization import quantizer_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import FrozenSpan, load_span
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.session.served_model import Served
from isthmus.common.torch_threads import torch_threads
from isthmus.edge.audit.audit_run import AuditReport, OtherAnswer, audit, usual
from isthmus.edge.audit.replay import LocalReplayer
from isthmus.edge.witness.audit_sample import AUDIT_FOLDER
from isthmus.experiments.harness.rig_settings import AuditSettings
from isthmus.experiments.rigs.lying.audit_cost import cost_of
from isthmus.experiments.rigs.lying.drawn_audits import drawn_audits
from isthmus.experiments.rigs.lying.forgeries import forgeries_of
from isthmus.experiments.rigs.lying.lies import KINDS, LyingExecutor
from isthmus.experiments.rigs.lying.lying_cloud import TENANTS, Keys, served
from isthmus.experiments.rigs.lying.tenants import Bench, Remembered, Work, call, replay
from isthmus.privacy.transcript.detection import share_interval
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, read_transcript
from isthmus.protocol.limits import SIGN_EVERY

QUANTIZED = ("none", "int8")
CHEAPER = {"none": "none", "int8": "nf4"}
"""What a lying cloud computes in instead: bf16 where there are no quantized weights, nf4 in the place of int8."""
ELSEWHERE = "eager"
"""The attention of the worker with other numerics."""
TRAINED = ("stale_adapter",)
"""Lies that need a run that trains, at one length."""
Calls = set[tuple[str, int, str]]
AT_A_LIE = 2
"""Tenants of a lying cloud; an honest one has all of them."""
LONGER_SHARE = 0.5
"""Of the calls that a cloud alters whose sequences are longer: there are few of them, half the tokens of the others."""


class AuditedCloud:
    """The parts of the measurement with one quantization; the model is loaded for the first that is made.

    Args:
        settings: The measurement's.
        folder: For runs and keys.
        quantize: Of the weights.
    """

    def __init__(self, settings: AuditSettings, folder: Path, quantize: str) -> None:
        self._settings, self._folder, self._quantize = settings, folder, quantize

    @cached_property
    def _bench(self) -> Bench:
        checkpoint = resolve(self._settings.model)
        return Bench(self._settings, self._folder, checkpoint, self._keys(f"keys-{self._quantize}"))

    def _keys(self, name: str) -> Keys:
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run's
        return Keys(folder)

    @cached_property
    def _model(self) -> Served:
        settings, bench = self._settings, self._bench
        return served(
            bench.checkpoint, settings.edge_layers, bench.keys, quantize=self._quantize, threads=settings.threads
        )

    @cached_property
    def _elsewhere(self) -> Executor:
        """The same layers with other numerics."""
        honest = self._model.executor
        span = self._span(self._quantize, ELSEWHERE)
        return Executor(SiteHost(span), honest.dtype, honest.cache.budget, honest.compute_bytes)

    @cached_property
    def _cheaper(self) -> FrozenSpan | None:
        return None if CHEAPER[self._quantize] == "none" else self._span(CHEAPER[self._quantize], None)

    def _span(self, quantize: str, attention: str | None) -> FrozenSpan:
        checkpoint, dtype = self._bench.checkpoint, self._model.executor.dtype
        plan = SplitPlan.parse(self._settings.edge_layers, checkpoint.config.num_hidden_layers)
        return load_span(
            checkpoint, plan.cloud, dtype=dtype, attn_implementation=attention, quantizer=quantizer_of(quantize)
        )

    def threshold(self, length: int) -> dict[str, Any]:
        """How far honest answers of a length are apart where the numerics differ."""
        settings = self._settings
        calls = max(2, settings.measured * settings.seq // length)  # about as many tokens for each length
        work = Work(f"threshold-{self._quantize}-{length}", len(TENANTS), calls, length, fixed=length > settings.seq)
        runs = call(self._bench, self._model, LyingExecutor(self._model.executor, None, 0.0), work).runs
        found = [report for report, _ in replay(self._bench, self._model, runs, self._elsewhere, threshold=math.inf)]
        return {
            "quantize": self._quantize,
            "seq": length,
            "calls": sum(report.replayed for report in found),
            "same_bits": sum(report.identical for report in found),
            "threshold": usual(chain.from_iterable(report.distances for report in found)),
        }

    def honest(self, threshold: float, *, batching: bool) -> dict[str, Any]:
        """An honest cloud: false alarms."""
        settings, bench, model = self._settings, self._bench, self._model
        each = math.ceil(settings.honest / (2 * len(QUANTIZED) * len(TENANTS) * 2)) * 2  # a forward and its backward
        name = f"honest-{self._quantize}-{'batching' if batching else 'alone'}"
        work = Work(name, len(TENANTS), each, settings.seq, batching=batching, breaks=True)
        called = call(bench, model, LyingExecutor(model.executor, None, 0.0), work)
        reports = [report for report, _ in replay(bench, model, called.runs, batching=batching)]
        found = replay(bench, model, called.runs, self._elsewhere, threshold=threshold)
        there = [report for report, _ in found]
        return {
            "quantize": self._quantize,
            "batching": batching,
            "calls": sum(each.replayed for each in reports),
            "calls_per_pass": called.shared,
            "unsigned": sum(each.unsigned for each in reports),
            # By the same numerics, an answer of which nobody can say anything is as wrong as one that is accused.
            "false_alarms": sum(len(each.lies) + each.undecided for each in reports),
            "elsewhere_calls": sum(each.replayed for each in there),
            "elsewhere_alarms": sum(len(each.lies) for each in there),
            "elsewhere_explained": sum(len(each.explained) for each in there),
            "elsewhere_largest_ratio": max(chain.from_iterable(each.rounding_ratios for each in there), default=0.0),
            "again": self._again_without_batching(called.runs, threshold, here=not batching),
        }

    def _again_without_batching(self, runs: Sequence[Path], threshold: float, *, here: bool) -> dict[str, Any]:
        """What is made of an honest cloud's calls, some of each run, without batching: here, or by another worker."""
        settings, bench, some = self._settings, self._bench, self._settings.measured
        if here:
            session = read_transcript(runs[0] / TRANSCRIPT_FILE).sessions[0].session
            local = Remembered(LocalReplayer(bench.checkpoint.folder, session, settings.threads))
            with torch_threads(settings.threads):
                judged = [_audited(run, local, some, threshold) for run in runs]
            replayers = [local] * len(runs)
        else:
            found = replay(bench, self._model, runs, threshold=threshold, batching=False, calls=some)
            judged, replayers = [report for report, _ in found], [replayer for _, replayer in found]
        bare = [_audited(run, replayer, some, None) for run, replayer in zip(runs, replayers, strict=True)]
        return {
            "by": "this process" if here else "a worker without batching",
            "numerics": sorted({pair for report in bare for pair in report.numerics}),
            "calls": sum(report.replayed for report in bare),
            "same_bits": sum(report.identical for report in bare),
            "undecided": sum(report.undecided for report in bare),
            "alarms": sum(len(report.lies) for report in judged) + sum(report.undecided for report in bare if here),
        }

    def lie(self, kind: str, threshold: float) -> dict[str, Any]:
        """A lying cloud: what replays find, and how often audits of `sample` calls meet a lie."""
        settings, leased = self._settings, kind == "stale_adapter"
        executor = LyingExecutor(self._model.executor, kind, settings.share, cheaper=self._cheaper)
        work = Work(f"{kind}-{self._quantize}", AT_A_LIE, settings.calls, settings.seq, leased=leased, breaks=True)
        judged = self._judge(executor, work, threshold)
        apart = [lie.distance for report, _ in judged.found for lie in report.lies if lie.distance is not None]
        # The first tenant is one that every kind lies to. It audits its own run.
        victim, (report, replayer) = judged.runs[0], judged.found[0]
        sample, asked = min(settings.sample, report.replayed), settings.trials
        drawn = drawn_audits(victim, replayer, sample, asked, crc32(work.name.encode()))
        predicted = drawn.predicted(len(judged.altered[0]))
        # As if the cloud altered its largest calls, of which a sampler might keep fewer than it should.
        largest = drawn.by_size[: math.ceil(settings.share * len(drawn.by_size))]
        met_largest, predicted_largest = drawn.meeting(largest), drawn.predicted(len(largest))
        kept = sorted({len(each) for each in drawn.kept})
        as_predicted = fits(drawn.caught, asked, predicted) and fits(met_largest, asked, predicted_largest)
        return {
            "kind": kind,
            "quantize": self._quantize,
            **judged.counts(),
            "elsewhere_least_ratio": judged.least_ratio(),
            "least_distance": min(apart, default=None),
            "sample": sample,
            "kept": kept,
            "asked": asked,
            "caught": drawn.caught,
            "caught_interval": share_interval(drawn.caught, asked),
            "predicted": predicted,
            "largest": len(largest),
            "met_largest": met_largest,
            "predicted_largest": predicted_largest,
            "as_predicted": as_predicted and kept == [sample],
        }

    def longer(self, length: int, threshold: float) -> dict[str, Any]:
        """Honest and lying clouds whose sequences have this many tokens, by the length's own threshold."""
        settings, model = self._settings, self._model.executor
        honest = LyingExecutor(model, None, 0.0)
        kinds = [kind for kind in KINDS if kind not in TRAINED]
        liars = [LyingExecutor(model, kind, LONGER_SHARE, cheaper=self._cheaper) for kind in kinds]
        counts: Counter[str] = Counter()
        for executor in (honest, *liars):
            tenants, calls = (AT_A_LIE, settings.calls) if executor.kind else (len(TENANTS), settings.measured)
            name = f"longer-{executor.kind or 'honest'}-{self._quantize}-{length}"
            work = Work(name, tenants, max(4, calls * settings.seq // (2 * length)), length, fixed=True)
            counts.update(self._judge(executor, work, threshold).counts())
        return {"quantize": self._quantize, "seq": length, "threshold": threshold, **counts}

    def _judge(self, executor: LyingExecutor, work: Work, threshold: float) -> _Judged:
        """Have tenants call a cloud, and all their calls computed again by its like, and elsewhere."""
        runs = call(self._bench, self._model, executor, work).runs
        found = replay(self._bench, self._model, runs)
        there = replay(self._bench, self._model, runs, self._elsewhere, threshold=threshold)
        told = {(session.hex(), call, question) for session, call, question in executor.altered}
        altered = [_crossed(run) & told for run in runs]
        unsigned = set(chain.from_iterable(_crossed(run, unsigned=True) & told for run in runs))
        return _Judged(runs, found, [report for report, _ in there], altered, unsigned, told)

    def forgeries(self) -> dict[str, Any]:
        """What is found in forged transcripts of an honest run, which the cloud has signed twice."""
        work = Work("forged", 1, max(self._settings.calls, SIGN_EVERY + 4), self._settings.seq)
        (run,) = call(self._bench, self._model, LyingExecutor(self._model.executor, None, 0.0), work).runs
        return {"rows": forgeries_of(run, self._bench.keys, self._keys("keys-stranger"))}

    def cost(self) -> dict[str, Any]:
        """What audits cost; a replay's time is of one tenant's calls after each other, as `edge audit` asks them."""
        work = Work("cost-replay", 1, self._settings.calls, self._settings.seq)
        called = call(self._bench, self._model, LyingExecutor(self._model.executor, None, 0.0), work)
        started = time.perf_counter()
        ((report, _),) = replay(self._bench, self._model, called.runs)
        replayed = (time.perf_counter() - started) / report.replayed
        return {**cost_of(self._bench, self._model), "call_seconds": called.seconds, "replay_seconds": replayed}


@dataclass(frozen=True, slots=True)
class _Judged:
    """A cloud's calls, by their session, number and kind.

    Attributes:
        runs: Of each tenant.
        found: What replays by the cloud's like found of each, and what has replayed.
        there: What replays with other numerics found.
        altered: Of each run, what the cloud altered and the tenant got.
        unsigned: Of all of that, what the cloud has not signed.
        told: All that the cloud altered.
    """

    runs: Sequence[Path]
    found: Sequence[tuple[AuditReport, Remembered]]
    there: Sequence[AuditReport]
    altered: Sequence[Calls]
    unsigned: Calls
    told: Calls

    def counts(self) -> dict[str, int]:
        """Calls of each kind."""
        here = [lie for report, _ in self.found for lie in report.lies]
        accused, elsewhere = _calls_of(here), _calls_of(lie for report in self.there for lie in report.lies)
        explained = _calls_of(each for report in self.there for each in report.explained)
        return {
            "calls": sum(report.replayed for report, _ in self.found),
            "altered": sum(map(len, self.altered)),
            "detected": len(accused & self.told),
            "altered_unsigned": len(self.unsigned),
            "detected_unsigned": len(_calls_of(lie for lie in here if not lie.signed) & self.unsigned),
            "false_alarms": len(accused - self.told),
            "elsewhere_found": len(elsewhere & self.told),
            "elsewhere_alarms": len(elsewhere - self.told),
            "elsewhere_explained": len(explained - self.told),
            "elsewhere_explained_lies": len(explained & self.told),
        }

    def least_ratio(self) -> float | None:
        """Of altered answers above the threshold elsewhere, the smallest ratio to what rounding does."""
        others = [each for report in self.there for each in (*report.lies, *report.explained)]
        ratios = [each.rounding_ratio for each in others if not _calls_of([each]).isdisjoint(self.told)]
        return min((each for each in ratios if each is not None), default=None)


def _calls_of(answers: Iterable[OtherAnswer]) -> Calls:
    return {(each.session, each.call, each.question) for each in answers}


def _audited(run: Path, replayer: Remembered, calls: int, threshold: float | None) -> AuditReport:
    return audit(read_transcript(run / TRANSCRIPT_FILE), run / AUDIT_FOLDER, replayer, calls, threshold)


def fits(met: int, asked: int, predicted: float) -> bool:
    """Whether so many of the audits are what a probability predicts, within three standard deviations and one audit."""
    return abs(met - asked * predicted) <= 3 * math.sqrt(asked * predicted * (1 - predicted)) + 1


def _crossed(run: Path, *, unsigned: bool = False) -> Calls:
    """The calls of a run, or those of them that the cloud has not signed: session, number, kind."""
    return {
        (each.session.id.hex(), exchange.call.call, exchange.question)
        for each in read_transcript(run / TRANSCRIPT_FILE).sessions
        for exchange in each.exchanges[each.signed if unsigned else 0 :]
    }
