"""What each way of training gives up to a cloud that attacks, and the limits that a budget sets.

A limit is `tokens<=X` or `labels<=X`, X a share between 0 and 1. Loads no torch.

What a mode without a defence gives up follows from what it sends. Hidden states at a cut whose lower layers are known
are taken to give up all tokens, at any depth and in any codec, and gradients at the output of the cloud's layers all
labels: the bounds are 1. Where nothing is sent, they are 0. Labels that are sent as tokens of the text are given up
with them, so a mode without gradients keeps a limit of labels where the answers are withheld.

`label_paths` decides by which ways labels reach a cloud: the budget of a run, its report and its certificate, and the
table here go by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

LabelPath = Literal["text", "gradients", "slopes"]

CHANNELS = {"tokens": "hidden states at the cut", "labels": "gradients at the output of the cloud's layers"}
"""What a budget limits, and what it is read from."""

CLOUD_READS = (
    "A cloud that attacks reads 98 to 100 % of the tokens of your texts from the activations, and 94 to 100 % of your "
    "labels from the gradients."
)
"""What split training gives up, as it was measured at SmolLM2-135M; README, guides and the page say it in these words.
"""


def label_paths(*, withheld: bool, front_moves: bool, backward: bool) -> frozenset[LabelPath]:
    """By which ways labels reach the cloud. Where there is none, what is sent is the same whatever the labels are.

    - `text`: as tokens of the text, unless they are withheld.
    - `gradients`: those that go up, where something before the end of the cloud's layers is trained by them.
    - `slopes`: the same, trained by losses alone. Later messages show how far it has moved, and that follows from the
      losses, so whoever knows the direction of each step (of MeZO, by the seed) can tell labels apart.

    Args:
        withheld: Whether other tokens are sent in the place of labels.
        front_moves: Whether the front, the cloud's layers or adapters inside them are trained.
        backward: Whether steps send gradients back.
    """
    text: frozenset[LabelPath] = frozenset() if withheld else frozenset({"text"})
    if not front_moves:
        return text
    return text | {"gradients" if backward else "slopes"}


_LIMIT = re.compile(r"(\w+)\s*<=\s*([0-9.]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModeLeak:
    """A way of training, as a cloud sees it.

    Attributes:
        mode: Its name in `isthmus plan`.
        title: Its name in the documents.
        sends: Which of `CHANNELS` it opens.
        how: How a user gets it.
    """

    mode: str
    title: str
    sends: frozenset[str]
    how: str

    def bound(self, channel: str) -> float:
        """The upper bound of what is given up."""
        return float(channel in self.sends)

    def keeps(self, limits: Mapping[str, float]) -> bool:
        """Whether each limit is kept."""
        return all(self.bound(channel) <= limit for channel, limit in limits.items())

    def why(self) -> str:
        """What it gives up, in words."""
        given = [f"{channel} {self.bound(channel):.2f} ({CHANNELS[channel]})" for channel in sorted(self.sends)]
        return " and ".join(reversed(given)) if given else "nothing of the texts crosses"


def _sends(*, front_moves: bool) -> frozenset[str]:
    """The channels of a mode that sends hidden states, and withholds answers where that helps."""
    told = label_paths(withheld=True, front_moves=front_moves, backward=True)
    return frozenset({"tokens", "labels"} if told else {"tokens"})


_WITHHELD = "for labels --withhold-answers"
_TOKENS, _BOTH = _sends(front_moves=False), _sends(front_moves=True)

MODE_LEAKS: dict[str, ModeLeak] = {
    each.mode: each
    for each in (
        ModeLeak("u_shape", "split", _BOTH, "isthmus edge train"),
        ModeLeak("tail_cache", "top only", _TOKENS, f"adapters on the last layers alone, {_WITHHELD}"),
        ModeLeak("taps", "ladder", _TOKENS, f"isthmus edge train --method ladder, {_WITHHELD}"),
        ModeLeak("edge", "sites", _BOTH, "isthmus edge train --sites all"),
        ModeLeak("kill_revive", "kill-and-revive", _BOTH, "isthmus edge train --sites all --site-policy kill-revive"),
        ModeLeak("low_rank", "low-rank sites", _BOTH, "isthmus edge train --sites all --method low_rank"),
        ModeLeak("leased", "leased sites", _BOTH, "isthmus edge train --sites all --leased all"),
        ModeLeak("emulator", "emulator", frozenset(), "isthmus emulator tune"),
    )
}  # fmt: skip
"""By the modes' names."""


def read_limits(texts: Iterable[str]) -> dict[str, float]:
    """The limits of `tokens<=X` and `labels<=X`, by channel.

    Raises:
        ValueError: A text is something else, or sets a limit twice; the message names it.
    """
    limits: dict[str, float] = {}
    for text in (part.strip() for each in texts for part in each.split(",")):
        found = _LIMIT.fullmatch(text)
        try:
            channel, limit = ("", 2.0) if found is None else (found[1], float(found[2]))
        except ValueError:
            channel, limit = "", 2.0
        if channel not in CHANNELS or limit > 1:
            raise ValueError(f"{text!r} is no limit: write tokens<=X or labels<=X, X between 0 and 1")
        if channel in limits:
            raise ValueError(f"{channel} has two limits, {limits[channel]:g} and {limit:g}: give one")
        limits[channel] = limit
    return limits


def keeping(limits: Mapping[str, float]) -> list[ModeLeak]:
    """The modes that keep every limit."""
    return [mode for mode in MODE_LEAKS.values() if mode.keeps(limits)]
