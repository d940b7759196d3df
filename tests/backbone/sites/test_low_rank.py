"""Low-rank sites: the trainable M, by itself and on models, under the same names everywhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.models.tiny import HIDDEN
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.sites.low_rank import LowRankAdapter, LowRankSite, add_low_rank
from isthmus.backbone.sites.low_rank_basis import low_rank_basis, site_basis
from isthmus.common.errors import CheckpointError, ConfigError

from ..conftest import Checkpoints, Pairs, batch, disturb, logits, whole_model
from .conftest import NAME, RANK, SITES, SkeletonLinear, low_rank_sites

# One site -------------------------------------------------------------------------------------------------------------


def test_a_site_answers_as_the_paper_says() -> None:
    """`u = scale M z`, `dM = scale g_u z^T` and `dz = scale M^T g_u`."""
    site = LowRankSite(RANK, scale=0.5)
    disturb(site)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, RANK, generator=generator, requires_grad=True)
    g = torch.randn(2, 3, RANK, generator=generator)
    u = site(z)
    u.backward(g)
    m = site.weight.detach()
    assert torch.allclose(u, 0.5 * z @ m.T)
    assert site.weight.grad is not None
    assert z.grad is not None
    assert torch.allclose(site.weight.grad, 0.5 * torch.einsum("bsi,bsj->ij", g, z.detach()), atol=1e-6)
    assert torch.allclose(z.grad, 0.5 * g @ m, atol=1e-6)


def test_a_site_starts_at_zero_and_still_learns() -> None:
    site = LowRankSite(RANK, 1.0)
    z = torch.ones(5, RANK)
    u = site(z)
    assert not u.any()
    u.sum().backward()
    assert site.weight.grad is not None
    assert site.weight.grad.abs().min() > 0


def test_a_site_keeps_the_dtype_of_what_it_gets() -> None:
    site = LowRankSite(RANK, 1.0, low_rank_basis(NAME, 12, 20, RANK, 0))
    disturb(site)
    assert site(torch.ones(2, RANK, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert site.delta(torch.ones(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert site.weight.dtype == torch.float32


def test_a_site_over_a_skeleton_has_no_delta() -> None:
    with pytest.raises(ConfigError, match="A and B, which are the cloud's"):
        LowRankSite(RANK, 1.0).delta(torch.ones(2, 12))


def test_gradients_of_the_whole_product() -> None:
    down, up = (part.double() for part in low_rank_basis(NAME, 6, 5, 2, 0))
    site = LowRankSite(2, 2.0, (down, up)).double()
    disturb(site)
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def run(x: Tensor, m: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(site, {"weight": m}, (x @ down.T,)) @ up.T
        return result

    assert torch.autograd.gradcheck(run, (x, site.weight))
    assert torch.allclose(run(x, site.weight), site.delta(x))


# On a model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["seeded", "svd"])
@pytest.mark.parametrize("family", SITES)
def test_a_whole_model_adds_the_products(checkpoints: Checkpoints, family: str, init: str) -> None:
    folder = checkpoints(family)
    plain, adapted = whole_model(folder), whole_model(folder)
    add_low_rank(adapted, SITES[family], RANK, alpha=8, seed=5, init=init)
    assert torch.equal(logits(plain), logits(adapted))
    disturb(adapted)
    with torch.no_grad():
        for name, site in low_rank_sites(adapted).items():
            linear = plain.get_submodule(name)
            down, up = site_basis(name, linear, rank=RANK, seed=5, init=init)
            change = 8 / RANK * up @ site.weight @ down
            linear.weight += change.T if isinstance(linear, Conv1D) else change
    assert (logits(adapted) - logits(whole_model(folder))).abs().max() > 0.01
    assert torch.allclose(logits(plain), logits(adapted), atol=1e-4)


def test_only_the_sites_learn(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    add_low_rank(model, SITES["llama"], RANK, alpha=RANK)
    model(**batch("full_mask")).loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {f"{site}.low_rank.weight" for site in SITES["llama"]}
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in moved)
    assert list(model.isthmus_adapter.parameters(model)) == [f"{site}.low_rank.weight" for site in SITES["llama"]]


def test_a_skeleton_gets_the_same_names_and_no_basis(checkpoints: Checkpoints) -> None:
    whole = whole_model(checkpoints("llama"))
    edge = copy.deepcopy(whole)
    for name in SITES["llama"]:
        parent, _, leaf = name.rpartition(".")
        real = edge.get_submodule(name)
        edge.get_submodule(parent).register_module(leaf, SkeletonLinear(real.in_features, real.out_features))
    for model in (whole, edge):
        add_low_rank(model, SITES["llama"], RANK, alpha=RANK)
    ours, theirs = (model.isthmus_adapter.parameters(model) for model in (edge, whole))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    for site in low_rank_sites(edge).values():
        assert site.down is None
        assert site.up is None
        assert {name for name, _ in site.named_parameters()} == {"weight"}
    assert low_rank_sites(edge).keys() == set(SITES["llama"])


def test_the_edges_own_layers_run_their_sites(pairs: Pairs) -> None:
    pair = pairs("llama", "3:1")
    sites = ["model.layers.0.self_attn.q_proj", NAME, "model.layers.5.mlp.up_proj"]
    for model in (pair.whole, pair.edge):
        add_low_rank(model, sites, RANK, alpha=8, seed=2, init="svd")
        disturb(model)
    assert torch.equal(logits(pair.whole), logits(pair.edge))


def test_neither_a_nor_b_is_in_the_state(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    before = set(model.state_dict())
    add_low_rank(model, [NAME], RANK, alpha=1)
    assert set(model.state_dict()) - before == {f"{NAME}.low_rank.weight"}


def test_a_copy_of_the_model_uses_its_own_sites(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    add_low_rank(model, [NAME], RANK, alpha=1)
    before = logits(model)
    other = copy.deepcopy(model)
    disturb(other)
    assert torch.equal(before, logits(model))
    assert not torch.equal(before, logits(other))


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["model.layers.9.self_attn.q_proj"], "no module 'model.layers.9.self_attn.q_proj'"),
        (["q_proj"], "no module 'q_proj'"),
        (["model.layers.1.self_attn"], "is a LlamaAttention, no plain linear"),
        ([NAME, NAME], "each once"),
        ([], "name one linear or more"),
    ],
)
def test_bad_sites_are_refused_and_change_nothing(checkpoints: Checkpoints, sites: list[str], message: str) -> None:
    model = whole_model(checkpoints("llama"))
    with pytest.raises(ConfigError, match=message):
        add_low_rank(model, ["model.layers.0.mlp.up_proj", *sites] if sites else sites, RANK, alpha=1)
    assert not low_rank_sites(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": HIDDEN + 1}, rf"rank {HIDDEN + 1} does not fit {NAME}"),
        ({"rank": 0}, "rank 0 is no rank"),
        ({"rank": 2.0}, "rank 2.0 is no rank"),
        ({"alpha": 0}, "alpha 0 is no scale"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"alpha": float("inf")}, "alpha inf"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"init": "pissa"}, "init 'pissa' is unknown: use seeded or svd"),
    ],
)
def test_bad_values_are_refused(checkpoints: Checkpoints, change: dict[str, Any], message: str) -> None:
    model = whole_model(checkpoints("llama"))
    values: dict[str, Any] = {"rank": RANK, "alpha": 1.0, **change}
    with pytest.raises(ConfigError, match=message):
        add_low_rank(model, [NAME], values.pop("rank"), **values)
    assert not low_rank_sites(model)


def test_a_site_takes_one_adapter(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    add_low_rank(model, [NAME], RANK, alpha=1)
    with pytest.raises(ConfigError, match="has a low-rank matrix already"):
        add_low_rank(model, ["model.layers.0.mlp.up_proj", NAME], RANK, alpha=1)
    assert list(low_rank_sites(model)) == [NAME]
    wrapped = peft.get_peft_model(whole_model(checkpoints("llama")), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="no plain linear"):
        add_low_rank(wrapped.get_base_model(), [NAME], RANK, alpha=1)


# On disk --------------------------------------------------------------------------------------------------------------


def test_the_description_comes_back(tmp_path: Path) -> None:
    adapter = LowRankAdapter((NAME, "model.layers.3.mlp.down_proj"), RANK, 8.0, 11, "svd")
    info = adapter.info()
    assert info == {
        "method": "low_rank",
        "sites": [NAME, "model.layers.3.mlp.down_proj"],
        "rank": RANK,
        "alpha": 8.0,
        "seed": 11,
        "init": "svd",
    }
    assert LowRankAdapter.from_info({**info, "digest": "", "plan": "2:2"}, tmp_path) == adapter


@pytest.mark.parametrize(
    "damage",
    [{"rank": "4"}, {"rank": True}, {"alpha": None}, {"sites": "ab"}, {"sites": [1]}, {"sites": []}, {"init": 3}],
)
def test_a_damaged_description_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    info = LowRankAdapter((NAME,), RANK, 8.0).info()
    with pytest.raises(CheckpointError, match="is damaged"):
        LowRankAdapter.from_info({**info, **damage}, tmp_path / "isthmus_adapter.json")
    with pytest.raises(CheckpointError, match="is damaged"):
        LowRankAdapter.from_info({name: info[name] for name in info if name not in damage}, tmp_path)


def test_places_are_known_before_anything_is_changed(checkpoints: Checkpoints) -> None:
    model = whole_model(checkpoints("llama"))
    adapter = LowRankAdapter(tuple(SITES["llama"]), RANK, 1.0)
    places = adapter.places(model)
    assert not low_rank_sites(model)
    adapter.attach(model)
    assert places == {name: parameter.shape for name, parameter in adapter.parameters(model).items()}
