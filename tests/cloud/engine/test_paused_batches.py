"""Calls with sites that are computed together: the bits of each by itself, and what they share."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.site_tenants import LAYERS, RANK, Tenant, alone, edge, host_of, play, tenants_of
from support.models.tiny import CONFIGS
from torch import Tensor

from isthmus.backbone.runtime import leased_lora
from isthmus.backbone.runtime.batched_products import ProductBatches
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.engine.requests import Kind
from isthmus.cloud.session.batched_calls import step_batch
from isthmus.protocol import messages as m

BIG = 1 << 26


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_and_placement_has_the_bits_of_each_by_itself(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    host = host_of(tmp_path, family, dtype)
    executor, tenants = Executor(host, dtype, BIG), tenants_of(host)
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    play(edges)
    for mine, theirs in zip(edges, expected, strict=True):
        assert mine.heard == theirs
    assert host.product_batches.requests_per_batch > 2
    assert executor.cache.used == 0


@pytest.mark.parametrize("cached", ["kept", "inputs", "nothing"])
@pytest.mark.parametrize("seed", range(2))
def test_whoever_is_late_or_has_to_be_computed_again_changes_no_bit(llama: SiteHost, seed: int, cached: str) -> None:
    """At each turn some have not answered yet; others are anywhere in their passes."""
    tenants = tenants_of(llama)
    executor = Executor(llama, torch.float32, BIG)
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    order = random.Random(seed)  # noqa: S311  # no secret

    def forget() -> None:
        if cached == "nothing":
            executor.cache.evict_all()
        elif cached == "inputs":
            for entry in executor.cache._entries.values():
                if entry.graph is not None:
                    executor.cache._drop(entry.graph)

    play(edges, forget, lambda ready: order.sample(list(ready), order.randint(1, len(ready))))
    for mine, theirs in zip(edges, expected, strict=True):
        again = [entry for entry in mine.heard if m.SitePhase.AGAIN in entry]
        heard = [(*entry[:2], False) if entry[-1] is True else entry for entry in mine.heard if entry not in again]
        assert heard == theirs
    assert executor.cache.counters.recomputed == (0 if cached == "kept" else sum(tenant.keep for tenant in tenants))


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantized_span_has_the_bits_of_each_by_itself(tmp_path: Path, quantize: str) -> None:
    pytest.importorskip("bitsandbytes")
    host = host_of(tmp_path, quantize=quantize)
    executor, tenants = Executor(host, torch.float32, BIG), tenants_of(host)[:4]
    expected = [alone(executor, tenant, number) for number, tenant in enumerate(tenants)]
    edges = [edge(executor, tenant, number) for number, tenant in enumerate(tenants)]
    play(edges)
    assert [mine.heard for mine in edges] == expected
    assert host.product_batches.requests_per_batch > 1.5


# What is shared -------------------------------------------------------------------------------------------------------


def products(host: SiteHost, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls in each batch of products, in order."""
    host.product_batches = ProductBatches()
    sizes: list[int] = []
    compute = ProductBatches.compute

    def noted(self: ProductBatches, requests: Sequence[object]) -> object:
        sizes.append(len(requests))
        return compute(self, requests)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(ProductBatches, "compute", noted)
    return sizes


