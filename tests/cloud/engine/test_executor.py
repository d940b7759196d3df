"""The executor: gradients of a frozen span, and an activation cache that forgets without changing a bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.kept_activations import count_kept, given_by_activations
from support.models.tiny import HIDDEN, N_LAYERS, tiny_checkpoint

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime import graph_memory
from isthmus.backbone.runtime.graph_memory import KeptBytes, counting
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import FrozenSpan, SpanInput, load_span
from isthmus.cloud.engine import executor as executor_module
from isthmus.cloud.engine.activation_cache import ActivationsLost
from isthmus.cloud.engine.executor import BackwardCall, Executor, Gradients

A, B = b"session a", b"session b"
BIG = 1 << 30


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FrozenSpan]:
    folder: Path = tiny_checkpoint("llama", tmp_path_factory.mktemp("llama") / "model")
    return lambda dtype, **options: load_span(folder, SplitPlan.parse("2:2", N_LAYERS), dtype=dtype, **options)


@pytest.fixture(scope="module")
def span(load: Callable[..., FrozenSpan]) -> FrozenSpan:
    return load(torch.float32)


def inputs(seed: int = 0, rows: int = 2, length: int = 12, *, masked: bool = False) -> SpanInput:
    hidden = torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))
    mask = None
    if masked:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[1:, -3:] = 0
    return SpanInput(hidden, mask, torch.arange(length)[None])


def upstream(seed: int = 9, rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def direct(span: FrozenSpan, given: SpanInput, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = given.hidden.clone().requires_grad_(True)
    output = span(leaf, given.attention_mask, given.position_ids)
    (expected,) = torch.autograd.grad(output, leaf, gradient)
    return output.detach(), expected


def one_call_bytes(span: FrozenSpan) -> int:
    """What the activation cache holds for one kept call of `inputs()`."""
    probe = Executor(SiteHost(span), torch.float32, BIG)
    probe.forward(A, 1, inputs(), keep=True)
    return probe.cache.used


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


def test_without_keep_nothing_is_kept(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    kept = executor.forward(A, 1, inputs(), keep=True).hidden
    executor.cache.release(A)
    assert torch.equal(executor.forward(A, 1, inputs(), keep=False).hidden, kept)
    assert executor.cache.used == 0
    assert executor.cache.is_masked((A, 1)) is None
    with pytest.raises(ActivationsLost):
        executor.backward(A, 1, upstream())


def test_a_repeated_call_replaces_what_was_kept_for_it(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    executor.forward(A, 1, inputs(seed=1), keep=True)
    size = executor.cache.used
    executor.forward(A, 1, inputs(seed=2), keep=True)
    assert executor.cache.used == size
    assert torch.equal(executor.backward(A, 1, upstream()).hidden, direct(span, inputs(seed=2), upstream())[1])


def test_the_oldest_graph_goes_first_and_its_input_stays(span: FrozenSpan) -> None:
    one, small = one_call_bytes(span), inputs().nbytes
    executor = Executor(SiteHost(span), torch.float32, 2 * one + small)
    for call in (1, 2, 3):
        executor.forward(A, call, inputs(seed=call), keep=True)
    assert executor.cache.counters.graphs_evicted == 1
    assert executor.cache.counters.inputs_evicted == 0
    assert executor.cache.used == 2 * one + small
    for call, again in ((3, False), (2, False), (1, True)):
        gradients = executor.backward(A, call, upstream())
        result, recomputed = gradients.hidden, gradients.recomputed
        assert torch.equal(result, direct(span, inputs(seed=call), upstream())[1])
        assert recomputed is again
    assert executor.cache.counters.recomputed == 1


def test_inputs_go_once_all_graphs_have_gone(span: FrozenSpan) -> None:
    small = inputs().nbytes
    executor = Executor(SiteHost(span), torch.float32, 2 * small)  # not one graph fits
    for call in (1, 2, 3):
        executor.forward(A, call, inputs(seed=call), keep=True)
    assert (executor.cache.counters.graphs_evicted, executor.cache.counters.inputs_evicted) == (3, 1)
    assert executor.cache.is_masked((A, 1)) is None
    assert executor.cache._entries[A, 2].inputs.hidden.shape == inputs().hidden.shape
    with pytest.raises(ActivationsLost):
        executor.backward(A, 1, upstream())
    assert torch.equal(executor.backward(A, 2, upstream()).hidden, direct(span, inputs(seed=2), upstream())[1])


def counted(executor: Executor) -> int:
    """What the activation cache holds: inputs, and each graph once."""
    entries = executor.cache._entries.values()
    graphs = {id(entry.graph): entry.graph.nbytes for entry in entries if entry.graph is not None}
    return sum(entry.inputs.nbytes for entry in entries) + sum(graphs.values())


@pytest.mark.parametrize(("count_graphs", "times"), [(False, 2), (True, 3)])
def test_graphs_between_two_that_were_counted_are_counted_where_the_operator_wants_it(
    span: FrozenSpan, monkeypatch: pytest.MonkeyPatch, count_graphs: bool, times: int
) -> None:
    seen = []
    monkeypatch.setattr(executor_module, "counting", lambda weights: seen.append(weights) or counting(weights))
    executor = Executor(SiteHost(span), torch.float32, BIG, count_graphs=count_graphs)
    kept = {}
    for call, length in enumerate((4, 12, 8)):
        executor.forward(A, call, inputs(call, 2, length), keep=True)
        kept[length] = executor.cache._entries[A, call].graph.nbytes / length
    assert len(seen) == times
    assert kept[8] == pytest.approx((kept[4] + kept[12]) / 2, rel=0.01)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0, 1.7, 3.2])
def test_the_budget_is_never_exceeded(span: FrozenSpan, share: float) -> None:
    executor = Executor(SiteHost(span), torch.float32, int(share * one_call_bytes(span)))
    for call in range(12):
        rows, length = 1 + call % 3, 4 + 3 * (call % 4)
        executor.forward((A, B)[call % 2], call, inputs(call, rows, length), keep=True)
        assert executor.cache.used <= executor.cache.budget
        assert executor.cache.used == counted(executor)
        if call % 5 == 4:
            executor.cache.release(A)
    executor.cache.release(A)
    executor.cache.release(B)
    assert executor.cache.used == 0


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


def test_sessions_do_not_see_each_other(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    executor.forward(A, 1, inputs(seed=1), keep=True)
    executor.forward(B, 1, inputs(seed=2), keep=True)
    executor.cache.release(A)
    with pytest.raises(ActivationsLost):
        executor.backward(A, 1, upstream())
    assert torch.equal(executor.backward(B, 1, upstream()).hidden, direct(span, inputs(seed=2), upstream())[1])


def test_evict_all_forgets_everything(span: FrozenSpan) -> None:
    executor = Executor(SiteHost(span), torch.float32, BIG)
    executor.forward(A, 1, inputs(), keep=True)
    executor.cache.evict_all()
    assert executor.cache.used == 0
    with pytest.raises(ActivationsLost):
        executor.backward(A, 1, upstream())


def test_the_measured_graph_is_what_autograd_saves_but_for_outputs_of_activation_functions(
    load: Callable[..., FrozenSpan],
) -> None:
    """Counted independently: every storage that the graph keeps alive, weights left out."""
    span, given = load(torch.float32), inputs()
    weights = {p.untyped_storage().data_ptr() for p in [*span.parameters(), *span.buffers()]}
    kept: dict[int, int] = {}
    activated = 0
    alive = []  # so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal activated
        alive.append(tensor.detach())
        if tensor.grad_fn is not None and tensor.grad_fn.name() == "SiluBackward0":
            activated += tensor.nbytes
        else:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = span(given.hidden.clone().requires_grad_(True), given.attention_mask, given.position_ids)
    expected = sum(size for pointer, size in kept.items() if pointer not in weights) + output.nbytes
    executor = Executor(SiteHost(span), torch.float32, BIG)
    executor.forward(A, 1, given, keep=True)
    graph = executor.cache.used - given.nbytes
    assert activated > given.hidden.nbytes
    assert expected > 5 * given.hidden.nbytes
    assert 0.95 * expected <= graph <= 1.05 * expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_known_of_graphs_is_what_counting_says(
    load: Callable[..., FrozenSpan], monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    counted = []

    def counting(weights: Collection[int]) -> AbstractContextManager[KeptBytes]:
        counted.append(None)
        return graph_memory.counting(weights)

    monkeypatch.setattr(executor_module, "counting", counting)

    def kept(executor: Executor, calls: Sequence[SpanInput]) -> tuple[int, int]:
        counted.clear()
        executor.forward_together({(A, number): given for number, given in enumerate(calls)}, keep=True)
        nbytes = executor.cache.used - sum(given.nbytes for given in calls)
        executor.cache.release(A)
        return nbytes, len(counted)

    def one(length: int, end: int | None = None) -> SpanInput:
        """A sequence, or one that ends early."""
        mask = None if end is None else (torch.arange(length) < end).long()[None]
        return replace(inputs(rows=1, length=length), attention_mask=mask)

    span = load(torch.float32, attn_implementation=attention)
    executor = Executor(SiteHost(span), torch.float32, BIG)
    for calls, counts in (
        ([one(24)], 1),
        ([one(24), one(24)], 0),
        ([one(6)], 1),
        ([one(12)], 0),
        ([one(24), one(6), one(15)], 0),
        ([one(12, end=9)], 1),
        ([one(12, end=7)], 0),
        ([one(12, end=9), one(20)], 0),
        ([one(40, end=9), one(20)], 1),
        ([one(40, end=9), one(20)], 1),
        ([one(40, end=9), one(40, end=20)], 1),
        ([one(40, end=9), one(20)], 0),
        ([one(30, end=9)], 0),
        ([one(40)], 1),
        ([one(40, end=40)], 0),
        ([one(9)], 0),
    ):
        nbytes, times = kept(executor, calls)
        expected, once = kept(Executor(SiteHost(span), torch.float32, BIG), calls)
        assert (times, once) == (counts, 1)
        assert 0.93 * expected <= nbytes <= 1.03 * expected


def test_graphs_keep_little_also_where_they_are_not_counted(load: Callable[..., FrozenSpan]) -> None:
    span = load(torch.float32)
    executor = Executor(SiteHost(span), torch.float32, BIG)
    executor.forward(A, 1, inputs(), keep=True)
    given = given_by_activations(span)
    executor.forward(A, 2, inputs(), keep=True)
    assert (count_kept(given), len(given)) == (0, N_LAYERS - 4)


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


def test_a_backward_in_other_company_has_the_same_bits(span: FrozenSpan) -> None:
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
