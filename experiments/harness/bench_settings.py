"""The settings of each command of `isthmus bench`, and where the function is that measures.

The docstring of a class is the help of its command; `Measurement` says how the flags come about. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from typer import Option

from isthmus.common.errors import ConfigError
from isthmus.experiments.harness import bench_flags as flags
from isthmus.experiments.harness.command import Measurement
from isthmus.experiments.harness.generation_settings import GENERATION
from isthmus.experiments.harness.rig_settings import RIGS


@dataclass(frozen=True, slots=True)
class ParitySettings:
    """Compare a split run (real processes, sealed gRPC) with a single-process run, bit for bit.

    Example: isthmus bench parity --model smollm2-135m --steps 10 --json
    """

    model: flags.Model = "smollm2-135m"
    steps: flags.Steps = 10
    edge_layers: flags.EdgeLayers = "2:2"
    codec: flags.Codec = "fp32"
    dtype: Annotated[str, Option("--cloud-dtype", help="What the cloud computes in: fp32 or bf16.")] = "fp32"
    batch: flags.Examples = 4
    seq: Annotated[int, Option(min=2, help="Tokens per example at most.")] = 128
    learning_rate: Annotated[float, Option(min=0, help="Of AdamW.")] = 1e-3
    threads: flags.Threads = 1
    data: Annotated[str, Option(help="A data file as for `edge train`; by default a few sentences of real text.")] = ""
    pipeline: Annotated[int, Option(min=1, help="Actors of the cloud that its layers are divided among.")] = 1


@dataclass(frozen=True, slots=True)
class StepSettings:
    """Compare the time of a split step with that of a single-process PEFT step.

    With --package it also compares a step of `emulator tune` on that package with a step of `edge train`, in the first
    epoch and later. These are whole runs of the two commands on the same texts, in turns.

    Example: isthmus bench step --model smollm2-135m --cloud-dtype bf16 --codec bf16 --json
    """

    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    codec: flags.Codec = "fp32"
    cloud_dtype: flags.CloudDtype = "fp32"
    quantize: Annotated[str, Option(help="How the cloud holds its weights: none, int8 or nf4.")] = "none"
    batch: Annotated[int, Option(min=1, help="Sequences per step.")] = 4
    seq: Annotated[int, Option(min=2, help="Tokens per sequence.")] = 128
    pairs: Annotated[int, Option(min=5, help="Steps of either kind, in turns.")] = 9
    threads: Annotated[int, Option(min=1, help="torch threads on either side and in the single process.")] = 2
    package: Annotated[Path | None, Option(help="Folder of a package with advice for tuning.")] = None
    rounds: Annotated[int, Option(min=1, help="With --package: runs of either command.")] = 3


@dataclass(frozen=True, slots=True)
class PathSettings:
    """Count the source files whose functions run for one forward, at the edge and in the cloud.

    Example: isthmus bench path --json
    """

    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSettings:
    """Run `edge train` on real data, and the same in one process; compare the loss curves step by step.

    Example: isthmus bench curve --data tickets.jsonl --steps 200 --figure curve.png --json
    """

    data: Annotated[str, Option(help="A data file as for `edge train`.")]
    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    prompt_template: Annotated[str | None, Option(help="As for `edge train`.")] = None
    completion_template: Annotated[str | None, Option(help="As for `edge train`.")] = None
    steps: flags.Steps = 200
    batch: flags.Examples = 4
    learning_rate: Annotated[float, Option(min=0, help="Peak, of AdamW.")] = 1e-3
    validation_split: Annotated[float, Option(min=0, max=0.9, help="Fraction held out.")] = 0.03
    threads: flags.Threads = 2
    figure: Annotated[Path | None, Option(help="PNG to draw the two curves to (needs matplotlib).")] = None


@dataclass(frozen=True, slots=True)
class KernelSettings:
    """Compare the grouped low-rank product and block quantization with the calls of libraries for the same.

    Example: isthmus bench kernels --threads 2 --json
    """

    rows: Annotated[list[int] | None, Option(min=1, help="Rows of each group, repeatable.")] = None
    rounds: Annotated[int, Option(min=1, help="Runs of each candidate.")] = 15
    threads: Annotated[int, Option(min=1, help="torch threads.")] = 1
    device: Annotated[str | None, Option(help="cpu or cuda; by default cuda where there is such a device.")] = None
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

    model: flags.Model = "smollm2-135m"
    modes: Annotated[str, Option(help="Modes, comma-separated; by default all.")] = ""
    edge_layers: flags.EdgeLayers = "2:2"
    costs: Annotated[bool, Option(help="Whether to measure what a step costs, at fp32.")] = True
    scores: Annotated[bool, Option(help="Whether to train and to score on held-out data.")] = True
    rank: Annotated[int, Option(min=1, help="Rank of the adapters.")] = 8
    target_modules: Annotated[
        str | None, Option(help="Modules that get adapters, comma-separated; the family's usual ones by default.")
    ] = None
    taps: Annotated[int, Option(min=1, help="Layers that the ladder reads.")] = 4
    dropout: Annotated[float, Option(min=0, max=0.99, help="In front of the adapters where costs are measured.")] = 0.1
    batch: Annotated[int, Option(min=1, help="Sequences of a step whose cost is measured.")] = 4
    seq: Annotated[int, Option(min=2, help="Tokens of such a sequence.")] = 128
    rounds: Annotated[int, Option(min=1, help="Steps that count, of each run whose cost is measured.")] = 7
    task: flags.Task = "e2e"
    data_folder: flags.DataFolder = None
    steps: Annotated[int, Option(min=1, help="Optimizer steps of a scored run.")] = 400
    score_batch: Annotated[int, Option(min=1, help="Examples of a step of a scored run.")] = 2
    max_length: flags.MaxLength = 256
    learning_rates: Annotated[str, Option(help="Candidate learning rates, for every mode.")] = "1e-3,3e-3"
    seeds: Annotated[
        int,
        Option(min=1, help="Seeds of the modes that choose sites, and of `edge` or else `single`; one of the others."),
    ] = 3
    test: flags.Test = None
    validation: Annotated[int, Option(min=1, help="Training examples that rates are chosen by.")] = 32
    precision: Annotated[str, Option(help="What the edge of a scored run computes in: fp32 or bf16.")] = "bf16"
    cloud_dtype: Annotated[str, Option(help="What its cloud computes in: fp32 or bf16.")] = "bf16"
    threads: flags.Threads = 1
    figure: Annotated[Path | None, Option(help="PNG of the held-out loss against bytes.")] = None
    budget_figure: Annotated[Path | None, Option(help="PNG of the held-out loss against site traffic.")] = None
    sites_figure: Annotated[Path | None, Option(help="PNG of kill-and-revive's live sites over time.")] = None
    out: flags.Out = Path("isthmus-placements")


@dataclass(frozen=True, slots=True)
class CodecSettings:
    """Compare the wire's codecs: bytes for a token, cosine of the adapters' gradients, loss after a whole run.

    Example: isthmus bench codecs --json

    Two of them: isthmus bench codecs --codec int8 --codec int4-outliers,int4
    """

    model: flags.Model = "smollm2-135m"
    codec: Annotated[
        list[str] | None,
        Option(help="Codecs as `edge train --codec` has them, repeatable; by default a choice of all."),
    ] = None
    edge_layers: flags.EdgeLayers = "2:2"
    task: flags.Task = "e2e"
    data_folder: flags.DataFolder = None
    steps: flags.RunSteps = 200
    batch: flags.StepExamples = 4
    max_length: flags.MaxLength = 256
    learning_rate: flags.OneRate = 1e-3
    test: flags.Test = None
    probes: Annotated[int, Option(min=1, help="Micro-batches that gradients are compared on.")] = 8
    precision: flags.EdgeDtype = "fp32"
    cloud_dtype: flags.CloudDtype = "fp32"
    threads: flags.Threads = 1
    out: flags.Out = Path("isthmus-codecs")


@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """Compare ways of holding the backbone: memory of the span, time of a step, loss after the same tuning.

    Example: isthmus bench quantize --json

    Two of them: isthmus bench quantize --form none --form nf4
    """

    model: flags.Model = "smollm2-135m"
    form: Annotated[
        list[str] | None, Option(help="Any of none (fp32), bf16, int8 and nf4, repeatable; by default all.")
    ] = None
    edge_layers: flags.EdgeLayers = "2:2"
    task: flags.Task = "e2e"
    data_folder: flags.DataFolder = None
    steps: Annotated[int, Option(min=1, help="Optimizer steps of a scored run.")] = 200
    batch: flags.StepExamples = 4
    seq: Annotated[int, Option(min=2, help="Tokens per sequence of a timed step.")] = 128
    pairs: Annotated[int, Option(min=5, help="Timed steps of either kind, in turns.")] = 9
    max_length: flags.MaxLength = 256
    learning_rate: flags.OneRate = 1e-3
    test: flags.Test = None
    precision: flags.EdgeDtype = "fp32"
    threads: flags.Threads = 1
    out: flags.Out = Path("isthmus-quantize")


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """Compare many edges on one cloud with as many single processes: throughput, memory, fairness, losses.

    Example: isthmus bench tenants --n 8 --json
    """

    n: Annotated[int, Option("--n", min=2, help="Tenants.")] = 8
    model: flags.Model = "smollm2-135m"
    tokens: Annotated[int, Option(min=16, help="Tokens of a tenant's step, on average.")] = 64
    edge_layers: flags.EdgeLayers = "2:2"
    steps: Annotated[int, Option(min=2, help="Steps of each tenant that count.")] = 24
    threads: Annotated[
        int | None, Option(min=1, help="torch threads of the cloud; by default all cores that it may use.")
    ] = None
    batching: Annotated[
        Literal["on", "off"], Option(help="Whether the cloud computes several tenants' calls in one pass.")
    ] = "on"
    figure: Annotated[
        Path | None, Option(help="PNG of the throughput against the number of tenants; measures 1, 2, 4 … too.")
    ] = None
    cloud_options: tuple[str, ...] = ()  # further ones of `isthmus cloud serve`


@dataclass(frozen=True, slots=True)
class QosSettings:
    """Compare the scheduler with a textbook's: latency and deadlines of interactive calls, throughput.

    Example: isthmus bench qos --json
    """

    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    loads: Annotated[str, Option(help="Computing time that is asked for over the time there is, comma-separated.")] = (
        "0.4,0.8,1.0,1.2"
    )
    seconds: Annotated[float, Option(min=1, help="For which calls arrive, in each run.")] = 15.0
    interactive_share: Annotated[float, Option(help="Of the arrivals; the others are training.")] = 0.5
    interactive_tokens: Annotated[int, Option(min=1, help="Tokens of an interactive call.")] = 32
    training_tokens: Annotated[int, Option(min=1, help="Tokens of a training call.")] = 64
    deadline: Annotated[float, Option(min=0.01, help="Of interactive calls, in seconds.")] = 1.0
    tenants: Annotated[int, Option(min=1, help="Among whom the calls are drawn.")] = 8
    threads: Annotated[int | None, Option(min=1, help="torch threads; by default all cores that it may use.")] = None
    seed: Annotated[int, Option(help="Of the arrivals.")] = 0
    rounds: Annotated[int, Option(min=1, help="How often both schedulers have their turn.")] = 5

    def __post_init__(self) -> None:
        if not 0 < self.interactive_share < 1:
            raise ConfigError(
                f"an interactive share of {self.interactive_share} leaves nothing to compare: give one between 0 and 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """See what each mechanism of the scheduler is worth: a table of schedulers over the same simulated arrivals.

    Example: isthmus bench scheduler
    """

    seeds: Annotated[int, Option(min=2, help="Simulations of each scene.")] = 5
    steps: Annotated[int, Option(min=2, help="Steps of each edge, in the simulation and in real runs.")] = 24
    loads: Annotated[str, Option(help="Computing time that is asked for over the time there is, comma-separated.")] = (
        "0.4,0.8,1.2,1.6"
    )
    seconds: Annotated[float, Option(min=1, help="Simulated seconds for which calls arrive.")] = 60.0
    deadline: Annotated[float, Option(min=0.01, help="Of interactive calls, in seconds.")] = 1.0
    real: Annotated[
        bool, Option("--real", help="Run `bench tenants` for the rows that it can measure; on a quiet machine.")
    ] = False
    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    n: Annotated[int, Option("--n", min=2, help="Tenants of real runs.")] = 8
    threads: Annotated[int | None, Option(min=1, help="torch threads of real runs' cloud; by default all cores.")] = (
        None
    )


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """Load the edge daemon with clients that ask much, slowly or wrongly, while a job trains.

    Example: isthmus bench daemon --json
    """

    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    steps: flags.Steps = 60
    clients: Annotated[int, Option(min=1, help="Clients of a case; they ask 20 times a second together.")] = 200
    threads: flags.Threads = 1


MEASUREMENTS: Final = {
    "parity": Measurement(ParitySettings, "benchmarks.parity:run_parity"),
    "step": Measurement(StepSettings, "benchmarks.step:run_step"),
    **GENERATION,
    "path": Measurement(PathSettings, "benchmarks.path:run_path", "benchmarks.path:show", folder="temporary"),
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
    "tenants": Measurement(TenantSettings, "serving.tenants_bench:run_tenants", folder="temporary"),
    "qos": Measurement(QosSettings, "serving.qos_bench:run_qos", "serving.qos_bench:show", folder="none"),
    "scheduler": Measurement(
        SchedulerSettings, "serving.scheduler_bench:run_scheduler", "serving.scheduler_bench:show", folder="temporary"
    ),
    "daemon": Measurement(
        DaemonSettings,
        "daemon.daemon_bench:run_daemon",
        "daemon.daemon_bench:show",
        passed=("adapters_identical", "no_errors_5xx"),
    ),
    **RIGS,
}
"""The commands of `isthmus bench` by name, in the order of its help."""
