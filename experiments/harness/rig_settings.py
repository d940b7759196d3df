"""The settings of the commands of `isthmus bench` that break things, and where the function is that measures.

The rigs themselves are in the source tree alone; these are here, so that the commands say so where they are missing.
Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from typer import Option

from isthmus.common.errors import ConfigError
from isthmus.experiments.harness import bench_flags as flags
from isthmus.experiments.harness.command import Measurement


@dataclass(frozen=True, slots=True)
class FaultSettings:
    """Break whatever can break during one training run, and compare it with an undisturbed one, bit for bit.

    Connections are cut in each phase of a call, the worker and the edge are killed, the cloud is restarted and forgets
    forward states. Then an answer is generated while connections are cut and the worker is killed: its text is the one
    of an undisturbed run. A fault counts only where a call in flight failed or was repeated because of it.

    Example: isthmus bench faults --json
    """

    model: flags.Model = "smollm2-135m"
    steps: Annotated[int, Option(min=1, help="Optimizer steps of either run.")] = 40
    tokens: Annotated[int, Option(min=2, help="Tokens of either answer.")] = 64
    per_phase: Annotated[int, Option(min=1, help="Faults of each phase that have to count.")] = 3
    phases: Annotated[str, Option(help="Phases to break, comma-separated; by default all.")] = ""
    edge_layers: flags.EdgeLayers = "2:2"
    batch: flags.Examples = 2
    seq: flags.ExampleTokens = 64
    threads: flags.Threads = 1
    save_every: int = 4  # steps between the edge's checkpoints


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Train across a slow and long link, with and without overlap, and compare with what computing and wire need.

    The edge and the cloud run in network namespaces of their own, which needs root.

    Example: isthmus bench link --rate 100mbit --rtt 50ms --json
    """

    rate: Annotated[str, Option(help="Of the way in each direction: 100mbit, 1gbit, …")] = "100mbit"
    rtt: Annotated[str, Option(help="Round trip of the way: 50ms, 1.5s, …")] = "50ms"
    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    codec: Annotated[str, Option(help="Codec of the wire.")] = "fp32"
    cloud_dtype: flags.CloudDtype = "fp32"
    batch: Annotated[int, Option(min=1, help="Sequences per micro-batch.")] = 2
    seq: Annotated[int, Option(min=2, help="Tokens per sequence.")] = 128
    micro_batches: Annotated[int, Option(min=2, help="Micro-batches per optimizer step.")] = 4
    overlap: Annotated[int, Option(min=2, help="Micro-batches in flight in the run with overlap.")] = 4
    steps: Annotated[int, Option(min=1, help="Optimizer steps that count, of each run.")] = 7
    threads: flags.Threads = 1

    def __post_init__(self) -> None:
        if not 2 <= self.overlap <= self.micro_batches:
            raise ConfigError(
                f"{self.overlap} micro-batches in flight do not fit {self.micro_batches} of a step: "
                "give at least 2, and no more in flight than a step has"
            )


@dataclass(frozen=True, slots=True)
class ChaosSettings:
    """Let several tenants train while workers, controller, cluster, edges, connections and the network break at random.

    Each tenant's adapter is compared, bit for bit, with that of its undisturbed training. `felt` says how much longer
    the tenants' steps take while somebody misbehaves. Faults of the network need root, for network namespaces; without
    it the others fall.

    Example: isthmus bench chaos --seconds 600 --json

    Memory alone: isthmus bench chaos --soak --seconds 1800 --json
    """

    seconds: Annotated[float, Option(min=1, help="During which faults fall.")] = 600.0
    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    tenants: Annotated[int, Option(min=1, help="That train at the same time.")] = 3
    workers: Annotated[
        int | None, Option(min=1, help="Of the cloud, about 1 GB each of smollm2-135m; 2, or 1 in a soak.")
    ] = None
    steps: Annotated[int, Option(min=4, help="Optimizer steps of a training.")] = 30
    batch: flags.Examples = 1
    seq: flags.ExampleTokens = 64
    kinds: Annotated[str, Option(help="Faults, comma-separated; by default all that the machine can make.")] = ""
    seed: Annotated[int, Option(help="Of the faults.")] = 0
    silence_s: Annotated[float, Option("--silence", min=0.1, help="Seconds for which the way carries nothing.")] = 30.0
    stash_bytes: Annotated[str, Option(help="The cloud's budget for forward states.")] = "1GiB"
    warm_up_s: Annotated[
        float | None,
        Option("--warm-up", min=0, help="Of a worker's life, whose memory does not count; 15, or a quarter of a soak."),
    ] = None
    threads: flags.Threads = 1
    soak: Annotated[bool, Option("--soak", help="Break nothing: tenants come and go.")] = False
    bad_s: float = 5.0  # seconds for which a tenant misbehaves or a way is bad
    save_every: int = 4  # steps between an edge's checkpoints


