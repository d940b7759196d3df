"""What local tuning costs: a step over an emulator against one of the whole model, in time and in memory.

Each way to tune runs in a process of its own, and they take turns, one step each. Ratios are medians over the rounds.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.precision import hold_frozen_linears
from isthmus.emulator.compress.emulator_files import load_emulator, save_emulator
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.public_text import load_blocks
from isthmus.emulator.compress.recipe import Recipe
from isthmus.experiments.harness.bench_flags import precision_of
from isthmus.experiments.harness.emulator_settings import LocalCostSettings
from isthmus.experiments.harness.launch import stderr_progress
from isthmus.experiments.harness.process_memory import own_bytes
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve
from isthmus.experiments.harness.single_process import random_batch, stepper, whole

WARM_UP = 2
_MODULE = "isthmus.experiments.offsite.local_cost"

KINDS = ("full_fine_tuning", "lora_full", "local_layers", "local_lora")
"""All weights of the whole model; LoRA in all its layers; over the emulator, the edge's layers whole; LoRA in them."""


def run_cost(settings: LocalCostSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `runs`: for each kind `tokens_per_s`, `step_s`, `peak_bytes` and `model_bytes` (the peak without what the
        process held before it had a model), and for the two local ones how many times faster and smaller they are:
        `faster_than_full_fine_tuning`, `less_memory_than_full_fine_tuning` (of `model_bytes`), and the same for
        `lora_full`. Beside it the settings.
    """
    precision_of(settings.precision, "precision")  # before the first process finds it wrong
    _build(settings, folder / "emulator")
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        shared = asdict(settings) | {"emulator": str(folder / "emulator"), "text": None}
        workers = {
            kind: stack.enter_context(TaskProcess(kind, _MODULE, shared | {"kind": kind}, threads=settings.threads))
            for kind in KINDS
        }
        for worker in workers.values():
            worker.answer()  # it has its model
        advance = stack.enter_context(stderr_progress("rounds", WARM_UP + settings.rounds))
        for number in range(WARM_UP + settings.rounds):
            for kind in KINDS[:: 1 if number % 2 else -1]:
                seconds[kind].append(workers[kind].ask("step"))
            advance()
        memory = {kind: worker.ask("memory") for kind, worker in workers.items()}
    seconds = {kind: values[WARM_UP:] for kind, values in seconds.items()}
    runs = [_row(kind, settings, seconds, memory) for kind in KINDS]
    described = asdict(settings) | {"text": None if settings.text is None else settings.text.name}
    return {"runs": runs, "settings": described}


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    for row in result["runs"]:
        line = f"{row['kind']:18} {row['tokens_per_s']:8.0f} tokens/s {row['model_bytes'] / 2**20:8.0f} MiB"
        if "faster_than_lora_full" in row:
            line += (
                f"   {row['faster_than_full_fine_tuning']:.2f} x faster and "
                f"{row['less_memory_than_full_fine_tuning']:.2f} x smaller than full fine-tuning; "
                f"{row['faster_than_lora_full']:.2f} x and {row['less_memory_than_lora_full']:.2f} x than LoRA on the "
                "full model"
            )
        print(line)


def _row(
    kind: str, settings: LocalCostSettings, seconds: dict[str, list[float]], memory: dict[str, dict[str, int]]
) -> dict[str, Any]:
    step = statistics.median(seconds[kind])
    row = {"kind": kind, "tokens_per_s": settings.batch * settings.seq / step, "step_s": step, **memory[kind]}
    if kind.startswith("local"):
        for other in ("full_fine_tuning", "lora_full"):
            ratios = [theirs / ours for ours, theirs in zip(seconds[kind], seconds[other], strict=True)]
            row[f"faster_than_{other}"] = statistics.median(ratios)
            row[f"less_memory_than_{other}"] = memory[other]["model_bytes"] / memory[kind]["model_bytes"]
    return row


def _build(settings: LocalCostSettings, folder: Path) -> None:
    checkpoint = resolve(settings.model)
    recipe = Recipe.parse(settings.method, settings.keep)
    blocks = None
    if settings.text is not None and recipe.needs_text:
        blocks = load_blocks(settings.text, load_tokenizer(checkpoint.folder), 256)
    plan = SplitPlan.parse(settings.adapter_layers, checkpoint.config.num_hidden_layers)
    save_emulator(build_emulator(checkpoint, plan, recipe, blocks), folder)


# Inside one of the processes ------------------------------------------------------------------------------------------


def _main(parent: Parent) -> None:
    task = parent.task
    kind, emulator = task.pop("kind"), Path(task.pop("emulator"))
    settings = LocalCostSettings(**task)
    set_torch_threads(settings.threads)
    before = own_bytes("VmRSS")
    model = _model(kind, settings, emulator)
    batch = random_batch(model.config.vocab_size, settings.batch, settings.seq)
    step = stepper(model, batch, precision_of(settings.precision, "precision"))
    parent.say("ready")
    for question in parent.questions():
        if question == "step":
            parent.say(step())
        else:
            peak = own_bytes("VmHWM")
            parent.say({"peak_bytes": peak, "model_bytes": peak - before})


def _model(kind: str, settings: LocalCostSettings, emulator: Path) -> Any:
    checkpoint = resolve(settings.model)
    if kind == "full_fine_tuning":
        return whole(checkpoint).requires_grad_(True)
    precision = precision_of(settings.precision, "precision")
    method: Any = "full" if kind == "local_layers" else "lora"
    config = TuningConfig(data="-", method=method, rank=settings.rank, precision=precision)
    if kind == "lora_full":
        base: Any = whole(checkpoint)
    else:
        plan = SplitPlan.parse(settings.adapter_layers, checkpoint.config.num_hidden_layers)
        base = load_edge_parts(checkpoint, plan, load_emulator(emulator, checkpoint.config))
    model = build_peft(base, config)
    hold_frozen_linears(model, config)
    return model


if __name__ == "__main__":
    serve(_main)
