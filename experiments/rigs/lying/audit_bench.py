"""Whether audits catch lying clouds, how often they accuse honest ones, and what they cost.

Two tenants call a cloud at the same time, with transcripts and samples. Every call is then computed again by another
worker, so it is known of each whether a replay would have caught it. An audit of m calls is a random draw of m of them:
many draws give the share that caught the cloud, which is compared with the formula.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.backbone.checkpoints.sources import Checkpoint, resolve
from isthmus.backbone.checkpoints.weight_quantization import quantizer_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import FrozenSpan, load_span
from isthmus.cloud.session.served_model import Served
from isthmus.edge.audit.audit_run import AuditReport, audit
from isthmus.edge.audit.replay import CloudReplayer, PreciseReplayer, Replayer
from isthmus.edge.client.link import Link, connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft
from isthmus.edge.witness.audit_sample import AUDIT_FOLDER, AuditSample
from isthmus.experiments.harness.launch import stderr_progress
from isthmus.experiments.harness.rig_settings import AuditSettings
from isthmus.experiments.harness.single_process import random_batch, stepper
from isthmus.experiments.rigs.lying.lies import KINDS, LyingExecutor
from isthmus.experiments.rigs.lying.lying_cloud import Keys, ThreadCloud, served
from isthmus.privacy.transcript.detection import probability_of_catching
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, TranscriptLog, read_transcript
from isthmus.protocol.limits import GIB, MIB

QUANTIZED = ("none", "int8")
CHEAPER = {"none": "none", "int8": "nf4"}
"""What a lying cloud computes in instead: bf16 where there are no quantized weights, nf4 in the place of int8."""
MARGIN = 4.0
"""A threshold for other numerics is so many times the largest distance of honest answers that it was measured on."""
SAMPLE_MIB = 64
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Bench:
    """What all parts of the measurement share."""

    settings: AuditSettings
    folder: Path
    checkpoint: Checkpoint
    keys: Keys


def run_audit_bench(settings: AuditSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `lies`: a row for each kind and quantization; `honest_clouds`: one for each quantization, with batching and
        without; `elsewhere`: how the same answers fare where the replay has other numerics; `cost`: a step's time with
        what is noted, over that without. `all_caught`, `no_false_alarms` and `as_predicted` sum them up.
    """
    torch.set_num_threads(settings.threads)
    bench = Bench(settings, folder, resolve(settings.model), Keys(folder))
    lies: list[dict[str, Any]] = []
    honest: list[dict[str, Any]] = []
    with stderr_progress("clouds", len(QUANTIZED) * (len(KINDS) + 2) + 1) as advance:
        for quantize in QUANTIZED:
            model = served(
                bench.checkpoint, settings.edge_layers, bench.keys, quantize=quantize, threads=settings.threads
            )
            precise = _Precise(bench, model) if quantize == "none" else None
            for batching in (True, False):
                honest.append(_honest(bench, model, quantize, precise, batching=batching))
                advance()
            cheaper = None if quantize == "none" else _span(bench, model, CHEAPER[quantize])
            for kind in KINDS:
                lies.append(_lie(bench, model, quantize, kind, precise, cheaper))
                advance()
            if precise is not None:
                elsewhere = precise.to_json()
                cost = _cost(bench, model)
                advance()
    return {
        "all_caught": all(row["detected"] == row["altered"] > 0 for row in lies),
        "no_false_alarms": all(row["false_alarms"] == 0 for row in (*lies, *honest)),
        "as_predicted": all(row["as_predicted"] for row in lies),
        "lies": lies,
        "honest_clouds": honest,
        "honest_calls": sum(row["calls"] for row in honest),
        "elsewhere": elsewhere,
        "cost": cost,
        **asdict(settings),
    }


def show(result: dict[str, Any]) -> None:
    """Print a result for people."""
    for row in result["lies"]:
        met = f"caught {row['caught']}/{row['asked']}, predicted {row['predicted']:.3f}"
        found = f"{row['detected']} of {row['altered']} altered calls, {row['false_alarms']} false alarms"
        print(f"{row['kind']:15} {row['quantize']:5} {met}; {found}")
    for row in result["honest_clouds"]:
        how = "batching" if row["batching"] else "alone"
        print(f"{'honest':15} {row['quantize']:5} {how}: {row['false_alarms']} false alarms in {row['calls']} calls")
    print("step time, over that without: " + ", ".join(f"{name} {value:.3f}" for name, value in result["cost"].items()))


