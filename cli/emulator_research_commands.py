"""The researcher's commands for emulators: `isthmus emulator table | score | cost | pretrain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.common.readable import lines
from isthmus.experiments.harness.bench_flags import names_of, numbers_of, precision_of, to_its_end

if TYPE_CHECKING:
    from isthmus.experiments.offsite.table import TableSettings

app = typer.Typer(no_args_is_help=True)

Model = Annotated[str, typer.Option(help="A name (smollm2-135m), a local folder, a GGUF file or a hub id.")]
AdapterLayers = Annotated[str, typer.Option(help="How many of the first and of the last layers are tuned.")]
Tasks = Annotated[str, typer.Option(help="Tasks, comma-separated: e2e, openbookqa, arc_easy, sst2, text:PATH.")]
Methods = Annotated[
    str,
    typer.Option(
        help="Ways to make the emulator, comma-separated: recipes of `emulator build`, with +distilled at the end of "
        "those to distil, or folders of emulators or packages."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder for emulators and finished pieces; the same command goes on there.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps of every training run.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples of a step.")]
MaxLength = Annotated[int, typer.Option(min=8, help="Tokens of an example at most.")]
Trainables = Annotated[
    str, typer.Option(help="What is trained on the edge's layers: full, lora, bottleneck, bitfit, …")
]
Rank = Annotated[int, typer.Option(min=1, help="Rank of adapters.")]
Rates = Annotated[str, typer.Option(help="Candidate learning rates where the edge's layers are trained whole.")]
AdapterRates = Annotated[str, typer.Option(help="Candidate learning rates where adapters are trained.")]
WholeRates = Annotated[str, typer.Option(help="Candidate learning rates where all weights of a model are trained.")]
Text = Annotated[
    Path | None,
    typer.Option(
        help="Public text to choose layers, fit bridges and distil by; default: Shakespeare of the data folder."
    ),
]
DistillSteps = Annotated[int, typer.Option(min=1, help="Steps of the distillation.")]
DistillBatch = Annotated[int, typer.Option(min=1, help="Blocks of text of a step of it.")]
DistillRate = Annotated[float, typer.Option(min=0, help="Peak of its learning rate.")]
MseWeight = Annotated[float, typer.Option(min=0, help="Its weight of the hidden states' error.")]
LmWeight = Annotated[float, typer.Option(min=0, help="Its weight of the language model's loss.")]
TextLength = Annotated[int, typer.Option(min=2, help="Tokens of a block of the text.")]
Precision = Annotated[str, typer.Option(help="What training computes in: fp32 or bf16.")]
ScorePrecision = Annotated[str, typer.Option(help="What scoring computes in: fp32 or bf16.")]
Test = Annotated[int | None, typer.Option(min=2, help="Held-out documents of a task; default: 160 of e2e, else 200.")]
Validation = Annotated[int, typer.Option(min=1, help="Examples of the training file that rates are chosen by.")]
DataFolder = Annotated[Path | None, typer.Option(help="Where the tasks lie; default: shared/data beside the checkout.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, or auto for a GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RATES, ADAPTER_RATES, WHOLE_RATES = "1e-4,3e-4,1e-3", "1e-3,3e-3,1e-2", "3e-5,1e-4,3e-4"


@app.command()
def table(
    model: Model = "smollm2-135m",
    tasks: Tasks = "e2e,openbookqa,arc_easy,sst2",
    methods: Methods = "uniform,crash,importance,importance+distilled",
    keep: Annotated[
        str, typer.Option(help="Share of the middle's layers that the emulators keep; several, comma-separated.")
    ] = "0.5",
    adapter_layers: AdapterLayers = "2:2",
    seeds: Seeds = 3,
    steps: Steps = 40,
    batch: Batch = 8,
    max_length: MaxLength = 256,
    trainables: Trainables = "full",
    rank: Rank = 8,
    learning_rates: Rates = RATES,
    adapter_rates: AdapterRates = ADAPTER_RATES,
    whole_rates: WholeRates = WHOLE_RATES,
    text: Text = None,
    text_length: TextLength = 256,
    distill_steps: DistillSteps = 400,
    distill_batch: DistillBatch = 8,
    distill_learning_rate: DistillRate = 3e-4,
    mse_weight: MseWeight = 30.0,
    lm_weight: LmWeight = 1.0,
    precision: Precision = "fp32",
    score_precision: ScorePrecision = "fp32",
    test: Test = None,
    validation: Validation = 64,
    data_folder: DataFolder = None,
    device: Device = "auto",
    threads: Threads = None,
    whole_runs: Annotated[
        bool, typer.Option(help="Whether the whole model is fine-tuned too, and tuned with LoRA, for comparison.")
    ] = True,
    figure: Annotated[
        Path | None,
        typer.Option(help="PNG to draw plug-in's recovery against a thief's to, a point for each emulator."),
    ] = None,
    out: Out = Path("isthmus-table"),
    as_json: AsJson = False,
) -> None:
    """Score emulators: what the data owner gains by plug-in, what a thief does, and the references beside them.

    With several shares to keep and --figure, this is the frontier between the two. An interrupted table goes on when
    the same command is repeated.

    Example: isthmus emulator table --model smollm2-135m --tasks e2e,openbookqa,arc_easy,sst2 --json
    """
    settings = _settings(locals())
    from rich.console import Console

    from isthmus.common.figures import plotting
    from isthmus.experiments.offsite.frontier import draw
    from isthmus.experiments.offsite.table import run_table
    from isthmus.experiments.offsite.table_rows import show

    if figure is not None:
        plotting()  # a missing package is told before the long run, not after it
    result = to_its_end(lambda: run_table(settings))
    if figure is not None:
        draw(result["methods"], figure, f"{model}, {tasks}")
    if as_json:
        typer.echo(json.dumps(result))
    else:
        show(result, Console())


@app.command()
def score(
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, comma-separated.")],
    model: Annotated[str | None, typer.Option(help="The whole model, as for `build`.")] = None,
    package: Annotated[Path | None, typer.Option(help="A package, whose emulator stands for the middle.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter on it; on the whole model this is plug-in.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with YAML files of tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; all by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a forward.")] = 16,
    precision: Annotated[str, typer.Option(help="What the forward computes in: fp32 or bf16.")] = "fp32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Run tasks of lm-eval's harness on a whole model, on a package's emulator, or on either with a tuned adapter.

    Example: isthmus emulator score --package package --adapter run/adapter --tasks my_task --include-path tasks --json
    """
    from isthmus.emulator.package.build import pick_device
    from isthmus.experiments.scoring.task_scoring import ScoreSettings, run_score

    settings = ScoreSettings(
        tasks=names_of(tasks, "tasks"),
        model=model,
        package=package,
        adapter=adapter,
        include_path=include_path,
        limit=limit,
        batch=batch,
        precision=precision_of(precision, "precision"),
        device=pick_device(device),
    )
    result = to_its_end(lambda: run_score(settings))
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"{result['model']}{', with the adapter' if result['adapter'] else ''}")
    for name, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            typer.echo(f"{name:24} {metric:16} {value:.4f}")


