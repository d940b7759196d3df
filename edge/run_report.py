"""What a run asks of the wire's meter, and `report.json`: what the run did, what it cost, and who paid.

Time: a step's wall time is the edge's unless the wire's meter says otherwise; the meter gives the seconds that the
    edge waited for the cloud's computing (`cloud_s`), for the network (`wire_s`) and for sealing and opening
    (`crypto_s`).

FLOPs follow Kaplan et al. (2020, "Scaling Laws for Neural Language Models", section 2.1): a matrix of N parameters
costs 2N per token forward and 2·2N backward, half of the latter for the gradient of its input and half for that of its
weights. Frozen weights have no gradient, so with T token positions (padding is computed too)

    edge    2·N_edge·T forward + 2·N_edge·T to inputs + 2·N_trained·T to trained weights
    cloud   2·N_span·T forward + 2·N_span·T to inputs

where N counts the weights of linear layers, the LM head among them, and neither embeddings (a look-up) nor norms. With
a draft that is tuned, N_edge counts its layers as well, those that it shares with the model once more, and N_trained
its emulator's.
Attention's own products, and work that a run may skip (backward below its lowest adapter or below a draft's emulator, a
draft's head where nothing is a label), are not modelled: these are upper estimates of the first order.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from torch import nn

_ENDS = 10  # steps


@dataclass(frozen=True, slots=True)
class WireTotals:
    """What the wire has carried and cost since the link was made. Bytes as sealed; seconds as the edge waited.

    A difference of two is what lies between them.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    calls: int = 0
    round_trips: int = 0
    wire_s: float = 0.0
    crypto_s: float = 0.0
    cloud_s: float = 0.0
    retries: int = 0

    def __sub__(self, other: WireTotals) -> WireTotals:
        return WireTotals(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: WireTotals) -> WireTotals:
        return WireTotals(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class WireMeter(Protocol):
    """What a training loop needs of the wire: to say which step its calls belong to, and to read the meter."""

    def begin_step(self, step: int) -> None:
        """Called before the micro-batches of optimizer step `step` (from 1); again for the same step after a resume."""

    def totals(self) -> WireTotals:
        """What has crossed so far."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What the applied steps of a run have used, over all its restarts."""

    seconds: float = 0.0
    tokens: int = 0
    positions: int = 0
    wire: WireTotals = WireTotals()
    first_epoch_seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.seconds + other.seconds,
            self.tokens + other.tokens,
            self.positions + other.positions,
            self.wire + other.wire,
            self.first_epoch_seconds + other.first_epoch_seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """A tree of plain values, under the names that checkpoints have for them."""
        tree = asdict(self)
        return {**{name: value for name, value in tree.items() if name != "wire"}, "strip": tree["wire"]}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Spent:
        """The inverse of `to_json`."""
        totals = {name: value for name, value in tree.items() if name != "strip"}
        return cls(**totals, wire=WireTotals(**tree["strip"]))


@dataclass(frozen=True, slots=True)
class Report:
    """What `report.json` says. Seconds, bytes and tokens cover the training steps, not the evaluations; shares are of
    `seconds`.

    `tokens` leaves padding out and `positions` counts it: padding crosses the wire as well, so `bytes_per_position_*`
    is what a codec and a hidden size predict, `bytes_per_token_*` what a token of the data cost. `peak_bytes_edge` is
    the process's largest resident memory, `peak_bytes_cloud` the cloud's estimate of what the largest call takes there
    while it is computed, null where it did not say. `codec` is "none" where nothing crosses.

    `first_epoch_step_s` and `later_epoch_step_s` are the seconds of a step; the second is null where no step is in a
    later epoch.

    `draft_*` are means over the first and the last ten steps: the KL divergence of a tuned draft in nats, and its top-1
    agreement, the share of labels where its likeliest token is the model's; null where none is tuned.

    `epsilon` and `delta` are what `defences` guarantee, and `guarantee` says of what. They are null where nothing is
    guaranteed; `guarantee` says why not, if one of the defences could.

    `leak` says what the attacks of a leak budget got at most, in a line, `leak_tokens` and `leak_labels` as numbers:
    upper 95 % bounds of a text that is sent. Null where nothing was measured. `leak_attacks` is how
    often the run was attacked.
    """

    loss_before: float | None
    loss_after: float | None
    train_loss_first: float
    train_loss_last: float
    steps: int
    examples: int
    dropped_examples: int
    tokens: int
    positions: int
    seconds: float
    tokens_per_s: float
    edge_s: float
    cloud_s: float
    wire_s: float
    crypto_s: float
    edge_share: float
    cloud_share: float
    wire_share: float
    crypto_share: float
    edge_flops: int
    cloud_flops: int
    bytes_up: int
    bytes_down: int
    bytes_per_token_up: float
    bytes_per_token_down: float
    bytes_per_position_up: float
    bytes_per_position_down: float
    peak_bytes_edge: int
    peak_bytes_cloud: int | None
    calls: int
    retries: int
    trained_parameters: int
    model: str
    plan: str
    method: str
    codec: str
    draft_kl_first: float | None = None
    draft_kl_last: float | None = None
    draft_agreement_first: float | None = None
    draft_agreement_last: float | None = None
    defences: Sequence[str] = ()
    epsilon: float | None = None
    delta: float | None = None
    guarantee: str | None = None
    leak: str | None = None
    leak_tokens: float | None = None
    leak_labels: float | None = None
    leak_attacks: int | None = None
    first_epoch_step_s: float | None = None
    later_epoch_step_s: float | None = None

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def lines(self, out: Path) -> str:
        """The report in a few lines, for a person; `out` is the run's folder."""
        losses = " -> ".join("-" if loss is None else f"{loss:.4f}" for loss in (self.loss_before, self.loss_after))
        wire = (
            f"time: edge {self.edge_share:.0%}, cloud {self.cloud_share:.0%}, wire {self.wire_share:.2%}, "
            f"encryption {self.crypto_share:.2%}\n"
            f"traffic: {self.bytes_per_position_up:.0f} bytes up and {self.bytes_per_position_down:.0f} down "
            "per token position, "
            f"{self.retries} retries\n"
        )
        epochs = ""
        if self.later_epoch_step_s is not None:
            epochs = (
                f"a step: {self.first_epoch_step_s:.3g} s in the first epoch, {self.later_epoch_step_s:.3g} s later\n"
            )
        draft = ""
        if self.draft_kl_first is not None:
            draft = (
                f"draft: KL divergence {self.draft_kl_first:.3f} -> {self.draft_kl_last:.3f}, top-1 agreement "
                f"{self.draft_agreement_first:.0%} -> {self.draft_agreement_last:.0%}; in {out / 'draft.safetensors'}\n"
            )
        defences = ""
        if self.defences:
            defences = f"defences: {'; '.join(self.defences)}\n"
        if self.epsilon is not None:
            privacy = f"epsilon {self.epsilon:.3g} at delta {self.delta:g}"
            defences += f"differential privacy: {privacy}, of {self.guarantee}\n"
        if self.leak is not None:
            defences += f"leak: {self.leak}\n"
        return (
            f"held-out loss {losses}; {self.steps} steps, {self.tokens_per_s:.0f} tokens/s\n"
            f"{epochs}{wire if self.calls else ''}{draft}{defences}"
            f"adapter in {out / 'adapter'}, report in {out / 'report.json'}"
        )


def shares(spent: Spent) -> dict[str, float]:
    """Seconds per party and their shares, under the names that `Report` has for them."""
    wire, total = spent.wire, spent.seconds
    seconds = {"cloud": wire.cloud_s, "wire": wire.wire_s, "crypto": wire.crypto_s}
    # Calls of different micro-batches may overlap, so the parts can exceed the whole; the edge's own part is never
    # negative.
    seconds["edge"] = max(0.0, total - sum(seconds.values()))
    return {f"{who}_s": s for who, s in seconds.items()} | {
        f"{who}_share": _per(s, total) for who, s in seconds.items()
    }


def step_seconds(spent: Spent, steps: int, per_epoch: int) -> dict[str, float | None]:
    """Seconds of a step in the first epoch and later, under the names that `Report` has for them."""
    first = min(steps, per_epoch)
    later = (spent.seconds - spent.first_epoch_seconds) / (steps - first) if steps > first else None
    return {"first_epoch_step_s": spent.first_epoch_seconds / first, "later_epoch_step_s": later}


def traffic(spent: Spent) -> dict[str, float]:
    """Bytes per token and per position, under the names that `Report` has for them."""
    wire = spent.wire
    return {
        "bytes_per_token_up": _per(wire.bytes_up, spent.tokens),
        "bytes_per_token_down": _per(wire.bytes_down, spent.tokens),
        "bytes_per_position_up": _per(wire.bytes_up, spent.positions),
        "bytes_per_position_down": _per(wire.bytes_down, spent.positions),
    }


def draft_fit(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How near a tuned draft was to its model at both ends of a log, under the names that `Report` has for that."""
    ends = {"first": log[:_ENDS], "last": log[-_ENDS:]}
    return {
        f"{name}_{end}": sum(line[name] for line in lines) / len(lines)
        for name in ("draft_kl", "draft_agreement")
        for end, lines in ends.items()
    }


def flops(edge_parameters: int, trained_parameters: int, span_parameters: int, positions: int) -> dict[str, int]:
    """FLOPs per side by the formula at the top of this file, under the names that `Report` has for them."""
    return {
        "edge_flops": (4 * edge_parameters + 2 * trained_parameters) * positions,
        "cloud_flops": 4 * span_parameters * positions,
    }


def linear_parameters(model: nn.Module) -> int:
    """Weights of the linear layers of `model` (GPT-2's transposed ones included): the N of the FLOPs formula.

    Those that the cloud holds are not among them: their skeletons have no weights.
    """
    from transformers.pytorch_utils import Conv1D

    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    return sum(linear.weight.numel() for linear in linears if isinstance(linear.weight, nn.Parameter))


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Elements in all of `parameters`."""
    return sum(parameter.numel() for parameter in parameters)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux, bytes on macOS


def _per(value: float, total: float) -> float:
    return value / total if total else 0.0