class _Precise:
    """The same calls judged by a replay with other numerics: fp64."""

    def __init__(self, bench: Bench, model: Served) -> None:
        self._bench, self._model = bench, model
        self._replayer: PreciseReplayer | None = None
        self.threshold: float | None = None
        self._said: dict[str, Any] = {}

    def judge(self, name: str, run: Path) -> AuditReport:
        """Audit a run by the threshold; the first run, an honest one, is what it is measured on."""
        transcript = read_transcript(run / TRANSCRIPT_FILE)
        session = transcript.sessions[0].session
        if self._replayer is None:
            self._replayer = PreciseReplayer(self._bench.checkpoint.folder, session, self._bench.settings.threads)
        calls = min(self._bench.settings.calls, 200)
        if self.threshold is None:
            largest = audit(transcript, run / AUDIT_FOLDER, self._replayer, calls, math.inf).largest_distance
            self.threshold = MARGIN * largest
            self._said |= {"threshold": self.threshold, "measured_on": calls}
        found = audit(transcript, run / AUDIT_FOLDER, self._replayer, calls, self.threshold)
        self._said[name] = {"replayed": found.replayed, "lies": len(found.lies), "skipped": found.skipped}
        return found

    def to_json(self) -> dict[str, Any]:
        """All that it judged."""
        return self._said


def _honest(bench: Bench, model: Served, quantize: str, precise: _Precise | None, *, batching: bool) -> dict[str, Any]:
    """An honest cloud: false alarms."""
    count = math.ceil(bench.settings.honest / (2 * len(QUANTIZED)))
    name = f"honest-{quantize}-{'batching' if batching else 'alone'}"
    executor = LyingExecutor(model.executor, None, 0.0)
    runs, shared = _called(bench, model, executor, name, count, batching=batching, leased=False)
    reports = [_replayed(bench, model, run) for run in runs]
    if precise is not None:
        precise.judge(name, runs[0])
    return {
        "quantize": quantize,
        "batching": batching,
        "calls": sum(each.replayed for each in reports),
        "calls_per_pass": shared,
        "false_alarms": sum(len(each.lies) for each in reports),
    }


def _lie(
    bench: Bench, model: Served, quantize: str, kind: str, precise: _Precise | None, cheaper: FrozenSpan | None
) -> dict[str, Any]:
    """A lying cloud: what replays find, and how often draws of `sample` calls meet a lie."""
    settings = bench.settings
    executor = LyingExecutor(model.executor, kind, settings.share, cheaper=cheaper)
    name = f"{kind}-{quantize}"
    runs, _ = _called(bench, model, executor, name, 2 * settings.calls, batching=True, leased=kind == "stale_adapter")
    reports = [_replayed(bench, model, run) for run in runs]
    told = {(session.hex(), call, question) for session, call, question in executor.altered}
    detected, altered, wrong = 0, 0, 0
    for run, report in zip(runs, reports, strict=True):
        crossed = {
            (each.session.id.hex(), exchange.call.call, exchange.question)
            for each in read_transcript(run / TRANSCRIPT_FILE).sessions
            for exchange in each.exchanges
        }
        found = {(lie.session, lie.call, lie.question) for lie in report.lies}
        altered += len(told & crossed)
        detected += len(found & told)
        wrong += len(found - told)
    victim = reports[0]  # the tenant that every kind lies to, who audits its own run
    replayed, lied = victim.replayed, len(victim.lies)
    sample = min(settings.sample, replayed)
    predicted = probability_of_catching(replayed, lied, sample)
    draw = random.SystemRandom()
    caught = sum(any(each < lied for each in draw.sample(range(replayed), sample)) for _ in range(settings.trials))
    margin = 3 * math.sqrt(settings.trials * predicted * (1 - predicted)) + 1
    if precise is not None:
        precise.judge(name, runs[0])
    return {
        "kind": kind,
        "quantize": quantize,
        "calls": sum(each.replayed for each in reports),
        "altered": altered,
        "detected": detected,
        "false_alarms": wrong,
        "sample": sample,
        "asked": settings.trials,
        "caught": caught,
        "predicted": predicted,
        "as_predicted": abs(caught - settings.trials * predicted) <= margin,
    }