@app.command()
def cost(
    model: Model = "smollm2-135m",
    keep: Annotated[float, typer.Option(help="Share of the middle's layers that the emulator keeps.")] = 0.5,
    method: Annotated[str, typer.Option(help="The emulator's recipe, as for `build`.")] = "uniform",
    text: Annotated[Path | None, typer.Option(help="Public text, for a recipe that needs it.")] = None,
    adapter_layers: AdapterLayers = "2:2",
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 4,
    seq: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each kind, in turns.")] = 7,
    rank: Rank = 8,
    precision: Precision = "fp32",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch in each process.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Compare tokens/s and peak memory of local tuning with fine-tuning of the whole model and with LoRA on it.

    Example: isthmus emulator cost --model smollm2-135m --keep 0.5 --json
    """
    from isthmus.experiments.harness.launch import working_folder
    from isthmus.experiments.offsite.local_cost import CostSettings, run_cost

    settings = CostSettings(
        model=model,
        keep=keep,
        method=method,
        text=text,
        adapter_layers=adapter_layers,
        batch=batch,
        seq=seq,
        rounds=rounds,
        rank=rank,
        precision=precision_of(precision, "precision"),
        threads=threads,
    )
    with working_folder() as folder:
        result = to_its_end(lambda: run_cost(settings, folder))
    if as_json:
        typer.echo(json.dumps(result))
        return
    for row in result["runs"]:
        line = f"{row['kind']:18} {row['tokens_per_s']:8.0f} tokens/s {row['model_bytes'] / 2**20:8.0f} MiB"
        if "faster_than_lora_full" in row:
            line += (
                f"   {row['faster_than_full_fine_tuning']:.2f} x faster and "
                f"{row['less_memory_than_full_fine_tuning']:.2f} x smaller than full fine-tuning; "
                f"{row['faster_than_lora_full']:.2f} x and {row['less_memory_than_lora_full']:.2f} x than LoRA on the "
                "full model"
            )
        typer.echo(line)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Folder of the model; must not exist.")],
    text: Annotated[Path, typer.Option(help="Public text, .txt, or .jsonl with `text`.")],
    family: Annotated[str, typer.Option(help="Architecture: gpt2, qwen3, llama, …")] = "gpt2",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 600,
    layers: Annotated[int, typer.Option(min=3, help="Decoder layers.")] = 10,
    hidden: Annotated[int, typer.Option(min=32, help="Width of the hidden states, a multiple of 32.")] = 96,
    vocabulary: Annotated[int, typer.Option(min=260, help="Tokens of the tokenizer.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Blocks of a step.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 128,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak of AdamW's learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the order of the text.")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Pretrain a tiny model of any family on public text, to run the table on a second architecture.

    Example: isthmus emulator pretrain --family qwen3 --text public.txt --out tiny-qwen3
    """
    from isthmus.experiments.offsite.pretrain import PretrainSettings, run_pretrain

    settings = PretrainSettings(
        family=family,
        text=text,
        out=out,
        steps=steps,
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        batch=batch,
        length=length,
        learning_rate=learning_rate,
        seed=seed,
        threads=threads,
    )
    result = to_its_end(lambda: run_pretrain(settings))
    if as_json:
        typer.echo(json.dumps(result))
        return
    for line in lines(result, 24):
        typer.echo(line)


def _settings(given: dict[str, Any]) -> TableSettings:
    """The settings of a table, of the command's parameters by name."""
    from isthmus.emulator.distill.distillation import DistillConfig
    from isthmus.emulator.package.build import pick_device
    from isthmus.experiments.offsite.table import TableSettings
    from isthmus.experiments.offsite.table_lab import Regime
    from isthmus.experiments.scoring.tasks import Sizes

    precision = precision_of(given["precision"], "precision")
    return TableSettings(
        model=given["model"],
        tasks=names_of(given["tasks"], "tasks"),
        out=given["out"],
        methods=names_of(given["methods"], "methods"),
        keeps=numbers_of(given["keep"], "keep"),
        adapter_layers=given["adapter_layers"],
        seeds=given["seeds"],
        regime=Regime(
            trainables=given["trainables"],
            steps=given["steps"],
            batch=given["batch"],
            max_length=given["max_length"],
            rank=given["rank"],
            weight_rates=numbers_of(given["learning_rates"], "learning-rates"),
            adapter_rates=numbers_of(given["adapter_rates"], "adapter-rates"),
            whole_rates=numbers_of(given["whole_rates"], "whole-rates"),
            precision=precision,
            score_precision=precision_of(given["score_precision"], "score-precision"),
        ),
        sizes=Sizes(test=given["test"], validation=given["validation"], max_length=given["max_length"]),
        text=given["text"],
        text_length=given["text_length"],
        distill=DistillConfig(
            steps=given["distill_steps"],
            batch=given["distill_batch"],
            learning_rate=given["distill_learning_rate"],
            mse_weight=given["mse_weight"],
            lm_weight=given["lm_weight"],
            precision=precision,
        ),
        data_folder=given["data_folder"],
        whole_runs=given["whole_runs"],
        device=pick_device(given["device"]),
        threads=given["threads"],
    )
