"""The executor: gradients of a frozen span, alone and in passes that calls share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.cloud.executor_calls import BIG, A, B, counted, direct, inputs, upstream

from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import FrozenSpan, SpanInput
from isthmus.cloud.engine.activation_cache import ActivationsLost
from isthmus.cloud.engine.executor import BackwardCall, Executor, Gradients


@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_backward_are_those_of_autograd(span: FrozenSpan, masked: bool) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    given, gradient = inputs(masked=masked), upstream()
    output, expected = direct(span, given, gradient)
    assert torch.equal(executor.forward(A, 1, given, keep=True).hidden, output)
    gradients = executor.backward(A, 1, gradient)
    result, recomputed = gradients.hidden, gradients.recomputed
    assert torch.equal(result, expected)
    assert not recomputed
    assert executor.cache.used == 0  # a backward comes once


def test_the_second_call_of_a_shape_is_not_measured_and_gives_the_same(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    first = executor.forward(A, 1, inputs(), keep=True).hidden
    size = executor.cache.used
    assert torch.equal(executor.forward(A, 2, inputs(), keep=True).hidden, first)
    assert executor.cache.used == 2 * size
    assert torch.equal(executor.backward(A, 1, upstream()).hidden, executor.backward(A, 2, upstream()).hidden)


def test_a_replay_needs_no_cache_and_gives_the_same_bits(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    executor.forward(A, 1, inputs(masked=True), keep=True)
    expected = executor.backward(A, 1, upstream()).hidden
    gradients = executor.backward(A, 1, upstream(), replay=inputs(masked=True))
    result, recomputed = gradients.hidden, gradients.recomputed
    assert torch.equal(result, expected)
    assert recomputed
    assert executor.cache.used == 0


def test_what_is_kept_wins_over_a_replay(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    executor.forward(A, 1, inputs(seed=1), keep=True)
    gradients = executor.backward(A, 1, upstream(), replay=inputs(seed=1))
    result, recomputed = gradients.hidden, gradients.recomputed
    assert torch.equal(result, direct(span, inputs(seed=1), upstream())[1])
    assert not recomputed


def test_no_weight_gets_a_gradient(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    executor.forward(A, 1, inputs(), keep=True)
    executor.backward(A, 1, upstream())
    assert all(p.grad is None and not p.requires_grad for p in span.parameters())


def test_a_bf16_span_takes_fp32_and_answers_in_bf16(load: Callable[..., FrozenSpan]) -> None:
    span = load(torch.bfloat16)
    executor = Executor(SiteHost(span), torch.bfloat16, BIG)
    given = inputs()
    output = executor.forward(A, 1, given, keep=True).hidden
    result = executor.backward(A, 1, upstream()).hidden
    assert output.dtype == result.dtype == torch.bfloat16
    cast = SpanInput(given.hidden.bfloat16(), None, given.position_ids)
    expected, gradient = direct(span, cast, upstream().bfloat16())
    assert torch.equal(output, expected)
    assert torch.equal(result, gradient)


SHAPES = ((2, 12), (1, 19), (3, 7), (2, 12), (1, 16))


def several(masked: bool = True) -> dict[tuple[bytes, int], SpanInput]:
    """Calls of two sessions, of different lengths, some with padding."""
    return {
        ((A, B)[number % 2], number): inputs(number, rows, length, masked=masked and number % 2 == 0)
        for number, (rows, length) in enumerate(SHAPES)
    }


def gradient_of(given: SpanInput) -> torch.Tensor:
    return upstream(9, *given.hidden.shape[:2])


def check_backward(
    executor: Executor, span: FrozenSpan, calls: dict[tuple[bytes, int], SpanInput], *, recomputed: bool
) -> None:
    """Have the backward of `calls` done together; the gradients are those of a pass of each."""
    asked = [BackwardCall(key, gradient_of(given)) for key, given in calls.items()]
    for given, outcome in zip(calls.values(), executor.backward_together(asked), strict=True):
        assert isinstance(outcome, Gradients)
        assert outcome.hidden is not None
        assert torch.equal(outcome.hidden, direct(span, given, gradient_of(given))[1])
        assert outcome.recomputed == recomputed


def test_calls_that_share_a_pass_have_the_bits_of_their_own(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    calls = several()
    for keep in (False, True):
        outputs = executor.forward_together(calls, keep=keep)
        for given, output in zip(calls.values(), outputs, strict=True):
            assert torch.equal(output.hidden, direct(span, given, gradient_of(given))[0])
    assert executor.cache.used == counted(executor)
    check_backward(executor, span, calls, recomputed=False)
    assert executor.cache.used == 0


def test_a_backward_batched_with_other_calls_has_the_same_bits(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    calls = several()
    executor.forward_together(calls, keep=True)
    extra = {(B, 9): inputs(9, 2, 9)}
    executor.forward(B, 9, extra[B, 9], keep=True)
    keys = list(calls)
    most = {key: calls[key] for key in keys[1:]}
    check_backward(
        executor, span, {**most, **extra}, recomputed=False
    )  # most of the shared graph: taken, for all of it
    assert executor.cache.used == counted(executor) > 0
    check_backward(executor, span, {keys[0]: calls[keys[0]]}, recomputed=True)  # a small part: less work anew
    assert executor.cache.used == 0


def test_what_is_evicted_is_computed_again_together(span: FrozenSpan) -> None:
    calls = several()
    all_inputs = sum(given.nbytes for given in calls.values())
    executor = Executor(SiteHost(span), torch.float32, all_inputs)
    executor.forward_together(calls, keep=True)
    assert executor.cache.counters.graphs_evicted == len(calls)
    assert executor.cache.used == counted(executor) == all_inputs
    check_backward(executor, span, calls, recomputed=True)


def test_one_bad_call_among_several_keeps_the_others_whole(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    calls = several()
    executor.forward_together(calls, keep=True)
    executor.forward(B, 50, inputs(), keep=True, wanted=True)
    executor.cache.release(A)
    asked = [BackwardCall(key, gradient_of(given)) for key, given in calls.items()]
    for (session, _), given, outcome in zip(calls, calls.values(), executor.backward_together(asked), strict=True):
        if session == A:
            assert isinstance(outcome, ActivationsLost)
        else:
            assert isinstance(outcome, Gradients)
            assert outcome.hidden is not None
            assert torch.equal(outcome.hidden, direct(span, given, gradient_of(given))[1])


def test_a_session_that_ends_costs_those_that_share_its_graph_nothing(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    calls = several()
    executor.forward_together(calls, keep=True)
    gone = next(key for key in calls if key[0] == B)
    executor.cache.release(B)
    left = {key: given for key, given in calls.items() if key[0] == A}
    assert gone not in left
    assert executor.cache.counters.graphs_evicted == 0
    assert executor.cache.used == counted(executor)
    check_backward(executor, span, left, recomputed=False)
    assert executor.cache.used == 0  # the last of them takes the graph with it


def test_a_session_that_ends_leaves_no_input_of_its_own(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    calls = several()
    executor.forward_together(calls, keep=True)
    entries = {key: executor.cache._entries[key] for key in calls}
    executor.cache.release(A)
    for (session, _), entry in entries.items():
        assert bool(entry.inputs.hidden.any()) == (session == B)


def test_what_crossed_the_wire_is_overwritten_after_a_shared_pass(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    calls = several()
    executor.forward_together(calls, keep=True)
    kept = [executor.cache._entries[key].inputs.hidden for key in calls]
    check_backward(executor, span, calls, recomputed=False)
    assert not any(hidden.any() for hidden in kept)


def test_backwards_through_one_graph_on_two_threads_have_the_bits_of_their_own(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    calls = {(name, 1): inputs(number, 2, 12, masked=False) for number, name in enumerate((A, B))}
    start = threading.Barrier(2, timeout=10)

    def backward(key: tuple[bytes, int]) -> Any:
        start.wait()
        return executor.backward(*key, gradient_of(calls[key])).hidden

    for _ in range(5):
        executor.forward_together(calls, keep=True)
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(backward, calls))
        for (_, given), result in zip(calls.items(), results, strict=True):
            _, expected = direct(span, given, gradient_of(given))
            assert torch.equal(result, expected)
        assert executor.cache.used == 0
