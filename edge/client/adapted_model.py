"""The split model with the adapter that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.families import family_of
from isthmus.common.errors import ConfigError
from isthmus.edge.client.link import Link
from isthmus.edge.config.adapter_config import Sites, sites_at


def load_adapted(link: Link, adapter: Path | None, *, plugged: bool, leased: Sites = "none") -> Any:
    """The split model with the adapter given, the one that the cloud has plugged in, or none.

    Args:
        link: To the cloud.
        adapter: Folder of an adapter.
        plugged: Whether the adapter is the one that is plugged in.
        leased: Layers of the cloud whose adapters are leased to it.

    Raises:
        ConfigError: Two adapters are named, or a layer that is to be leased is not the cloud's.
        CheckpointError: The adapter does not fit the model.
    """
    if plugged and adapter is not None:
        raise ConfigError(f"--plugged and --adapter {adapter} exclude each other: give one of them")

    def is_leased(name: str) -> bool:
        return is_at(name)  # asked once there is an adapter

    model: Any = link.load_model(leased=is_leased)
    is_at = sites_at(leased, family_of(model.config).layers_path, link.plan, "leased")
    folder = link.plugged_adapter() if plugged else adapter
    return model if folder is None else load_adapter(model, folder)
