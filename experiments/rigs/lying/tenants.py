"""What tenants of a cloud do in the measurement of audits: make calls together, and have them computed again."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.session.served_model import Served
from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.audit.audit_run import AuditReport, audit
from isthmus.edge.audit.replay import CloudReplayer, Replayer
from isthmus.edge.client.link import Link, connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft
from isthmus.edge.witness.audit_sample import AUDIT_FOLDER, AuditSample, SampledCall
from isthmus.experiments.harness.rig_settings import AuditSettings
from isthmus.experiments.harness.single_process import random_batch, stepper
from isthmus.experiments.rigs.lying.lies import LyingExecutor
from isthmus.experiments.rigs.lying.lying_cloud import Keys, ThreadCloud
from isthmus.privacy.transcript.chain import digest
from isthmus.privacy.transcript.transcript_file import TRANSCRIPT_FILE, TranscriptLog, read_transcript
from isthmus.protocol import messages as m
from isthmus.protocol.limits import GIB, SIGN_EVERY

_OPEN_SECONDS = 10.0
_NO_BOUND = 64 * GIB  # the sample of a run keeps all calls: it shall be known of each what a replay says


@dataclass(frozen=True, slots=True)
class Bench:
    """What all parts of the measurement share."""

    settings: AuditSettings
    folder: Path
    checkpoint: Checkpoint
    keys: Keys


@dataclass(frozen=True, slots=True)
class Work:
    """What tenants ask of a cloud.

    Attributes:
        name: Of the folder in which their runs are.
        tenants: How many of them call at the same time.
        calls: Of each, rounded down to an even number: forwards, each with its backward.
        seq: Tokens of a sequence at most, and at least 4; where `fixed`, of all.
        batching: Whether their calls share passes.
        leased: Whether they train adapters that are leased, instead of asking for the gradients of a first step.
        breaks: Whether each tenant's session breaks once, after three quarters of its calls or just before the first
            signature is due: the cloud has signed nothing of it, and then signs what is left.
    """

    name: str
    tenants: int
    calls: int
    seq: int
    batching: bool = True
    leased: bool = False
    fixed: bool = False
    breaks: bool = False

    @property
    def breaks_before(self) -> int | None:
        """Before which pair of a forward and its backward, from 0."""
        return min(3 * self.calls // 4, SIGN_EVERY - 1) // 2 if self.breaks else None


@dataclass(frozen=True, slots=True)
class Called:
    """What came of it: the runs' folders, the calls in a pass on average, and the seconds of a call."""

    runs: tuple[Path, ...]
    shared: float
    seconds: float


class Remembered:
    """A replayer that computes each call once, and then gives its answers again.

    Args:
        inner: What computes.
        elsewhere: What the numerics are said to be beside the cloud's own; empty where they are the same.
    """

    def __init__(self, inner: Replayer, elsewhere: str = "") -> None:
        self._inner, self._elsewhere = inner, elsewhere
        self._answers: dict[tuple[bytes, int, bytes], m.Message] = {}

    def numerics(self) -> str:
        """See `Replayer`."""
        return self._inner.numerics() + self._elsewhere

    def answer(self, call: SampledCall) -> m.Message:
        """See `Replayer`."""
        name = (call.session, call.exchange, digest(call.question))  # whose inputs may have been changed
        if name not in self._answers:
            self._answers[name] = self._inner.answer(call)
        return self._answers[name]


