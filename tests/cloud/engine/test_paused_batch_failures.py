"""Calls with sites that are computed together: one that fails or leaves disturbs no other."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from support.cloud.site_tenants import Edge, Tenant, alone, edge, play, tenants_of
from torch import Tensor

from isthmus.backbone.runtime.batched_products import ProductBatches, ProductRequest, Products
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.session.batched_calls import step_batch
from isthmus.protocol import messages as m

BIG = 1 << 26


@pytest.mark.parametrize("ending", ["a bad answer", "closed", "dropped", "no such list"])
def test_who_leaves_in_the_middle_disturbs_nobody(llama: SiteHost, ending: str) -> None:
    executor, tenants = Executor(llama, torch.float32, BIG), tenants_of(llama)[:4]
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    leaver = edge(executor, tenants[0], 9)
    if ending == "a bad answer":
        answers = leaver.answers
        leaver.answers = lambda question: () if len(leaver.heard) > 2 else answers(question)  # type: ignore[method-assign]
    elif ending == "no such list":
        leaver.session.calls.lists._lists.clear()

    def choose(ready: Sequence[Edge]) -> Sequence[Edge]:
        if len(leaver.heard) == 2 and ending in ("closed", "dropped"):
            if ending == "closed":
                leaver.session.close()
            else:
                leaver.session.calls.drop(1)
        return ready

    play([leaver, *edges], choose=choose)
    (said,) = leaver.heard[-1]
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.BAD_REQUEST
    assert [mine.heard for mine in edges] == expected
    assert not leaver.session.calls.begun
    assert executor.cache.used == 0


def test_a_product_that_fails_ends_the_calls_that_were_there(llama: SiteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Executor(llama, torch.float32, BIG)
    place = llama.groups[0][0][1]
    tenants = [Tenant((SiteSpec(4, place),)), Tenant((SiteSpec(4, place),)), Tenant((SiteSpec(1, place),))]
    expected = alone(executor, tenants[2], 2)
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]

    def exhausted(*_: object) -> None:
        raise RuntimeError("out of memory: 1.2345")

    with monkeypatch.context() as patch:
        patch.setattr(ProductBatches, "compute", exhausted)
        *failed, question = step_batch([(each.session, each.forward()) for each in edges])
    for said in failed:
        assert isinstance(said, m.Status)
        assert said.code == m.StatusCode.INTERNAL
        assert "1.2345" not in said.message
    assert not any(each.session.calls.begun for each in edges[:2])
    message = edges[2].next(question)  # type: ignore[arg-type]  # it asked before the others' products
    while message is not None:
        message = edges[2].next(edges[2].session.handle(message))
    assert edges[2].heard == expected
    assert executor.cache.used == 0


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_a_batch_that_fails_is_computed_again_for_each_of_its_calls(
    llama: SiteHost, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, tenants = Executor(llama, torch.float32, BIG), tenants_of(llama)[:4]
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    compute = ProductBatches.compute
    failed: list[weakref.ref[Tensor]] = []
    large = tenants[2].shape[0] * tenants[2].shape[1]
    limit = 10_000

    def limited(self: ProductBatches, requests: Sequence[ProductRequest]) -> list[Products]:
        assert not any(each() is not None for each in failed), "a batch that has failed still holds memory"
        rows = torch.empty(sum(request.n_rows for request in requests))
        if len(requests) > 1 or len(rows) > limit:
            failed.append(weakref.ref(rows))
            raise error("out of memory: 1.2345")
        return compute(self, requests)

    monkeypatch.setattr(ProductBatches, "compute", limited)
    play(edges)
    assert failed
    assert [mine.heard for mine in edges] == expected
    limit = large - 1  # the others are smaller
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    play(edges)
    for number, (mine, theirs) in enumerate(zip(edges, expected, strict=True)):
        if number != 2:
            assert mine.heard == theirs
    (said,) = edges[2].heard[-1]
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.INTERNAL
    assert "1.2345" not in said.message
    assert executor.cache.used == 0


def test_a_call_that_fails_holds_no_memory_while_others_go_on(llama: SiteHost) -> None:
    executor, tenant = Executor(llama, torch.float32, BIG), Tenant((SiteSpec(4, llama.groups[0][0][1]),))
    edges = [edge(executor, tenant, number) for number in range(2)]
    failed: list[weakref.ref[Tensor]] = []

    def allocate(layer: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if not failed:
            failed.append(weakref.ref(args[0]))
            raise RuntimeError("out of memory")
        assert failed[0]() is None

    hook = llama.span.base.layers[1].register_forward_pre_hook(allocate)
    gc.disable()  # whose help is not to be needed
    try:
        bad, good = step_batch([(each.session, each.forward()) for each in edges])
    finally:
        gc.enable()
        hook.remove()
    assert isinstance(bad, m.Status)
    assert bad.code == m.StatusCode.INTERNAL
    assert isinstance(good, m.SiteQuestion)
    edges[1].session.close()
