"""Low-rank and leased sites and taps over a link in memory: each equals the same in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.memory_cloud import MemoryCloud, messages, new_link
from support.models.tiny import VOCAB
from support.protocol.wire import TENANT
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.plan import Span
from isthmus.backbone.sites.ladder import add_ladder
from isthmus.backbone.sites.low_rank import add_low_rank
from isthmus.common.errors import RefusedError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota

pytestmark = pytest.mark.usefixtures("cache_folder")

SITES = [f"model.layers.{layer}.self_attn.{part}" for layer in (2, 3) for part in ("q_proj", "v_proj")]
RANK = 3


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def train(
    model: Any, between: Callable[[], None] = lambda: None, before: Callable[[int], None] = lambda step: None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three AdamW steps, and the trained parameters after them.

    `before` comes before each step, and `between` before its backward.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, foreach=False)
    losses = []
    for step in range(3):
        ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        before(step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        between()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in trained.items()}


def adapted(model: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False, use_rslora=True
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("evict", [False, True])
def test_leased_lora_equals_one_process_bit_for_bit(folder: Path, cloud: MemoryCloud, evict: bool) -> None:
    link = new_link(cloud)
    forget = cloud.served.executor.cache.evict_all if evict else (lambda: None)
    losses, trained = train(adapted(link.load_model(leased=lambda name: True)), forget)
    expected_losses, expected = train(adapted(whole(folder)))
    assert losses == expected_losses
    assert not [name for name, value in trained.items() if not torch.equal(value, expected[name])]
    assert len(messages(cloud, m.Lease)) == 3  # once a step
    assert not messages(cloud, m.SiteAnswer)


@pytest.mark.parametrize("evict", [False, True])
def test_leased_dead_sites_act_on_and_equal_one_process_bit_for_bit(
    folder: Path, cloud: MemoryCloud, evict: bool
) -> None:
    """Others are live at each step; in one process the dead ones are frozen meanwhile."""
    link = new_link(cloud)
    model = adapted(link.load_model())
    gate = model.get_base_model().remote_layers
    sites = {site.name: site for site in model.get_base_model().find_sites()}
    turns = [frozenset(sorted(sites)[number::3]) for number in range(3)]
    gate.lend_dead = True
    reference = adapted(whole(folder))
    places = dict(reference.get_base_model().named_modules())

    def live(step: int) -> None:
        gate.live_sites = turns[step]
        for name in sites:
            for parameter in places[name].parameters():
                if parameter is not places[name].base_layer.weight:
                    parameter.requires_grad_(name in turns[step])

    forget = cloud.served.executor.cache.evict_all if evict else (lambda: None)
    expected_losses, expected = train(reference, before=live)
    losses, trained = train(model, forget, live)
    assert losses == expected_losses
    assert not [name for name, value in trained.items() if not torch.equal(value, expected[name])]
    asked = [site for answer in messages(cloud, m.SiteAnswer) for site in range(len(answer.tensors))]
    assert len(asked) == (3 if evict else 2) * sum(map(len, turns))  # forward, perhaps again, and backward


def test_a_lease_is_overwritten_when_the_session_ends(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.cloud.session.site_lists import SiteLists

    kept: list[Tensor] = []
    lease = SiteLists.lease

    def keep(self: SiteLists, message: m.Lease) -> m.Status:
        status = lease(self, message)
        assert self._lease is not None
        kept.extend(matrix for pair in self._lease.weights.values() for matrix in (pair.down, pair.up))
        return status

    monkeypatch.setattr(SiteLists, "lease", keep)
    link = new_link(cloud)
    model = adapted(link.load_model(leased=lambda name: True))
    with torch.no_grad():
        model(input_ids=torch.ones(1, 6, dtype=torch.long), use_cache=False)
    assert all(bool(matrix.any()) for matrix in kept)
    link.close()
    assert kept
    assert not any(bool(matrix.any()) for matrix in kept)


@pytest.mark.parametrize("init", ["seeded", "svd"])
@pytest.mark.parametrize("evict", [False, True])
def test_low_rank_sites_equal_one_process_and_send_r_numbers(
    folder: Path, cloud: MemoryCloud, init: str, evict: bool
) -> None:
    link = new_link(cloud)
    forget = cloud.served.executor.cache.evict_all if evict else (lambda: None)
    model, reference = link.load_model(), whole(folder)
    for each in (model, reference):
        add_low_rank(each, SITES, RANK, alpha=6.0, seed=5, init=init)
    losses, trained = train(model, forget)
    expected_losses, expected = train(reference)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, value in trained.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-5)
    sent = [tensor for answer in messages(cloud, m.SiteAnswer) for tensor in answer.tensors]
    assert sent
    assert all(tensor.shape == (2, 8, RANK) for tensor in sent)


def test_low_rank_sites_over_the_tenants_quota_are_refused_with_the_remedy(cloud: MemoryCloud) -> None:
    cloud.authorize = lambda key: replace(TENANT, quota=Quota(max_inflight_bytes=1000))
    model = new_link(cloud).load_model()
    add_low_rank(model, SITES, RANK, alpha=6.0, seed=5)
    with pytest.raises(RefusedError, match="over the 1000 that hospital-a may have in flight: use a lower rank"):
        model(input_ids=torch.ones(1, 6, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize("width", [None, 8])
def test_a_ladder_reads_taps_and_sends_nothing_back(folder: Path, cloud: MemoryCloud, width: int | None) -> None:
    link = new_link(cloud)
    model, reference = link.load_model(), whole(folder)
    for each in (model, reference):
        torch.manual_seed(0)
        add_ladder(each, [2, 3], span=Span(2, 4), reduction=2, tap_width=width, seed=3)
    losses, trained = train(model)
    expected_losses, expected = train(reference)
    assert losses == expected_losses
    assert not [name for name, value in trained.items() if not torch.equal(value, expected[name])]
    assert [[spec.rank for spec in listed.entries] for listed in messages(cloud, m.Sites)] == [[width or 0] * 2]
    assert len(messages(cloud, m.Forward)) == 3
    assert not messages(cloud, m.Backward)
