"""Messages about sites: adapters of the edge inside the cloud's layers, and the pauses that they make in a call."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass
from typing import Annotated

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import MessageError
from isthmus.protocol.limits import MAX_NAME, Size
from isthmus.protocol.tensor_codecs import CODECS, Payload, Role, check_hidden

MAX_LISTS = 64
"""Lists of sites that a cloud remembers of a session; the oldest goes first."""
MAX_SITES = 1024
"""Most sites of a list."""
MAX_GROUP = 64
"""Most sites that read one input."""
MAX_RANK = (1 << 16) - 1
"""The largest rank of a site, or width of a tap."""

Number = Annotated[int, Size(1, (1 << 32) - 1)]
"""Of a list of sites, or of leased weights."""
_PART = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


@dataclass(frozen=True, slots=True, order=True)
class CallId:
    """The name of one call: optimizer step (32 bits), call (64 bits, grows), attempt (32 bits)."""

    step: int
    call: int
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Sites:
    """Where the edge has adapters: a list that calls of this session name by `number`, from 1 on."""

    number: Number
    entries: Annotated[tuple[SiteSpec, ...], Size(1, MAX_SITES)]

    def check(self) -> None:
        """Check the names of the sites' linears, and their ranks."""
        for entry in self.entries:
            if entry.part and (len(entry.part) > MAX_NAME or not _PART.fullmatch(entry.part)):
                raise MessageError(f"site {entry.part[:MAX_NAME]!r} is refused: a dotted name of a module is needed")
            if entry.rank > MAX_RANK:
                raise MessageError(f"site {entry} of rank {entry.rank} is refused: {MAX_RANK} is accepted")


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
    sites: Annotated[tuple[Annotated[int, Size(0, MAX_SITES - 1)], ...], Size(1, MAX_GROUP)]
    tensors: tuple[Payload, ...]
    compute_ns: int
    crypto_ns: int
    queue_ns: int

    def check(self) -> None:
        """Check that the sites differ, and that the tensors are those of the phase."""
        if len(set(self.sites)) != len(self.sites):
            raise MessageError(f"a question about the sites {list(self.sites)} is refused: it names one twice")
        count = len(self.sites)
        # Sites that share their input share its tensor on the way forward.
        least, most, role = {
            SitePhase.FORWARD: (1, count, Role.ACTIVATION),
            SitePhase.AGAIN: (0, 0, Role.ACTIVATION),
            SitePhase.BACKWARD: (count, count, Role.GRADIENT),
            SitePhase.BACKWARD_ONLY: (count, count, Role.GRADIENT),
        }[self.phase]
        if not least <= len(self.tensors) <= most:
            raise MessageError(
                f"a question of phase {self.phase.name} about {count} sites has {len(self.tensors)} tensors, which do "
                "not fit it"
            )
        for tensor in self.tensors:
            check_hidden(tensor, role)


@dataclass(frozen=True, slots=True)
class SiteAnswer:
    """The edge's answer: a contribution for each site, or a gradient for each.

    Where one gradient stands for all sites of the group, it is alone.
    """

    id: CallId
    tensors: Annotated[tuple[Payload, ...], Size(0, MAX_GROUP)]

    def check(self) -> None:
        """Check that all are hidden states, or all are gradients of such."""
        for tensor in self.tensors:
            check_hidden(tensor, self.tensors[0].role)


def check_lora(down: Payload, up: Payload, role: Role) -> None:
    """Check the two matrices of a LoRA, or their gradients: `[r, in]` and `[out, r]`, in fp32.

    Raises:
        MessageError: They are others.
    """
    fits = len(down.shape) == len(up.shape) == 2 and up.shape[1] == down.shape[0]
    if not fits or not all(each.role == role and each.codec == CODECS["fp32"].id for each in (down, up)):
        raise MessageError(
            f"matrices of shapes {list(down.shape)} and {list(up.shape)}, roles {down.role.name} and {up.role.name}, "
            f"codec ids {down.codec} and {up.codec} are refused: [r, in] and [out, r] of role {role.name} in fp32 are "
            "needed"
        )


@dataclass(frozen=True, slots=True)
class LeasedWeights:
    """A leased site's LoRA: `down` `[r, in]`, `up` `[out, r]`, and the scale of their product."""

    down: Payload
    up: Payload
    scale: float

    def check(self) -> None:
        """Check that the matrices fit each other, and that the scale is finite."""
        check_lora(self.down, self.up, Role.ACTIVATION)
        if not math.isfinite(self.scale):
            raise MessageError(f"leased matrices with the scale {self.scale} are refused: a finite one is needed")


@dataclass(frozen=True, slots=True)
class Lease:
    """Weights for the leased sites of list `sites`, in its order, which calls name by `number`, from 1 on.

    The cloud keeps one lease of a session, and overwrites it when the next one comes or the session ends.
    """

    number: Number
    sites: Number
    weights: Annotated[tuple[LeasedWeights, ...], Size(1, MAX_SITES)]
