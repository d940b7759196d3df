"""A model in training: a LoRA over a base model that others share, its gradients, its optimizer, its state on the disk.

It is always in eval mode, so nothing is dropped out, and the log probabilities are those of generation up to rounding.
Gradients add up over calls as `backward` adds them, micro-batch by micro-batch. A call, a step or a load that fails has
changed nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from isthmus.common.errors import ConfigError, IsthmusError, NonFiniteError
from isthmus.daemon.tinker.training.adapter_copies import read_copy, write_copy
from isthmus.daemon.tinker.training.datum_batches import (
    Datum,
    DatumBatch,
    checked,
    micro_batches,
    most_positions,
)
from isthmus.daemon.tinker.training.lora_shape import ALPHA, LoraShape
from isthmus.daemon.tinker.training.loss_functions import loss_named
from isthmus.daemon.tinker.training.open_cloud import OpenCloud
from isthmus.daemon.tinker.training.state_folder import ModelState, StateFolder
from isthmus.edge.config.settings import MOST_FACTOR
from isthmus.edge.run_report import count
from isthmus.edge.training import methods
from isthmus.training.gradient_step import GradientStep, require_finite

_REMEDY = "look at the weights, advantages and log probabilities, or lower the learning rate."

Logprobs = list[float] | list[list[float]]


class LostGradientsError(IsthmusError):
    """A step is to apply other gradients than those that are there: a defect, here or of who asks."""


class AdamParams(BaseModel):
    """How a step moves what is trained, in Tinker's words; see `torch.optim.AdamW`. A norm of 0 clips nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    learning_rate: float = Field(ge=0, le=MOST_FACTOR)
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    eps: float = Field(ge=0, le=MOST_FACTOR)
    weight_decay: float = Field(ge=0, le=MOST_FACTOR)
    grad_clip_norm: float = Field(ge=0, le=MOST_FACTOR)


