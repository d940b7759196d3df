"""Adapters inside the cloud's layers: the split model with the edge's answers equals the whole model with PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.runtime.sited_modules import sites_active
from isthmus.backbone.runtime.sited_pass import SitedPass
from isthmus.backbone.sites.ladder import add_ladder
from isthmus.backbone.sites.leasing import LeasedLora
from isthmus.backbone.sites.low_rank import add_low_rank
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import Placement
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import UnsupportedCallError
from isthmus.edge.client.remote_span import BackwardRequest, ForwardRequest, RemoteSpan

from ..conftest import Pair, Pairs, batch


@dataclass
class HereLink:
    """A link whose cloud is in this process: it asks the sites directly."""

    host: SiteHost
    forget: bool = False  # run the forward again for each backward, as a cloud without memory does
    asked: int = 0

    def forward(self, request: ForwardRequest) -> tuple[Tensor, Any]:
        inputs = request.inputs
        hidden, mask, positions = inputs.hidden, inputs.attention_mask, inputs.position_ids
        keep, sites = request.keep, request.sites
        with torch.set_grad_enabled(keep):
            leaf = hidden.detach().requires_grad_(keep)
            output, sited = self._run(leaf, mask, positions, sites)
        if sites is not None:
            sites.tapped = sited.taps
        return output.detach(), (leaf, output, sited)

    def _run(self, leaf: Tensor, mask: Any, positions: Any, sites: SiteCall | None, again: bool = False) -> Any:
        if sites is None:
            return self.host.span(leaf, mask, positions), None
        specs = sites.specs
        leased = [number for number, spec in enumerate(specs) if spec.placement == Placement.LEASED]
        leased_weights = {
            number: LeasedLora(one.down.clone().requires_grad_(), one.up.clone().requires_grad_(), one.scale)
            for number, one in zip(leased, sites.lease, strict=True)
        }
        sited = SitedPass(self.host.bind(specs), Counting(self, sites), leased_weights, again)
        with sites_active(sited):
            return self.host.sited_span(leaf, mask, positions), sited

    def backward(self, request: BackwardRequest) -> Tensor | None:
        mask, positions = request.inputs.attention_mask, request.inputs.position_ids
        gradient, sites, wanted = request.gradient, request.sites, request.wanted
        leaf, output, sited = request.kept
        if self.forget:
            with torch.enable_grad():
                output, sited = self._run(leaf, mask, positions, sites, again=True)
        if sites is None:
            return torch.autograd.grad(output, [leaf], gradient)[0]
        leased_weights = [matrix for _, one in sorted(sited.leased.items()) for matrix in (one.down, one.up)]
        with sites_active(sited):
            result, *back = torch.autograd.grad(
                output, [leaf if wanted else sited.anchor, *leased_weights], gradient, allow_unused=True
            )
        sites.take_gradients(back)
        return result if wanted else None


@dataclass
class Counting:
    """Asks the sites of a call, and counts how often."""

    link: HereLink
    sites: SiteCall

    def forward(self, sites: Sequence[int], inputs: Sequence[Tensor] | None) -> Sequence[Tensor]:
        self.link.asked += 1
        return self.sites.forward(sites, inputs)

    def backward(self, sites: Sequence[int], gradients: Sequence[Tensor], *, wanted: bool) -> Sequence[Tensor | None]:
        self.link.asked += 1
        return self.sites.backward(sites, gradients, wanted=wanted)


def split(pair: Pair, leased: bool = False, **options: Any) -> tuple[Any, HereLink]:
    link = HereLink(SiteHost(load_span(pair.folder, pair.plan)), **options)
    return load_edge_parts(pair.folder, pair.plan, RemoteSpan(link, leased=lambda name: leased)), link


TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "k_proj", "o_proj", "down_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "opt": ["q_proj", "v_proj", "fc1"],
    "qwen3": "all-linear",
}


def lora(targets: Any, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options)


def steps(model: Any, inputs: Any, n: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few AdamW steps, and the trainable parameters after them."""
    torch.manual_seed(7)
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    for _ in range(n):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in parameters.items()}


def assert_same(split_run: Any, whole_run: Any) -> None:
    assert split_run[0] == whole_run[0]
    assert split_run[1].keys() == whole_run[1].keys()
    for name, value in split_run[1].items():
        assert torch.equal(value, whole_run[1][name]), name


# The frozen layers of the cloud never drop anything; in one process these would.
NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"attention_dropout": 0.0, "dropout": 0.0},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("forget", [False, True])
def test_lora_in_every_layer_equals_peft_in_one_process(pairs: Pairs, family: str, forget: bool) -> None:
    pair = pairs(family, **NO_DROPOUT.get(family, {}))
    config = {"targets": TARGETS[family], "lora_dropout": 0.1}
    model, link = split(pair, forget=forget)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora(**config))
    torch.manual_seed(0)
    whole = peft.get_peft_model(pair.whole, lora(**config))
    inputs = batch("left_padded")
    assert_same(steps(model, inputs), steps(whole, inputs))
    assert link.asked


@pytest.mark.parametrize("layers", [[2], [3], [1, 3], [2, 3]])
def test_sites_without_anything_trainable_below_them(pairs: Pairs, layers: list[int]) -> None:
    pair = pairs("llama")
    model, _ = split(pair)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora(["q_proj", "v_proj"], layers_to_transform=layers))
    torch.manual_seed(0)
    whole = peft.get_peft_model(pair.whole, lora(["q_proj", "v_proj"], layers_to_transform=layers))
    inputs = batch("no_mask")
    assert_same(steps(model, inputs), steps(whole, inputs))


