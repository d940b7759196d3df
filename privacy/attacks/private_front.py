"""A front that the edge has tuned in secret: the attacker's own, fitted to texts of which it knows what came.

It knows them, or has guessed most of their tokens.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from isthmus.common.errors import ConfigError
from isthmus.common.progress import watched
from isthmus.privacy.attacks.attack import Knowledge

_RATE = 3e-3
_RANK = 8
_ROUNDING = 1e-9
_JUDGED = 4  # one known text in so many is not fitted to


def held_out_known(knowledge: Knowledge) -> list[tuple[Tensor, Tensor]]:
    """The known texts that the front is not fitted to, and what came of them."""
    return list(knowledge.known[::_JUDGED])


def fit_front(knowledge: Knowledge) -> Knowledge:
    """The same knowledge with adapters of low rank in all of the front's linears, fitted to the known texts.

    They need fewer texts than the weights do, and an edge tunes adapters alike. Channels count by their spread, the
    first position (a sink) not at all.

    Raises:
        ConfigError: Fewer than two texts are known.
    """
    fitted = [pair for number, pair in enumerate(knowledge.known) if number % _JUDGED]
    if not fitted:
        raise ConfigError(
            f"{len(knowledge.known)} known texts are too few to fit a front to and to judge it; give two or more"
        )
    front = knowledge.front.with_own_layers()
    adapted = [name for name, module in front.layers.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    lora = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules=adapted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(knowledge.seed)
        inject_adapter_in_model(lora, front.layers)
    weights = [weight for weight in front.layers.parameters() if weight.requires_grad]
    spread = torch.cat([hidden[1:] for _, hidden in fitted]).std(0).clamp_min(1e-6)
    optimizer = torch.optim.Adam(weights, lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=knowledge.front_steps, pct_start=0.1)
    for step in watched(knowledge.progress, "fitting a front: steps", range(knowledge.front_steps)):
        tokens, hidden = fitted[step % len(fitted)]
        expected = front.states(tokens, graph=True)
        if knowledge.defence is not None:
            expected = knowledge.expect(expected)
        # Of the roots, not the squares: where a token is wrong that was only guessed, it counts for little.
        loss = (((expected - hidden)[1:] / spread).square().mean(1) + _ROUNDING).sqrt().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    for name, module in list(front.layers.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            front.layers.set_submodule(name, module.get_base_layer())
    front.layers.requires_grad_(False)
    return knowledge.with_front(front)
