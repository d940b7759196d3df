"""What tests of sites share: the layout of SmolLM2-135M's sites, and scores."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.models.lora_runs import Run, adapted, train, whole

from isthmus.edge.sites.site_policy import SiteInfo, Sites

H = 576
Scoring = Callable[[int, str], float]


def layout(layers: int = 26, *, summed: bool = False) -> Sites:
    """LoRA of rank 8 on q and v of SmolLM2-135M's layers."""
    return Sites(
        SiteInfo.of_linear(
            f"model.layers.{layer}.self_attn.{kind}",
            layer=layer,
            group=f"{layer}/attn",
            in_features=H,
            out_features=out,
            parameters=8 * (H + out),
            summed=summed,
        )
        for layer in range(2, 2 + layers)
        for kind, out in (("q_proj", H), ("v_proj", H // 3))
    )


def name(layer: int, kind: str = "v") -> str:
    return f"model.layers.{layer}.self_attn.{kind}_proj"


def noise(seed: int) -> Scoring:
    return lambda step, site: random.Random(f"{seed}/{step}/{site}").uniform(-0.1, 1)  # noqa: S311


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Run:
    """LoRA with dropout on every layer, in one process."""
    return train(adapted(whole(folder)))
