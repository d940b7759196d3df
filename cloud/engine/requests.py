"""What is submitted to the engine: one request for each thing that a session wants computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class TooLate(Exception):  # noqa: N818 - tells the gateway what to answer, is never shown to anybody
    """A request's deadline has passed before it could begin."""


class NotBegun(Exception):  # noqa: N818 - tells whoever submitted a request, is never shown to anybody
    """A request that had its turn could not begin: nothing of it was computed. Submit it again later."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant may have of a worker's computing time.

    Attributes:
        weight: Its share against the other tenants', where all want more than there is.
        positions_per_second: Token positions at most, on average; None for no limit.
    """

    weight: float = 1.0
    positions_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """What requests may share a batch: those whose kind has the same name.

    Attributes:
        name: Also names what the time that a token position takes is measured for.
        parallel: Whether such a batch may be computed beside another one. All else is left to the first compute
            thread.
        any_size: Whether a request may be batched even when it is shorter than `smallest`, so that its bits depend on
            the batch.
        all_threads: Whether a request that is alone has all of torch's threads; None for where its bits do not depend
            on that, by their number of positions.
    """

    name: str
    parallel: bool = False
    any_size: bool = False
    all_threads: bool | None = None


@dataclass(slots=True, eq=False)
class Request(Generic[R]):
    """Something that a session wants computed. Built once, where its message is taken in.

    Attributes:
        tenant: Whose it is.
        session: Id of the session that it belongs to.
        share: What its tenant may have.
        run: Computes it alone.
        kind: What it may share a batch with; None for nothing.
        item: What `run_batch` is given of it.
        run_batch: Computes several requests of the kind: takes their items, returns as many results, in the same
            order, an error where one raises.
        interactive: Whether a person waits for the result.
        positions: Token positions that it computes; 0 for none.
        deadline: When it has to be done, on the engine's clock; None for whenever.
        rate_positions: Token positions that count against the tenant's rate: None for its own, 0 where they were
            counted before.
        nbytes: Memory that it takes while it is computed.
        keeps_bytes: Memory of the forward state that it leaves for a later backward.
        future: Its result.
        since: When it was added to the queue, on the engine's clock.
    """

    tenant: str
    session: bytes
    share: Share
    run: Callable[[], R]
    kind: Kind | None = None
    item: Any = None
    run_batch: Callable[[Sequence[Any]], Sequence[R | Exception]] | None = None
    interactive: bool = False
    positions: int = 0
    deadline: float | None = None
    rate_positions: int | None = None
    nbytes: int = 0
    keeps_bytes: int = 0
    future: Future[R] = field(default_factory=Future)
    since: float = 0.0