def test_calls_alike_share_products_at_every_group_both_ways(llama: SiteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = products(llama, monkeypatch)
    executor, tenant = Executor(llama, torch.float32, BIG), tenants_of(llama)[0]
    play([edge(executor, tenant, number) for number in range(3)])
    assert sizes == [3] * (2 * len(llama.groups))
    assert llama.product_batches.requests_per_batch == 3


def test_leases_of_several_are_one_product_both_ways(llama: SiteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different ranks, and beside a call that leases nothing."""
    ranks: list[list[int]] = []
    real = leased_lora.grouped_low_rank

    def noted(x: Tensor, sizes: Sequence[int], downs: Sequence[Tensor], *rest: Any) -> Tensor:
        ranks.append([len(down) for down in downs])
        return real(x, sizes, downs, *rest)

    monkeypatch.setattr(leased_lora, "grouped_low_rank", noted)
    executor, tenants = Executor(llama, torch.float32, BIG), tenants_of(llama)
    play([edge(executor, tenants[at], number) for number, at in enumerate((3, 3, 5))])
    assert ranks == [[RANK, RANK + 1]] * (2 * len(tenants[3].sites))


def test_calls_that_ask_at_different_layers_share_products_later(
    llama: SiteHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is behind catches up as far as the other stands, if both go on at a time."""
    sizes = products(llama, monkeypatch)
    executor = Executor(llama, torch.float32, BIG)
    place = llama.groups[0][0][1]
    early, late = (Tenant((SiteSpec(layer, place),), keep=False) for layer in (1, 4))
    edges = [edge(executor, early, 0), edge(executor, late, 1)]
    ready = [(each.session, each.forward()) for each in edges]
    questions = step_batch(ready)  # the first asks at once, the second three layers later
    assert sizes == []  # nobody was beside the second one
    step_batch([(each.session, each.next(said)) for each, said in zip(edges, questions, strict=True)])
    groups = len(llama.groups) // len(LAYERS)
    assert sizes == [1] * (3 * groups) + [2] * groups


def test_a_call_alone_computes_without_a_batch(llama: SiteHost, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = products(llama, monkeypatch)
    executor = Executor(llama, torch.float32, BIG)
    play([edge(executor, tenants_of(llama)[0], 0)])
    assert sizes == []


def test_nobody_holds_memory_of_another(llama: SiteHost) -> None:
    """A graph that was built beside others is as large as one that was built alone."""
    executor, tenant = Executor(llama, torch.float32, BIG), tenants_of(llama)[3]
    own = 0
    for number in range(3):
        only = edge(executor, tenant, number)
        only.session.handle(only.forward())
        own += executor.cache.used
        only.session.close()
    edges = [edge(executor, tenant, number) for number in range(3)]
    step_batch([(each.session, each.forward()) for each in edges])
    assert executor.cache.used == own
    for each in edges:
        each.session.close()


def test_each_call_of_a_batch_has_a_compute_time(llama: SiteHost) -> None:
    executor, tenant = Executor(llama, torch.float32, BIG), tenants_of(llama)[3]
    edges = [edge(executor, tenant, number) for number in range(2)]
    for said in step_batch([(each.session, each.forward()) for each in edges]):
        assert isinstance(said, m.ForwardReply)
        assert said.compute_ns > 0


# Kinds ----------------------------------------------------------------------------------------------------------------


def test_each_step_of_a_call_has_a_kind_of_its_own(llama: SiteHost) -> None:
    executor = Executor(llama, torch.float32, BIG)
    for number, tenant in enumerate(tenants_of(llama)):
        mine = edge(executor, tenant, number)
        play([mine])
        kinds = [kind for kind in mine.kinds if kind is not None]
        assert len(kinds) == len(mine.kinds)
        assert kinds[0].name == "sites forward"
        assert not any(kind.parallel for kind in kinds)
        assert len({kind.name for kind in kinds}) == len(kinds)


def test_steps_are_of_one_kind_where_their_calls_stand_at_one_place(llama: SiteHost) -> None:
    executor = Executor(llama, torch.float32, BIG)
    (first, name), (_, last) = llama.groups[0][0], llama.groups[0][-1]
    kinds: list[Mapping[str, Kind | None]] = []
    for number, part in enumerate((name, last)):
        mine = edge(executor, Tenant((SiteSpec(first, part), SiteSpec(4, part))), number)
        play([mine])
        kinds.append({kind.name: kind for kind in mine.kinds if kind is not None})
    assert kinds[0] == kinds[1]


def test_an_answer_has_the_positions_of_its_call(llama: SiteHost) -> None:
    executor = Executor(llama, torch.float32, BIG)
    mine = edge(executor, tenants_of(llama)[0], 0)
    answer = mine.next(mine.session.handle(mine.forward()))
    assert isinstance(answer, m.SiteAnswer)
    assert mine.session.calls.positions(answer) == 14
    other = m.SiteAnswer(m.CallId(1, 99), ())
    assert mine.session.calls.positions(other) == 0
    assert mine.session.kind_of(other) is None
    mine.session.close()


def test_without_batching_no_step_has_a_kind(llama: SiteHost) -> None:
    executor = Executor(llama, torch.float32, BIG)
    mine = edge(executor, tenants_of(llama)[0], 0, batching=False)
    assert mine.session.kind_of(mine.forward()) is None
    answer = mine.next(mine.session.handle(mine.forward()))
    assert answer is not None
    assert mine.session.kind_of(answer) is None
    mine.session.close()
