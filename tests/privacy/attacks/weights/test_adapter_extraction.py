"""Adapters out of what crosses at their sites, by the edge's own answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.privacy.attacks.weights.adapter_extraction import AdapterExtraction
from isthmus.privacy.recording.traffic import Asked, Leased, Traffic
from isthmus.protocol.site_messages import SitePhase
from isthmus.protocol.tensor_codecs import Role, decode, encode

INPUT, RANK = 48, 3
OUTPUTS = {"self_attn.q_proj": 32, "self_attn.v_proj": 16}


class Adapter(nn.Module):
    """`up(bend(down(x)))`, in the place of what PEFT puts on a skeleton."""

    def __init__(self, out: int, bend: nn.Module) -> None:
        super().__init__()
        self.down, self.bend, self.up = nn.Linear(INPUT, RANK, bias=False), bend, nn.Linear(RANK, out, bias=False)

    @property
    def weight(self) -> Tensor:
        return (self.up.weight @ self.down.weight).detach()

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(self.bend(self.down(x)))
        return up


Adapters = dict[str, Adapter]


def traffic_of(
    modules: Adapters, positions: int, *, summed: bool = False, backward: bool = True, codec: str = "fp32"
) -> Traffic:
    """What crosses at sites that read one input, in one call."""
    random = torch.Generator().manual_seed(1)
    sites = [Site(part, SiteSpec(3, part), module) for part, module in modules.items()]
    call, numbers = SiteCall(sites, keep=True, summed=summed), list(range(len(sites)))

    def wire(tensor: Tensor, role: Role) -> Tensor:
        return decode(encode(tensor, codec, role))

    x = wire(torch.randn(1, positions, INPUT, generator=random), Role.ACTIVATION)
    contributions = call.forward(numbers, [x] * len(sites))
    specs = tuple(site.spec for site in sites)
    up = tuple(wire(each, Role.ACTIVATION) for each in contributions)
    asked = [Asked(0, 5, SitePhase.FORWARD, specs, (x,), up)]
    if backward:
        down = [wire(torch.randn(each.shape, generator=random), Role.GRADIENT) for each in contributions]
        answers = call.backward(numbers, down, wanted=True)
        back = tuple(wire(each, Role.GRADIENT) for each in answers if each is not None)
        asked.append(Asked(0, 5, SitePhase.BACKWARD, specs, tuple(down), back))
    return Traffic("", "2:2", asked=tuple(asked))


@pytest.fixture
def loras() -> Adapters:
    torch.manual_seed(0)
    return {part: Adapter(out, nn.Identity()) for part, out in OUTPUTS.items()}


@pytest.mark.parametrize("summed", [False, True])
def test_a_few_positions_give_the_product(loras: Adapters, summed: bool) -> None:
    found = AdapterExtraction().run(traffic_of(loras, 12, summed=summed))
    assert len(found) == (1 if summed else 2)
    assert [each.step for each in found] == [5] * len(found)
    true = torch.cat([module.weight for module in loras.values()])
    torch.testing.assert_close(torch.cat([each.product for each in found]), true, rtol=1e-3, atol=1e-4)
    assert all(each.error < 1e-4 for each in found)
    assert sum(each.rank() for each in found) == 2 * RANK


def test_a_coarse_wire_blurs_the_product(loras: Adapters) -> None:
    found = AdapterExtraction().run(traffic_of(loras, 200, codec="int8"))
    for each, module in zip(found, loras.values(), strict=True):
        assert 1e-4 < each.error < 0.05
        assert (each.product - module.weight).norm() / module.weight.norm() < 0.05


def test_without_gradients_it_takes_as_many_positions_as_inputs(loras: Adapters) -> None:
    many = AdapterExtraction().run(traffic_of(loras, 2 * INPUT, backward=False))
    assert all(each.error < 1e-4 for each in many)
    few = AdapterExtraction().run(traffic_of(loras, 12, backward=False))
    assert all(each.error > 0.5 for each in few)


def test_what_is_no_product_of_the_input_does_not_come_out(loras: Adapters) -> None:
    bent = {part: Adapter(out, nn.GELU()) for part, out in OUTPUTS.items()}
    assert all(each.error > 0.1 for each in AdapterExtraction().run(traffic_of(bent, 200)))
    mixed = traffic_of(loras, 200)
    down, up = mixed.asked
    other = torch.Generator().manual_seed(7)
    order = torch.randperm(200, generator=other)
    shuffled = replace(down, question=(down.question[0][:, order],))
    found = AdapterExtraction().run(Traffic("", "2:2", asked=(shuffled, up)))
    assert all(each.error > 0.5 for each in found)


def test_a_low_rank_site_gives_its_core() -> None:
    torch.manual_seed(0)
    parts = ("mlp.up_proj", "mlp.gate_proj")
    specs = tuple(SiteSpec(3, part, Placement.LOW_RANK, RANK, seed) for seed, part in enumerate(parts))
    cores, z = [torch.randn(RANK, RANK) for _ in specs], [torch.randn(1, 20, RANK) for _ in specs]
    answer = tuple(each @ core.T for each, core in zip(z, cores, strict=True))
    asked = Asked(0, 1, SitePhase.FORWARD, specs, tuple(z), answer)
    found = AdapterExtraction().run(Traffic("", "2:2", asked=(asked,)))
    for each, core in zip(found, cores, strict=True):
        torch.testing.assert_close(each.product, core, rtol=1e-3, atol=1e-4)


def test_leased_weights_are_read() -> None:
    down, up = torch.randn(RANK, INPUT), torch.randn(16, RANK)
    lease = Leased((SiteSpec(3, "self_attn.v_proj", Placement.LEASED),), ((down, up, 2.0),))
    (found,) = AdapterExtraction().run(Traffic("", "2:2", leased=(lease,)))
    assert torch.equal(found.product, 2.0 * (up @ down))
    assert found.error == 0


def test_a_site_that_never_contributed_is_left_out(loras: Adapters) -> None:
    nn.init.zeros_(loras["self_attn.q_proj"].up.weight)
    (found,) = AdapterExtraction().run(traffic_of(loras, 12))
    assert [site.part for site in found.sites] == ["self_attn.v_proj"]
