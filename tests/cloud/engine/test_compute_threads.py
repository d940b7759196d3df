"""The compute thread: order, results, errors, and an end."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
import torch

from isthmus.cloud.engine import compute_threads
from isthmus.cloud.engine.compute_threads import Dispatcher, Shared, TooLate
from isthmus.cloud.engine.requests import Batching, Kind, Share


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    made = Dispatcher(1)
    yield made
    made.shutdown(cancel=True)


def submit(dispatcher: Dispatcher, run: Callable[[], Any], tenant: str = "a", **values: Any) -> Future[Any]:
    return dispatcher.submit(run, tenant=tenant, owner=tenant.encode(), share=Share(), **values)


class Gate:
    """Holds the compute thread."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._open, self._in = threading.Event(), threading.Event()
        self.future = submit(dispatcher, self._wait, "gate")
        assert self._in.wait(10)

    def _wait(self) -> None:
        self._in.set()
        assert self._open.wait(10)

    def open(self) -> None:
        self._open.set()


def test_work_is_done_on_one_thread_with_its_number_of_torch_threads(dispatcher: Dispatcher) -> None:
    names = {submit(dispatcher, lambda: threading.current_thread().name).result(10) for _ in range(3)}
    assert names == {"compute 0"}
    assert submit(dispatcher, torch.get_num_threads).result(10) == 1


