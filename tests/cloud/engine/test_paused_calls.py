"""Calls that pause: they ask, wait and go on, one computes at a time, and what is over leaves nothing behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from isthmus.cloud.engine import paused_calls
from isthmus.cloud.engine.paused_calls import CallThreads, Pause, PausingCall

Ask = Callable[[str], int]
Call = PausingCall[str, int, Any]


@pytest.fixture
def threads() -> CallThreads:
    return CallThreads(1, 16)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed is freed because nothing holds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def question(outcome: Any) -> str:
    assert isinstance(outcome, Pause)
    return str(outcome.question)


def test_a_call_that_asks_nothing_ends_in_its_first_turn(threads: CallThreads) -> None:
    call: Call = PausingCall(lambda ask: threading.current_thread().name, threads.claim("a"))
    assert str(call.resume()).startswith("call")


def test_nothing_runs_before_its_first_turn(threads: CallThreads) -> None:
    done: list[int] = []
    call: Call = PausingCall(lambda ask: done.append(1), threads.claim("a"))
    assert not done
    call.resume()
    assert done == [1]


def test_a_call_asks_as_often_as_it_likes_and_gets_the_answers_in_order(threads: CallThreads) -> None:
    call: Call = PausingCall(lambda ask: [ask(f"question {n}") for n in range(3)], threads.claim("a"))
    outcome = call.resume()
    for n in range(3):
        assert question(outcome) == f"question {n}"
        outcome = call.resume(10 + n)
    assert outcome == [10, 11, 12]


def test_none_is_a_result(threads: CallThreads) -> None:
    call: Call = PausingCall(lambda ask: None, threads.claim("a"))
    assert call.resume() is None


def test_a_call_runs_with_the_torch_threads_that_it_was_told(threads: CallThreads) -> None:
    call: Call = PausingCall(lambda ask: torch.get_num_threads(), threads.claim("a"))
    assert call.resume() == 1


@pytest.mark.parametrize("pauses", [0, 1])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_a_call_raises_reaches_the_one_that_resumes_it(
    threads: CallThreads, error: BaseException, pauses: int
) -> None:
    def work(ask: Ask) -> None:
        for _ in range(pauses):
            ask("?")
        raise error

    call: Call = PausingCall(work, threads.claim("a"))
    for _ in range(pauses):
        assert question(call.resume()) == "?"
    with pytest.raises(type(error)) as raised:
        call.resume(1)
    assert raised.value is error


def test_going_on_without_an_answer_is_an_error_of_the_call(threads: CallThreads) -> None:
    call: Call = PausingCall(lambda ask: ask("?"), threads.claim("a"))
    call.resume()
    with pytest.raises(RuntimeError, match="without an answer"):
        call.resume()


def test_an_abandoned_call_unwinds_on_its_own_thread(threads: CallThreads) -> None:
    seen: list[str] = []

    def work(ask: Ask) -> None:
        try:
            ask("?")
            seen.append("went on")
        finally:
            seen.append(threading.current_thread().name)

    call: Call = PausingCall(work, threads.claim("a"))
    call.resume()
    call.abandon()
    assert len(seen) == 1
    assert seen[0].startswith("call")


def test_a_call_that_is_abandoned_before_its_first_turn_never_runs(threads: CallThreads) -> None:
    done: list[int] = []
    call: Call = PausingCall(lambda ask: done.append(1), threads.claim("a"))
    call.abandon()
    assert not done


@pytest.mark.parametrize("ending", ["abandoned", "failed", "finished"])
def test_a_call_that_is_over_holds_nothing(threads: CallThreads, no_collector: None, ending: str) -> None:
    """Activations are freed with the call, and not when Python's collector comes round."""
    held: list[weakref.ref[torch.Tensor]] = []

    def work(ask: Ask) -> int:
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        answer = ask("?")
        if ending == "failed":
            raise ValueError(f"{answer} {activations.shape}")
        return answer

    call: Call = PausingCall(work, threads.claim("a"))
    call.resume()
    assert held[0]() is not None
    if ending == "abandoned":
        call.abandon()
    elif ending == "finished":
        assert call.resume(1) == 1
    else:
        with pytest.raises(ValueError, match="1 torch"):
            call.resume(1)
    assert held[0]() is None


