"""What a transcript and a sample cost a training: its step's time, hashing, the file and the wire."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from isthmus.cloud.session.served_model import Served
from isthmus.edge.client.link import Link, connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft
from isthmus.edge.witness.audit_sample import AUDIT_FOLDER, AuditSample
from isthmus.experiments.rigs.lying.lying_cloud import ThreadCloud
from isthmus.experiments.rigs.lying.tenants import Bench, step_of
from isthmus.privacy.transcript.chain import digest
from isthmus.privacy.transcript.transcript_file import TranscriptLog, read_transcript
from isthmus.protocol import messages as m
from isthmus.protocol.limits import MIB, SIGN_EVERY
from isthmus.protocol.tensor_codecs import Role, encode

SAMPLE_MIB = 64
WARM_UP = 2
_HASHED = 20  # times that one message is hashed, for a median


def cost_of(bench: Bench, model: Served) -> dict[str, float]:
    """Measure it.

    Returns:
        `transcript_step_ratio`, `sample_step_ratio`: the median ratio of a step's time, with a transcript, and with a
        sample too, to that without. `sign_ms`: until a signature has come, of which each step bears its share: a run
        asks for one after `SIGN_EVERY` exchanges. `hash_ms`, of `hashed_bytes`: one message of such a step, which each
        side hashes once for the question and once for the answer. `wire_bytes_per_exchange`: what crosses more than
        without. `file_bytes_per_exchange`: what the transcript takes on the disk. Both with a signature's share.
    """
    settings, folder = bench.settings, bench.folder / "cost"
    names = ("plain", "transcript", "sample")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    signing: dict[str, list[float]] = {name: [] for name in names}
    config = TrainConfig(cloud="-", data="-", method="lora")
    with ThreadCloud(model, bench.keys, threads=settings.threads) as cloud, ExitStack() as stack:
        links: dict[str, Link] = {}
        steps: dict[str, Callable[[], float]] = {}
        for name in names:
            link = links[name] = stack.enter_context(connect(cloud.address, key=bench.keys.edges[0]))
            split = build_peft(link.load_model(), config, layers=link.plan.edge_layers)
            steps[name] = step_of(split, split.config.vocab_size, settings.cost_batch, settings.cost_seq, 0)
            if name != "plain":
                sample = AuditSample(folder / AUDIT_FOLDER, SAMPLE_MIB * MIB) if name == "sample" else None
                link.keep_transcript(TranscriptLog(folder / f"{name}.jsonl"), sample)
        for pair in range(WARM_UP + settings.cost_steps):
            for name in _turned(names, pair):
                taken = steps[name]()
                # After each step, as so few steps would not come to one: it costs the same after any number of them.
                started, before = time.perf_counter(), _crossed(links[name])
                links[name].sign_transcript()
                if pair >= WARM_UP:
                    seconds[name].append(taken)
                    signing[name].append(time.perf_counter() - started)
                if name == "transcript":
                    signature = _crossed(links[name]) - before
        hash_ms, hashed = _hashing(settings.cost_batch, settings.cost_seq, links["plain"].info.hidden_size)
    exchanges = read_transcript(folder / "transcript.jsonl").exchanges
    signatures = exchanges / (WARM_UP + settings.cost_steps) / SIGN_EVERY  # that a step of a run has to pay for
    plain = seconds["plain"]
    ratios = {f"{name}_step_ratio": step_ratio(seconds[name], signing[name], plain, signatures) for name in names[1:]}
    return {
        **ratios,
        "step_seconds": statistics.median(plain),
        "sign_ms": 1e3 * statistics.median(signing["transcript"]),
        "signatures_per_step": signatures,
        "hash_ms": hash_ms,
        "hashed_bytes": hashed,
        "wire_bytes_per_exchange": signature / SIGN_EVERY,
        "file_bytes_per_exchange": _file_bytes(folder / "transcript.jsonl"),
    }


def step_ratio(steps: Sequence[float], signing: Sequence[float], plain: Sequence[float], signatures: float) -> float:
    """The median ratio of a step's time, and its share of a signature's, to that of a plain step.

    Args:
        steps, signing, plain: Seconds, of as many steps each.
        signatures: That a step has to pay for.
    """
    together = zip(steps, signing, plain, strict=True)
    return statistics.median((step + signatures * sign) / other for step, sign, other in together)


def _crossed(link: Link) -> int:
    totals = link.totals()
    return totals.bytes_up + totals.bytes_down


def _file_bytes(transcript: Path) -> float:
    """Bytes of an exchange in a transcript, with its share of a signature."""
    lines = transcript.read_bytes().splitlines(keepends=True)
    exchange, signature = (
        statistics.mean(len(line) for line in lines if name in json.loads(line)) for name in ("n", "head")
    )
    return exchange + signature / SIGN_EVERY


def _hashing(batch: int, seq: int, hidden: int) -> tuple[float, int]:
    """Milliseconds to hash one message with hidden states, and its bytes."""
    payload = encode(torch.randn(batch, seq, hidden), "fp32", Role.ACTIVATION)
    message: Any = m.ForwardReply(m.CallId(0, 0, 0), payload, 0, 0, 0)
    taken = []
    for _ in range(_HASHED):
        started = time.perf_counter()
        digest(message)
        taken.append(time.perf_counter() - started)
    return 1e3 * statistics.median(taken), batch * seq * hidden * 4


def _turned(names: Sequence[str], by: int) -> Sequence[str]:
    """The names, beginning at another one each time, so that none always follows the same."""
    at = by % len(names)
    return (*names[at:], *names[:at])
