"""Files for fine-tuning: how one is checked, and the settings that its size decides.

A line is a JSON object with nothing but `messages` (role, content), or `prompt` and `completion`, or `text`; all lines
have the form of the first. It is read as `isthmus edge train` reads it (`isthmus.edge.data.readers`): of a
conversation, the last message of the assistant is learned, and earlier ones are read. So `weight` may be given where it
says that: 1 with the last message of the assistant, 0 with earlier ones. Tools, names and images are refused.

Hyperparameters that are "auto", by the number of examples:

    n_epochs                  3; with few examples so many that all passes together are 100 examples, 25 at most; with
                              many so few that they are 25,000, 1 at least (the rule of OpenAI's cookbook)
    batch_size                4 with fewer than 500 examples, 8 with fewer than 5,000, then 16; at most all examples
    learning_rate_multiplier  1

The learning rate is `learning_rate_multiplier` times the default of `isthmus edge train`. A batch is computed in equal
micro-batches of 8 examples at most. Examples are cut at the model's window, or at 2,048 tokens if that is less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.common.bounded_values import brief
from isthmus.common.errors import DataError
from isthmus.edge.config.data_config import ExamplesConfig
from isthmus.edge.config.training_config import LEARNING_RATE, TrainConfig
from isthmus.edge.data.readers import Columns, Record, json_lines

LONGEST_LINE = 4 * 2**20
"""Bytes of a line at most."""
LONGEST_EXAMPLE = 2048
"""Tokens of an example at most."""
EPOCHS, FEWEST, MOST, MOST_EPOCHS = 3, 100, 25_000, 25
"""Passes, the examples of all passes together at least and at most, and passes at most, where n_epochs is "auto"."""
BATCHES = ((500, 4), (5_000, 8))
"""With fewer examples than the first number, the batch where batch_size is "auto"."""
LARGEST_BATCH = 16
"""With more examples than the table has."""
MICRO_BATCH = 8
"""Examples of a micro-batch at most."""

_FORMS = ({"messages"}, {"prompt", "completion"}, {"text"})


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """What is known of a file for fine-tuning.

    Attributes:
        examples: How many it has.
        chats: Whether they are conversations.
    """

    examples: int
    chats: bool


def read_training_file(path: Path, name: str) -> TrainingFile:
    """Check a file, a line at a time.

    Args:
        path: Where it is.
        name: What errors call it.

    Raises:
        DataError: It does not fit; the message names the line.
    """
    columns: Columns | None = None
    examples, chats = 0, False
    for record in json_lines(str(path), name):
        if columns is None:
            columns, chats = Columns.of(ExamplesConfig(data=name), record), "messages" in record.values
        _check_keys(record)
        columns.example(record)
        examples += 1
    if not examples:
        raise DataError(f"{name} holds no examples: it is empty, or has nothing but blank lines")
    return TrainingFile(examples, chats)


def hyperparameters_of(spec: Mapping[str, Any], *, advised: bool = False) -> dict[str, Any]:
    """Hyperparameters as OpenAI's API tells them; without `n_epochs` where a job has a number of steps instead.

    What a job's settings leave out is as in `isthmus edge train`.

    Args:
        spec: A job's settings.
        advised: Whether a package's advice decides what they leave out; then that is "auto".
    """
    batch, accumulate, rate = (
        spec.get(name, TrainConfig.model_fields[name].default) for name in ("batch", "accumulate", "learning_rate")
    )
    numbers: dict[str, Any] = {
        "batch_size": batch * accumulate,
        "learning_rate_multiplier": float(f"{rate / LEARNING_RATE:.10g}"),
    }
    if advised and "learning_rate" not in spec:
        numbers["learning_rate_multiplier"] = "auto"
    if advised and "epochs" not in spec and "steps" not in spec:
        numbers["n_epochs"] = "auto"
    elif spec.get("steps") is None:
        numbers["n_epochs"] = spec.get("epochs") or 1
    return numbers


def settings_of(numbers: Mapping[str, Any], n_examples: int, *, advised: bool = False) -> dict[str, Any]:
    """The settings of a run (`isthmus.edge.config.training_config`) for hyperparameters.

    Args:
        numbers: `n_epochs`, `batch_size`, `learning_rate_multiplier`; each a number or "auto".
        n_examples: How many examples the training file has.
        advised: Whether a package's advice decides length and learning rate where they are "auto": they are left out.
    """
    epochs, batch = numbers["n_epochs"], numbers["batch_size"]
    multiplier = numbers["learning_rate_multiplier"]
    batch = _batch(n_examples) if batch == "auto" else batch
    micro = max(size for size in range(1, MICRO_BATCH + 1) if batch % size == 0)
    settings: dict[str, Any] = {"batch": micro, "accumulate": batch // micro}
    if epochs != "auto" or not advised:
        settings["epochs"] = _epochs(n_examples) if epochs == "auto" else epochs
    if multiplier != "auto" or not advised:
        settings["learning_rate"] = LEARNING_RATE * (1 if multiplier == "auto" else multiplier)
    return settings


def _epochs(n_examples: int) -> int:
    if n_examples * EPOCHS < FEWEST:
        return min(MOST_EPOCHS, FEWEST // n_examples)
    if n_examples * EPOCHS > MOST:
        return max(1, MOST // n_examples)
    return EPOCHS


def _batch(n_examples: int) -> int:
    usual = next((batch for fewer_than, batch in BATCHES if n_examples < fewer_than), LARGEST_BATCH)
    return min(usual, n_examples)


def _check_keys(record: Record) -> None:
    """Refuse what the reader would pass over."""
    form = next((form for form in _FORMS if form <= record.values.keys()), set(record.values))
    strange = sorted(record.values.keys() - form)
    if strange:
        raise DataError(f"{record.where}: {brief(strange[0])} is not understood beside {sorted(form)}; remove it.")
    messages = record.values.get("messages")
    if not isinstance(messages, list):
        return  # the reader says what is wrong
    last = max((at for at, each in enumerate(messages) if _role(each) == "assistant"), default=-1)
    for at, message in enumerate(messages):
        what = f"{record.where}: message {at}"
        strange = sorted(set(message) - {"role", "content", "weight"}) if isinstance(message, Mapping) else []
        if strange:
            raise DataError(f"{what}: {brief(strange[0])} is not understood here; remove it.")
        if isinstance(message, Mapping) and "weight" in message and message["weight"] != int(at == last):
            raise DataError(
                f"{what}: weight = {brief(message['weight'])} cannot be followed: the last message of the assistant is "
                "learned, with weight 1, and the others are read, with weight 0."
            )


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None
