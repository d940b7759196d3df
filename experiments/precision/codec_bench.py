"""What each codec costs in bytes, in the direction of the adapters' gradients, and in the loss after a whole run.

The gradients are compared with those over fp32 on several micro-batches, after some steps over fp32, so that nothing of
the adapter is zero any more. The runs are `isthmus edge train` as in `isthmus.experiments.placements.placement_scores`,
with the same data, order and seed; each is a cell on the disk.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.common.torch_threads import torch_threads
from isthmus.edge.client.link import connect
from isthmus.edge.codecs.codec_choice import cosine
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Batch, Batches
from isthmus.edge.training.evaluation import to_device
from isthmus.edge.training.methods import build_peft, trained
from isthmus.edge.training.precision import computing_in
from isthmus.experiments.harness.bench_settings import CodecSettings
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import LocalCloud, working_folder
from isthmus.experiments.placements.placement_modes import Mode
from isthmus.experiments.placements.placement_scores import Regime, Scorer, one_rate_regime
from isthmus.experiments.placements.placements import CELLS, clouds
from isthmus.experiments.scoring.tasks import Task

_STEPS_BEFORE = 20

BASELINE = "fp32"
CODECS = (
    *(BASELINE, "bf16", "fp32,int8", "int8,fp32", "int8", "int8,int4"),
    *("int4-outliers,int8", "int4-outliers,int4", "int4"),
)
"""What is compared by default: `codec` of `edge train`, forward and backward."""


def run_codecs(settings: CodecSettings) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `runs`, one for each codec: `codec`, `codec_forward` and `codec_backward` (up and down with a slash between
        where they differ), `bytes_per_token` over a whole run with headers and tags, `gradient_cosine` (mean over the
        micro-batches) and `gradient_cosine_min`, `held_out_loss`, and `loss_over_fp32`. Also the settings.

    Raises ConfigError where a codec does not exist.
    """
    parsed = {text: WireCodecs.parse(text) for text in dict.fromkeys((BASELINE, *(settings.codec or CODECS)))}
    regime = one_rate_regime(settings, settings.cloud_dtype)
    cells = Cells(settings.out / CELLS, Console(stderr=True))
    cells.expect(len(parsed) + 1)
    checkpoint = resolve(settings.model)
    with torch_threads(regime.threads), working_folder() as folder, ExitStack() as stack:
        options = ("--threads", str(regime.threads), "--dtype", regime.cloud_dtype)
        cloud = clouds(stack, checkpoint, folder, options)
        scorer = Scorer(checkpoint, settings.edge_layers, regime, cells, folder, cloud)
        cosines = cells.get(
            "codec cosines",
            scorer.settings | {"plan": settings.edge_layers, "codecs": list(parsed), "probes": settings.probes},
            lambda: measure_cosines(cloud(settings.edge_layers), scorer.task, regime, settings.probes, parsed),
        )
        runs = {text: scorer.run(_mode(text), regime.rates[0], 0) for text in parsed}
    baseline = runs[BASELINE]["scores"]["completion_loss"]
    return {
        "runs": [_row(text, codecs, runs[text], cosines[text], baseline) for text, codecs in parsed.items()],
        "settings": {"model": checkpoint.name, "edge_layers": settings.edge_layers, **scorer.settings},
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    for row in result["runs"]:
        print(
            f"{row['codec']:24} {row['bytes_per_token']:7.0f} bytes per token   cosine {row['gradient_cosine']:.4f} "
            f"(least {row['gradient_cosine_min']:.4f})   loss {row['held_out_loss']:.4f}, "
            f"{row['loss_over_fp32'] - 1:+.2%} over fp32"
        )


def _mode(codec: str) -> Mode:
    return Mode(f"codec {codec}", "u_shape", {"codec": codec})


def _row(text: str, codecs: WireCodecs, run: dict[str, Any], cosines: list[float], baseline: float) -> dict[str, Any]:
    report, loss = run["report"], run["scores"]["completion_loss"]
    return {
        "codec": text,
        "codec_forward": _both(codecs.forward_up, codecs.forward_down),
        "codec_backward": _both(codecs.backward_up, codecs.backward_down),
        "bytes_per_token": report["bytes_per_position_up"] + report["bytes_per_position_down"],
        "gradient_cosine": statistics.mean(cosines),
        "gradient_cosine_min": min(cosines),
        "held_out_loss": loss,
        "loss_over_fp32": loss / baseline,
    }


def _both(up: str, down: str) -> str:
    return up if up == down else f"{up}/{down}"


def measure_cosines(
    cloud: LocalCloud, task: Task, regime: Regime, probes: int, parsed: Mapping[str, WireCodecs]
) -> dict[str, list[float]]:
    """The cosine of LoRA's gradients over each codec to those over fp32, on each of some micro-batches."""
    config = TrainConfig(cloud="-", data="-", learning_rate=regime.rates[0], **regime.shared)
    batches = Batches(task.train, regime.batch, task.pad_id, config.seed).epoch(0, 0, _STEPS_BEFORE + probes)
    with connect(cloud.connection, key=cloud.edge_key) as link:
        model = build_peft(link.load_model(), config)
        parameters = list(trained(model).values())

        def gradients(batch: Batch, codecs: WireCodecs) -> list[Tensor]:
            link.codecs = codecs
            with computing_in(regime.precision, model):
                loss = model(**to_device(batch, model), use_cache=False).loss
            return list(torch.autograd.grad(loss, parameters))

        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
        found: dict[str, list[float]] = {text: [] for text in parsed}
        for number, batch in enumerate(batches):
            exact = gradients(batch, WireCodecs())
            if number < _STEPS_BEFORE:
                for parameter, gradient in zip(parameters, exact, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                continue
            for text, codecs in parsed.items():
                found[text].append(cosine(_flat(gradients(batch, codecs)), _flat(exact)))
    return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
