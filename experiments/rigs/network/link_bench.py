"""How well a slow link is hidden behind computation: a real cloud and a real edge with a narrow, long way between them.

Three trainings of the same data against one cloud: over the loopback (what the two sides compute), and across the way
without and with several micro-batches in flight. They run in the namespaces of
`isthmus.experiments.network.net_space`; rate and round trip are measured there with plain TCP before anything else
starts.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import statistics
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.edge.client.link import Link
from isthmus.edge.run_report import WireTotals
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import Parent, run_task, serve
from isthmus.experiments.harness.prose import write_long_texts
from isthmus.experiments.harness.rig_settings import LinkSettings
from isthmus.experiments.network.delay_relay import Conditions
from isthmus.experiments.network.net_space import ADDRESSES, NetSpace, Side
from isthmus.planner.link_spec import parse_rate, parse_seconds

WARM_UP = 2  # steps before the first that counts: TCP's and HTTP/2's windows grow, torch settles
ECHOES = 21
RATE_SECONDS = 1.5
SLOW_START_TRIPS, SLOW_START_SECONDS = 20, 0.5  # passed over, whichever is longer, before the rate is measured
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Way:
    """What plain TCP gets of a way: payload bits per second upwards, the median round trip in seconds, and by which
    congestion control. The kernel's default counts: BBR, for one, paces small messages far below the rate."""

    rate_bps: float
    rtt_s: float
    congestion_control: str


@dataclass(frozen=True, slots=True)
class Measured:
    """One training: seconds of each step that counts, and what crossed in all of them."""

    step_s: tuple[float, ...]
    spent: WireTotals

    @property
    def median_s(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.step_s)

    def per_step(self, name: str) -> float:
        """A field of `spent`, per step."""
        return float(getattr(self.spent, name)) / len(self.step_s)


