"""The settings of each command of `isthmus bench`, and where the function is that measures.

The docstring of a class is the help of its command; `Measurement` says how the flags come about. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from isthmus.common.errors import ConfigError
from isthmus.experiments.harness.command import Measurement

_Model = Annotated[str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")]
_EdgeLayers = Annotated[str, typer.Option(help="How many of the first and of the last layers the edge holds.")]
_Threads = Annotated[int, typer.Option(min=1, help="torch threads on either side.")]
_Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
_Examples = Annotated[int, typer.Option(min=1, help="Examples per step.")]
_ExampleTokens = Annotated[int, typer.Option(min=32, help="Tokens per example at most.")]
_Codec = Annotated[str, typer.Option(help="Codec of the wire, as for `edge train`.")]
_CloudDtype = Annotated[str, typer.Option(help="What the cloud computes in: fp32 or bf16.")]
_EdgeDtype = Annotated[str, typer.Option(help="What the edge computes in: fp32 or bf16.")]
_Task = Annotated[str, typer.Option(help="What runs are scored on: e2e, openbookqa, arc_easy or sst2.")]
_DataFolder = Annotated[
    Path | None, typer.Option(help="Where the tasks lie; default: shared/data beside the checkout.")
]
_RunSteps = Annotated[int, typer.Option(min=1, help="Optimizer steps of a run.")]
_StepExamples = Annotated[int, typer.Option(min=1, help="Examples of a step.")]
_MaxLength = Annotated[int, typer.Option(min=8, help="Tokens of an example at most.")]
_OneRate = Annotated[float, typer.Option(min=0, help="Of every run.")]
_Test = Annotated[int | None, typer.Option(min=2, help="Held-out documents; by default the task's.")]
_Out = Annotated[Path, typer.Option(help="Folder for finished pieces; the same command goes on there.")]


@dataclass(frozen=True, slots=True)
class ParitySettings:
    """Compare a split run (real processes, sealed gRPC) with a single-process run, bit for bit.

    Example: isthmus bench parity --model smollm2-135m --steps 10 --json
    """

    model: _Model = "smollm2-135m"
    steps: _Steps = 10
    edge_layers: _EdgeLayers = "2:2"
    codec: _Codec = "fp32"
    dtype: Annotated[str, typer.Option("--cloud-dtype", help="What the cloud computes in: fp32 or bf16.")] = "fp32"
    batch: _Examples = 4
    seq: Annotated[int, typer.Option(min=2, help="Tokens per example at most.")] = 128
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 1e-3
    threads: _Threads = 1
    data: Annotated[
        str, typer.Option(help="A data file as for `edge train`; by default a few sentences of real text.")
    ] = ""
    pipeline: Annotated[int, typer.Option(min=1, help="Actors of the cloud that its layers are divided among.")] = 1


@dataclass(frozen=True, slots=True)
class StepSettings:
    """Compare the time of a split step with that of a single-process PEFT step.

    Example: isthmus bench step --model smollm2-135m --cloud-dtype bf16 --codec bf16 --json
    """

    model: _Model = "smollm2-135m"
    edge_layers: _EdgeLayers = "2:2"
    codec: _Codec = "fp32"
    cloud_dtype: _CloudDtype = "fp32"
    quantize: Annotated[str, typer.Option(help="How the cloud holds its weights: none, int8 or nf4.")] = "none"
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 4
    seq: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128
    pairs: Annotated[int, typer.Option(min=5, help="Steps of either kind, in turns.")] = 9
    threads: Annotated[int, typer.Option(min=1, help="torch threads on either side and in the single process.")] = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSettings:
    """Run `edge train` on real data, and the same in one process; compare the loss curves step by step.

    Example: isthmus bench curve --data tickets.jsonl --steps 200 --figure curve.png --json
    """

    data: Annotated[str, typer.Option(help="A data file as for `edge train`.")]
    model: _Model = "smollm2-135m"
    edge_layers: _EdgeLayers = "2:2"
    prompt_template: Annotated[str | None, typer.Option(help="As for `edge train`.")] = None
    completion_template: Annotated[str | None, typer.Option(help="As for `edge train`.")] = None
    steps: _Steps = 200
    batch: _Examples = 4
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak, of AdamW.")] = 1e-3
    validation_split: Annotated[float, typer.Option(min=0, max=0.9, help="Fraction held out.")] = 0.03
    threads: _Threads = 2
    figure: Annotated[Path | None, typer.Option(help="PNG to draw the two curves to (needs matplotlib).")] = None


@dataclass(frozen=True, slots=True)
class KernelSettings:
    """Compare the grouped low-rank product and block quantization with the calls of libraries for the same.

    Example: isthmus bench kernels --threads 2 --json
    """

    rows: Annotated[list[int] | None, typer.Option(min=1, help="Rows of each group, repeatable.")] = None
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each candidate.")] = 15
    threads: Annotated[int, typer.Option(min=1, help="torch threads.")] = 1
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is such a device.")] = (
        None
    )
    widths: tuple[tuple[int, int], ...] = ((576, 576), (576, 1536), (1536, 576))  # features in and out of the sites
    ranks: tuple[int, ...] = (4, 8, 8, 16, 16, 32, 64, 64)  # of the groups


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """Compare every way of training: bytes, round trips, memory, step time and held-out loss, beside a single process.

    The modes are single, u_shape, tail_cache, taps, edge, edge_summed, kill_revive, random, even, low_rank and leased;
    kill_revive@0.05 has 5 % of always-on's site traffic. An interrupted benchmark goes on when the same command is
    repeated.

    Example: isthmus bench placements --json

    The costs alone: isthmus bench placements --no-scores
    """

    model: _Model = "smollm2-135m"
    modes: Annotated[str, typer.Option(help="Modes, comma-separated; by default all.")] = ""
    edge_layers: _EdgeLayers = "2:2"
    costs: Annotated[bool, typer.Option(help="Whether to measure what a step costs, at fp32.")] = True
    scores: Annotated[bool, typer.Option(help="Whether to train and to score on held-out data.")] = True
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8
    target_modules: Annotated[
        str | None, typer.Option(help="Modules that get adapters, comma-separated; the family's usual ones by default.")
    ] = None
    taps: Annotated[int, typer.Option(min=1, help="Layers that the ladder reads.")] = 4
    dropout: Annotated[
        float, typer.Option(min=0, max=0.99, help="In front of the adapters where costs are measured.")
    ] = 0.1
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step whose cost is measured.")] = 4
    seq: Annotated[int, typer.Option(min=2, help="Tokens of such a sequence.")] = 128
    rounds: Annotated[int, typer.Option(min=1, help="Steps that count, of each run whose cost is measured.")] = 7
    task: _Task = "e2e"
    data_folder: _DataFolder = None
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a scored run.")] = 400
    score_batch: Annotated[int, typer.Option(min=1, help="Examples of a step of a scored run.")] = 2
    max_length: _MaxLength = 256
    learning_rates: Annotated[str, typer.Option(help="Candidate learning rates, for every mode.")] = "1e-3,3e-3"
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Seeds of the modes that choose sites, and of `edge` or else `single`; one of the others."
        ),
    ] = 3
    test: _Test = None
    validation: Annotated[int, typer.Option(min=1, help="Training examples that rates are chosen by.")] = 32
    precision: Annotated[str, typer.Option(help="What the edge of a scored run computes in: fp32 or bf16.")] = "bf16"
    cloud_dtype: Annotated[str, typer.Option(help="What its cloud computes in: fp32 or bf16.")] = "bf16"
    threads: _Threads = 1
    figure: Annotated[Path | None, typer.Option(help="PNG of the held-out loss against bytes.")] = None
    budget_figure: Annotated[Path | None, typer.Option(help="PNG of the held-out loss against site traffic.")] = None
    sites_figure: Annotated[Path | None, typer.Option(help="PNG of kill-and-revive's live sites over time.")] = None
    out: _Out = Path("isthmus-placements")


@dataclass(frozen=True, slots=True)
class CodecSettings:
    """Compare the wire's codecs: bytes for a token, cosine of the adapters' gradients, loss after a whole run.

    Example: isthmus bench codecs --json

    Two of them: isthmus bench codecs --codec int8 --codec int4-outliers,int4
    """

    model: _Model = "smollm2-135m"
    codec: Annotated[
        list[str] | None,
        typer.Option(help="Codecs as `edge train --codec` has them, repeatable; by default a choice of all."),
    ] = None
    edge_layers: _EdgeLayers = "2:2"
    task: _Task = "e2e"
    data_folder: _DataFolder = None
    steps: _RunSteps = 200
    batch: _StepExamples = 4
    max_length: _MaxLength = 256
    learning_rate: _OneRate = 1e-3
    test: _Test = None
    probes: Annotated[int, typer.Option(min=1, help="Micro-batches that gradients are compared on.")] = 8
    precision: _EdgeDtype = "fp32"
    cloud_dtype: _CloudDtype = "fp32"
    threads: _Threads = 1
    out: _Out = Path("isthmus-codecs")


@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """Compare ways of holding the backbone: memory of the span, time of a step, loss after the same tuning.

    Example: isthmus bench quantize --json

    Two of them: isthmus bench quantize --form none --form nf4
    """

    model: _Model = "smollm2-135m"
    form: Annotated[
        list[str] | None, typer.Option(help="Any of none (fp32), bf16, int8 and nf4, repeatable; by default all.")
    ] = None
    edge_layers: _EdgeLayers = "2:2"
    task: _Task = "e2e"
    data_folder: _DataFolder = None
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a scored run.")] = 200
    batch: _StepExamples = 4
    seq: Annotated[int, typer.Option(min=2, help="Tokens per sequence of a timed step.")] = 128
    pairs: Annotated[int, typer.Option(min=5, help="Timed steps of either kind, in turns.")] = 9
    max_length: _MaxLength = 256
    learning_rate: _OneRate = 1e-3
    test: _Test = None
    precision: _EdgeDtype = "fp32"
    threads: _Threads = 1
    out: _Out = Path("isthmus-quantize")


@dataclass(frozen=True, slots=True)
class TenantsFlags:
    """Compare many edges on one cloud with as many single processes: throughput, memory, fairness, losses.

    Example: isthmus bench tenants --n 8 --json
    """

    n: Annotated[int, typer.Option("--n", min=2, help="Tenants.")] = 8
    model: _Model = "smollm2-135m"
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of a tenant's step, on average.")] = 64
    edge_layers: _EdgeLayers = "2:2"
    steps: Annotated[int, typer.Option(min=2, help="Steps of each tenant that count.")] = 24
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads of the cloud; by default all cores that it may use.")
    ] = None
    batching: Annotated[
        Literal["on", "off"], typer.Option(help="Whether the cloud computes several tenants' calls in one pass.")
    ] = "on"
    figure: Annotated[
        Path | None, typer.Option(help="PNG of the throughput against the number of tenants; measures 1, 2, 4 … too.")
    ] = None


@dataclass(frozen=True, slots=True)
class QosFlags:
    """See what the scheduler does for interactive calls among training: latency, missed deadlines, throughput.

    Example: isthmus bench qos --json
    """

    model: _Model = "smollm2-135m"
    edge_layers: _EdgeLayers = "2:2"
    loads: Annotated[
        str, typer.Option(help="Computing time that is asked for over the time there is, comma-separated.")
    ] = "0.4,0.8,1.0,1.2"
    seconds: Annotated[float, typer.Option(min=1, help="For which calls arrive, in each run.")] = 15.0
    interactive_share: Annotated[float, typer.Option(help="Of the arrivals; the others are training.")] = 0.5
    interactive_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an interactive call.")] = 32
    training_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a training call.")] = 64
    deadline: Annotated[float, typer.Option(min=0.01, help="Of interactive calls, in seconds.")] = 1.0
    tenants: Annotated[int, typer.Option(min=1, help="Among whom the calls are drawn.")] = 8
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; by default all cores that it may use.")] = (
        None
    )
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0


# What breaks things. The rigs themselves are in the source tree alone. ------------------------------------------------


@dataclass(frozen=True, slots=True)
class FaultSettings:
    """Break whatever can break during one training run, and compare it with an undisturbed one, bit for bit.

    Connections are cut in each phase of a call, the worker and the edge are killed, the cloud is restarted and forgets
    forward states. A fault counts only where a call in flight failed or was repeated because of it.

    Example: isthmus bench faults --json
    """

    model: _Model = "smollm2-135m"
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of either run.")] = 40
    per_phase: Annotated[int, typer.Option(min=1, help="Faults of each phase that have to count.")] = 3
    phases: Annotated[str, typer.Option(help="Phases to break, comma-separated; by default all.")] = ""
    edge_layers: _EdgeLayers = "2:2"
    batch: _Examples = 2
    seq: _ExampleTokens = 64
    threads: _Threads = 1
    save_every: int = 4  # steps between the edge's checkpoints


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Train across a slow and long link, with and without overlap, and compare with what computing and wire need.

    The edge and the cloud run in network namespaces of their own, which needs root.

    Example: isthmus bench link --rate 100mbit --rtt 50ms --json
    """

    rate: Annotated[str, typer.Option(help="Of the way in each direction: 100mbit, 1gbit, …")] = "100mbit"
    rtt: Annotated[str, typer.Option(help="Round trip of the way: 50ms, 1.5s, …")] = "50ms"
    model: _Model = "smollm2-135m"
    edge_layers: _EdgeLayers = "2:2"
    codec: Annotated[str, typer.Option(help="Codec of the wire.")] = "fp32"
    cloud_dtype: _CloudDtype = "fp32"
    batch: Annotated[int, typer.Option(min=1, help="Sequences per micro-batch.")] = 2
    seq: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128
    micro_batches: Annotated[int, typer.Option(min=2, help="Micro-batches per optimizer step.")] = 4
    overlap: Annotated[int, typer.Option(min=2, help="Micro-batches in flight in the run with overlap.")] = 4
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps that count, of each run.")] = 7
    threads: _Threads = 1

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

    seconds: Annotated[float, typer.Option(min=1, help="During which faults fall.")] = 600.0
    model: _Model = "smollm2-135m"
    edge_layers: _EdgeLayers = "2:2"
    tenants: Annotated[int, typer.Option(min=1, help="That train at the same time.")] = 3
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of the cloud, about 1 GB each of smollm2-135m; 2, or 1 in a soak.")
    ] = None
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps of a training.")] = 30
    batch: _Examples = 1
    seq: _ExampleTokens = 64
    kinds: Annotated[str, typer.Option(help="Faults, comma-separated; by default all that the machine can make.")] = ""
    seed: Annotated[int, typer.Option(help="Of the faults.")] = 0
    silence_s: Annotated[
        float, typer.Option("--silence", min=0.1, help="Seconds for which the way carries nothing.")
    ] = 30.0
    stash_bytes: Annotated[str, typer.Option(help="The cloud's budget for forward states.")] = "1GiB"
    warm_up_s: Annotated[
        float | None,
        typer.Option(
            "--warm-up", min=0, help="Of a worker's life, whose memory does not count; 15, or a quarter of a soak."
        ),
    ] = None
    threads: _Threads = 1
    soak: Annotated[bool, typer.Option("--soak", help="Break nothing: tenants come and go.")] = False
    bad_s: float = 5.0  # seconds for which a tenant misbehaves or a way is bad
    save_every: int = 4  # steps between an edge's checkpoints


