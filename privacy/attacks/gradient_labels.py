"""Labels from the gradients at the span's output, which the edge sends where it trains something below its top.

The loss of a position with the label y is the cross entropy of the head's logits. Its gradient, where the head reads,
is `u = c * W^T (p - onehot(y))`: p is the model's own prediction, `c` one over the number of labels. What the edge
sends is `J^T u`, J the Jacobian of the top layers and the final norm, and of a denoiser before them where the edge has
one. With label smoothing, `onehot(y)` is mixed with the uniform distribution, in a share that the attacker knows.

`DirectLabels` takes J for the identity and p for nothing: the label's row of the head points against the gradient.
Behind a denoiser it takes J for the denoiser's Jacobian, and solves for the gradient above it.

A denoiser also depends on noise that is the edge's secret. Both attacks take it as it is without noise. Whoever finds
the noise out, say from hidden states whose tokens it has read, would read more labels.

`ExactLabels` knows the top's weights (or base weights near them), and from the span's output p and J. J has blocks:
position t of its output depends on positions up to t. So the gradient at the last position with a label is
`J_tt^T u_t`, one of V directions, and that at an earlier one is the same and what comes of later labels. A list of
candidates for each position is compared with what is left once the other positions' best candidates are taken off. This
is repeated until what is left stays, after as many rounds as there are positions at most. The lists go by directions
whose lengths are estimated; a position that its list does not explain gets another one, by the exact directions of the
whole vocabulary, which take a Jacobian. A candidate counts by how
well it explains what is left, given the noise of defence and codec, and by p: where the noise drowns a gradient, it is
small, so that p is sure of the label.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from isthmus.backbone.families import family_of
from isthmus.common.errors import DataError
from isthmus.privacy.attacks.attack import UNKNOWN, Guess, Knowledge, KnownDefence
from isthmus.privacy.attacks.known_defences import defended
from isthmus.privacy.attacks.model_top import ModelTop, RowTop
from isthmus.privacy.recording.traffic import Forward, Traffic

LISTS = (16, 64, 256)
"""Candidates for a position: the shortest list that holds every label of the public texts is taken."""
_PUBLIC_TEXTS = 4
_SILENT = 0.99  # so many positions without a label stay below the threshold
_NEIGHBOURS = 16  # public positions, of like norms, whose noise is averaged
_ROUNDING = 1e-12  # the noise's power at least, of the gradient's
_LISTINGS = 3  # lists are made anew of what is left; the gradient of later labels hides some at first
_EXPLAINED = 0.9
"""Of the public labels that lists give rightly, so many at least count as explained, and all that leave less of the
gradient than half-way, on a scale of factors, from what right labels leave to what others do. For a position that is
not explained the whole vocabulary is searched."""
_SETTLED = 1e-4  # of the gradient's norm, that a round changes at most where no further one is needed
_TINY = 1e-30


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
    """

    row: Row
    labels: Tensor
    noise: Tensor


