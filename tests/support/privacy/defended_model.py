"""A tiny split model with adapters on both sides of the cut, and what crosses it under defences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from support.models.tiny import HIDDEN
from torch import Tensor

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.privacy.defences.decoys import Decoys
from isthmus.privacy.defences.defence import IGNORED
from isthmus.privacy.defences.defence_options import read_defence
from isthmus.privacy.defences.defended_span import DefendedSpan, build_defences
from isthmus.privacy.defences.secret_noise import SecretNoise

Rows = list[list[int]]


class DefendedModel:
    """A model with LoRA below and above the cut.

    Attributes:
        sent, gradients: What has gone up, call by call.
        plain_loss: The last loss, without what defences add.
    """

    def __init__(self, folder: Path, noise: SecretNoise, defences: Sequence[str] = (), plan: str = "2:2") -> None:
        torch.set_num_threads(1)
        cut = SplitPlan.parse(plan, 6)
        span = load_span(folder, cut)
        self.sent: list[Tensor] = []
        self.plain_loss = 0.0
        self.gradients: list[Tensor] = []

        def recorded(hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
            self.sent.append(hidden.detach().clone())
            output = span(hidden, mask, positions)
            if output.requires_grad:
                output.register_hook(lambda gradient: self.gradients.append(gradient.clone()))
            return output

        self.edge = load_edge_parts(folder, cut, recorded)
        torch.manual_seed(0)
        lora = LoraConfig(
            r=2, target_modules=["q_proj"], layers_to_transform=list(cut.edge_layers), init_lora_weights=False
        )
        self.model = get_peft_model(self.edge, lora).train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.defences = build_defences([read_defence(text) for text in defences], HIDDEN)
        self._noise = noise

    @contextmanager
    def defended(self, decoys: Decoys | None = None) -> Iterator[DefendedSpan]:
        span = DefendedSpan(self.edge, self.defences, self._noise, decoys)
        with span.in_place():
            yield span

    def forward(self, rows: Rows) -> Tensor:
        """The logits of a micro-batch that no loss follows."""
        with torch.no_grad():
            logits: Tensor = self.model(**padded(rows), use_cache=False).logits
        return logits

    def loss(self, rows: Rows, span: DefendedSpan | None = None) -> Tensor:
        """The loss of a micro-batch, with what the defences add to it."""
        batch = padded(rows)
        output = self.model(**batch, use_cache=False)
        extra = None if span is None else span.extra_loss(output.logits, batch["labels"])
        loss: Tensor = output.loss if extra is None else output.loss + extra
        self.plain_loss = float(output.loss.detach())
        return loss

    def gradient(self, rows: Rows, span: DefendedSpan | None = None) -> tuple[float, list[Tensor]]:
        """The loss of a micro-batch without what defences add, and the gradients of what is trained."""
        found = torch.autograd.grad(self.loss(rows, span), self.trained)
        return self.plain_loss, list(found)


def padded(rows: Rows) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([[IGNORED, *row[1:], *[IGNORED] * (longest - len(row))] for row in rows]),
    }
