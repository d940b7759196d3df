"""A row's run: a cloud that records, an edge that trains, and what of the recording is attacked.

Tokens are attacked in the evaluation after the last step, which sends private texts that were not trained on through
the front, the bottleneck and the noise as they are then. Labels are attacked in the gradients of the last steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import DataError
from isthmus.common.files import write_atomic
from isthmus.edge.bridge_fit import ordered_blocks
from isthmus.edge.config.client_config import FitConfig
from isthmus.edge.data.batches import Batches, Encoded
from isthmus.edge.data.readers import Example
from isthmus.edge.training.edge_steps import COSTS_FILE
from isthmus.emulator.compress.public_text import documents
from isthmus.emulator.package.manifest import MANIFEST_FILE, sign
from isthmus.emulator.package.package import open_package
from isthmus.experiments.harness.launch import LocalCloud, write_key
from isthmus.experiments.harness.processes import CommandFailedError, run_isthmus, train_flags
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.leak.grid import Row
from isthmus.experiments.leak.leak_settings import LeakSettings
from isthmus.experiments.leak.leak_texts import LeakTexts, Text
from isthmus.experiments.leak.rows.recorded_rows import Batch, Crossed, in_order, sequences
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.recording.traffic import Backward, Traffic, read_traffic
from isthmus.protocol.secure.keys import load_worker

TRAINED = "trained"
"""Name of the training run's folder."""
PUBLIC = "public.jsonl"
"""Name of the file of the texts that a bridge is fitted to."""

_RECORDING = "recording"
_ALPHA = 16.0


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What each step of a run took, `[steps]` fp64 each; bytes are those of both ways."""

    seconds: Tensor
    tokens: Tensor
    bytes: Tensor


def read_costs(out: Path) -> StepCosts:
    """The costs of a run that was not interrupted, by its folder."""
    lines = [json.loads(line) for line in (out / COSTS_FILE).read_text(encoding="utf-8").splitlines()]
    names = ("seconds", "tokens", "bytes_up", "bytes_down")
    seconds, tokens, up, down = (torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in names)
    return StepCosts(seconds, tokens, up + down)


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What a run left.

    Attributes:
        out: Its folder.
        checkpoint: That of the newest checkpoint, which has what was trained beside the adapter.
        report: Its `report.json`.
        traffic: All that was read of the recording.
        sent: By codec the private texts as they were sent after training.
        learned: The last steps, where gradients went up; empty where none did.
        backwards: Their gradients.
    """

    out: Path
    checkpoint: Path
    report: Mapping[str, Any]
    traffic: Traffic
    sent: Mapping[str, tuple[Batch, ...]]
    learned: tuple[Batch, ...]
    backwards: tuple[Backward, ...]


def record_run(
    row: Row, settings: LeakSettings, texts: LeakTexts, model: Any, folder: Path, decoys: Path | None = None
) -> tuple[Path, Path]:
    """Train over a cloud that records.

    Args:
        model: The whole model, whose names are those of the edge's part.
        folder: For the run's files; must hold none.
        decoys: The file of decoys, where the row has some.

    Returns:
        What `read_run` needs of them: the training run's folder, and the recording.

    Raises:
        IsthmusError: What cloud and edge raise.
    """
    out, recording = folder / TRAINED, folder / _RECORDING
    plan = row.plan(model.config.num_hidden_layers)
    write_examples(folder / "train.jsonl", texts.train)
    write_examples(folder / "sent.jsonl", texts.sent)
    serve = ("--edge-layers", row.edge_layers, "--threads", str(settings.threads))
    record = ("--record", str(recording), "--record-mib", str(settings.record_mib))
    with LocalCloud(folder, settings.model, *serve, *record) as cloud:
        connection = {"cloud": cloud.connection_file, "key": cloud.edge_key, "threads": settings.threads}
        options = {**connection, "out": out, **train_options(row, settings, model, plan)}
        options |= {"codec": row.codec, "data": folder / "train.jsonl", "validation": folder / "sent.jsonl"}
        defences = [flag for each in row.defences(str(decoys)) for flag in ("--defence", each.text())]
        if defences:
            options["defence_key"] = write_key(folder / "defence-key", settings.seed)
        run_isthmus("edge", "train", *train_flags(options), *defences)
        shared = {**connection, "data": folder / "sent.jsonl", "batch": settings.batch, "max_length": _whole(settings)}
        for codec in row.also_codecs:
            run_isthmus("edge", "eval", *train_flags({**shared, "codec": codec, "adapter": out / "adapter"}))
    return out, recording


def fit_config(folder: Path, block: int, cloud: str = "-") -> FitConfig:
    """What `emulator fit` is told in a folder: the public texts, and the private ones that they may not share."""
    return FitConfig(
        cloud=cloud,
        package=folder / "package",
        text=folder / PUBLIC,
        data=str(folder / "train.jsonl"),
        validation=str(folder / "sent.jsonl"),
        leave_out_shared=True,
        block=block,
    )


