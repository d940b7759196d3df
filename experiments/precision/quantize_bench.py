"""What fewer bits for the backbone's weights cost: memory of the span, time of a step, and loss after the same tuning.

Steps are those of `isthmus bench step`, next to a single process in fp32. Losses are of `isthmus edge train` on real
data, scored on test data over the span as the cloud serves it, which is what a data owner has. Each piece is a cell on
the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.backbone.checkpoints.span_format import NONE
from isthmus.backbone.checkpoints.weight_quantization import QUANTIZERS, quantizer_of
from isthmus.common.errors import ConfigError
from isthmus.common.torch_threads import torch_threads
from isthmus.edge.client.link import connect
from isthmus.experiments.benchmarks.step import StepSettings, run_step
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import working_folder
from isthmus.experiments.placements.placement_modes import Mode
from isthmus.experiments.placements.placement_scores import Regime, Scorer
from isthmus.experiments.placements.placements import CELLS, clouds

FORMS = {NONE: ("fp32", NONE), "bf16": ("bf16", NONE), **{name: ("bf16", name) for name in QUANTIZERS}}
"""What is compared: dtype that the cloud computes in, and how it holds the weights."""


@dataclass(frozen=True, slots=True)
class QuantizeSettings:
    """What is measured.

    Attributes:
        forms: Some of `FORMS`.
        step: How steps are timed; its dtype and quantization are those of the forms.
        regime: How every run is trained and scored, with the first of its rates; its `cloud_dtype` is the forms'.
        out: Where finished pieces are kept.
    """

    forms: tuple[str, ...]
    step: StepSettings
    regime: Regime
    out: Path


def run_quantize(settings: QuantizeSettings) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `runs`, one for each form: `quantize`, `cloud_dtype`, `span_bytes` (the span's tensors in the cloud's memory),
        `step_ratio` (over a single fp32 process with the same trainables, median), `held_out_loss`, and
        `zero_shot_loss` of the same span without an adapter. Also the settings.

    Raises:
        ConfigError: There is no such form, or its package is not installed.
        IsthmusError: Of whatever kind fits.
    """
    unknown = [form for form in settings.forms if form not in FORMS]
    if unknown:
        raise ConfigError(f"there is no form {unknown[0]!r} of the backbone: choose among {', '.join(FORMS)}")
    for form in settings.forms:
        quantizer_of(FORMS[form][1])
    cells = Cells(settings.out / CELLS, Console(stderr=True))
    cells.expect(3 * len(settings.forms))
    return {
        "runs": [_row(form, settings, cells) for form in settings.forms],
        "settings": {
            "step": asdict(settings.step),
            "regime": {name: value for name, value in asdict(settings.regime).items() if name != "data_folder"},
        },
    }


def _row(form: str, settings: QuantizeSettings, cells: Cells) -> dict[str, Any]:
    dtype, quantize = FORMS[form]
    timed = replace(settings.step, cloud_dtype=dtype, quantize=quantize)
    with working_folder() as folder:
        with torch_threads(timed.threads):
            step = cells.get(f"step {form}", asdict(timed), lambda: run_step(timed, folder / "step"))
        with torch_threads(settings.regime.threads):
            scores, zero_shot = _scores(form, settings, cells, folder)
    return {
        "quantize": form,
        "cloud_dtype": dtype,
        "span_bytes": step["span_bytes"],
        "step_ratio": step["ratio"],
        "held_out_loss": scores["completion_loss"],
        "zero_shot_loss": zero_shot["completion_loss"],
        "scores": scores,
    }


def _scores(
    form: str, settings: QuantizeSettings, cells: Cells, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """The scores after tuning and before, by metric, over the span as it is served."""
    dtype, quantize = FORMS[form]
    regime, plan = replace(settings.regime, cloud_dtype=dtype), settings.step.edge_layers
    checkpoint = resolve(settings.step.model)
    with ExitStack() as stack:
        options = ("--threads", str(regime.threads), "--dtype", dtype, "--quantize", quantize)
        cloud = clouds(stack, checkpoint, folder / "scores", options)

        @contextmanager
        def served() -> Iterator[Any]:
            started = cloud(plan)
            with connect(started.connection, key=started.edge_key) as link:
                yield link.load_model()

        scorer = Scorer(checkpoint, plan, regime, cells, folder, cloud, served)
        run = scorer.run(Mode(f"quantize {form}", "u_shape"), regime.rates[0], 0)
        return run["scores"], scorer.zero_shot(f"zero-shot {form}")