class TrainedModel:
    """A model in training.

    Args:
        cloud: Its base model, and where that has its middle layers.
        shape: Its LoRA.
        folder: Where its state is kept. One that is there is gone on with.

    Attributes:
        cloud, shape: The same.
        number: Of its newest step or load; 0 before the first.
        calls: Calls whose gradients the next step applies.
        parameters: What is trained, by name.
        saved: Number of the step or load that it has gone on from; None for a new one.

    Raises:
        ConfigError: The LoRA does not fit the base model.
        CheckpointError: The state on the disk is damaged, or of another model.
    """

    def __init__(self, cloud: OpenCloud, shape: LoraShape, folder: Path) -> None:
        self.cloud, self.shape = cloud, shape
        self._model = shape.put_on(cloud.new_model(), cloud.config).eval()
        self.parameters = methods.trained(self._model)
        self._optimizer = torch.optim.AdamW(self.parameters.values(), foreach=False)
        info = cloud.link.info
        made_of = {"digest": info.digest, "plan": info.plan, "alpha": ALPHA, **shape.model_dump()}
        self._states = StateFolder(folder, made_of)
        self._record = {"digest": info.digest, "plan": info.plan, "method": "lora"}
        self._version, self.number, self.calls = 0, 0, 0
        self._metrics: Mapping[str, float] = {}
        state = self._states.read()
        self.saved = None if state is None else state.number
        if state is not None:
            self._put(state.parameters, state.optimizer)
            self._version, self.number, self._metrics = state.version, state.number, state.metrics

    def facts(self) -> dict[str, Any]:
        """What was made: the targets' names inside a layer, how many numbers are trained, and in which layers."""
        plan = self.cloud.link.plan
        layers = range(plan.n_layers) if self.shape.layers == "all" else plan.edge_layers
        return {
            "targets": list(self.shape.targets(self.cloud.family)),
            "parameters": count(self.parameters.values()),
            "layers": list(layers),
            "alpha": ALPHA,
            "unembed": self.shape.unembed,
            "saved": self.saved,
        }

    def forward_backward(
        self, loss_name: str, config: Mapping[str, float], data: Sequence[Datum], *, forward_only: bool
    ) -> tuple[list[Logprobs], float]:
        """Compute a loss, and add its gradient to what the next step applies.

        Args:
            forward_only: Leave the gradients as they are.

        Returns:
            The log probability of each datum's targets, and the loss.

        Raises:
            ConfigError: The data, the loss or its settings do not make sense.
            NonFiniteError: The loss or its gradient is NaN or infinite.
            UnreachableError: The cloud stayed away.
        """
        loss = loss_named(loss_name, config)
        vocabulary = int(self._model.config.vocab_size)
        rows = checked(data, loss, vocabulary=vocabulary, longest=self.cloud.longest)
        outputs: list[Logprobs] = []
        total = 0.0
        with self._whole_or_not(), torch.set_grad_enabled(not forward_only):
            for batch in micro_batches(rows, self.cloud.pad_id, most_positions(vocabulary, self.cloud.positions)):
                logprobs = self._logprobs(batch)
                value = loss(logprobs, batch.inputs)
                total += require_finite(f"the loss {loss_name} is", value.item(), _REMEDY)
                if not forward_only:
                    value.backward()  # type: ignore[no-untyped-call]  # torch
                outputs += _by_row(logprobs.detach(), batch)
            self._check_gradients(loss_name)
            self.calls += not forward_only
        return outputs, total

    def optim_step(self, number: int, adam: AdamParams, calls: int | None = None) -> Mapping[str, float]:
        """Apply the gradients, and have the state on the disk. The newest step is not made twice.

        Args:
            number: Of the step; higher than that of the step or load before.
            calls: Calls whose gradients it is to apply: all that were answered since the newest step or load. None for
                those that there are.

        Returns:
            What is worth knowing of it, by names of Tinker's form.

        Raises:
            ConfigError: The number is one of an older step, or there are no gradients.
            LostGradientsError: There are not so many.
            NonFiniteError: The gradients are NaN or infinite.
            DiskError: The state cannot be written.
        """
        if number == self.number:
            return self._metrics
        if number < self.number:
            raise ConfigError(f"step {number} comes after step {self.number}: give a higher number")
        if calls not in (None, self.calls):
            raise LostGradientsError(
                f"step {number} is to apply the gradients of {calls} calls of forward_backward, and there are those of "
                f"{self.calls}: make the model anew, and repeat them"
            )
        if self.calls == 0:
            raise ConfigError(f"step {number} has no gradients to apply: call forward_backward first")
        with self._whole_or_not():
            rule = self._rule(adam)
            norm = rule.clip(number)
            rule.apply(adam.learning_rate)
            metrics = {"grad_norm:mean": norm}
            self._write(number, metrics)
        return metrics

    def save(self, folder: Path, *, optimizer: bool) -> None:
        """Write an adapter that `load_adapter` takes, and on demand the optimizer's moments beside it.

        Raises:
            DiskError: It cannot be written.
        """
        write_copy(self._model, folder, self._record, self._rule().state() if optimizer else None)

    def load(self, number: int, folder: Path, *, optimizer: bool) -> None:
        """Go on from what `save` wrote, of this or another model with such a LoRA. Gradients are forgotten.

        The state on the disk is it, before this returns. The newest load is not made twice.

        Args:
            number: Of the load; higher than that of the step or load before.
            folder: Where `save` wrote.
            optimizer: Go on with its moments, too; otherwise they start anew.

        Raises:
            CheckpointError: It is damaged, does not fit, or has no moments.
            ConfigError: The number is one of an older step or load.
            DiskError: The state cannot be written.
        """
        if number == self.number:
            return
        if number < self.number:
            raise ConfigError(f"load {number} comes after step {self.number}: give a higher number")
        values, moments = read_copy(self._model, self.parameters, folder, self._record["digest"], optimizer)
        with self._whole_or_not():
            self._put(values, moments)
            self._write(number, {})

    def _logprobs(self, batch: DatumBatch) -> Tensor:
        """The targets' log probabilities `[B, S, K]`, fp32, 0 on padding."""
        device = self._model.device
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found: Tensor = logits.float().log_softmax(-1).gather(-1, batch.targets.to(device))
        return found.masked_fill(batch.padding.to(device), 0.0)

    def _check_gradients(self, loss_name: str) -> None:
        if not all(bool(each.grad.isfinite().all()) for each in self.parameters.values() if each.grad is not None):
            raise NonFiniteError(f"the gradient of loss {loss_name} is not finite: {_REMEDY}")

    def _rule(self, adam: AdamParams | None = None) -> GradientStep:
        """The optimizer's step, with these settings from now on."""
        if adam is None:
            return GradientStep(self._optimizer, self.parameters, peak_rate=1.0, max_norm=math.inf, remedy=_REMEDY)
        for group in self._optimizer.param_groups:
            group |= {
                "lr": adam.learning_rate,
                "betas": (adam.beta1, adam.beta2),
                "eps": adam.eps,
                "weight_decay": adam.weight_decay,
            }
        norm = adam.grad_clip_norm or math.inf
        return GradientStep(
            self._optimizer, self.parameters, peak_rate=adam.learning_rate, max_norm=norm, remedy=_REMEDY
        )

    def _write(self, number: int, metrics: Mapping[str, float]) -> None:
        """Have the model, as it is now, on the disk; its gradients are forgotten then."""
        state = ModelState(self._version + 1, number, metrics, self.parameters, self._rule().state())
        self._states.write(state)
        self._version, self.number, self._metrics = state.version, number, metrics
        self._optimizer.zero_grad(set_to_none=True)
        self.calls = 0

    @contextmanager
    def _whole_or_not(self) -> Iterator[None]:
        """What fails inside has changed nothing in memory."""
        parameters = {name: each.detach().clone() for name, each in self.parameters.items()}
        moments = {name: value.clone() for name, value in self._rule().state().items()}
        gradients = [None if each.grad is None else each.grad.clone() for each in self.parameters.values()]
        try:
            yield
        except BaseException:
            self._put(parameters, moments)
            for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
                parameter.grad = gradient
            raise

    def _put(self, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Give what is trained these values, and the optimizer these moments."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(parameters[name])
        self._optimizer.state.clear()
        self._rule().load_state(dict(moments))


def _by_row(logprobs: Tensor, batch: DatumBatch) -> Iterator[Logprobs]:
    """Each row's log probabilities, shaped as its targets were given."""
    for values, row in zip(logprobs.cpu(), batch.rows, strict=True):
        n, k = row.targets.shape
        yield (values[:n, 0] if row.flat else values[:n, :k]).tolist()
