"""Which private texts are attacked, and which texts the attacker learns from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isthmus.common.errors import ConfigError
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Encoded, TrainingData, encode_for
from isthmus.edge.data.readers import read_examples
from isthmus.privacy.measures.planted_secrets import decoded

FEWEST_PUBLIC = 8
"""Public texts that an attack takes at least: one in eight of them tells how good it is."""

MOST_PUBLIC = 256
"""Public texts that attacks learn from at most, which bounds their time."""


@dataclass(frozen=True, slots=True)
class BudgetTexts:
    """What the attacks of a leak budget are tried on.

    Attributes:
        sample: Private texts.
        secrets: The strings in each of them that may not be recovered; empty for none at all.
        public: Texts that the attacker learns from, none of which is in the sample.
        given: Whether they are public, so that they may be sent; else they are private ones of the run.
    """

    sample: tuple[Encoded, ...]
    secrets: tuple[tuple[str, ...], ...]
    public: tuple[Encoded, ...]
    given: bool


def choose_texts(config: TrainConfig, data: TrainingData, tokenizer: Any, *, attacked: bool) -> BudgetTexts:
    """Draw the sample by the run's seed, add every text that holds a secret, and take the attacker's texts.

    Args:
        attacked: Whether any attack needs them.

    Raises:
        ConfigError: A secret is in no text, or there are too few texts for the attacker.
        DataError: The public texts cannot be read.
    """
    private = list(dict.fromkeys((*data.train, *data.validation)))
    order = list(range(len(private)))
    random.Random(f"leak/{config.seed}").shuffle(order)  # noqa: S311  # an order, not a secret
    held = _secrets_of(config, private, tokenizer)
    chosen = [*order[: config.leak_sample], *(place for place in order[config.leak_sample :] if held.get(place))]
    sample = tuple(private[place] for place in chosen)
    secrets = tuple(held.get(place, ()) for place in chosen) if held else ()
    if config.public is None:
        public = [private[place] for place in order if place not in set(chosen)]
        remedy = "give --public FILE, or a smaller --leak-sample"
    else:
        found, _ = encode_for(config, read_examples(config.public, config), tokenizer)
        known = {text.input_ids for text in private}
        public = [text for text in dict.fromkeys(found) if text.input_ids not in known]
        remedy = "give a file with more texts that are not among the private ones"
    public = [text for text in public if len(text.input_ids) > 1]
    if attacked and len(public) < FEWEST_PUBLIC:
        raise ConfigError(f"{len(public)} texts for the attacker are too few, it needs {FEWEST_PUBLIC}: {remedy}.")
    return BudgetTexts(sample, secrets, tuple(public[:MOST_PUBLIC]), config.public is not None)


def read_secrets(path: Path) -> list[str]:
    """The lines of a file of secrets, blank ones among them. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"secrets = {str(path)!r} cannot be read ({error}): give a file in UTF-8.") from error


def _secrets_of(config: TrainConfig, private: Sequence[Encoded], tokenizer: Any) -> dict[int, tuple[str, ...]]:
    """The secrets that a text holds, for each that holds some."""
    if config.secrets is None:
        return {}
    lines = read_secrets(config.secrets)
    texts = [decoded(tokenizer, torch.tensor(text.input_ids)) for text in private]
    held: dict[int, tuple[str, ...]] = {}
    for number, secret in enumerate(lines, 1):
        if not secret.strip():
            continue
        places = [place for place, text in enumerate(texts) if secret in text]
        if not places:
            raise ConfigError(
                f"line {number} of {config.secrets} is in no text of the data as the model sees them: no attack could "
                "be seen to recover it. Correct or remove it."
            )
        for place in places:
            held[place] = (*held.get(place, ()), secret)
    if not held:
        raise ConfigError(f"secrets = {str(config.secrets)!r} has no string: write one in each line.")
    return held
