"""What fewer bits for the backbone's weights cost: memory of the span, time of a step, and loss after the same tuning.

Steps are those of `isthmus bench step`, next to a single process in fp32. Losses are of `isthmus edge train` on real
data, scored on test data over the span as the cloud serves it, which is what a data owner has. Each result is a cell on
the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.checkpoints.span_format import NONE
from isthmus.backbone.checkpoints.weight_quantization import QUANTIZERS, quantizer_of
from isthmus.common.errors import ConfigError
from isthmus.common.torch_threads import torch_threads
from isthmus.edge.client.link import connect
from isthmus.experiments.benchmarks.step import run_step
from isthmus.experiments.harness.bench_settings import QuantizeSettings, StepSettings
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import working_folder
from isthmus.experiments.placements.placement_modes import Mode
from isthmus.experiments.placements.placement_scores import Regime, Scorer, described, one_rate_regime
from isthmus.experiments.placements.placements import CELLS, clouds

FORMS = {NONE: ("fp32", NONE), "bf16": ("bf16", NONE), **{name: ("bf16", name) for name in QUANTIZERS}}
"""What is compared: dtype that the cloud computes in, and how it holds the weights."""


def run_quantize(settings: QuantizeSettings) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `runs`, one for each form: `quantize`, `cloud_dtype`, `span_bytes` (the span's tensors in the cloud's memory),
        `step_ratio` (over a single fp32 process with the same trainables, median), `held_out_loss`, and
        `zero_shot_loss` of the same span without an adapter. Also the settings.

    Raises ConfigError where there is no such form, or its package is not installed.
    """
    forms = settings.form or list(FORMS)
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise ConfigError(f"there is no form {unknown[0]!r} of the backbone: choose among {', '.join(FORMS)}")
    for form in forms:
        quantizer_of(FORMS[form][1])
    step = StepSettings(
        settings.model,
        settings.edge_layers,
        batch=settings.batch,
        seq=settings.seq,
        pairs=settings.pairs,
        threads=settings.threads,
    )
    regime = one_rate_regime(settings, "fp32")
    cells = Cells(settings.out / CELLS, Console(stderr=True))
    cells.expect(3 * len(forms))
    return {
        "runs": [_row(form, step, regime, cells) for form in forms],
        "settings": {"step": asdict(step), "regime": described(regime)},
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    for row in result["runs"]:
        print(
            f"{row['quantize']:5} computing in {row['cloud_dtype']}   span {row['span_bytes'] / 2**20:7.1f} MiB   "
            f"step {row['step_ratio']:.2f} of a single process   loss {row['held_out_loss']:.4f} "
            f"(untuned {row['zero_shot_loss']:.4f})"
        )


def _row(form: str, step: StepSettings, regime: Regime, cells: Cells) -> dict[str, Any]:
    dtype, quantize = FORMS[form]
    timed = replace(step, cloud_dtype=dtype, quantize=quantize)
    with working_folder() as folder:
        with torch_threads(timed.threads):
            steps = cells.get(f"step {form}", asdict(timed), lambda: run_step(timed, folder / "step"))
        with torch_threads(regime.threads):
            scores, zero_shot = _scores(form, timed, replace(regime, cloud_dtype=dtype), cells, folder)
    return {
        "quantize": form,
        "cloud_dtype": dtype,
        "span_bytes": steps["span_bytes"],
        "step_ratio": steps["ratio"],
        "held_out_loss": scores["completion_loss"],
        "zero_shot_loss": zero_shot["completion_loss"],
        "scores": scores,
    }


def _scores(
    form: str, step: StepSettings, regime: Regime, cells: Cells, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """The scores after tuning and before, by metric, over the span as it is served."""
    plan, checkpoint = step.edge_layers, resolve(step.model)
    with ExitStack() as stack:
        options = ("--threads", str(regime.threads), "--dtype", step.cloud_dtype, "--quantize", step.quantize)
        cloud = clouds(stack, checkpoint, folder / "scores", options)

        @contextmanager
        def served() -> Iterator[Any]:
            started = cloud(plan)
            with connect(started.connection, key=started.edge_key) as link:
                yield link.load_model()

        scorer = Scorer(checkpoint, plan, regime, cells, folder, cloud, served)
        run = scorer.run(Mode(f"quantize {form}", "u_shape"), regime.rates[0], 0)
        return run["scores"], scorer.zero_shot(f"zero-shot {form}")
