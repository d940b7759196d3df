"""What a worker's environment does to the memory of its process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch

from isthmus.cloud.control.cluster import WORKER_ENVIRONMENT

LEFT = 2 << 20


class Heap(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = [
        *((f"unread{at}", ctypes.c_size_t) for at in range(4)),
        ("hblkhd", ctypes.c_size_t),  # in blocks of their own
        *((f"unread{at}", ctypes.c_size_t) for at in range(4, 6)),
        ("uordblks", ctypes.c_size_t),  # in the heap
        *((f"unread{at}", ctypes.c_size_t) for at in range(6, 8)),
    ]


def bytes_in_use() -> int:
    """Bytes of this process's heap that are allocated."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Heap
    heap = libc.mallinfo2()
    return int(heap.uordblks + heap.hblkhd)


def bytes_left_by_products() -> int:
    """What products of several shapes leave allocated in the threads that have computed them."""
    computed, over = threading.Barrier(3), threading.Event()

    def compute() -> None:
        torch.set_num_threads(1)
        for rows in (32, 64, 96, 160, 192):
            torch.nn.functional.linear(torch.ones(rows, 576), torch.ones(1536, 576))
        computed.wait(60)
        over.wait(60)

    before = bytes_in_use()
    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    computed.wait(60)
    left = bytes_in_use() - before
    over.set()
    for thread in threads:
        thread.join()
    return left


def left_with(environment: dict[str, str]) -> int:
    """The same in a process of its own."""
    plain = {name: value for name, value in os.environ.items() if name not in WORKER_ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, __file__],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallinfo2 is glibc's, from 2.33 on")
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
def test_products_of_matrices_leave_no_buffers_in_a_worker() -> None:
    others = {name: value for name, value in WORKER_ENVIRONMENT.items() if name != "MKL_DISABLE_FAST_MM"}
    if left_with(others) < LEFT:
        pytest.skip("this processor's MKL keeps no buffers")
    assert left_with(WORKER_ENVIRONMENT) < LEFT


if __name__ == "__main__":
    print(bytes_left_by_products())
