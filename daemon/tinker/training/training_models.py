"""The models in training, by their names, and the clouds that they need."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from isthmus.common.errors import ConfigError, UnknownModelError
from isthmus.daemon.state.crossings import COUNTERS
from isthmus.daemon.tinker.training.lora_shape import LoraShape
from isthmus.daemon.tinker.training.open_cloud import OpenCloud
from isthmus.daemon.tinker.training.trained_model import TrainedModel
from isthmus.edge.config.client_config import ClientConfig

MOST_MODELS = 64
"""At a time: each takes the memory of its adapter four times."""


class TrainingModels:
    """What a process trains. A cloud's link is open as long as a model needs it."""

    def __init__(self) -> None:
        self._models: dict[str, TrainedModel] = {}
        self._clouds: dict[str, OpenCloud] = {}
        self._crossed: dict[str, Counter[str]] = {}  # by connection string, and not said yet

    def create(
        self, name: str, folder: Path, config: ClientConfig, shape: LoraShape, *, spare_tied_head: bool = False
    ) -> dict[str, Any]:
        """Make a model, or go on with the one whose state is in `folder`. One of that name in memory is dropped.

        Args:
            name: Its name.
            folder: Where its state is kept.
            config: How its cloud is reached.
            shape: Its LoRA.
            spare_tied_head: Leave the head out where it is tied to the embedding, instead of refusing to train it.

        Returns:
            See `TrainedModel.facts`.

        Raises:
            ConfigError: There are too many already, or the LoRA does not fit.
            IsthmusError: Whatever opening the link raises, or reading the state.
        """
        key = json.dumps(config.model_dump(mode="json"), sort_keys=True)
        self._models.pop(name, None)
        if len(self._models) >= MOST_MODELS:
            raise ConfigError(f"{MOST_MODELS} models are in training already: unload one")
        if key not in self._clouds:
            self._clouds[key] = OpenCloud(config)
        cloud = self._clouds[key]
        if spare_tied_head and cloud.tied_head:
            shape = shape.model_copy(update={"unembed": False})
        try:
            model = self._models[name] = TrainedModel(cloud, shape, folder)
        except BaseException:
            self._close_unused()
            raise
        return model.facts()

    def model(self, name: str) -> TrainedModel:
        """A model.

        Raises:
            UnknownModelError: It is not there; it may be in its folder.
        """
        if name not in self._models:
            raise UnknownModelError(f"model {name} is not in training here: create it first")
        return self._models[name]

    def forget(self, name: str) -> None:
        """Take a model out of memory. Its folder stays."""
        self._models.pop(name, None)
        self._close_unused()

    def state(self) -> dict[str, Any]:
        """What there is, for status."""
        models = {name: {"number": model.number, "calls": model.calls} for name, model in self._models.items()}
        return {"models": models, "clouds": len(self._clouds)}

    def take_crossed(self) -> dict[str, dict[str, int]]:
        """What has crossed to each cloud, by its connection string, since this was asked last."""
        for cloud in self._clouds.values():
            self._count(cloud)
        crossed, self._crossed = self._crossed, {}
        return {name: {key: counts[key] for key in COUNTERS} for name, counts in crossed.items() if counts.total()}

    def _count(self, cloud: OpenCloud) -> None:
        self._crossed.setdefault(cloud.config.cloud, Counter()).update(cloud.take_counts())

    def _close_unused(self) -> None:
        used = {id(model.cloud) for model in self._models.values()}
        for key, cloud in list(self._clouds.items()):
            if id(cloud) not in used:
                self._clouds.pop(key).close()
                self._count(cloud)