def test_two_calls_take_turns(threads: CallThreads) -> None:
    seen: list[str] = []

    def work(name: str) -> Callable[[Ask], str]:
        def run(ask: Ask) -> str:
            for n in range(2):
                seen.append(f"{name} {ask(name)} {n}")
            return name

        return run

    a: Call = PausingCall(work("a"), threads.claim("a"))
    b: Call = PausingCall(work("b"), threads.claim("a"))
    assert question(a.resume()) == "a"
    assert question(b.resume()) == "b"
    assert question(b.resume(20)) == "b"
    assert question(a.resume(10)) == "a"
    assert a.resume(11) == "a"
    assert b.resume(21) == "b"
    assert seen == ["b 20 0", "a 10 0", "a 11 1", "b 21 1"]


def test_one_computes_at_a_time(threads: CallThreads) -> None:
    """Many calls, driven in an order of their own: none is ever inside while another is."""
    inside = 0
    most = 0
    order = torch.Generator().manual_seed(0)

    def work(ask: Ask) -> int:
        nonlocal inside, most
        total = 0
        for _ in range(4):
            inside += 1
            most = max(most, inside)
            total += sum(range(500))
            inside -= 1
            total += ask("?")
        return total

    open_calls: list[tuple[Call, bool]] = [(PausingCall(work, threads.claim("a")), False) for _ in range(12)]
    results = []
    while open_calls:
        number = int(torch.randint(len(open_calls), (), generator=order))
        call, asked = open_calls.pop(number)
        outcome = call.resume(1 if asked else None)
        if isinstance(outcome, Pause):
            open_calls.append((call, True))
        else:
            results.append(outcome)
    assert most == 1
    assert results == [4 * sum(range(500)) + 4] * 12


def test_no_more_calls_begin_than_there_are_threads_and_the_others_wait_in_order() -> None:
    threads = CallThreads(1, limit=2)

    def work(ask: Ask) -> int:
        return ask("?")

    calls: list[Call] = [PausingCall(work, threads.claim(tenant)) for tenant in ("a", "b")]
    for call in calls:
        assert question(call.resume()) == "?"
    third, fourth, fifth = (threads.claim(tenant) for tenant in ("c", "d", "e"))
    assert not third.ready.done()
    assert calls[0].resume(1) == 1  # its thread is another call's at once, however it ends
    assert third.ready.done()
    assert not fourth.ready.done()
    fourth.give_back()  # nobody waits for it any more
    calls[1].abandon()
    assert fifth.ready.done()
    assert not threads.claim("f").ready.done()
    for thread in (third, fifth):
        call = PausingCall(work, thread)
        assert question(call.resume()) == "?"
        call.abandon()


def test_a_tenant_has_no_more_threads_than_it_leaves_free() -> None:
    threads = CallThreads(1, limit=4)
    many = [threads.claim("many") for _ in range(4)]
    assert [each.ready.done() for each in many] == [True, True, False, False]
    few = threads.claim("few")
    assert few.ready.done()  # though others wait
    many[0].give_back()
    assert [each.ready.done() for each in many[2:]] == [True, False]
    few.give_back()
    many[1].give_back()
    assert many[3].ready.done()


def test_its_pauses_are_not_counted_as_its_time(threads: CallThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0

    def compute(ns: int) -> None:
        nonlocal now
        now += ns

    monkeypatch.setattr(paused_calls.time, "perf_counter_ns", lambda: now)

    def work(ask: Ask) -> None:
        compute(5)
        compute(ask("?"))

    call: Call = PausingCall(work, threads.claim("a"))
    call.resume()
    assert call.busy_ns == 5
    compute(1000)
    call.resume(7)
    assert call.busy_ns == 12
