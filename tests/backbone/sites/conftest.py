"""Linears that carry low-rank sites."""

from __future__ import annotations

from torch import nn

from isthmus.backbone.sites.low_rank import LOW_RANK, LowRankSite

RANK = 4
NAME = "model.layers.2.self_attn.q_proj"
SITES = {
    "llama": [NAME, "model.layers.3.mlp.down_proj", "model.layers.5.self_attn.v_proj"],
    "phi3": ["model.layers.2.self_attn.qkv_proj"],
    "gpt2": ["transformer.h.2.attn.c_attn", "transformer.h.3.mlp.c_proj"],
    "opt": ["model.decoder.layers.1.self_attn.k_proj", "model.decoder.layers.4.fc2"],
}


class SkeletonLinear(nn.Linear):
    """A linear without a weight, as the edge has for the cloud's layers."""

    def __init__(self, n_in: int, n_out: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = n_in, n_out


def low_rank_sites(model: nn.Module) -> dict[str, LowRankSite]:
    """The low-rank sites of a model by their linears' full names, in the order of its modules."""
    return {
        name.removesuffix(f".{LOW_RANK}"): module
        for name, module in model.named_modules()
        if isinstance(module, LowRankSite)
    }
