"""A row as the edge sends its gradient, and public texts sent as the edge would, whose labels the attacker knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from isthmus.backbone.families import family_of
from isthmus.privacy.attacks.attack import UNKNOWN, Knowledge, KnownDefence
from isthmus.privacy.attacks.known_defences import defended


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence whose gradient the edge sent.

    Attributes:
        output: What the span gave, `[1, S, h]`.
        gradient: The loss's gradient of it, `[1, S, h]`.
        mask, positions: `[1, S]`, or None.
    """

    output: Tensor
    gradient: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A sequence of a public text.

    Attributes:
        row: As the edge would send it.
        labels: `[S]`: at place t what position t learns to predict.
        noise: What defence and codec have added to the gradient, `[1, S, h]`.
        partner_labels: `[S]`, the labels of the row that it is mixed with, where they are mixed in; None for none.
    """

    row: Row
    labels: Tensor
    noise: Tensor
    partner_labels: Tensor | None = None

    @property
    def labelled(self) -> Tensor:
        """Where a label is, of the row or of what is mixed in, `[S]` bool."""
        own = self.labels != UNKNOWN
        return own if self.partner_labels is None else own | (self.partner_labels != UNKNOWN)

    def in_lists(self, lists: Tensor) -> Tensor:
        """Whether a list has all labels of its position, `[labelled positions]` as 0 and 1.

        Args:
            lists: `[S, candidates]`.
        """
        found = torch.ones_like(self.labels, dtype=torch.bool)
        for labels in (self.labels, self.labels if self.partner_labels is None else self.partner_labels):
            found &= (lists == labels[:, None]).any(1) | (labels == UNKNOWN)
        return found[self.labelled].float()


def labelled_row(
    knowledge: Knowledge, tokens: Tensor, start: int, number: int = 0, partner: Tensor | None = None
) -> LabelledRow:
    """What the edge would send for a text `[n]` whose tokens from `start` on, 1 at least, are labels.

    Args:
        number: Another one draws other noise.
        partner: Tokens `[m]` of the text that it is mixed with, from whose quarter on are labels; None where rows are
            not mixed.
    """
    model = knowledge.model
    family = family_of(model.config)
    layer = getattr(model.get_submodule(family.base), family.layers)[knowledge.plan.cloud.stop - 1]
    kept = []

    def keep(_module: object, _args: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    other = None if partner is None else knowledge.front.states(partner)
    handle = layer.register_forward_hook(keep)  # before those of the defence, so that it keeps what the cloud gives
    try:
        with knowledge.drawing(number):
            ids = tokens[None]
            known = knowledge.defence or KnownDefence()
            now = known.of_pass(ids, torch.ones_like(ids, dtype=torch.bool), other)
            with defended(model, knowledge.plan, now):
                logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    labels, partner_labels = _ahead(tokens, start), None
    loss = cross_entropy(logits, labels, ignore_index=UNKNOWN, label_smoothing=knowledge.label_smoothing)
    if partner is not None:  # as the edge mixes the loss: where the other is shorter, it begins again
        partner_labels = _ahead(partner, max(len(partner) // 4, 1))[torch.arange(len(tokens)) % len(partner)]
        of_own, of_partner = (
            cross_entropy(logits, each, ignore_index=UNKNOWN, reduction="sum") for each in (labels, partner_labels)
        )
        loss = loss + (1 - knowledge.own_share) * (of_partner - of_own) / (labels != UNKNOWN).sum()
    (gradient,) = torch.autograd.grad(loss, kept)
    sent = knowledge.sent_gradient(gradient, number)
    return LabelledRow(Row(kept[0].detach(), sent), labels, sent - gradient, partner_labels)


def _ahead(tokens: Tensor, start: int) -> Tensor:
    """What each position learns to predict where the tokens from `start` on are labels, `[n]`."""
    labels = torch.full_like(tokens, UNKNOWN)
    labels[start - 1 : -1] = tokens[start:]
    return labels