def _called(
    bench: Bench, model: Served, executor: LyingExecutor, name: str, count: int, *, batching: bool, leased: bool
) -> tuple[list[Path], float]:
    """Have both tenants make `count` calls together; returns their runs' folders, and the calls in a pass."""
    runs = [bench.folder / name / tenant.name for tenant in bench.keys.edges]
    work = _train_leased if leased else _call
    with (
        ThreadCloud(model, bench.keys, executor, batching=batching, threads=bench.settings.threads) as cloud,
        ExitStack() as stack,
        ThreadPoolExecutor(len(runs)) as pool,
    ):
        links = []
        for run, key in zip(runs, bench.keys.edges, strict=True):
            run.mkdir(parents=True)
            link = stack.enter_context(connect(cloud.address, key=key))
            link.keep_transcript(TranscriptLog(run / TRANSCRIPT_FILE), AuditSample(run / AUDIT_FOLDER, 8 * GIB))
            link.open(10.0)
            links.append(link)
        if executor.kind == "tenant_altered":
            executor.victims = frozenset((bytes.fromhex(links[0].info.session_id),))
        jobs = [pool.submit(work, bench.settings, link, count // 2, seed) for seed, link in enumerate(links)]
        for job in jobs:
            job.result()
        return runs, cloud.shared_calls


def _call(settings: AuditSettings, link: Link, count: int, seed: int) -> None:
    """Forwards and backwards, `count` in all, of random hidden states and lengths."""
    draw = random.Random(seed)  # noqa: S311  # is no secret
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count // 2):
        shape = (settings.batch, draw.randint(4, settings.seq), link.info.hidden_size)
        hidden, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        _, kept = link.forward_span(hidden, None, None, keep=True)
        link.backward_span(kept, gradient, hidden, None, None)


def _train_leased(settings: AuditSettings, link: Link, count: int, seed: int) -> None:
    """The same number of calls of a training whose adapters in the cloud's layers are leased."""
    model = link.load_model(leased=lambda name: True)
    config = TrainConfig(cloud="-", data="-", method="lora", rank=2, learning_rate=1e-2, sites="all", leased="all")
    step = _step(build_peft(model, config, layers=tuple(link.plan.cloud)), model.config.vocab_size, settings, seed)
    for _ in range(count // 2):
        step()


def _step(model: Any, vocabulary: int, settings: AuditSettings, seed: int) -> Callable[[], float]:
    torch.manual_seed(seed)
    return stepper(model, random_batch(vocabulary, settings.batch, settings.seq))


def _replayed(bench: Bench, model: Served, run: Path) -> AuditReport:
    """All calls of a run, computed again by another worker, which computes nothing else meanwhile."""
    transcript = read_transcript(run / TRANSCRIPT_FILE, bench.keys.pin)
    with (
        ThreadCloud(model, bench.keys, batching=False, threads=bench.settings.threads) as cloud,
        connect(cloud.address, key=bench.keys.edges[0]) as link,
    ):
        link.keep_transcript(TranscriptLog(run / "audit-transcript.jsonl"))
        replayer: Replayer = CloudReplayer(link, transcript.sessions[0].session)
        return audit(transcript, run / AUDIT_FOLDER, replayer)


def _span(bench: Bench, model: Served, quantize: str) -> FrozenSpan:
    plan = SplitPlan.parse(bench.settings.edge_layers, bench.checkpoint.config.num_hidden_layers)
    dtype = model.executor.dtype
    return load_span(bench.checkpoint, plan.cloud, dtype=dtype, quantizer=quantizer_of(quantize))


def _cost(bench: Bench, model: Served) -> dict[str, float]:
    """The median ratio of a training step's time, with a transcript and with a sample too, to that without."""
    settings, folder = bench.settings, bench.folder / "cost"
    names = ("plain", "transcript", "sample")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    config = TrainConfig(cloud="-", data="-", method="lora")
    with ThreadCloud(model, bench.keys, threads=settings.threads) as cloud, ExitStack() as stack:
        steps: dict[str, Callable[[], float]] = {}
        for name in names:
            link = stack.enter_context(connect(cloud.address, key=bench.keys.edges[0]))
            split = build_peft(link.load_model(), config, layers=link.plan.edge_layers)
            batch = random_batch(split.config.vocab_size, settings.cost_batch, settings.cost_seq)
            steps[name] = stepper(split, batch)
            if name != "plain":
                sample = AuditSample(folder / AUDIT_FOLDER, SAMPLE_MIB * MIB) if name == "sample" else None
                link.keep_transcript(TranscriptLog(folder / f"{name}.jsonl"), sample)
        for pair in range(WARM_UP + settings.cost_steps):
            for name in _turned(names, pair):
                taken = steps[name]()
                if pair >= WARM_UP:
                    seconds[name].append(taken)
    return {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        for name in names[1:]
    }


def _turned(names: Sequence[str], by: int) -> Sequence[str]:
    """The names, beginning at another one each time, so that none always follows the same."""
    at = by % len(names)
    return (*names[at:], *names[:at])