class _LabelAttack:
    """What both have in common: a label and a cosine for each position, and a threshold for the cosine.

    A position without a label has a gradient too: that of later labels, through attention. Its best cosine is that of
    noise. The threshold comes from public texts of which the second half are labels. Labels stand in a run, so those
    between two that pass it are guessed as well. Who knows the places of labels needs none of this, and guesses all.
    """

    sees: ClassVar[str] = "gradients at the output of the cloud's layers, and that output"
    knows: ClassVar[str]
    listed: tuple[Tensor, ...] | None = None
    threshold: float = 0.0
    _label_places = False

    def prepare(self, knowledge: Knowledge) -> None:
        """Set the threshold by public texts, whose gradients pass through the defence and the wire's codec."""
        received = (knowledge.defence or KnownDefence()).expect_output
        self._top, self._label_places = ModelTop(knowledge.model, knowledge.plan, received), knowledge.label_places
        self._smoothing = knowledge.label_smoothing
        texts = [tokens for tokens in knowledge.public if len(tokens) > 1][:_PUBLIC_TEXTS]
        self.calibrate([labelled_row(knowledge, tokens, len(tokens) // 2, n) for n, tokens in enumerate(texts)])

    def calibrate(self, public: Sequence[LabelledRow]) -> None:
        """Set the threshold."""
        cosines = torch.cat([self.match(each.row)[1] for each in public])
        self._set_threshold(cosines, torch.cat([each.labels for each in public]))

    def _set_threshold(self, cosines: Tensor, labels: Tensor) -> None:
        self.threshold = float(cosines[labels == UNKNOWN].quantile(_SILENT))

    def run(self, traffic: Traffic) -> Guess:
        """Guess the labels of each row of each backward: at place t the token that position t learns to predict.

        Raises:
            DataError: The traffic has a gradient without the span's output.
        """
        forwards = {(forward.session, forward.call): forward for forward in traffic.forwards}
        labels = []
        for backward in traffic.backwards:
            forward = forwards.get((backward.session, backward.call))
            if forward is None or forward.output is None:
                raise DataError(
                    f"call {backward.call} has a gradient and no output of the span: record a whole session"
                )
            for row in _rows(forward, forward.output, backward.gradient):
                tokens, cosines = self.match(row)
                labels.append(tokens if self._label_places else torch.where(self._shown(cosines), tokens, UNKNOWN))
        return Guess((), self.listed, tuple(labels))

    def _shown(self, cosines: Tensor, beside: int = 0) -> Tensor:
        """Which positions are between the first and the last that shows a label, or so many beside them, `[S]`."""
        places, shows = torch.arange(len(cosines)), (cosines > self.threshold).nonzero()
        if not len(shows):
            return torch.zeros_like(places, dtype=torch.bool)
        return (places >= shows.min() - beside) & (places <= shows.max() + beside)

    @abstractmethod
    def match(self, row: Row) -> tuple[Tensor, Tensor]:
        """The likeliest label of each position `[S]`, and the cosine that speaks for it, `[S]`."""


class DirectLabels(_LabelAttack):
    """The row of the head that points most against the gradient as it was sent, or above a denoiser."""

    name: ClassVar[str] = "labels-direct"
    knows: ClassVar[str] = "the head, public texts"

    def match(self, row: Row) -> tuple[Tensor, Tensor]:
        """See `_LabelAttack`."""
        gradient = self._top.above(row.output, row.gradient)[0].double()
        cosines, tokens = (normalize(-gradient, dim=-1) @ normalize(self._top.rows, dim=-1).T).max(-1)
        return tokens, cosines


class ExactLabels(_LabelAttack):
    """The candidate whose gradient, drawn through the top, has the direction of what the edge sent."""

    name: ClassVar[str] = "labels-exact"
    knows: ClassVar[str] = "the head and the top layers, or base weights near them; public texts"

    def calibrate(self, public: Sequence[LabelledRow]) -> None:
        """Take the shortest lists that hold all labels of the public texts, or the longest ones; set the thresholds."""
        self.threshold = 0.0
        self._noise = _Noise(public)
        labels = torch.cat([each.labels for each in public])
        for self._listed in LISTS:
            self._explained = float("inf")
            plain = [self._match(each.row, each.labels != UNKNOWN) for each in public]
            right = torch.cat([each.tokens for each in plain]) == labels
            if right.any():
                own, others = (
                    torch.cat(each)[right] for each in zip(*((e.unexplained, e.others) for e in plain), strict=True)
                )
                self._explained = float(max(own.quantile(_EXPLAINED), (own.median() * others.median()).sqrt()))
            matched = [self._match(each.row, each.labels != UNKNOWN) for each in public]
            self.listed = tuple(
                (found.lists == each.labels[:, None]).any(1)[each.labels != UNKNOWN].float()
                for each, found in zip(public, matched, strict=True)
            )
            if torch.cat(self.listed).all():
                break
        self._set_threshold(torch.cat([each.cosines for each in matched]), labels)

    def match(self, row: Row) -> tuple[Tensor, Tensor]:
        """See `_LabelAttack`."""
        found = self._match(row)
        return found.tokens, found.cosines

    def _match(self, row: Row, labelled: Tensor | None = None) -> _Matched:
        """The best candidate of each position, first of lists that are made by a bound, then of exact ones.

        Args:
            labelled: Where labels are, `[S]`; None for where they show, or beside that.
        """
        top, gradient = RowTop(self._top, (row.output, row.mask, row.positions), self._smoothing), row.gradient[0]
        twice, left = 2 * self._noise.power(gradient)[:, None], gradient
        for _ in range(_LISTINGS):
            along = top.along(left)
            lists = (along.abs() * along / twice + top.prior).topk(min(self._listed, top.size)).indices
            listed_of = left
            found = self._chosen(top, gradient, lists, top.drawn(lists), left, twice)
            left = found.left
            if (left - listed_of).norm() <= _SETTLED * gradient.norm():
                break
        searched = torch.zeros(len(gradient), dtype=torch.bool)
        for _ in range(len(gradient)):
            explained = found.unexplained <= self._explained
            shown = found.cosines.where(explained | ~searched, -1)  # where a search explains nothing is no label
            where = self._shown(shown, beside=1) if labelled is None else labelled
            due = (where & ~searched & ~explained).nonzero()
            if not len(due):
                break
            place = int(due.max())  # the last one first: its label hides those before it
            searched[place] = True
            lists, directions = found.lists.clone(), found.directions.clone()
            lists[place], directions[place] = top.nearest(place, found.left, twice, lists.shape[1])
            found = self._chosen(top, gradient, lists, directions, found.left, twice)
        return found

    def _chosen(
        self, top: RowTop, gradient: Tensor, lists: Tensor, directions: Tensor, left: Tensor, twice: Tensor
    ) -> _Matched:
        """The best candidates of lists, for what is `left` of the gradient without later labels.

        Args:
            lists: `[S, candidates]`.
            directions: The gradient of each candidate, `[S, candidates, h]`.
        """
        places = torch.arange(len(gradient))
        prior = top.prior.gather(1, lists)
        for _ in range(len(lists)):
            cosines = cosine_similarity(left[:, None], directions, dim=-1, eps=_TINY)
            power = left.double().square().sum(-1, keepdim=True)
            best = (cosines.abs() * cosines * power / twice + prior).argmax(-1)
            others = 1 - cosines.double().scatter(1, best[:, None], 0).square().max(1).values
            cosines, chosen = cosines[places, best], directions[places, best]
            scales = (left * chosen).sum(-1) / chosen.square().sum(-1).clamp_min(_TINY)
            scales = scales.where(cosines > self.threshold, 0)[:, None]
            together = top.drawn_together(lists[places, best], scales)
            before, left = left, gradient - (together - scales * chosen)  # without what later labels give
            if (left - before).norm() <= _SETTLED * gradient.norm():
                break
        unexplained = 1 - cosines.double().square()
        return _Matched(lists, directions, lists[places, best], cosines, unexplained, others, left)


class _Matched(NamedTuple):
    """What a row's gradient was matched with.

    Attributes:
        lists: The candidates of each position, `[S, candidates]`.
        directions: Their gradients, `[S, candidates, h]`.
        tokens: The best of each, `[S]`.
        cosines: What speaks for it, `[S]`.
        unexplained: The share of the gradient's power that it leaves, `[S]`.
        others: The share that the others leave at least, `[S]`.
        left: The gradient without what later labels give, `[S, h]`.
    """

    lists: Tensor
    directions: Tensor
    tokens: Tensor
    cosines: Tensor
    unexplained: Tensor
    others: Tensor
    left: Tensor


class _Noise:
    """What defence and codec add to a gradient, by the length of what is sent, from public texts."""

    def __init__(self, public: Sequence[LabelledRow]) -> None:
        lengths = torch.cat([each.row.gradient[0].double().norm(dim=-1) for each in public])
        powers = torch.cat([each.noise[0].double().square().mean(-1) for each in public])
        self._lengths, order = lengths.sort()
        self._powers = powers[order].unfold(0, min(_NEIGHBOURS, len(order)), 1).mean(-1)

    def power(self, gradient: Tensor) -> Tensor:
        """The mean square of the noise in each number, `[S]`, of a gradient `[S, h]`."""
        gradient = gradient.double()
        places = torch.searchsorted(self._lengths, gradient.norm(dim=-1)) - _NEIGHBOURS // 2
        floor = _ROUNDING * gradient.square().mean(-1)
        return self._powers[places.clamp(0, len(self._powers) - 1)] + floor.clamp_min(_TINY)


def _rows(forward: Forward, output: Tensor, gradient: Tensor) -> list[Row]:
    positions = None if forward.positions is None else forward.positions.expand(output.shape[:2])
    return [
        Row(
            output[place, None],
            gradient[place, None],
            None if forward.mask is None else forward.mask[place, None].long(),
            None if positions is None else positions[place, None],
        )
        for place in range(len(output))
    ]


def labelled_row(knowledge: Knowledge, tokens: Tensor, start: int, number: int = 0) -> LabelledRow:
    """What the edge would send for a text `[n]` whose tokens from `start` on, 1 at least, are labels.

    Args:
        number: Another one draws other noise.
    """
    model = knowledge.model
    family = family_of(model.config)
    layer = getattr(model.get_submodule(family.base), family.layers)[knowledge.plan.cloud.stop - 1]
    kept = []

    def keep(_module: object, _args: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = layer.register_forward_hook(keep)  # before those of the defence, so that it keeps what the cloud gives
    try:
        with knowledge.drawing(number):
            ids = tokens[None]
            now = (knowledge.defence or KnownDefence()).of_pass(ids, torch.ones_like(ids, dtype=torch.bool))
            with defended(model, knowledge.plan, now):
                logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    labels = torch.full_like(tokens, UNKNOWN)
    labels[start - 1 : -1] = tokens[start:]
    loss = cross_entropy(logits, labels, ignore_index=UNKNOWN, label_smoothing=knowledge.label_smoothing)
    (gradient,) = torch.autograd.grad(loss, kept)
    sent = knowledge.sent_gradient(gradient, number)
    return LabelledRow(Row(kept[0].detach(), sent), labels, sent - gradient)
