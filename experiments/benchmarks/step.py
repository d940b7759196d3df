"""What a step costs: the split run against a single process with the same adapters, batch, precision of the edge, and
threads.

Both models live in one process and take turns, so that whatever else the machine does hits both alike; the figures
are ratios. The cloud is in processes of its own and waits while the whole model computes.

Tuning on a package is measured against split training by runs of `emulator tune` and `edge train`, each of two epochs.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from isthmus.common.errors import ConfigError
from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.client.link import connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.edge_steps import COSTS_FILE
from isthmus.edge.training.methods import build_peft
from isthmus.emulator.package.package import open_package
from isthmus.experiments.harness.bench_settings import StepSettings
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.processes import run_isthmus, train_flags
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.harness.single_process import random_batch, stepper, whole_model
from isthmus.protocol.limits import DEFAULT_LIMITS
from isthmus.protocol.secure.framing import KEY_BYTES, Direction
from isthmus.protocol.secure.record import Opener, Sealer
from isthmus.protocol.secure.renewal import CloudRenewal, EdgeRenewal

WARM_UP = 2
RENEWALS = 200
EPOCH = 4
"""Steps of an epoch of the runs on a package; the first step of a run is not counted."""


def run_step(settings: StepSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Shares are of the split step. The wire's is what the edge waited beyond the cloud's computing and the sealing and
    opening on both sides; codecs count as computing of the side that runs them. Bytes are of whole frames per token
    position.
    """
    if settings.package is not None and open_package(settings.package).manifest.tuning is None:
        raise ConfigError(f"{settings.package} has no advice for tuning: build one with --preset")
    set_torch_threads(settings.threads)
    options = (
        *("--edge-layers", settings.edge_layers, "--dtype", settings.cloud_dtype),
        *("--threads", str(settings.threads), "--quantize", settings.quantize),
    )
    with (
        LocalCloud(folder, settings.model, *options) as cloud,
        connect(cloud.connection, key=cloud.edge_key, codec=settings.codec) as link,
    ):
        whole, _, plan = whole_model(settings.model, settings.edge_layers)
        batch = random_batch(whole.config.vocab_size, settings.batch, settings.seq)
        config = TrainConfig(cloud="-", data="-", method="lora")
        split_step, whole_step = (
            stepper(build_peft(model, config, layers=plan.edge_layers), batch) for model in (link.load_model(), whole)
        )
        ratios: list[float] = []
        split_s: list[float] = []
        whole_s: list[float] = []
        with stderr_progress("steps", WARM_UP + settings.pairs) as advance:
            for pair in range(WARM_UP + settings.pairs):
                if pair == WARM_UP:
                    before = link.totals()
                # Turn about, so that neither always follows the other.
                for step, seconds in ((split_step, split_s), (whole_step, whole_s))[:: 1 if pair % 2 else -1]:
                    seconds.append(step())
                ratios.append(split_s[-1] / whole_s[-1])
                advance()
        spent = link.totals() - before
        span_bytes = cloud.status()["span_bytes"]
        tuning = {} if settings.package is None else {"tuning": tuning_cost(settings, folder, cloud)}
    ratios, split_s, whole_s = ratios[WARM_UP:], split_s[WARM_UP:], whole_s[WARM_UP:]
    total, positions = sum(split_s), settings.pairs * batch["input_ids"].numel()
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "edge_share": (total - spent.cloud_s - spent.wire_s - spent.crypto_s) / total,
        "cloud_share": spent.cloud_s / total,
        "wire_share": spent.wire_s / total,
        "crypto_share": spent.crypto_s / total,
        "bytes_per_token_up": spent.bytes_up / positions,
        "bytes_per_token_down": spent.bytes_down / positions,
        "bytes_per_token_over_hidden": (spent.bytes_up + spent.bytes_down) / positions / whole.config.hidden_size,
        "span_bytes": span_bytes,
        **renewal_cost(),
        "split_step_s": statistics.median(split_s),
        "whole_step_s": statistics.median(whole_s),
        **tuning,
        **asdict(settings),
        "package": None if settings.package is None else settings.package.name,
    }


