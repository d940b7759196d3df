"""What drafts over long links are measured with: prompts, a small draft, and an adapter that was tuned with it.

The draft is distilled on text that the model writes itself, and tuned further on E2E's training data. The prompts are
in neither. What is finished stays in a folder, in folders of its own whose names have what it depends on, so that the
same benchmark finds it again.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.backbone.checkpoints.sources import Checkpoint, resolve
from isthmus.common.errors import ConfigError, DataError
from isthmus.common.files import write_atomic
from isthmus.emulator.package.package import is_package
from isthmus.experiments.harness.generation_settings import GenerateSettings
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import run_isthmus, train_flags
from isthmus.experiments.scoring.tasks import Question, Sizes, Split, default_data_folder, read_task

TASK = "e2e"
VALIDATION = 16
"""Examples that are held out of tuning, for its report."""
CLOUD_DTYPE: Literal["fp32", "bf16"] = "bf16"
"""Of the clouds that links are measured with, and that the adapter is tuned with."""
SAMPLE_FLAGS = ("--special-tokens", "--temperature", "0.6")
"""Conversations as the model sees them, of what is likely, as greedy texts are."""
DISTILL_FLAGS = ("--length", "128", "--precision", "bf16", "--learning-rate", "1e-3")
"""In bf16 a step takes half of the time. Three layers begin far from what they should do: at three times the usual
learning rate they are nearer to it from the first steps on."""
TRAIN_OPTIONS = {"batch": 4, "max_length": 256, "learning_rate": 1e-3, "log_every": 50}
"""As the other benchmarks tune on E2E."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is measured with.

    Attributes:
        draft: The package of the small draft.
        tuned: The folder of a training run on E2E with that draft: an adapter, and the tuned draft beside it. None
            where no adapter is asked for.
    """

    draft: Path
    tuned: Path | None

    @property
    def adapter(self) -> Path | None:
        """The adapter's folder."""
        return None if self.tuned is None else self.tuned / "adapter"


def prepare(settings: GenerateSettings, *, tuned: bool) -> Prepared:
    """Make what is not given and not there yet; see the module.

    Args:
        tuned: Whether an adapter is needed, too.

    Raises:
        ConfigError: A draft is given, and no adapter that was tuned with it, or the other way round.
        DataError: The data of E2E are missing or malformed.
        IsthmusError: Whatever a command raises that makes it.
    """
    draft, adapter = settings.draft, settings.adapter
    if draft is not None:
        if tuned and adapter is None:
            raise ConfigError(f"an adapter that was tuned with {draft} is needed, too: give --adapter, or --texts chat")
        return Prepared(draft, adapter if tuned else None)
    if adapter is not None:
        raise ConfigError(
            f"the draft that {adapter} was tuned with is needed, too: give --draft, or leave --adapter out"
        )
    checkpoint = resolve(settings.model)
    name = f"{checkpoint.name.rpartition('/')[2]}-{checkpoint.digest()[:8]}-{settings.edge_layers.replace(':', '-')}"
    folder = settings.out / name
    cloud = LocalCloud(folder, str(checkpoint.folder), *settings.cloud_options(CLOUD_DTYPE))
    draft = folder / f"draft-{settings.sample_tokens}-{settings.distill_steps}"
    if not is_package(draft):
        _build(settings, checkpoint, cloud.home, _sample(settings, checkpoint, folder), draft)
    if tuned:
        adapter = folder / f"tuned-{settings.tune_steps}-{draft.name}"
        if not (adapter / "report.json").is_file():
            shutil.rmtree(adapter, ignore_errors=True)
            _tune(settings, cloud, draft, adapter)
    return Prepared(draft, adapter)


def read_e2e(settings: GenerateSettings) -> Split:
    """E2E's questions. Raises DataError where they are missing or malformed."""
    return read_task(TASK, settings.data_folder or default_data_folder(), Sizes(validation=VALIDATION))


def unseen_prompts(split: Split, count: int) -> list[str]:
    """So many different prompts of the test data that the training data do not have; always the same ones.

    They are drawn, as E2E's file is sorted: its first prompts are of a few restaurants.

    Raises DataError where there are fewer.
    """
    seen = {question.prompt for question in (*split.train, *split.validation)}
    unseen = [prompt for prompt in dict.fromkeys(each.prompt for each in split.test) if prompt not in seen]
    if len(unseen) < count:
        raise DataError(
            f"the test data of {TASK} have {len(unseen)} prompts that the training data lack, and {count} are asked "
            "for: give a smaller --link-prompts"
        )
    return random.Random(0).sample(unseen, count)  # noqa: S311 - no secret


def _sample(settings: GenerateSettings, checkpoint: Checkpoint, folder: Path) -> Path:
    """Text that the model has written."""
    text, begun = folder / f"sample-{settings.sample_tokens}.jsonl", folder / "sample-begun.jsonl"
    if not text.is_file():
        begun.unlink(missing_ok=True)  # the command keeps what it has when it is interrupted: too little
        options = ("--tokens", str(settings.sample_tokens), *SAMPLE_FLAGS, "--out", str(begun))
        run_isthmus("emulator", "sample", "--model", str(checkpoint.folder), *options)
        begun.rename(text)
    return text


def _build(settings: GenerateSettings, checkpoint: Checkpoint, home: Path, text: Path, out: Path) -> None:
    """Build the draft; a distillation that was interrupted goes on."""
    run_isthmus(
        *("emulator", "build", "--model", str(checkpoint.folder), "--draft", "--distill", str(text)),
        *("--allow-draft-tuning", "--distill-steps", str(settings.distill_steps), *DISTILL_FLAGS),
        *("--adapter-layers", settings.edge_layers, "--home", str(home), "--out", str(out)),
    )


def _tune(settings: GenerateSettings, cloud: LocalCloud, draft: Path, out: Path) -> None:
    split = read_e2e(settings)
    train, validation = (out.with_name(f"{TASK}-{name}.jsonl") for name in ("train", "validation"))
    _write(train, split.train)
    _write(validation, split.validation)
    options = {
        "data": train,
        "validation": validation,
        "out": out,
        "steps": settings.tune_steps,
        "save_every": settings.tune_steps,
        "threads": settings.threads,
        "draft": draft,
        **TRAIN_OPTIONS,
    }
    with cloud:
        connection = {"cloud": cloud.connection, "key": cloud.edge_key}
        run_isthmus("edge", "train", *train_flags(options | connection))


def _write(path: Path, questions: Iterable[Question]) -> None:
    examples = (question.example for question in questions)
    lines = (json.dumps({"prompt": each.prompt, "completion": each.completion}) + "\n" for each in examples)
    write_atomic(path, "".join(lines).encode())
