"""The settings of the researcher's commands of `isthmus emulator`, and where the function is that measures.

The docstring of a class is the help of its command; `Measurement` says how the flags come about. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from typer import Option

from isthmus.experiments.harness.bench_flags import Model
from isthmus.experiments.harness.command import Measurement

_AdapterLayers = Annotated[str, Option(help="How many of the first and of the last layers are tuned.")]
_Rank = Annotated[int, Option(min=1, help="Rank of adapters.")]
_Precision = Annotated[str, Option(help="What training computes in: fp32 or bf16.")]
_Device = Annotated[str, Option(help="Where to compute: cpu, cuda, or auto for a GPU if there is one.")]


@dataclass(frozen=True, slots=True)
class TableSettings:
    """Score emulators: what the data owner gains by plug-in, what a thief does, and the references beside them.

    The rows are explained in docs/guides/emulators.md. An interrupted table goes on when the same command is repeated.

    Example: isthmus emulator table --model smollm2-135m --preset fidelity --preset guarded --json
    """

    model: Model = "smollm2-135m"
    tasks: Annotated[
        str, Option(help="Tasks, comma-separated: e2e, openbookqa, arc_easy, sst2; tickets, plays, docstrings.")
    ] = "e2e,openbookqa,arc_easy,sst2"
    preset: Annotated[
        list[str] | None,
        Option(
            help="A preset of `emulator build`, which is built, or a package's folder; several by repeating the flag, "
            "by default all presets. Steps, rank and learning rate are the package's, or else the presets'."
        ),
    ] = None
    adapter_layers: Annotated[
        str | None,
        Option(help="How many of the first and of the last layers are the edge's; default: as the presets have it."),
    ] = None
    split_layers: Annotated[str, Option(help="The plan of the split training that they are compared with.")] = "2:2"
    seeds: Annotated[int, Option(min=1, help="How many seeds.")] = 5
    few_seeds: Annotated[
        int, Option(min=1, help="Seeds of the costlier rows: thief, split training, public alone, other bridges.")
    ] = 2
    rows: Annotated[
        str,
        Option(
            help="Which rows are made beside zero-shot, reference and floor, comma-separated; default: all. emulator "
            "tuned and thief bring edge bridge along.",
            show_default=False,
        ),
    ] = ""
    public: Annotated[int, Option(min=1, help="Tokens of a task's public slice.")] = 20_000
    private: Annotated[int, Option(min=1, help="Texts to train on at most.")] = 1000
    batch: Annotated[int, Option(min=1, help="Examples of a step.")] = 4
    max_length: Annotated[int, Option(min=8, help="Tokens of an example at most.")] = 256
    rate: Annotated[
        float | None, Option(min=0, help="Learning rate over emulators; default: what each package advises.")
    ] = None
    layers: Annotated[
        str | None,
        Option(help="The edge's layers that get adapters: above, or all; default: what each package advises."),
    ] = None
    adapter_rates: Annotated[str, Option(help="Candidate learning rates where adapters are trained.")] = (
        "1e-3,3e-3,1e-2"
    )
    whole_rates: Annotated[str, Option(help="Candidate learning rates where all weights of a model are trained.")] = (
        "3e-5,1e-4,3e-4"
    )
    text: Annotated[
        Path | None,
        Option(help="Public text to choose layers, fit bridges and distil by; default: the model's own writing."),
    ] = None
    text_length: Annotated[int, Option(min=2, help="Tokens of a block of the text.")] = 256
    precision: _Precision = "fp32"
    score_precision: Annotated[str, Option(help="What scoring computes in: fp32 or bf16.")] = "fp32"
    test: Annotated[int | None, Option(min=2, help="Held-out documents of a task; default: 160 of e2e, else 200.")] = (
        None
    )
    validation: Annotated[int, Option(min=1, help="Examples of the training file that rates are chosen by.")] = 64
    data_folder: Annotated[
        Path | None, Option(help="Where the tasks lie; default: shared/data beside the checkout.")
    ] = None
    device: _Device = "auto"
    threads: Annotated[int | None, Option(min=1, help="Threads of torch.")] = None
    figure: Annotated[
        Path | None, Option(help="PNG to draw plug-in against a thief to, a point for each emulator and task.")
    ] = None
    out: Annotated[Path, Option(help="Folder for packages and finished runs; the same command goes on there.")] = Path(
        "isthmus-table"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """Run tasks of lm-eval's harness on a whole model, on a package's emulator, or on either with a tuned adapter.

    Example: isthmus emulator score --package package --adapter run/adapter --tasks my_task --include-path tasks --json
    """

    tasks: Annotated[str, Option(help="Tasks of lm-eval, comma-separated.")]
    model: Annotated[str | None, Option(help="The whole model, as for `build`.")] = None
    package: Annotated[Path | None, Option(help="A package, whose emulator stands for the middle.")] = None
    adapter: Annotated[Path | None, Option(help="An adapter on it; on the whole model this is plug-in.")] = None
    include_path: Annotated[Path | None, Option(help="Folder with YAML files of tasks of your own.")] = None
    limit: Annotated[int | None, Option(min=1, help="Documents of each task; all by default.")] = None
    batch: Annotated[int, Option(min=1, help="Sequences of a forward.")] = 16
    precision: Annotated[str, Option(help="What the forward computes in: fp32 or bf16.")] = "fp32"
    device: _Device = "auto"


@dataclass(frozen=True, slots=True)
class LocalCostSettings:
    """Compare tokens/s and peak memory of local tuning with fine-tuning of the whole model and with LoRA on it.

    Example: isthmus emulator cost --model smollm2-135m --keep 0.5 --json
    """

    model: Model = "smollm2-135m"
    keep: Annotated[float, Option(help="Share of the middle's layers that the emulator keeps.")] = 0.5
    method: Annotated[str, Option(help="The emulator's recipe, as for `build`.")] = "uniform"
    text: Annotated[Path | None, Option(help="Public text, for a recipe that needs it.")] = None
    adapter_layers: _AdapterLayers = "2:2"
    batch: Annotated[int, Option(min=1, help="Sequences of a step.")] = 4
    seq: Annotated[int, Option(min=2, help="Tokens of a sequence.")] = 128
    rounds: Annotated[int, Option(min=1, help="Steps of each kind, in turns.")] = 7
    rank: _Rank = 8
    precision: _Precision = "fp32"
    threads: Annotated[int, Option(min=1, help="Threads of torch in each process.")] = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainSettings:
    """Pretrain a tiny model of any family on public text, to run the table on a second architecture.

    Example: isthmus emulator pretrain --family qwen3 --text public.txt --out tiny-qwen3
    """

    out: Annotated[Path, Option(help="Folder of the model; must not exist.")]
    text: Annotated[Path, Option(help="Public text, .txt, or .jsonl with `text`.")]
    family: Annotated[str, Option(help="Architecture: gpt2, qwen3, llama, …")] = "gpt2"
    steps: Annotated[int, Option(min=1, help="Optimizer steps.")] = 600
    layers: Annotated[int, Option(min=3, help="Decoder layers.")] = 10
    hidden: Annotated[int, Option(min=32, help="Width of the hidden states, a multiple of 32.")] = 96
    vocabulary: Annotated[int, Option(min=260, help="Tokens of the tokenizer.")] = 1024
    batch: Annotated[int, Option(min=1, help="Blocks of a step.")] = 16
    length: Annotated[int, Option(min=2, help="Tokens of a block.")] = 128
    learning_rate: Annotated[float, Option(min=0, help="Peak of AdamW's learning rate.")] = 2e-3
    seed: Annotated[int, Option(min=0, help="Of the weights and of the order of the text.")] = 0
    threads: Annotated[int | None, Option(min=1, help="Threads of torch.")] = None


MEASUREMENTS: Final = {
    "table": Measurement(TableSettings, "offsite.table:run_table", "offsite.table_rows:show", folder="none"),
    "score": Measurement(ScoreSettings, "scoring.task_scoring:run_score", "scoring.task_scoring:show", folder="none"),
    "cost": Measurement(
        LocalCostSettings, "offsite.local_cost:run_cost", "offsite.local_cost:show", folder="temporary"
    ),
    "pretrain": Measurement(PretrainSettings, "offsite.pretrain:run_pretrain", folder="none"),
}
"""The researcher's commands by name."""