def test_errors_come_to_who_waits_and_the_thread_goes_on(dispatcher: Dispatcher) -> None:
    with pytest.raises(ZeroDivisionError):
        submit(dispatcher, lambda: 1 // 0).result(10)
    assert submit(dispatcher, lambda: "after").result(10) == "after"


def test_the_order_is_the_schedulers(dispatcher: Dispatcher) -> None:
    gate, order = Gate(dispatcher), []
    for number in range(3):
        submit(dispatcher, lambda number=number: order.append(f"flood {number}"), "flood")
    last = submit(dispatcher, lambda: order.append("other"), "other")
    submit(dispatcher, lambda: order.append("chat"), "chat", interactive=True)
    assert dispatcher.waiting() == {"flood": 3, "other": 1, "chat": 1}
    gate.open()
    last.result(10)
    submit(dispatcher, lambda: None, "flood").result(10)
    assert order[0] == "chat"
    assert order.index("other") < order.index("flood 1")
    assert [entry for entry in order if entry.startswith("flood")] == ["flood 0", "flood 1", "flood 2"]


def test_what_a_session_has_waiting_is_cancelled_with_it(dispatcher: Dispatcher) -> None:
    gate, order = Gate(dispatcher), []
    gone = submit(dispatcher, lambda: order.append("gone"), "gone")
    stays = submit(dispatcher, lambda: order.append("stays"), "stays")
    dispatcher.cancel(b"gone")
    gate.open()
    stays.result(10)
    assert gone.cancelled()
    assert order == ["stays"]


def test_what_comes_too_late_is_refused_while_all_lanes_compute(dispatcher: Dispatcher) -> None:
    gate = Gate(dispatcher)
    late = [submit(dispatcher, list, f"late {number}", deadline=0.1) for number in range(2)]
    waits = submit(dispatcher, list, "waits")
    for each in late:
        with pytest.raises(TooLate):
            each.result(10)
    assert not gate.future.done()
    again = submit(dispatcher, list, "late 0", deadline=0.1)
    with pytest.raises(TooLate):
        again.result(10)
    gate.open()
    assert waits.result(10) == []


@pytest.mark.parametrize("cancel", [False, True])
def test_an_end_does_what_waits_or_cancels_it(cancel: bool) -> None:
    dispatcher = Dispatcher(1)
    gate = Gate(dispatcher)
    waiting = submit(dispatcher, lambda: "done")
    threading.Timer(0.05, gate.open).start()
    dispatcher.shutdown(cancel=cancel)
    if cancel:
        with pytest.raises(CancelledError):
            waiting.result(10)
    else:
        assert waiting.result(0) == "done"
    with pytest.raises(RuntimeError, match="no more work"):
        submit(dispatcher, lambda: None)


def test_nothing_of_a_piece_is_kept_while_the_next_one_is_waited_for(dispatcher: Dispatcher) -> None:
    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    submit(dispatcher, lambda thing=thing: thing).result(10)
    submit(dispatcher, lambda: None).result(10)
    del thing
    gc.collect()
    assert gone() is None


def test_a_limited_tenant_waits_and_then_goes_on(dispatcher: Dispatcher) -> None:
    share = Share(1.0, 1000.0)
    done = [dispatcher.submit(lambda: "done", tenant="a", owner=b"a", share=share, positions=1010) for _ in range(3)]
    assert [future.result(10) for future in done] == ["done"] * 3


def test_pieces_of_one_kind_are_done_in_one_call() -> None:
    dispatcher = Dispatcher(1, Batching())
    calls = []

    def together(items: Sequence[int]) -> list[int | Exception]:
        calls.append(list(items))
        if 13 in items:
            raise ZeroDivisionError
        return [KeyError(item) if item == 6 else 10 * item for item in items]

    def ask(item: int) -> Future[int]:
        kind = Kind("odd" if item % 2 else "even", "")
        shared = Shared(kind, item, together)
        name = f"tenant {item}"
        return dispatcher.submit(
            lambda: -item, tenant=name, owner=name.encode(), share=Share(), positions=1, shared=shared
        )

    gate = Gate(dispatcher)
    even = [ask(item) for item in (2, 4, 6)]
    gate.open()
    assert [future.result(10) for future in even[:2]] == [20, 40]
    with pytest.raises(KeyError, match="6"):  # its own error, and nobody else's
        even[2].result(10)
    assert ask(8).result(10) == -8  # alone
    gate = Gate(dispatcher)
    gone, left = ask(10), ask(12)
    assert gone.cancel()
    gate.open()
    assert left.result(10) == -12
    gate = Gate(dispatcher)
    odd = [ask(item) for item in (11, 13)]
    gate.open()
    for future in odd:
        with pytest.raises(ZeroDivisionError):
            future.result(10)
    assert calls == [[2, 4, 6], [11, 13]]
    assert dispatcher.calls_per_pass == pytest.approx((3 + 1 + 2 + 2) / 4)
    dispatcher.shutdown(cancel=True)


def test_two_sessions_are_computed_for_at_the_same_time_with_half_of_the_threads_each() -> None:
    dispatcher = Dispatcher(2, Batching())
    meet = threading.Barrier(2, timeout=10)

    def run() -> int:
        meet.wait()
        return torch.get_num_threads()

    kinds = [Kind(name, name, anywhere=True) for name in ("a", "b")]
    gates = [Gate(dispatcher)]
    asked = [
        dispatcher.submit(
            run,
            tenant=kind.name,
            owner=kind.name.encode(),
            share=Share(),
            positions=10,
            shared=Shared(kind, None, list),
        )
        for kind in kinds
    ]
    gates[0].open()
    assert [each.result(10) for each in asked] == [1, 1]
    dispatcher.shutdown(cancel=False)


def test_one_session_has_all_threads() -> None:
    dispatcher = Dispatcher(2, Batching())
    shared = Shared(Kind("a", "a", anywhere=True), None, list)
    for _ in range(3):
        asked = dispatcher.submit(
            torch.get_num_threads, tenant="a", owner=b"a", share=Share(), positions=10, shared=shared
        )
        assert asked.result(10) == 2
    dispatcher.shutdown(cancel=False)


def test_what_depends_on_the_number_of_threads_has_those_of_a_lane_also_alone() -> None:
    dispatcher = Dispatcher(2, Batching(), all_threads_from=200)
    shared = Shared(Kind("a", "a", anywhere=True), None, list)

    def threads(positions: int, shared: Shared[None, int] | None) -> int:
        return dispatcher.submit(
            torch.get_num_threads, tenant="a", owner=b"a", share=Share(), positions=positions, shared=shared
        ).result(10)

    assert [threads(positions, shared) for positions in (199, 200)] == [1, 2]
    assert threads(199, None) == 2
    dispatcher.shutdown(cancel=False)


def test_memory_goes_back_where_a_crowd_makes_the_process_large(monkeypatch: pytest.MonkeyPatch) -> None:
    size, given = [100], threading.Event()
    monkeypatch.setattr(compute_threads, "resident_bytes", lambda: size[0])
    monkeypatch.setattr(compute_threads, "give_memory_back", given.set)
    dispatcher = Dispatcher(2, Batching(), growth=50)
    submit(dispatcher, lambda: None).result(10)
    gate = Gate(dispatcher)
    waits = submit(dispatcher, lambda: None)  # two sessions are at work until the gate is open
    size[0] = 150
    assert not given.wait(5 * compute_threads.TIDY_SECONDS)
    size[0] = 151
    assert given.wait(10)
    given.clear()
    size[0] = 150
    gate.open()
    waits.result(10)
    assert given.wait(10)  # once more, after a while without work
    dispatcher.shutdown(cancel=False)


def test_what_this_process_has_in_memory() -> None:
    with mmap.mmap(-1, 8 << 20) as block:
        before = compute_threads.resident_bytes()
        block.write(bytes(8 << 20))
        assert compute_threads.resident_bytes() - before >= 6 << 20


def test_who_waits_for_work_that_is_too_late_is_told_outside_the_lock(dispatcher: Dispatcher) -> None:
    gate, answered, asked = Gate(dispatcher), list[bool](), threading.Event()

    def ask(_: Future[Any]) -> None:
        # What others do when their work is over may ask the dispatcher something, from any thread.
        asking = threading.Thread(target=dispatcher.waiting, daemon=True)
        asking.start()
        asking.join(2)
        answered.append(not asking.is_alive())
        asked.set()

    late = submit(dispatcher, lambda: None, "b", positions=1, deadline=0.05)
    late.add_done_callback(ask)
    with pytest.raises(TooLate):
        late.result(10)
    gate.open()
    assert asked.wait(10)
    assert answered == [True]
