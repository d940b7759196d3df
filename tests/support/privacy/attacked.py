"""A tiny model, private and public texts, and what a cloud has of the private ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from support.models.tiny import N_LAYERS, VOCAB, tiny_config, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.plan import SplitPlan
from isthmus.privacy.attacks.attack import Attack, Guess, Knowledge, KnownDefence
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.recording.traffic import Forward, Traffic
from isthmus.protocol.tensor_codecs import Role, decode, encode

LENGTH = 14
_PRIVATE, _PUBLIC = 4, 50


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random model of a family of `support.models.tiny`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()


@dataclass(frozen=True)
class GaussianNoise(KnownDefence):
    """A defence that adds noise of one size to every channel."""

    deviation: float

    def send(self, hidden: Tensor) -> Tensor:
        """With noise."""
        return hidden + self.deviation * torch.randn_like(hidden)

    def expect(self, hidden: Tensor) -> Tensor:
        """Without."""
        return hidden


@dataclass(frozen=True)
class Attacked:
    """What an attack is tried on.

    Attributes:
        texts: The private texts, `[n]` each.
        traffic: What came of them.
        knowledge: What the attacker knows.
    """

    texts: tuple[Tensor, ...]
    traffic: Traffic
    knowledge: Knowledge

    def attack(self, attack: Attack) -> Guess:
        """Prepare and run an attack."""
        attack.prepare(self.knowledge)
        return attack.run(self.traffic)

    def accuracy(self, guess: Guess) -> float:
        """The share of private tokens that are right."""
        return float((torch.cat(guess.tokens) == torch.cat(self.texts)).float().mean())

    def shuffled(self) -> Attacked:
        """The same with the positions of each text in another order."""
        order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
        forwards = tuple(replace(each, hidden=each.hidden[:, order]) for each in self.traffic.forwards)
        return replace(self, traffic=replace(self.traffic, forwards=forwards))

    def knowing(self, **changes: Any) -> Attacked:
        """The same for an attacker who knows something else."""
        return replace(self, knowledge=replace(self.knowledge, **changes))


def attacked(
    family: str = "llama",
    *,
    bottom: int = 2,
    codec: str = "fp32",
    defence: KnownDefence | None = None,
    model: Any = None,
    edges_front: Front | None = None,
) -> Attacked:
    """Private texts through the front of a tiny model, and an attacker who knows it.

    Args:
        edges_front: The front that the edge runs, where it is another than the attacker's.
    """
    model = model or tiny_model(family)
    front = Front(model, bottom)
    random = torch.Generator().manual_seed(1)
    texts = tuple(torch.randint(3, VOCAB, (LENGTH,), generator=random) for _ in range(_PRIVATE + _PUBLIC))
    private, public = texts[:_PRIVATE], texts[_PRIVATE:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        states = torch.stack([(edges_front or front).states(text) for text in private])
        sent = states if defence is None else defence.send(states)
    hidden = decode(encode(sent, codec, Role.ACTIVATION))
    forward = Forward(0, 0, hidden, None, None, codec, None, False)
    knowledge = Knowledge(
        model,
        tiny_tokenizer(),
        SplitPlan(N_LAYERS, bottom, 1),
        front,
        public,
        codec=codec,
        defence=defence,
        inverter_steps=40,
    )
    return Attacked(private, Traffic("", f"{bottom}:1", (forward,)), knowledge)
