"""What trains for Tinker's API, in this process, with a cloud in this process."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from support.cloud.train_runs import Runs
from support.models.tiny import VOCAB
from torch import Tensor

from isthmus.daemon.tinker.training.trained_model import TrainedModel
from isthmus.daemon.tinker.training_worker import TrainingHandlers

ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0, "grad_clip_norm": 0.0}
Values = dict[str, Any]


def creation(runs: Runs, model: str, folder: Path, **values: Any) -> Values:
    """A question for a model: a LoRA of rank 4 on the linears of the edge's layers."""
    cloud = {"cloud": runs.server.address, "key": str(runs.server.home.key_file)}
    shape = {"rank": 4, "seed": 3, "attn": True, "mlp": True, "unembed": False, "layers": "edge"}
    return {"model": model, "folder": str(folder), "cloud": cloud, **shape, **values}


def random_data(seed: int, lengths: tuple[int, ...] = (9, 5, 12), **values: Any) -> list[Values]:
    """Rows of tokens, with weights of both signs."""
    drawn = random.Random(seed)  # noqa: S311  # data, not a secret
    data = []
    for n in lengths:
        tokens = [drawn.randrange(3, VOCAB) for _ in range(n + 1)]
        weights = [drawn.uniform(-0.5, 1) for _ in range(n)]
        data.append({"tokens": tokens[:-1], "targets": tokens[1:], "weights": weights, **values})
    return data


def sampled_data(seed: int, lengths: tuple[int, ...] = (9, 5, 12)) -> list[Values]:
    """Rows of tokens with advantages, and log probabilities of a sampler that is not far from a random model."""
    drawn = random.Random(seed)  # noqa: S311  # data, not a secret
    data = random_data(seed, lengths)
    for datum in data:
        n = len(datum.pop("weights"))
        datum["logprobs"] = [drawn.uniform(-7, -4) for _ in range(n)]
        datum["advantages"] = [drawn.uniform(-1, 1) for _ in range(n)]
    return data


@dataclass
class LocalTrainer:
    """Asks, and looks at what the models are. A context manager, which closes the link.

    Args:
        runs: Has the cloud.
        folder: Where models and copies go.
    """

    runs: Runs
    folder: Path
    handlers: TrainingHandlers = field(default_factory=TrainingHandlers)
    _copies: Any = field(default_factory=itertools.count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.handlers.state({})["models"]:
            self.handlers.forget({"model": name})

    def create(self, model: str = "a", **values: Any) -> Values:
        """A model whose state is in a folder of its name."""
        return self.handlers.create(creation(self.runs, model, self.folder / model, **values))

    def forward_backward(self, data: list[Values], model: str = "a", **values: Any) -> Values:
        """By cross entropy, if nothing else is asked."""
        return self.handlers.forward_backward({"model": model, "loss": "cross_entropy", "data": data, **values})

    def step(self, number: int, model: str = "a", **adam: Any) -> Values:
        """A step."""
        calls = self.model(model).calls
        return self.handlers.optim_step({"model": model, "number": number, "adam": {**ADAM, **adam}, "calls": calls})

    def train(self, numbers: range, model: str = "a", **values: Any) -> list[float]:
        """Steps with data of their numbers; their losses."""
        losses = []
        for number in numbers:
            losses.append(self.forward_backward(random_data(number), model, **values)["metrics"]["loss:sum"])
            self.step(number, model)
        return losses

    def save(self, model: str = "a", *, optimizer: bool = False) -> Path:
        """A new copy of a model."""
        folder = self.folder / f"copy-{model}-{next(self._copies)}"
        assert self.handlers.save({"model": model, "folder": str(folder), "optimizer": optimizer}) == {}
        return folder

    def load(self, folder: Path, model: str = "a", *, optimizer: bool = False) -> None:
        """Go on from a copy, by a promise after the model's newest step."""
        asked = {"model": model, "number": self.model(model).number + 1, "folder": str(folder), "optimizer": optimizer}
        assert self.handlers.load(asked) == {}

    def adapter(self, model: str = "a") -> dict[str, Tensor]:
        """What a model has learned."""
        weights: dict[str, Tensor] = load_file(self.save(model) / "adapter_model.safetensors")
        return weights

    def model(self, name: str = "a") -> TrainedModel:
        """A model itself."""
        return self.handlers.models.model(name)

    def gradients(self, model: str = "a") -> dict[str, Tensor]:
        """Copies of what the next step applies."""
        parameters = self.model(model).parameters
        return {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}

    def values(self, model: str = "a") -> dict[str, Tensor]:
        """Copies of what is trained."""
        return {name: each.detach().clone() for name, each in self.model(model).parameters.items()}


def near(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> bool:
    """Whether all tensors differ by at most `bound` times the largest value of each."""
    if not ours or ours.keys() != theirs.keys():
        return False
    return all(
        float((ours[name] - theirs[name]).abs().max()) <= bound * max(float(theirs[name].abs().max()), 1e-6)
        for name in ours
    )


def whole_logprobs(logits: Tensor, targets: list[int]) -> Tensor:
    """Log probabilities of the targets, by logits `[1, S, V]` of a row that has them."""
    rows = torch.tensor(targets)
    return logits[0, : len(rows)].log_softmax(-1)[torch.arange(len(rows)), rows]