def tuning_cost(settings: StepSettings, folder: Path, cloud: LocalCloud) -> dict[str, Any]:
    """A step of `emulator tune` over one of `edge train` on the same texts, all of `seq` tokens.

    Returns:
        `first_epoch` and `later_epochs`: the ratio `median`, `min` and `max` over the rounds, each of medians of steps,
        and the median `step_s`. `split_step_s`. `rounds`: as they were measured.
    """
    data = folder / "texts.jsonl"
    write_jsonl(data, ({"text": f"{number} " + "word " * settings.seq} for number in range(EPOCH * settings.batch)))
    shared = {"data": data, "validation_split": 0.0, "steps": 2 * EPOCH, "save_every": 2 * EPOCH}
    shared |= {"batch": settings.batch, "max_length": settings.seq, "threads": settings.threads}
    commands: dict[str, dict[str, Any]] = {
        "emulator tune": {"package": settings.package},
        "edge train": {"cloud": cloud.connection_file, "key": cloud.edge_key, "codec": settings.codec},
    }
    rounds = []
    for number in range(settings.rounds):
        seconds = {}
        for command in list(commands)[:: -1 if number % 2 else 1]:
            out = folder / f"{command.replace(' ', '-')}-{number}"
            run_isthmus(*command.split(), *train_flags({**shared, **commands[command], "out": out}))
            lines = [json.loads(line) for line in (out / COSTS_FILE).read_text(encoding="utf-8").splitlines()]
            seconds[command] = [line["seconds"] for line in lines]
        split, tuned = seconds["edge train"], seconds["emulator tune"]
        rounds.append(
            {
                "split_step_s": statistics.median(split[1:]),
                "first_epoch_step_s": statistics.median(tuned[1:EPOCH]),
                "later_epochs_step_s": statistics.median(tuned[EPOCH:]),
            }
        )

    def over_split(name: str) -> dict[str, float]:
        steps = [each[f"{name}_step_s"] for each in rounds]
        ratios = [step / each["split_step_s"] for step, each in zip(steps, rounds, strict=True)]
        return {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "step_s": statistics.median(steps),
        }

    return {
        "first_epoch": over_split("first_epoch"),
        "later_epochs": over_split("later_epochs"),
        "split_step_s": statistics.median(each["split_step_s"] for each in rounds),
        "rounds": rounds,
    }


def renewal_cost() -> dict[str, float]:
    """What a renewal of a session's keys costs: the median of many, in this process.

    Returns:
        `renewal_s`: processor seconds of both sides together. `renewal_share`: the same over the seconds between two
        renewals. `renewal_bytes`: of its three frames.
    """
    limits, session_id = replace(DEFAULT_LIMITS, renew_bytes=0, least_renew_bytes=0), bytes(16)
    sealers = [Sealer(bytearray(KEY_BYTES), session_id, direction, limits) for direction in Direction]
    openers = [Opener(bytearray(KEY_BYTES), session_id, direction, limits) for direction in Direction]
    edge = EdgeRenewal(sealers[0], openers[1], session_id, limits, time.monotonic)
    cloud = CloudRenewal(sealers[1], openers[0], session_id, limits, time.monotonic)
    senders: tuple[tuple[EdgeRenewal | CloudRenewal, Opener], ...]
    senders = ((edge, openers[0]), (cloud, openers[1]), (edge, openers[0]))
    seconds, size = [], 0
    for _ in range(RENEWALS):
        begun, size = time.process_time(), 0
        for sender, opener in senders:
            frame = sender.before_message() or b""
            opener.open(frame)
            size += len(frame)
        seconds.append(time.process_time() - begun)
        for sealer, opener in zip(sealers, openers, strict=True):  # a message must come between some changes of keys
            for frame in sealer.seal(b"header", []):
                opener.open(frame)
    taken = statistics.median(seconds)
    return {"renewal_s": taken, "renewal_share": taken / DEFAULT_LIMITS.renew_seconds, "renewal_bytes": size}
