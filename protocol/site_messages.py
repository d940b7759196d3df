"""Messages about sites: adapters of the edge inside the cloud's layers, and the pauses that they make in a call."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.protocol.tensor_codecs import Payload

MAX_LISTS = 64
"""Lists of sites that a cloud remembers of a session; the oldest goes first."""
MAX_SITES = 1024
"""Most sites of a list."""
MAX_GROUP = 64
"""Most sites that read one input."""


@dataclass(frozen=True, slots=True, order=True)
class CallId:
    """The name of one call: optimizer step (32 bits), call (64 bits, grows), attempt (16 bits)."""

    step: int
    call: int
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Sites:
    """Where the edge has adapters: a list that calls of this session name by `number`, from 1 on."""

    number: int
    entries: tuple[SiteSpec, ...]


class SitePhase(enum.IntEnum):
    """What a question at a group of sites is about."""

    FORWARD = 1
    """The group's input `[B, S, in]` is here: what do its sites add to their outputs `[B, S, out]`?"""
    AGAIN = 2
    """The same question once more, as the span is computed again: no tensor goes along, the edge has its answers."""
    BACKWARD = 3
    """The contributions' gradients `[B, S, out]` are here: what are those of the input `[B, S, in]`?"""
    BACKWARD_ONLY = 4
    """The same, and nothing below needs the input's: the answer is empty."""


@dataclass(frozen=True, slots=True)
class SiteQuestion:
    """A call pauses at a group of sites, which are named by their places in the list, and asks the edge.

    Times as in a reply, for what the cloud has done since the edge's last message.
    """

    id: CallId
    phase: SitePhase
    sites: tuple[int, ...]
    tensors: tuple[Payload, ...]
    compute_ns: int
    crypto_ns: int
    queue_ns: int


@dataclass(frozen=True, slots=True)
class SiteAnswer:
    """The edge's answer: a contribution for each site, or a gradient for each.

    Where one gradient stands for all sites of the group, it is alone.
    """

    id: CallId
    tensors: tuple[Payload, ...]


@dataclass(frozen=True, slots=True)
class LeasedWeights:
    """A leased site's LoRA: `down` `[r, in]`, `up` `[out, r]`, and the scale of their product."""

    down: Payload
    up: Payload
    scale: float


@dataclass(frozen=True, slots=True)
class Lease:
    """Weights for the leased sites of list `sites`, in its order, which calls name by `number`, from 1 on.

    The cloud keeps one lease of a session, and overwrites it when the next one comes or the session ends.
    """

    number: int
    sites: int
    weights: tuple[LeasedWeights, ...]
