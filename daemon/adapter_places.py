"""Where adapters act, and so what a cloud learns of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open

HERE, SEEN, LEASED = PLACES = ("here", "seen", "leased")
"""On this machine alone; inside the cloud's layers, so that the cloud can work out what they do; leased to the cloud,
which has their weights."""

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name, which other kinds of adapters have, too (`isthmus.backbone.adapters.adapter_files`)."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Cut:
    """How a model is cut: so many first and last layers are on this machine, of so many in all."""

    n_layers: int
    first: int
    last: int

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self | None:
        """What `isthmus.daemon.state.tables.BaseModel.facts` say; None where they do not."""
        first, _, last = str(facts.get("plan", "")).partition(":")
        n_layers = facts.get("n_layers")
        if n_layers is None or not (first.isdecimal() and last.isdecimal()):
            return None
        return cls(int(n_layers), int(first), int(last))


def acts_in_cloud(adapter: Path, cut: Cut) -> bool:
    """Whether an adapter's folder has weights for the cloud's layers. One that cannot be read acts nowhere."""
    try:
        with safe_open(adapter / WEIGHTS, "np") as file:  # torch is not for the daemon's own process
            names = list(file.keys())
    except (OSError, SafetensorError):
        return False
    layers = {int(match[1]) for match in map(_LAYER.search, names) if match is not None}
    return any(cut.first <= layer < cut.n_layers - cut.last for layer in layers)
