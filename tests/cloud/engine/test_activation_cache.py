"""The activation cache: what it keeps of calls within its budget, what it evicts first, and how it counts a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from support.cloud.executor_calls import BIG, A, B, counted, direct, inputs, upstream
from support.models.kept_activations import count_kept, given_by_activations
from support.models.tiny import N_LAYERS

from isthmus.backbone.runtime import graph_memory
from isthmus.backbone.runtime.graph_memory import KeptBytes, counting
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import FrozenSpan, SpanInput
from isthmus.cloud.engine import executor as executor_module
from isthmus.cloud.engine.activation_cache import ActivationsLost
from isthmus.cloud.engine.executor import Executor


def one_call_bytes(span: FrozenSpan) -> int:
    """What the activation cache holds for one kept call of `inputs()`."""
    probe = Executor(SiteHost(span), torch.float32, BIG)
    probe.forward(A, 1, inputs(), keep=True)
    return probe.cache.used


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
