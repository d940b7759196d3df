from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models.tiny import CONFIGS, VOCAB
from support.privacy.attacked import tiny_model
from torch import Tensor

from isthmus.backbone.families import family_of
from isthmus.common.errors import ConfigError, PlanError
from isthmus.privacy.attacks import front as front_module
from isthmus.privacy.attacks.front import Front

TOKENS = torch.randint(3, VOCAB, (18,), generator=torch.Generator().manual_seed(0))  # longer than two windows
PLACES = torch.arange(len(TOKENS))


def at_the_cut(model: Any, bottom: int) -> Tensor:
    """What the whole model gives its layer number `bottom`."""
    family = family_of(model.config)
    seen: list[Tensor] = []
    layer = getattr(model.get_submodule(family.base), family.layers)[bottom]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=TOKENS[None], use_cache=False)
    hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("bottom", [0, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_front_computes_what_the_whole_model_does(name: str, bottom: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "_CHUNK", 2)  # the three candidates take two forwards
    model = tiny_model(name)
    expected, front = at_the_cut(model, bottom), Front(model, bottom)
    torch.testing.assert_close(front.states(TOKENS), expected)

    prefix = front.begin()
    front.extend(prefix, TOKENS[:4], PLACES[:4])
    for place in range(4, len(TOKENS)):
        tried = torch.tensor([5, int(TOKENS[place]), 9])
        hidden = front.candidates(prefix, tried, PLACES[place])
        torch.testing.assert_close(hidden[1], expected[place], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(hidden[0], expected[place], rtol=1e-3, atol=1e-4)  # another token
        front.extend(prefix, TOKENS[place, None], PLACES[place, None])
    prefix.crop(7)
    torch.testing.assert_close(front.extend(prefix, TOKENS[7:], PLACES[7:]), expected[7:], rtol=1e-3, atol=1e-4)


def test_a_front_of_its_own_leaves_the_model_alone() -> None:
    model = tiny_model("llama")
    front = Front(model, 2)
    before, own = front.states(TOKENS), front.with_own_layers()
    with torch.no_grad():
        for weight in own.layers.parameters():
            weight.add_(0.1)
    assert torch.equal(front.states(TOKENS), before)
    assert not torch.allclose(own.states(TOKENS), before)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="6 layers"):
        Front(model, 6)
    with pytest.raises(ConfigError, match="129 tokens"):
        Front(model, 2).states(torch.full((129,), 5))
