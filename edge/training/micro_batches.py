"""Several micro-batches in flight at a time, so that computation hides a slow link.

Each micro-batch in flight has a thread, which takes it through forward and backward, and a link with a session of its
own. One thread computes at a time: the one that has the *turn*. It gives the turn away while it waits for the cloud, so
that messages of one micro-batch cross while another is computed. GPipe (Huang et al. 2019) splits a batch for the same
reason.

What a step computes does not depend on which thread is faster: each micro-batch has its own random state, drawn before
the step begins, and gradients are added up in the order of the micro-batches. Without dropout the result has the bits
of a run with one micro-batch at a time. With dropout other masks are drawn, the same ones in every run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.run_report import WireMeter, WireTotals

if TYPE_CHECKING:  # training on an emulator loads no gRPC
    from isthmus.backbone.split.split_cache import RemoteCache
    from isthmus.edge.client.remote_span import BackwardRequest, ForwardRequest, SpanLink

T = TypeVar("T")
R = TypeVar("R")


class _Turn:
    """Whose turn it is to compute. The random state belongs to the turn's owner and changes hands with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, slot: _Slot) -> Iterator[None]:
        """Wait for the turn, and give it back at the end."""
        with self._lock:
            torch.set_rng_state(slot.random)
            try:
                yield
            finally:
                slot.random = torch.get_rng_state()

    @contextmanager
    def left(self, slot: _Slot) -> Iterator[None]:
        """Let others have the turn meanwhile."""
        slot.random = torch.get_rng_state()
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            torch.set_rng_state(slot.random)


class _Slot:
    """A link, and the random state of the micro-batch that it carries."""

    def __init__(self, link: SpanLink) -> None:
        self.link = link
        self.random = torch.get_rng_state()


class InFlight:
    """A `SpanLink` over several links, and the threads that use them.

    A call outside `map` goes over the first link. Random numbers are a micro-batch's own if they are drawn on the CPU.

    Args:
        links: One for each micro-batch in flight, open, to the same cloud.
    """

    def __init__(self, links: Sequence[SpanLink]) -> None:
        self._slots = [_Slot(link) for link in links]
        self._turn = _Turn()
        self._here = threading.local()

    def new_cache(self) -> RemoteCache:
        """A cache of the first link's cloud."""
        return self._slots[0].link.new_cache()

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Generator[R, None, None]:
        """Do `work` for each item, as many at a time as there are links.

        If one fails, those that have not begun do not begin. When the iterator has ended, has raised, or is closed, no
        thread is at work, and the random state is the caller's.

        Args:
            work: Forward and backward of a micro-batch. It has the turn, and must not add to shared tensors.

        Yields:
            The results, in the order of the items. Of several failures the earliest item's is raised.
        """
        # One number for each, from the run's own random state: resumed or repeated, a step draws the same ones.
        seeds = torch.randint(0, 2**62, (len(items),)).tolist()
        after, with_graph, threads = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_num_threads()
        over = threading.Event()
        free: SimpleQueue[_Slot] = SimpleQueue()
        for slot in self._slots:
            free.put(slot)

        def run(item: T, seed: int) -> R:
            slot = free.get()  # never waits: there are as many slots as threads
            try:
                if over.is_set():
                    raise CancelledError  # nobody sees it: what has failed is an earlier item
                slot.random = torch.Generator().manual_seed(seed).get_state()
                self._here.slot = slot
                with (
                    self._turn.taken(slot),
                    torch.set_grad_enabled(with_graph),  # a thread's own setting
                    # An accelerator has one thread for backwards: what waits in it would keep the others out.
                    torch.autograd.set_multithreading_enabled(False),
                ):
                    return work(item)
            except BaseException:
                over.set()
                raise
            finally:
                free.put(slot)

        try:
            # The number belongs to the thread that sets it, and bits depend on it.
            with ThreadPoolExecutor(len(self._slots), "micro-batch", set_torch_threads, (threads,)) as pool:
                begun = deque(pool.submit(run, item, seed) for item, seed in zip(items, seeds, strict=True))
                try:
                    while begun:
                        yield begun.popleft().result()
                finally:
                    over.set()
        finally:
            torch.set_rng_state(after)

    def forward(self, request: ForwardRequest) -> tuple[Tensor, Any]:
        """See `SpanLink`."""
        slot: _Slot | None = getattr(self._here, "slot", None)
        if slot is None:
            output, kept = self._slots[0].link.forward(request)
            return output, (None, kept)
        if request.sites is not None:  # they compute, and draw dropout masks
            request.sites.turn = partial(self._turn.taken, slot)
        with self._turn.left(slot):
            output, kept = slot.link.forward(request)
        return output, (slot, kept)

    def backward(self, request: BackwardRequest) -> Tensor | None:
        """See `SpanLink`; over the link of the forward, whatever thread autograd's engine runs it in."""
        slot, kept = request.kept
        request = replace(request, kept=kept)
        if slot is None:
            return self._slots[0].link.backward(request)
        with self._turn.left(slot):
            result: Tensor | None = slot.link.backward(request)
        return result


class SummedMeter:
    """The meter of several links: what they have carried together. Waits overlap, and are added up."""

    def __init__(self, links: Sequence[WireMeter]) -> None:
        self._links = links

    def begin_step(self, step: int) -> None:
        """See `WireMeter`."""
        for link in self._links:
            link.begin_step(step)

    def totals(self) -> WireTotals:
        """See `WireMeter`."""
        return sum((link.totals() for link in self._links), WireTotals())