@dataclass(frozen=True, slots=True)
class AbuseSettings:
    """Attack a cloud as strangers and tenants would, and an edge as a cloud would; hold the cost to fixed ceilings.

    Each attack on a worker is made alone, while its memory, descriptors and processor time are counted, and beside a
    tenant that behaves, whose latency is compared with its calm one. An attack on an edge must end with the error that
    the edge documents. Servers with planted weaknesses, and edges without a bound, are measured last: each must be
    caught. Exits with 1 where a ceiling is broken or a planted weakness is not caught.

    Example: isthmus bench abuse --json
    """

    model: _Model = "smollm2-135m"
    edge_layers: _EdgeLayers = "2:2"
    attacks: Annotated[str, typer.Option(help="Attacks, comma-separated; by default all.")] = ""
    seconds: Annotated[float, typer.Option(min=0.5, help="For which each attack on a worker goes on, twice.")] = 5.0
    threads: Annotated[int, typer.Option(min=1, help="torch threads of the worker.")] = 1


MEASUREMENTS: Final = {
    "parity": Measurement(ParitySettings, "benchmarks.parity:run_parity"),
    "step": Measurement(StepSettings, "benchmarks.step:run_step"),
    "curve": Measurement(CurveSettings, "benchmarks.curve:run_curve"),
    "kernels": Measurement(
        KernelSettings, "benchmarks.kernels_bench:run_kernels", "benchmarks.kernels_bench:show", folder="none"
    ),
    "placements": Measurement(
        PlacementSettings, "placements.placements:run_placements", "placements.placement_figures:show", folder="none"
    ),
    "codecs": Measurement(
        CodecSettings, "precision.codec_bench:run_codecs", "precision.codec_bench:show", folder="none"
    ),
    "quantize": Measurement(
        QuantizeSettings, "precision.quantize_bench:run_quantize", "precision.quantize_bench:show", folder="none"
    ),
    "tenants": Measurement(TenantsFlags, "serving.tenants_command:run", folder="temporary"),
    "qos": Measurement(QosFlags, "serving.qos_command:run", "serving.qos_command:show", folder="none"),
    "faults": Measurement(FaultSettings, "rigs.faults.faults:run_faults"),
    "link": Measurement(LinkSettings, "rigs.network.link_bench:run_link"),
    "chaos": Measurement(ChaosSettings, "rigs.chaos.chaos_bench:run_chaos"),
    "abuse": Measurement(
        AbuseSettings,
        "rigs.abuse.abuse_bench:run_abuse",
        "rigs.abuse.abuse_bench:show",
        passed=("held", "planted_caught"),
    ),
}
"""The commands of `isthmus bench` by name, in the order of its help."""
