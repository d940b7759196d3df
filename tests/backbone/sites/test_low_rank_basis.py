"""The frozen matrices of low-rank sites: fixed by a seed and a name, or made of the weight."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.sites.low_rank_basis import low_rank_basis, seeded_matrix, site_basis, svd_basis
from isthmus.common.errors import ConfigError

from .conftest import NAME, RANK


def test_the_seeded_basis_is_fixed_for_all_time() -> None:
    """A change of these bits would break every adapter that was saved before."""
    down, up = low_rank_basis(NAME, 64, 48, 8, seed=7)
    content = down.numpy().tobytes() + up.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == "16cb7fca870b9eef7b1629ea710ddef7ef88853c1bc2fb9e913fa6130574c1ef"


def test_the_seeded_basis_depends_on_seed_and_site_alone() -> None:
    down, up = low_rank_basis(NAME, 64, 48, 8, seed=7)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = low_rank_basis(NAME, 64, 48, 8, seed=7)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(down, again[0])
    assert torch.equal(up, again[1])
    assert torch.equal(before, torch.get_rng_state())
    for name, seed in (("model.layers.3.self_attn.q_proj", 7), (NAME, 8)):
        other = low_rank_basis(name, 64, 48, 8, seed=seed)
        assert not torch.equal(down, other[0])
        assert not torch.equal(up, other[1])
    square = low_rank_basis(NAME, 8, 8, 8, seed=7)
    assert not torch.equal(*square)


def test_seeded_products_keep_the_size_of_the_numbers() -> None:
    down, up = low_rank_basis(NAME, 512, 384, 64, seed=0)
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    z = x @ down.T
    assert z.var().item() == pytest.approx(1, rel=0.15)
    assert (z @ up.T).var().item() == pytest.approx(1, rel=0.25)
    assert down.mean().abs().item() < 0.01 * down.abs().max().item()


@settings(max_examples=30, deadline=None)
@given(label=st.text(max_size=20), rows=st.integers(1, 6), columns=st.integers(1, 40))
def test_seeded_numbers_are_bounded_and_in_one_stream(label: str, rows: int, columns: int) -> None:
    matrix = seeded_matrix(label, rows, columns)
    assert matrix.shape == (rows, columns)
    assert matrix.dtype == torch.float32
    assert matrix.abs().max().item() <= (3 / columns) ** 0.5 * (1 + 1e-6)
    assert torch.equal(matrix, seeded_matrix(label, rows + 3, columns)[:rows])


def test_the_svd_basis_is_the_best_approximation_of_its_rank() -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    down, up = svd_basis(weight, RANK)
    values = torch.linalg.svdvals(weight)
    assert (weight - up @ down).norm().item() == pytest.approx(values[RANK:].norm().item(), rel=1e-5)
    assert torch.allclose(down @ down.T, torch.eye(RANK), atol=1e-6)
    assert torch.allclose(up.norm(dim=0), values[:RANK], rtol=1e-5)


def test_the_svd_basis_has_one_sign() -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    down, up = svd_basis(weight, RANK)
    assert (down.gather(1, down.abs().argmax(1, keepdim=True)) > 0).all()
    negated_down, negated_up = svd_basis(-weight, RANK)
    assert torch.allclose(down, negated_down, atol=1e-6)
    assert torch.allclose(up, -negated_up, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 13, 20])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"rank {rank} does not fit .* use 1 to 12"):
        svd_basis(torch.zeros(20, 12), rank)
    with pytest.raises(ConfigError, match=rf"rank {rank} does not fit {NAME}.* use 1 to 12"):
        low_rank_basis(NAME, 12, 20, rank, seed=0)


def test_a_conv1d_counts_as_the_linear_that_it_is() -> None:
    conv, linear = Conv1D(12, 20), nn.Linear(20, 12)
    linear.weight = nn.Parameter(conv.weight.T.detach().clone())
    for init in ("seeded", "svd"):
        ours = site_basis(NAME, conv, rank=RANK, seed=1, init=init)
        theirs = site_basis(NAME, linear, rank=RANK, seed=1, init=init)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert ours[0].shape == (RANK, 20)
        assert ours[1].shape == (12, RANK)