def run_link(settings: LinkSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module, and `figures` for what comes back.

    Raises:
        ConfigError: the rate or the round trip is malformed, or the machine cannot make network namespaces.
        IsthmusError: whatever a run raises.
    """
    rate, rtt_s = parse_rate(settings.rate), parse_seconds(settings.rtt)
    model = str(resolve(settings.model).folder)  # the namespaces reach neither a hub nor an index
    write_long_texts(folder / "texts.jsonl", settings.batch * settings.micro_batches, settings.seq)
    options = [
        *("--edge-layers", settings.edge_layers, "--dtype", settings.cloud_dtype),
        *("--threads", str(settings.threads), "--listen", f"{ADDRESSES['cloud']}:0"),
    ]
    with NetSpace(rate, Conditions(rtt_s)) as space:
        way = measure_way(space)
        with space.inside("cloud"), LocalCloud(folder, model, *options) as cloud:
            free = _train(settings, folder, cloud, space, "cloud", overlap=1)
            alone = _train(settings, folder, cloud, space, "edge", overlap=1)
            overlapped = _train(settings, folder, cloud, space, "edge", overlap=settings.overlap)
    given = {name: value for name, value in asdict(settings).items() if name != "rtt"}
    return {**figures(way, free, alone, overlapped), **given, "rate": rate, "rtt_s": rtt_s}


def figures(way: Way, free: Measured, alone: Measured, overlapped: Measured) -> dict[str, Any]:
    """What the three runs say.

    `computation_s` is a step over the loopback: both sides' computing, one after the other, with sealing and codecs.
    `wire_s` is what the way needs for a step's bytes, one after the other, and its round trips. The bound is the larger
    of the two. `floor_s` is stricter: the busiest of the edge, the cloud and the way's two directions in a step, before
    which no schedule can end.
    """
    up, down, calls = (alone.per_step(name) for name in ("bytes_up", "bytes_down", "calls"))
    computation = free.median_s
    wire = (up + down) * 8 / way.rate_bps + calls * way.rtt_s
    cloud = free.per_step("cloud_s")
    edge = max(0.0, computation - cloud - free.per_step("wire_s"))
    bound = max(computation, wire)
    floor = max(edge, cloud, max(up, down) * 8 / way.rate_bps)
    return {
        "step_over_bound": overlapped.median_s / bound,
        "step_over_bound_no_overlap": alone.median_s / bound,
        "step_over_floor": overlapped.median_s / floor,
        "computation_s": computation,
        "wire_s": wire,
        "floor_s": floor,
        "step_s": overlapped.median_s,
        "step_s_no_overlap": alone.median_s,
        "edge_computation_s": edge,
        "cloud_computation_s": cloud,
        "bytes_per_step": up + down,
        "bytes_per_step_up": up,
        "bytes_per_step_down": down,
        "round_trips": calls,
        "retries": sum(run.spent.retries for run in (free, alone, overlapped)),
        "rate_measured_bps": way.rate_bps,
        "rtt_measured_s": way.rtt_s,
        "congestion_control": way.congestion_control,
    }


def measure_way(space: NetSpace) -> Way:
    """What plain TCP gets of the way."""
    with space.connection() as (edge, cloud):
        control = edge.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
        trips = [_round_trip(edge, cloud) for _ in range(ECHOES)]
        rtt = statistics.median(trips)
        return Way(_goodput(edge, cloud, max(SLOW_START_SECONDS, SLOW_START_TRIPS * rtt)), rtt, control)


def _round_trip(edge: socket.socket, cloud: socket.socket) -> float:
    start = time.perf_counter()
    edge.sendall(b"?")
    cloud.sendall(cloud.recv(1))
    edge.recv(1)
    return time.perf_counter() - start


def _goodput(source: socket.socket, sink: socket.socket, skip_s: float) -> float:
    """Bits per second that arrive after the first `skip_s` seconds; closes the connection."""

    def pour() -> None:
        with contextlib.suppress(OSError):  # the sink closes when it has seen enough
            while True:
                source.sendall(bytes(CHUNK))

    thread = threading.Thread(target=pour, name="pour", daemon=True)
    thread.start()
    begun = time.perf_counter()
    while (start := time.perf_counter()) < begun + skip_s:
        sink.recv(CHUNK)
    received, end = 0, start
    while end < start + RATE_SECONDS:
        received += len(sink.recv(CHUNK))
        end = time.perf_counter()
    sink.close()
    thread.join()
    return received * 8 / (end - start)


def _train(
    settings: LinkSettings, folder: Path, cloud: LocalCloud, space: NetSpace, side: Side, *, overlap: int
) -> Measured:
    """One training by an edge in a process of its own; on the cloud's own side it goes over the loopback."""
    steps = WARM_UP + settings.steps + 1  # a step's time is known when the next one begins
    out = folder / f"{side}-{overlap}"
    config = {
        "cloud": cloud.connection,
        "key": str(cloud.edge_key),
        "data": str(folder / "texts.jsonl"),
        "validation_split": 0.0,
        "out": str(out),
        "steps": steps,
        "batch": settings.batch,
        "accumulate": settings.micro_batches,
        "overlap": overlap,
        "max_length": settings.seq,
        "codec": settings.codec,
        "save_every": steps,
        "threads": settings.threads,
    }
    with space.inside(side):
        made = run_task("the edge", "isthmus.experiments.rigs.network.link_bench", config, shown=True)
    return Measured(tuple(made["step_s"]), WireTotals(**made["spent"]))


class StepClock:
    """An observer of a link that notes when each step asks its first question, and what has crossed until then."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._begun: dict[int, tuple[float, WireTotals]] = {}

    def __call__(self, question: str, phase: str) -> None:
        """A phase begins."""
        if self._link.step and self._link.step not in self._begun:
            self._begun[self._link.step] = (time.perf_counter(), self._link.totals())

    def measured(self, skip: int) -> Measured:
        """The steps after the first `skip`, and without the last, whose end nobody saw."""
        times, totals = zip(*(self._begun[step] for step in sorted(self._begun)[skip:]), strict=True)
        step_s = tuple(after - before for before, after in itertools.pairwise(times))
        return Measured(step_s, totals[-1] - totals[0])


def _main(parent: Parent) -> None:
    """The edge's process: `isthmus edge train`'s own path, with a clock beside it."""
    from isthmus.edge.cloud_link import open_link
    from isthmus.edge.config.training_config import load_config
    from isthmus.edge.split_run import train_over

    config = load_config(None, parent.task)
    with open_link(config) as link:
        clock = StepClock(link)
        link.observer = clock
        report = train_over(link, config)
    measured = clock.measured(WARM_UP)
    # Of several links the clock sees the first, whose micro-batch opens every step; a retry counts wherever it was.
    spent = replace(measured.spent, retries=report.retries)
    parent.say(asdict(replace(measured, spent=spent)))


if __name__ == "__main__":
    serve(_main)
