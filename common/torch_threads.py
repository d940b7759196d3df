"""torch's threads, whose number belongs to the thread that sets it, and on which bits may depend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from isthmus.common.machine import usable_cores


def set_torch_threads(number: int) -> None:
    """Have torch compute with so many threads in this thread, whatever others set.

    At a thread's first use of its threads torch sets their number to what any thread has set last. Setting the number
    does not count as a use, so it could be overwritten; asking for it does, so this asks first.
    """
    torch.get_num_threads()
    torch.set_num_threads(number)


def use_threads(number: int | None) -> None:
    """Have torch compute with so many threads from now on; None for its own choice, but no more than usable cores.

    torch knows the CPU affinity and not the cgroup's quota: in a container it would start a thread for each core of the
    machine.
    """
    if number is None and torch.get_num_threads() <= usable_cores():
        return  # to set even the same number would change how MKL computes
    set_torch_threads(number or usable_cores())


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Within it torch computes with so many threads, in this thread; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
