"""Exact layers of the edge: whose products can be exact, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from support.models.tiny import VOCAB

from isthmus.backbone.decoding.exact_layers import exact_layers
from isthmus.backbone.sites.low_rank import add_low_rank
from isthmus.common.errors import UnsupportedCallError

from ..conftest import Pairs


def lora(*targets: str, **options: Any) -> Callable[[Any], Any]:
    """Puts LoRA on what is named."""

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)
        return peft.get_peft_model(model, config).eval()

    return adapted


def ia3(model: Any) -> Any:
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    return peft.get_peft_model(model, config).eval()


def vera(model: Any) -> Any:
    return peft.get_peft_model(model, peft.VeraConfig(r=4, target_modules=["q_proj"])).eval()


def low_rank(model: Any) -> Any:
    add_low_rank(model, ["model.layers.0.self_attn.q_proj"], 4, alpha=4)
    return model


@pytest.mark.parametrize("adapted", [lora("q_proj", "down_proj"), lora("lm_head"), ia3], ids=["lora", "head", "ia3"])
def test_an_adapter_of_linears_has_the_same_bits_for_every_number_of_tokens(
    pairs: Pairs, adapted: Callable[[Any], Any]
) -> None:
    model = adapted(pairs("llama").whole)
    ids = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), exact_layers(model):
        prompt = model(ids[:, :8], use_cache=True)
        several = model(ids[:, 8:], use_cache=True, past_key_values=prompt.past_key_values).logits
        cache, single = model(ids[:, :8], use_cache=True).past_key_values, []
        for at in range(8, 12):
            single.append(model(ids[:, at : at + 1], use_cache=True, past_key_values=cache).logits)
    assert torch.equal(torch.cat(single, dim=1), several)


@pytest.mark.parametrize(
    ("adapted", "name", "kind"),
    [
        (lora("embed_tokens"), "embed_tokens", "peft.tuners.lora.layer.Embedding"),
        (lora("q_proj", "embed_tokens"), "embed_tokens", "peft.tuners.lora.layer.Embedding"),
        (lora("q_proj", use_dora=True), "q_proj", "peft.tuners.lora.layer.Linear"),
        (vera, "q_proj", "peft.tuners.vera.layer.Linear"),
        (low_rank, "q_proj.low_rank", "isthmus.backbone.sites.low_rank.LowRankSite"),
    ],
    ids=["embedding", "embedding_too", "dora", "vera", "low_rank"],
)
def test_an_adapter_that_multiplies_by_itself_is_refused(
    pairs: Pairs, adapted: Callable[[Any], Any], name: str, kind: str
) -> None:
    model = adapted(pairs("llama").whole)
    with pytest.raises(UnsupportedCallError, match=f"{name} has an adapter of {kind}, "), exact_layers(model):
        pass