def call(bench: Bench, model: Served, executor: LyingExecutor, work: Work) -> Called:
    """Have tenants call a cloud at the same time, with transcripts and samples of all calls."""
    edges, folder = bench.keys.edges[: work.tenants], bench.folder / work.name
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted run's
    runs = tuple(folder / edge.name for edge in edges)
    with (
        ThreadCloud(model, bench.keys, executor, batching=work.batching, threads=bench.settings.threads) as cloud,
        ExitStack() as stack,
        ThreadPoolExecutor(len(runs), "tenant", set_torch_threads, (bench.settings.threads,)) as pool,
    ):
        links = []
        for run, key in zip(runs, edges, strict=True):
            run.mkdir(parents=True)
            link = stack.enter_context(connect(cloud.address, key=key))
            link.keep_transcript(TranscriptLog(run / TRANSCRIPT_FILE), AuditSample(run / AUDIT_FOLDER, _NO_BOUND))
            link.open(_OPEN_SECONDS)
            links.append(link)
        if executor.kind == "tenant_altered":
            executor.victims = frozenset((bytes.fromhex(links[0].info.session_id),))
        ask = _train_leased if work.leased else _ask
        started = time.perf_counter()
        # Of the measurement's name, so that no two have an input in common: a threshold must not be judged on its own.
        seeds = [crc32(f"{bench.settings.seed}/{work.name}/{edge.name}".encode()) for edge in edges]
        jobs = [
            pool.submit(ask, bench.settings, work, link, seed, partial(_begin_pair, work, link, executor))
            for seed, link in zip(seeds, links, strict=True)
        ]
        for job in jobs:
            job.result()
        seconds = time.perf_counter() - started
        for link in links:
            link.end_transcript()
        return Called(runs, cloud.shared_calls, seconds / (work.calls // 2 * 2 * len(runs)))


def replay(
    bench: Bench,
    model: Served,
    runs: Sequence[Path],
    executor: Executor | None = None,
    threshold: float | None = None,
    *,
    batching: bool = True,
    calls: int | None = None,
) -> list[tuple[AuditReport, Remembered]]:
    """Have calls of runs computed again by another worker, those of all runs at the same time.

    Args:
        bench: The measurement.
        model: What the worker serves.
        runs: Their folders.
        executor: What computes in the place of the model's own, with other numerics.
        threshold, calls: See `isthmus.edge.audit.audit_run.audit`.
        batching: Whether calls share passes there.
    """
    with (
        ThreadCloud(model, bench.keys, executor, batching=batching, threads=bench.settings.threads) as cloud,
        ThreadPoolExecutor(len(runs)) as pool,
    ):

        def one(run: Path, key: Path) -> tuple[AuditReport, Remembered]:
            transcript = read_transcript(run / TRANSCRIPT_FILE, bench.keys.pin)
            with connect(cloud.address, key=key) as link:
                link.keep_transcript(TranscriptLog(run / "audit-transcript.jsonl"))
                elsewhere = "" if executor is None else ", elsewhere"
                replayer = Remembered(CloudReplayer(link, transcript.sessions[0].session), elsewhere)
                return audit(transcript, run / AUDIT_FOLDER, replayer, calls, threshold), replayer

        return list(pool.map(one, runs, bench.keys.edges))


def step_of(model: Any, vocabulary: int, batch: int, seq: int, seed: int) -> Callable[[], float]:
    """A training step on random tokens; it returns its seconds."""
    torch.manual_seed(seed)
    return stepper(model, random_batch(vocabulary, batch, seq))


def _begin_pair(work: Work, link: Link, executor: LyingExecutor, number: int) -> None:
    """Before a forward and its backward, which is a pair of one session: the session breaks where it is to."""
    if number != work.breaks_before:
        return
    victims, broken = executor.victims, bytes.fromhex(link.info.session_id)
    link.drop()
    link.open(_OPEN_SECONDS)
    if victims is not None and broken in victims:  # one tenant is lied to in all of its sessions
        executor.victims = victims | {bytes.fromhex(link.info.session_id)}


def _ask(settings: AuditSettings, work: Work, link: Link, seed: int, begin: Callable[[int], None]) -> None:
    """Forwards and backwards of a training's first step, each of other random tokens, of random lengths."""
    model = link.load_model()
    tuned = build_peft(model, TrainConfig(cloud="-", data="-", method="lora", rank=2))
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)  # noqa: S311  # is no secret
    for number in range(work.calls // 2):
        begin(number)
        length = work.seq if work.fixed else draw.randint(4, work.seq)
        ids = torch.randint(model.config.vocab_size, (settings.batch, length), generator=generator)
        tuned(input_ids=ids, labels=ids).loss.backward()


def _train_leased(settings: AuditSettings, work: Work, link: Link, seed: int, begin: Callable[[int], None]) -> None:
    """The same number of calls of a training whose adapters in the cloud's layers are leased."""
    model = link.load_model(leased=lambda name: True)
    config = TrainConfig(cloud="-", data="-", method="lora", rank=2, learning_rate=1e-2, sites="all", leased="all")
    peft = build_peft(model, config, layers=tuple(link.plan.cloud))
    step = step_of(peft, model.config.vocab_size, settings.batch, work.seq, seed)
    for number in range(work.calls // 2):
        begin(number)
        step()
