"""How many threads torch computes with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from isthmus.common import torch_threads


def test_torch_takes_no_more_threads_by_itself_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before, set_to = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    for own, usable, asked in ((8, 2, None), (2, 2, None), (1, 2, None), (2, 2, 5)):
        monkeypatch.setattr(torch, "get_num_threads", lambda own=own: own)
        monkeypatch.setattr(torch_threads, "usable_cores", lambda usable=usable: usable)
        torch_threads.use_threads(asked)
    assert set_to == [2, 5]
    monkeypatch.undo()
    assert torch.get_num_threads() == before


def test_a_thread_keeps_its_number_from_the_start() -> None:
    def kept(set_to: Callable[[int], None]) -> int:
        """How many a new thread has that sets one, before another thread sets two."""
        mine, others = threading.Event(), threading.Event()

        def compute() -> int:
            set_to(1)
            mine.set()
            assert others.wait(10)
            return torch.get_num_threads()

        with torch_threads.torch_threads(1), ThreadPoolExecutor(1) as pool:
            found = pool.submit(compute)
            assert mine.wait(10)
            torch.set_num_threads(2)
            others.set()
            return found.result(10)

    assert kept(torch_threads.set_torch_threads) == 1
    # The control: torch alone gives it the other thread's.
    assert kept(torch.set_num_threads) == 2
