"""Adapter extraction at sites: the adapters of a run, solved for from a recording of it, beside what they were.

The run is a real one: a cloud that records (`cloud serve --record`) and an edge with LoRA at sites inside it
(`edge train --sites`), which keeps a checkpoint of every step. What step `s` was computed with is in the checkpoint of
step `s - 1`. In the first step LoRA contributes nothing, as its B is zero, so nothing is extracted there.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import ConfigError, DataError
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import run_isthmus, train_flags
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.leak.weights.local_split import LocalSplit
from isthmus.experiments.leak.weights.task_texts import distinct_texts
from isthmus.privacy.attacks.weights.adapter_extraction import AdapterExtraction, ExtractedAdapter
from isthmus.privacy.recording.traffic import Traffic, read_traffic
from isthmus.training import run_checkpoint

_ALPHA = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionSettings:
    """The run that is recorded.

    Attributes:
        model, edge_layers: The model and its split plan.
        task, data_folder: Where the texts come from; see `distinct_texts`.
        sites: As `--sites`.
        steps: Optimizer steps; 2 at least.
        batch: Texts of a step.
        rank: Of LoRA.
        codec: Of the wire.
        record_mib: MiB of the recording at most.
        seed: Of the draw and the training.
        threads: Threads of torch on either side.
    """

    model: str = "smollm2-135m"
    edge_layers: str = "2:2"
    task: str = "e2e"
    data_folder: Path | None = None
    sites: str = "all"
    steps: int = 3
    batch: int = 2
    rank: int = 8
    codec: str = "fp32"
    record_mib: int = 2048
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True, slots=True)
class ExtractionResult:
    """How near the extracted products of LoRA's matrices are to the true ones, over all sites and steps.

    Attributes:
        products: Products that were extracted.
        of: Products that there were, without those of the first step, which are zero.
        positions: Token positions of the step with the fewest, padding included.
        median_error, largest_error: Of the relative errors by the Frobenius norm. A guess of zero has 1.
        largest_own_error: The largest error that the attack itself reckons with, without knowing the true products.
        codec: Of the wire.
    """

    products: int
    of: int
    positions: int
    median_error: float
    largest_error: float
    largest_own_error: float
    codec: str


def measure_extraction(settings: ExtractionSettings, folder: Path) -> ExtractionResult:
    """Record a run, and extract its adapters.

    Args:
        folder: For the run's files; must hold none.

    Raises:
        ConfigError: A setting makes no sense.
        DataError: The data are missing or too few, or nothing was extracted.
        IsthmusError: What cloud and edge raise.
    """
    if settings.steps < 2:
        raise ConfigError(
            f"steps = {settings.steps} gives nothing to extract, as LoRA contributes from step 2 on: give more"
        )
    recording, out = folder / "recording", folder / "run"
    _write_texts(settings, folder)
    serve = ("--edge-layers", settings.edge_layers, "--threads", str(settings.threads))
    record = ("--record", str(recording), "--record-mib", str(settings.record_mib))
    with LocalCloud(folder, settings.model, *serve, *record) as cloud:
        where = {"cloud": cloud.connection_file, "key": cloud.edge_key, "data": folder / "texts.jsonl", "out": out}
        run_isthmus("edge", "train", *train_flags({**where, **run_options(settings)}))
    return extraction_of(read_traffic(recording), out, settings)


def run_options(settings: ExtractionSettings) -> dict[str, object]:
    """What the run has beside its data, cloud and folder, as fields of `TrainConfig`."""
    names = ("sites", "steps", "batch", "rank", "codec", "seed", "threads")
    kept = {"save_every": 1, "keep_checkpoints": settings.steps, "learning_rate": 2e-4}
    # Held-out texts would be sent after the last step, with weights that no checkpoint is of.
    return {"alpha": _ALPHA, "validation_split": 0.0, **kept, **{name: getattr(settings, name) for name in names}}


def extraction_of(traffic: Traffic, out: Path, settings: ExtractionSettings) -> ExtractionResult:
    """Extract the adapters of a recorded run and compare them with its checkpoints.

    Args:
        out: The run's folder.

    Raises:
        DataError: Nothing was extracted.
        CheckpointError: A checkpoint is damaged.
    """
    found = AdapterExtraction().run(traffic)
    if not found:
        raise DataError("the recording has no adapter at a site: give --sites, and two steps or more")
    steps = {step: run_checkpoint.load(out / f"checkpoint-{step - 1}").parameters for step in {f.step for f in found}}
    errors = [_error(each, true_product(steps[each.step], each.sites, _ALPHA / settings.rank)) for each in found]
    positions = {step: sum(f.hidden.shape[:2].numel() for f in traffic.forwards if f.step == step) for step in steps}
    sites = {site for each in traffic.asked for site in each.sites}
    return ExtractionResult(
        products=sum(len(each.sites) for each in found),
        of=len(sites) * (settings.steps - 1),
        positions=min(positions.values()),
        median_error=statistics.median(errors),
        largest_error=max(errors),
        largest_own_error=max(each.error for each in found),
        codec=settings.codec,
    )


def true_product(parameters: Mapping[str, Tensor], sites: tuple[SiteSpec, ...], scale: float) -> Tensor:
    """`scale * B A` of these sites, `[out, in]`, one below the other, from what a run trains.

    Raises:
        DataError: A site has no LoRA there.
    """
    return torch.cat([scale * (_matrix(parameters, site, "B") @ _matrix(parameters, site, "A")) for site in sites])


def _matrix(parameters: Mapping[str, Tensor], site: SiteSpec, which: str) -> Tensor:
    pattern = re.compile(rf"(.*\.)?{site.layer}\.{re.escape(site.part)}\.lora_{which}\b.*")
    for name, value in parameters.items():
        if pattern.fullmatch(name):
            return value
    raise DataError(f"the checkpoint has no LoRA at {site}: extract from the recording of this run")


def _error(found: ExtractedAdapter, true: Tensor) -> float:
    return float((found.product - true).norm() / true.norm())


def _write_texts(settings: ExtractionSettings, folder: Path) -> None:
    """Write as many texts as the run takes in one epoch."""
    split = LocalSplit(settings.model, settings.edge_layers)
    count = settings.steps * settings.batch
    texts = distinct_texts(settings.task, settings.data_folder, split.tokenizer, count, seed=settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        folder / "texts.jsonl",
        ({"text": split.tokenizer.decode(text.input_ids, skip_special_tokens=True)} for text in texts),
    )
