"""What a client trains on, checked, and as padded batches of bounded size.

A *datum* is a row of tokens with a target, or several, for each: what position i predicts. Data go into micro-batches
by one rule, on which the bits of sums depend: in the order given, as many as fit, where a micro-batch takes as many
rows times the longest one of positions. What bounds the positions is the model's vocabulary, as logits are what takes
memory (`most_positions`). A row is never divided, so a long one may be a micro-batch that is larger.

Each row is computed with its last target behind it, where the model's window has room for that. So a row of a
conversation has the shape that it has in `isthmus edge train`, and both give the same bits. Nothing that comes before
sees that token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from isthmus.common.errors import ConfigError
from isthmus.daemon.tinker.training.loss_functions import Loss
from isthmus.daemon.tinker.wire_bodies import MOST_TARGETS

POSITIONS = 4096
"""Of a micro-batch at most, if it has several rows."""
LOGITS = 1 << 27
"""Of a micro-batch at most, if it has several rows: 512 MiB, and as much again three times on the way to a gradient."""
MOST_DATA = 4096
"""In one request."""
MOST_TOKENS = 1 << 19
"""In one request, of all data together."""

_INPUTS = ("weights", "logprobs", "advantages")
Token = Annotated[int, Field(ge=0, lt=2**31)]
Numbers = list[float] | list[list[float]]


class Datum(BaseModel):
    """A row of tokens, and what is asked of each position.

    Attributes:
        tokens: `[N]`.
        targets: `[N]`, or `[N, K]` for several at each position. Sparse rows are made dense before they come here, by
            token 0 with weight 0.
        weights, logprobs, advantages: One for each target, as the loss needs them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    tokens: list[Token] = Field(min_length=1)
    targets: list[Token] | list[list[Token]] = Field(min_length=1)
    weights: Numbers | None = None
    logprobs: Numbers | None = None
    advantages: Numbers | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A checked datum.

    Attributes:
        tokens: `[N]`, int64, perhaps with the last target behind.
        targets: `[N, K]`, int64.
        inputs: What the loss takes, `[N, K]` each, fp32.
        flat: Whether the client gave one target for each position as `[N]`.
    """

    tokens: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]
    flat: bool


@dataclass(frozen=True, slots=True)
class DatumBatch:
    """Rows as one batch, padded on the right.

    Attributes:
        rows: What it is made of.
        input_ids, attention_mask: `[B, S]`, int64; the mask is 1 for tokens.
        targets: `[B, S, K]`, int64, 0 on padding.
        inputs: What the loss takes, `[B, S, K]` each, fp32, 0 on padding.
        padding: Where there is no target, `[B, S, K]`, bool. With inputs and a log probability of 0 it adds nothing to
            any loss.
    """

    rows: Sequence[Row]
    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]
    padding: Tensor


def checked(data: Sequence[Datum], loss: Loss, *, vocabulary: int, longest: int) -> list[Row]:
    """The data as tensors.

    Args:
        loss: Decides what has to be there.
        vocabulary: Tokens that the model has.
        longest: Tokens of a row at most.

    Raises:
        ConfigError: Something is missing, is too much, or does not fit; the message names the datum.
    """
    if not data:
        raise ConfigError("there are no data: give at least one datum")
    if len(data) > MOST_DATA:
        raise ConfigError(f"{len(data)} data in one request are too many: give at most {MOST_DATA}")
    if (tokens := sum(len(datum.tokens) for datum in data)) > MOST_TOKENS:
        raise ConfigError(f"{tokens} tokens in one request are too many: give at most {MOST_TOKENS}")
    rows = [_row(datum, f"datum {number}", loss, vocabulary, longest) for number, datum in enumerate(data)]
    if (targets := sum(row.targets.numel() for row in rows)) > MOST_TARGETS:
        raise ConfigError(f"{targets} targets in one request are too many: give at most {MOST_TARGETS}")
    return rows


def most_positions(vocabulary: int, per_call: int) -> int:
    """Positions that a micro-batch with several rows may have.

    Args:
        vocabulary: Logits of a position.
        per_call: Positions that one call of the cloud takes.
    """
    return min(POSITIONS, max(1, LOGITS // vocabulary), per_call)


def micro_batches(rows: Sequence[Row], pad_id: int, positions: int) -> Iterator[DatumBatch]:
    """The rows in micro-batches; see the top of the file for the rule.

    Args:
        pad_id: Token that fills rows.
        positions: Of a micro-batch with several rows at most.
    """
    begun: list[Row] = []
    width = 0
    for row in rows:
        wider = max(width, len(row.tokens))
        if begun and (len(begun) + 1) * wider > positions:
            yield _batch(begun, pad_id)
            begun, wider = [], len(row.tokens)
        begun.append(row)
        width = wider
    if begun:
        yield _batch(begun, pad_id)


def _row(datum: Datum, where: str, loss: Loss, vocabulary: int, longest: int) -> Row:
    flat = not isinstance(datum.targets[0], list)
    if not flat and not loss.many:
        raise ConfigError(f"{where}: loss {loss.name} takes one target for each position, not rows of them")
    tokens = torch.tensor(datum.tokens, dtype=torch.int64)
    if len(tokens) > longest:
        raise ConfigError(f"{where} has {len(tokens)} tokens, and {longest} are possible: make it shorter")
    targets = _matrix(datum.targets, torch.int64, f"{where}: targets")
    if len(targets) != len(tokens):
        raise ConfigError(f"{where} has {len(tokens)} tokens and targets for {len(targets)}: give one for each")
    if (highest := int(max(tokens.max(), targets.max()))) >= vocabulary:
        raise ConfigError(f"{where} has token {highest}, and the model has {vocabulary} tokens")
    inputs = {}
    for name in _INPUTS:
        given: Numbers | None = getattr(datum, name)
        if given is None:
            if name in loss.inputs:
                raise ConfigError(f"{where}: loss {loss.name} needs {name}, one for each target")
            continue
        if name not in loss.inputs:
            raise ConfigError(f"{where}: loss {loss.name} takes no {name}: leave them out")
        inputs[name] = _matrix(given, torch.float32, f"{where}: {name}")
        if inputs[name].shape != targets.shape or (not isinstance(given[0], list)) != flat:
            raise ConfigError(f"{where}: {name} are not shaped as the targets are: give one for each target")
        if not bool(inputs[name].isfinite().all()):
            raise ConfigError(f"{where}: {name} hold a number that fp32 cannot hold")
    if len(tokens) < longest:
        tokens = torch.cat([tokens, targets[-1, :1]])
    return Row(tokens, targets, inputs, flat)


def _matrix(values: Sequence[object], dtype: torch.dtype, what: str) -> Tensor:
    """`[N]` as `[N, 1]`, and `[N, K]` as it is."""
    try:
        tensor = torch.tensor(values, dtype=dtype)
    except (ValueError, RuntimeError, TypeError, OverflowError):
        raise ConfigError(f"{what} are rows of different lengths: give each as many") from None
    tensor = tensor[:, None] if tensor.dim() == 1 else tensor
    if not tensor.numel():
        raise ConfigError(f"{what} are empty: give at least one for each position")
    return tensor


def _batch(rows: list[Row], pad_id: int) -> DatumBatch:
    length = max(len(row.tokens) for row in rows)
    width = max(row.targets.shape[1] for row in rows)
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    targets = torch.zeros(len(rows), length, width, dtype=torch.int64)
    inputs = {name: torch.zeros(targets.shape) for name in rows[0].inputs}
    padding = torch.ones(targets.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.tokens)] = row.tokens
        mask[number, : len(row.tokens)] = 1
        n, k = row.targets.shape
        targets[number, :n, :k] = row.targets
        padding[number, :n, :k] = False
        for name, values in row.inputs.items():
            inputs[name][number, :n, :k] = values
    return DatumBatch(tuple(rows), ids, mask, targets, inputs, padding)