@dataclass(frozen=True, slots=True)
class AbuseSettings:
    """Attack a cloud, an edge and a daemon, as strangers, tenants, clouds and owners could; hold the cost to ceilings.

    Each attack on a worker is made alone, while its memory, descriptors and processor time are counted, and beside a
    tenant that behaves, whose latency is compared with its calm one. An attack on an edge must end with the error that
    the edge documents. A daemon is attacked beside another owner, whose slowest answer has a ceiling, too. Servers with
    planted weaknesses, and edges and a daemon without a bound, are measured last: each must be caught. Exits with 1
    where a ceiling is broken or a planted weakness is not caught.

    Example: isthmus bench abuse --json
    """

    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    attacks: Annotated[str, Option(help="Attacks, comma-separated; by default all.")] = ""
    seconds: Annotated[float, Option(min=0.5, help="Length of each attack; one on a worker is made twice.")] = 5.0
    threads: Annotated[int, Option(min=1, help="torch threads of the worker.")] = 1


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """Let clouds lie in some of their answers, and audit them; audit honest ones, and count false alarms.

    Tenants call each cloud at the same time, and each of their calls is computed again by another worker, and by one
    with other numerics, by a threshold; calls of honest clouds also without batching. Exits with 1 where an altered
    answer is not found, an honest one is accused, a forged transcript verifies, or audits of a sample catch lying
    clouds more or less often than the formula says. With --keep, an interrupted measurement goes on.

    Example: isthmus bench audit --json
    """

    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    honest: Annotated[int, Option(min=8, help="Calls of honest clouds, in all.")] = 10_000
    calls: Annotated[int, Option(min=4, help="Calls of each tenant at each lying cloud.")] = 60
    share: Annotated[float, Option(min=0.001, max=1, help="Of the calls that a lying cloud alters.")] = 0.1
    sample: Annotated[int, Option(min=1, help="Calls that an audit computes again.")] = 10
    trials: Annotated[int, Option(min=1, help="Audits of each lying cloud, each of a sample of its own.")] = 200
    batch: Annotated[int, Option(min=1, help="Sequences of a call.")] = 1
    seq: Annotated[int, Option(min=5, help="Tokens of a sequence at most; short, for many calls.")] = 32
    measured: Annotated[
        int, Option(min=2, help="Calls of each tenant that a threshold is measured on, or that go without batching.")
    ] = 126
    cost_batch: Annotated[int, Option(min=1, help="Sequences of a step whose time is measured.")] = 4
    cost_seq: Annotated[int, Option(min=5, help="Tokens of their sequences.")] = 64
    cost_steps: Annotated[int, Option(min=1, help="Such steps, with a transcript and without.")] = 12
    seed: Annotated[int, Option(min=0, help="Of the calls' tokens and lengths.")] = 0
    threads: flags.Threads = 2  # with one, batching changes nothing that bits depend on


@dataclass(frozen=True, slots=True)
class SecretsSettings:
    """Look for nonces that are used twice over crashes, and for what a cloud keeps of sessions, and where.

    Memory is searched for bytes as they are; logs, files, metrics, environments and Ray's control store also for their
    hex, base64 and other forms in text, and for numbers in decimal. Exits with 1 where a key and a nonce came twice
    (`no_reuse`), where anything of a session was found in another place than the worker's memory
    (`nothing_elsewhere`), or where a control was not found (`controls_found`).

    `during`, `at_once` and `after` are copies in the worker's memory: while sessions last, right after their end, and
    seconds later. `freed_wiped` says whether none is left with `--wipe-freed`, at once or later. Where none is left at
    once without the option either, it is null, as nothing is shown. It exits with 1 unless this is true. With --keep,
    an interrupted measurement goes on.

    Example: isthmus bench secrets --json
    """

    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    restarts: Annotated[int, Option(min=1, help="Edges and workers that are killed and started again.")] = 500
    sessions: Annotated[int, Option(min=1, help="Sessions of the state machines alone that crash.")] = 100_000
    tokens: Annotated[int, Option(min=1, help="Tokens of the calls under way while a cloud is looked at.")] = 256
    steps: Annotated[int, Option(min=1, help="Timed steps with --wipe-freed and without, in turns.")] = 12
    batch: Annotated[int, Option(min=1, help="Sequences of such a step.")] = 4
    seq: Annotated[int, Option(min=2, help="Tokens of a sequence.")] = 64
    seed: Annotated[int, Option(help="Says who crashes when.")] = 0
    threads: flags.Threads = 1


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Serve on several machines, in namespaces of their own, and cut their power and their links while an edge trains.

    The adapters are compared, bit for bit, with that of a cloud on one machine. Then keys, tokens and activations are
    looked for in Ray's control store, in logs and environments, and in all packets. Needs root. Exits with 1 where an
    adapter differs, a process is left, a secret is found, or a control is not. With --keep, an interrupted measurement
    goes on.

    Example: isthmus bench cluster --json
    """

    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    cases: Annotated[str, Option(help="Cases, comma-separated; by default all.")] = ""
    steps: Annotated[int, Option(min=4, help="Optimizer steps of each run.")] = 80
    at: Annotated[int, Option(min=1, help="Step after which something happens.")] = 8
    threads: flags.Threads = 1


RIGS: Final = {
    "faults": Measurement(FaultSettings, "rigs.faults.faults:run_faults"),
    "link": Measurement(LinkSettings, "rigs.network.link_bench:run_link"),
    "chaos": Measurement(ChaosSettings, "rigs.chaos.chaos_bench:run_chaos"),
    "abuse": Measurement(
        AbuseSettings,
        "rigs.abuse.abuse_bench:run_abuse",
        "rigs.abuse.abuse_bench:show",
        passed=("held", "planted_caught"),
    ),
    "audit": Measurement(
        AuditSettings,
        "rigs.lying.audit_bench:run_audit_bench",
        "rigs.lying.audit_bench:show",
        passed=("all_caught", "no_false_alarms", "as_predicted", "forgeries_found"),
    ),
    "secrets": Measurement(
        SecretsSettings,
        "rigs.secrets.secrets_bench:run_secrets",
        "rigs.secrets.secrets_bench:show",
        passed=("no_reuse", "nothing_elsewhere", "freed_wiped", "controls_found"),
    ),
    "cluster": Measurement(
        ClusterSettings,
        "rigs.cluster.cluster_bench:run_cluster",
        "rigs.cluster.cluster_bench:show",
        passed=("identical", "none_failed", "none_left", "in_time", "nothing_secret"),
    ),
}
"""The commands by name."""
