"""The engine: order, results, errors, an end, and how it is made for a span."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.batch_invariance import BatchInvariance
from isthmus.backbone.runtime.numerics import VARYING
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import load_span
from isthmus.cloud.bounds import EngineOptions
from isthmus.cloud.decoding.decode_calls import EXACT, FAST
from isthmus.cloud.engine import engine as engine_module
from isthmus.cloud.engine.batching import SchedulerLimits
from isthmus.cloud.engine.engine import Engine, start_engine
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.engine.requests import Kind, NotBegun, Request, Share, TooLate
from isthmus.cloud.engine.scheduler import Scheduler


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(1, Scheduler(time.monotonic))
    yield made
    made.shutdown(cancel=True)


def batching_engine(threads: int, **options: Any) -> Engine:
    """Two compute threads, where there are as many torch threads."""
    number = min(2, threads)
    limits = SchedulerLimits(compute_threads=number)
    return Engine(threads, Scheduler(time.monotonic, limits), compute_threads=number, **options)


def submit(engine: Engine, run: Callable[[], Any], tenant: str = "a", **values: Any) -> Future[Any]:
    if "deadline" in values:
        values["deadline"] += time.monotonic()
    return engine.submit(Request(tenant, tenant.encode(), Share(), run, **values))


class Gate:
    """Holds the compute thread."""

    def __init__(self, engine: Engine) -> None:
        self._open, self._in = threading.Event(), threading.Event()
        self.future = submit(engine, self._wait, "gate")
        assert self._in.wait(10)

    def _wait(self) -> None:
        self._in.set()
        assert self._open.wait(10)

    def open(self) -> None:
        self._open.set()


def test_work_is_done_on_one_thread_with_its_number_of_torch_threads(engine: Engine) -> None:
    names = {submit(engine, lambda: threading.current_thread().name).result(10) for _ in range(3)}
    assert names == {"compute 0"}
    assert submit(engine, torch.get_num_threads).result(10) == 1


def test_the_first_work_of_a_thread_has_its_number_whatever_others_set(engine: Engine) -> None:
    """Bits depend on it."""
    before = torch.get_num_threads()

    def work() -> int:
        other = threading.Thread(target=torch.set_num_threads, args=(2,))
        other.start()
        other.join()
        return torch.get_num_threads()

    try:
        assert submit(engine, work).result(10) == 1
    finally:
        torch.set_num_threads(before)


def test_errors_come_to_who_waits_and_the_thread_goes_on(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        submit(engine, lambda: 1 // 0).result(10)
    assert submit(engine, lambda: "after").result(10) == "after"


def test_the_order_is_the_schedulers(engine: Engine) -> None:
    gate, order = Gate(engine), []
    for number in range(3):
        submit(engine, lambda number=number: order.append(f"flood {number}"), "flood")
    last = submit(engine, lambda: order.append("other"), "other")
    submit(engine, lambda: order.append("chat"), "chat", interactive=True)
    assert engine.waiting() == {"flood": 3, "other": 1, "chat": 1}
    gate.open()
    last.result(10)
    submit(engine, lambda: None, "flood").result(10)
    assert order[0] == "chat"
    assert order.index("other") < order.index("flood 1")
    assert [entry for entry in order if entry.startswith("flood")] == ["flood 0", "flood 1", "flood 2"]


def test_what_never_fits_is_refused_and_keeps_nobody_waiting() -> None:
    engine = Engine(1, Scheduler(time.monotonic, SchedulerLimits(compute_bytes=100)))
    with pytest.raises(ValueError, match="101 bytes of memory never fits"):
        submit(engine, lambda: "too large", nbytes=101)
    assert submit(engine, lambda: "all of it", nbytes=100).result(10) == "all of it"
    engine.shutdown(cancel=True)


def test_what_a_session_has_waiting_is_cancelled_with_it(engine: Engine) -> None:
    gate, order = Gate(engine), []
    gone = submit(engine, lambda: order.append("gone"), "gone")
    stays = submit(engine, lambda: order.append("stays"), "stays")
    engine.cancel(b"gone")
    gate.open()
    stays.result(10)
    assert gone.cancelled()
    assert order == ["stays"]


def test_what_comes_too_late_is_refused_while_all_threads_compute(engine: Engine) -> None:
    gate = Gate(engine)
    late = [submit(engine, list, f"late {number}", deadline=0.1) for number in range(2)]
    waits = submit(engine, list, "waits")
    for each in late:
        with pytest.raises(TooLate):
            each.result(10)
    assert not gate.future.done()
    again = submit(engine, list, "late 0", deadline=0.1)
    with pytest.raises(TooLate):
        again.result(10)
    gate.open()
    assert waits.result(10) == []


@pytest.mark.parametrize("cancel", [False, True])
def test_an_end_does_what_waits_or_cancels_it(cancel: bool) -> None:
    engine = Engine(1, Scheduler(time.monotonic))
    gate = Gate(engine)
    waiting = submit(engine, lambda: "done")
    threading.Timer(0.05, gate.open).start()
    engine.shutdown(cancel=cancel)
    if cancel:
        with pytest.raises(CancelledError):
            waiting.result(10)
    else:
        assert waiting.result(0) == "done"
    with pytest.raises(RuntimeError, match="no more requests"):
        submit(engine, lambda: None)


def test_nothing_of_a_request_is_kept_while_the_next_one_is_waited_for(engine: Engine) -> None:
    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    submit(engine, lambda thing=thing: thing).result(10)
    submit(engine, lambda: None).result(10)
    del thing
    gc.collect()
    assert gone() is None


def test_a_limited_tenant_waits_and_then_goes_on(engine: Engine) -> None:
    share = Share(1.0, 1000.0)
    asked = [Request("a", b"a", share, lambda: "done", positions=1010) for _ in range(3)]
    assert [engine.submit(each).result(10) for each in asked] == ["done"] * 3


def test_requests_of_one_kind_are_computed_in_one_batch() -> None:
    engine = batching_engine(1)
    batches = []

    def run_batch(items: Sequence[int]) -> list[int | Exception]:
        batches.append(list(items))
        if 13 in items:
            raise ZeroDivisionError
        return [KeyError(item) if item == 6 else 10 * item for item in items]

    def ask(item: int) -> Future[int]:
        kind, name = Kind("odd" if item % 2 else "even"), f"tenant {item}"
        return submit(engine, lambda: -item, name, kind=kind, item=item, run_batch=run_batch, positions=1)

    gate = Gate(engine)
    even = [ask(item) for item in (2, 4, 6)]
    gate.open()
    assert [future.result(10) for future in even[:2]] == [20, 40]
    with pytest.raises(KeyError, match="6"):  # its own error, and nobody else's
        even[2].result(10)
    assert ask(8).result(10) == -8  # alone
    gate = Gate(engine)
    gone, left = ask(10), ask(12)
    assert gone.cancel()
    gate.open()
    assert left.result(10) == -12
    gate = Gate(engine)
    odd = [ask(item) for item in (11, 13)]
    gate.open()
    for future in odd:
        with pytest.raises(ZeroDivisionError):
            future.result(10)
    assert batches == [[2, 4, 6], [11, 13]]
    assert engine.calls_per_pass == pytest.approx((3 + 1 + 2 + 2) / 4)
    assert engine.shared_by_tenant == {f"tenant {item}": 1 for item in (2, 4, 6, 11, 13)}  # not 8 and 12, alone
    engine.shutdown(cancel=True)


def test_what_could_not_begin_counts_in_no_batch(engine: Engine) -> None:
    def ask(item: int) -> Future[Any]:
        def alone() -> Any:
            raise NotBegun

        def together(items: Sequence[int]) -> list[Any]:
            return [NotBegun() if each > 2 else each for each in items]

        return submit(engine, alone, f"tenant {item}", kind=Kind("k"), item=item, run_batch=together, positions=1)

    gate = Gate(engine)
    asked = [ask(item) for item in (1, 2, 3)]
    gate.open()
    assert [future.result(10) for future in asked[:2]] == [1, 2]
    for refused in (asked[2], ask(4)):
        with pytest.raises(NotBegun):
            refused.result(10)
    submit(engine, lambda: None).result(10)  # behind what the last batch leaves to do
    assert engine.calls_per_pass == 2
    charged = {name: account.virtual_time for name, account in engine._scheduler._tenants.items()}
    assert charged["tenant 3"] == 0 < charged["tenant 1"]
    engine.shutdown(cancel=True)


def test_two_sessions_are_computed_for_at_the_same_time_with_half_of_the_threads_each() -> None:
    engine = batching_engine(2)
    meet = threading.Barrier(2, timeout=10)

    def run() -> int:
        meet.wait()
        return torch.get_num_threads()

    gate = Gate(engine)
    asked = [submit(engine, run, name, kind=Kind(name, parallel=True), positions=10) for name in ("a", "b")]
    gate.open()
    assert [each.result(10) for each in asked] == [1, 1]
    engine.shutdown(cancel=False)


def test_a_session_alone_has_all_threads_where_its_bits_do_not_depend_on_that() -> None:
    engine = batching_engine(2, invariance=BatchInvariance(5, 200))
    kind = Kind("a", parallel=True)
    for positions, own_kind, threads in ((199, kind, 1), (200, kind, 2), (199, None, 2)):
        asked = submit(engine, torch.get_num_threads, kind=own_kind, positions=positions)
        assert asked.result(10) == threads
    engine.shutdown(cancel=False)


def test_who_waits_for_work_that_is_too_late_is_told_outside_the_lock(engine: Engine) -> None:
    gate, answered, asked = Gate(engine), list[bool](), threading.Event()

    def ask(_: Future[Any]) -> None:
        # What others do when their work is over may ask the engine something, from any thread.
        asking = threading.Thread(target=engine.waiting, daemon=True)
        asking.start()
        asking.join(2)
        answered.append(not asking.is_alive())
        asked.set()

    late = submit(engine, lambda: None, "b", positions=1, deadline=0.05)
    late.add_done_callback(ask)
    with pytest.raises(TooLate):
        late.result(10)
    gate.open()
    assert asked.wait(10)
    assert answered == [True]


# Made for a span ------------------------------------------------------------------------------------------------------


@pytest.fixture
def executor(tmp_path: Path) -> Executor:
    checkpoint = Checkpoint(tiny_checkpoint("llama", tmp_path / "tiny"), "tiny")
    span = load_span(checkpoint, SplitPlan.parse("1:1", checkpoint.config.num_hidden_layers))
    return Executor(SiteHost(span), torch.float32, 1 << 30)


@pytest.mark.parametrize(
    ("measured", "smallest", "all_from", "of_a_call", "note"),
    [
        (BatchInvariance(16, 16), 16, 16, 2, ""),
        (BatchInvariance(16, 256), 16, 256, 1, ", 1 from 16 to 255 positions"),  # as a compute thread has
        (BatchInvariance(16, None), 16, float("inf"), 1, ", 1 from 16 positions on"),
        (BatchInvariance(None, None), 1, 0, 2, VARYING),  # no bits to keep
    ],
)
def test_bits_decide_what_is_batched_and_with_how_many_threads(
    executor: Executor,
    monkeypatch: pytest.MonkeyPatch,
    measured: BatchInvariance,
    smallest: int,
    all_from: float,
    of_a_call: int,
    note: str,
) -> None:
    monkeypatch.setattr(engine_module, "measure_batch_invariance", lambda *_: measured)
    found = start_engine(executor, 2, EngineOptions())
    limits = found._scheduler._limits
    assert (limits.smallest, found._all_threads_from) == (smallest, all_from)
    assert found.threads_of_a_call == of_a_call
    assert found.invariance == measured
    assert found.threads_note == note
    found.shutdown(cancel=True)


def test_the_operator_s_options_reach_the_scheduler(executor: Executor) -> None:
    options = EngineOptions(max_batch_tokens=7, max_wait=3.0, interactive_lead=4.0, compute_threads=3, state_bytes=99)
    found = start_engine(executor, 4, options)
    limits = found._scheduler._limits
    assert (limits.max_batch_tokens, limits.max_wait, limits.interactive_lead) == (7, 3.0, 4.0)
    assert (limits.compute_threads, limits.state_bytes, len(found._threads)) == (3, 99, 3)
    assert found._trimmer is not None
    found.shutdown(cancel=True)
    plain = start_engine(executor, 4, EngineOptions(trim_heap=False))
    assert plain._trimmer is None
    assert plain._scheduler._limits.state_bytes == executor.span_bytes / 2
    plain.shutdown(cancel=True)


def test_without_batching_nothing_is_measured_shared_or_held_back(executor: Executor) -> None:
    found = start_engine(executor, 2, EngineOptions(batching=False))
    limits = found._scheduler._limits
    assert (found.invariance, found.threads_of_a_call, len(found._threads)) == (None, 2, 1)
    assert found.threads_note == ""
    assert (limits.smallest, limits.max_wait) == (float("inf"), 0.0)
    found.shutdown(cancel=True)


def test_decode_steps_have_all_threads_when_alone_unless_they_are_exact(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "measure_batch_invariance", lambda *_: BatchInvariance(4, 12))
    engine = start_engine(executor, 2, EngineOptions())
    seen = {}
    for name, kind, positions in (
        ("fast", FAST, 1),
        ("exact", EXACT, 1),
        ("exact prompt", EXACT, 64),
        ("training", Kind("forward", parallel=True), 64),
        ("short training", Kind("forward", parallel=True), 8),
    ):
        request = Request(
            name, name.encode(), Share(), torch.get_num_threads, kind=kind, positions=positions, interactive=True
        )
        seen[name] = engine.submit(request).result()
    engine.shutdown(cancel=True)
    assert seen == {"fast": 2, "exact": 1, "exact prompt": 1, "training": 2, "short training": 1}