METHODS = {
    "rslora": lambda: lora(["q_proj", "v_proj"], use_rslora=True),
    "gaussian": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM"),
    "lora_bias": lambda: lora(["v_proj"], lora_bias=True),
    "adalora": lambda: peft.AdaLoraConfig(
        target_modules=["q_proj", "v_proj"], lora_dropout=0.1, total_step=10, tinit=1, tfinal=2, task_type="CAUSAL_LM"
    ),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=8, vera_dropout=0.1, task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj", "v_proj"], r=2, init_weights=False),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj", "v_proj"], r=2, init_weights=False),
}


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
@pytest.mark.parametrize("method", METHODS)
def test_methods_that_work_on_a_site(pairs: Pairs, method: str) -> None:
    pair = pairs("llama")
    model, _ = split(pair)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, METHODS[method]())
    torch.manual_seed(0)
    whole = peft.get_peft_model(pair.whole, METHODS[method]())
    inputs = batch("right_padded")
    assert_same(steps(model, inputs, 3), steps(whole, inputs, 3))


REFUSED = {
    "DoRA": lambda: lora(["q_proj"], use_dora=True),
    "pissa": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"),
    "orthogonal": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="orthogonal"),
    "biases": lambda: lora(["q_proj"], bias="all"),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"]),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["q_proj"]),
    "HRA": lambda: peft.HRAConfig(target_modules=["q_proj"], r=4),
}


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning")  # BOFT looks for one, and
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning")  # does without
@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_would_be_wrong_are_refused_when_the_model_is_built(pairs: Pairs, method: str) -> None:
    model, _ = split(pairs("llama"))
    with pytest.raises(UnsupportedCallError, match=r"LoRA"):
        peft.get_peft_model(model, REFUSED[method]())


def test_merging_on_the_edge_is_refused(pairs: Pairs) -> None:
    model, _ = split(pairs("llama"))
    model = peft.get_peft_model(model, lora(["q_proj"]))
    for safe in (False, True):
        with pytest.raises(UnsupportedCallError, match="merge on the whole model"):
            model.merge_and_unload(safe_merge=safe)


def test_a_span_without_sites_refuses_adapters_inside(pairs: Pairs) -> None:
    with pytest.raises(UnsupportedCallError, match=r"model\.layers\.2\.self_attn\.q_proj.*layers_to_transform"):
        peft.get_peft_model(pairs("llama").edge, lora(["q_proj"]))


def test_a_bottleneck_behind_a_layer_of_the_cloud(pairs: Pairs) -> None:
    from isthmus.backbone.adapters.layer_adapters import add_bottlenecks

    pair = pairs("llama")
    model, link = split(pair)
    runs = []
    for each in (model, pair.whole):
        torch.manual_seed(0)
        add_bottlenecks(each, [0, 2, 3], 4, dropout=0.1)
        for name, parameter in each.named_parameters():
            if name.endswith("bottleneck.up.weight"):
                torch.nn.init.normal_(parameter, std=0.1)
        runs.append(steps(each, batch("left_padded")))
    assert_same(*runs)
    assert link.asked


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("forget", [False, True])
def test_leased_adapters_equal_peft_in_one_process(pairs: Pairs, family: str, forget: bool) -> None:
    pair = pairs(family, **NO_DROPOUT.get(family, {}))
    model, link = split(pair, leased=True, forget=forget)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora(TARGETS[family]))
    torch.manual_seed(0)
    whole = peft.get_peft_model(pair.whole, lora(TARGETS[family]))
    inputs = batch("left_padded")
    assert_same(steps(model, inputs, 3), steps(whole, inputs, 3))
    assert not link.asked


@pytest.mark.parametrize("config", [{"lora_dropout": 0.1}, {"lora_bias": True}])
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_what_cannot_be_leased_is_refused(pairs: Pairs, config: dict[str, Any]) -> None:
    model, _ = split(pairs("llama"), leased=True)
    model = peft.get_peft_model(model, lora(["v_proj"], **config))
    with pytest.raises(UnsupportedCallError, match="cannot be leased"):
        model(**batch("no_mask"))


@pytest.mark.parametrize("init", ["seeded", "svd"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_low_rank_sites_equal_the_whole_model_with_them(pairs: Pairs, family: str, init: str) -> None:
    pair = pairs(family, **NO_DROPOUT.get(family, {}))
    model, link = split(pair)
    name = "model.layers.{}.self_attn.{}" if family == "llama" else "transformer.h.{}.attn.c_attn"
    sites = [
        name.format(layer, part) for layer in (2, 3) for part in (("q_proj", "v_proj") if family == "llama" else ("",))
    ]
    runs = []
    for each in (model, pair.whole):
        add_low_rank(each, sites, 3, alpha=6.0, seed=5, init=init)
        runs.append(steps(each, batch("left_padded"), 3))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for site, value in runs[0][1].items():
        torch.testing.assert_close(value, runs[1][1][site], rtol=2e-3, atol=2e-5)
    assert link.asked


@pytest.mark.parametrize("width", [None, 8])
def test_a_ladder_beside_the_cloud_equals_one_beside_the_whole_model(pairs: Pairs, width: int | None) -> None:
    pair = pairs("llama")
    model, link = split(pair)
    runs = []
    for each in (model, pair.whole):
        torch.manual_seed(0)
        add_ladder(each, [2, 3], span=pair.plan.cloud, reduction=2, tap_width=width, seed=3)
        runs.append(steps(each, batch("left_padded"), 3))
    assert_same(*runs)
    assert not link.asked