def record_fit(settings: LeakSettings, plan: str, folder: Path) -> Path:
    """Fit the edge's own bridge to the package in a folder, over a cloud that records; returns the recording.

    A bridge that does not help is not kept, and its texts were sent.

    Raises:
        CommandFailedError: The fit failed otherwise.
        IsthmusError: What the cloud raises.
    """
    recording = folder / _RECORDING
    serve = ("--edge-layers", plan, "--threads", str(settings.threads))
    record = ("--record", str(recording), "--record-mib", str(settings.record_mib))
    with LocalCloud(folder, settings.model, *serve, *record) as cloud:
        package = folder / "package"
        # The row's cloud signs the copy: a fit takes a package of its own cloud alone.
        write_atomic(package / MANIFEST_FILE, sign(open_package(package).manifest, load_worker(cloud.home)))
        told = fit_config(folder, settings.max_length).model_dump(exclude_unset=True)
        options = {**told, "cloud": cloud.connection_file, "key": cloud.edge_key}
        failed: CommandFailedError | None = None
        try:
            run_isthmus("emulator", "fit", *train_flags(options))
        except CommandFailedError as error:
            if error.code != DataError.exit_code:
                raise
            failed = error
    if failed is not None and not read_traffic(recording).forwards:
        raise failed  # else the bridge did not help and is not kept, but its texts were sent
    return recording


def read_fit(folder: Path, settings: LeakSettings, tokenizer: Any, front: Front) -> tuple[Traffic, list[Crossed]]:
    """What `emulator fit` sent, by the files of `record_fit` in a folder: the sequences, and what they were.

    Raises:
        DataError: The recording has something else than the blocks of the public texts.
    """
    config = fit_config(folder, settings.max_length)
    _, blocks, asked = ordered_blocks(documents(config.text), config, tokenizer)
    empty = Example("", "")
    texts = tuple(Text(empty, Encoded(tuple(ids), tuple(ids))) for ids in blocks[:asked].tolist())
    traffic = read_traffic(folder / _RECORDING)
    return traffic, sequences([Batch(texts, traffic.forwards, 1)], front)


def read_run(row: Row, settings: LeakSettings, texts: LeakTexts, folder: Path) -> RecordedRun:
    """Read what `record_run` returned, in a folder: of the recording the last steps and what followed.

    Raises:
        DataError: The recording does not have what the run sent.
    """
    last = row.steps - -(-settings.attacked // settings.batch)
    traffic = read_traffic(folder / _RECORDING, wanted=lambda step: step == 0 or step > last)
    return _found(row, settings, texts, folder / TRAINED, traffic, last)


def train_options(row: Row, settings: LeakSettings, model: Any, plan: SplitPlan) -> dict[str, Any]:
    """What the run has beside its data, cloud, folder and defences, as fields of `TrainConfig`."""
    options: dict[str, Any] = {
        "steps": row.steps,
        "batch": settings.batch,
        "learning_rate": settings.learning_rate,
        "max_length": _whole(settings),
        "alpha": _ALPHA,
        "seed": settings.seed,
        "save_every": row.steps,
        "log_every": 50,
    }
    if row.mode == "top-only":
        options["target_modules"] = ",".join(top_modules(model, plan))
    return options


def top_modules(model: Any, plan: SplitPlan) -> list[str]:
    """The full names of the linears above the span that LoRA usually adapts."""
    usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model.config.model_type]
    above = tuple(f"{family_of(model.config).layers_path}.{layer}." for layer in range(plan.cloud.stop, plan.n_layers))
    names = [name for name, _ in model.named_modules() if name.startswith(above)]
    return [name for name in names if name.rpartition(".")[2] in usual]


def write_examples(path: Path, texts: Sequence[Text]) -> None:
    """Write texts as a data file that `edge train` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, ({"prompt": text.example.prompt, "completion": text.example.completion} for text in texts))


def _whole(settings: LeakSettings) -> int:
    """Tokens that cut no text."""
    return 4 * settings.max_length


def _found(row: Row, settings: LeakSettings, texts: LeakTexts, out: Path, traffic: Traffic, last: int) -> RecordedRun:
    """Sort the recording."""
    size, copies, names = settings.batch, 1 + row.n_decoys, traffic.sessions
    if len(names) != 1 + len(row.also_codecs):
        raise DataError(
            f"the recording has {len(names)} sessions of {1 + len(row.also_codecs)}: raise --record-mib, or repeat the "
            "row where a connection broke"
        )
    sent_batches = [texts.sent[start : start + size] for start in range(0, len(texts.sent), size)]
    own = traffic.of(session=names[0])
    evaluated = own.forwards[-len(sent_batches) * copies :]
    sent = {row.codec: tuple(in_order(evaluated, sent_batches, copies))}
    for codec, name in zip(row.also_codecs, names[1:], strict=True):
        sent[codec] = tuple(in_order(traffic.of(session=name).forwards, sent_batches, 1))
    order = Batches([text.encoded for text in texts.train], size, 0, settings.seed)
    backwards = tuple(each for each in own.backwards if each.step > last)
    steps = sorted({each.step for each in backwards})
    places = [divmod(step - 1, len(order)) for step in steps]
    batches = [[texts.train[index] for index in order.order(epoch)[place * size :][:size]] for epoch, place in places]
    calls = {each.call for each in backwards}
    learned = tuple(in_order([each for each in own.forwards if each.call in calls], batches, copies))
    report = json.loads((out / "report.json").read_text())
    return RecordedRun(out, out / f"checkpoint-{row.steps}", report, traffic, sent, learned, backwards)
