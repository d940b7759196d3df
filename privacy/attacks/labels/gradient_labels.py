"""Labels from the gradients at the span's output, which the edge sends where it trains something below its top.

The loss of a position with the label y is the cross entropy of the head's logits. Its gradient, where the head reads,
is `u = c * W^T (p - onehot(y))`: p is the model's own prediction, `c` one over the number of labels. What the edge
sends is `J^T u`, J the Jacobian of the top layers and the final norm, and of a denoiser before them where the edge has
one. With label smoothing, `onehot(y)` is mixed with the uniform distribution, in a share that the attacker knows; where
rows are mixed, with that of the other row's label. Then candidates are pairs of labels.

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
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from isthmus.common.errors import DataError
from isthmus.common.progress import Progress, unseen, watched
from isthmus.privacy.attacks.attack import UNKNOWN, Guess, Knowledge, KnownDefence
from isthmus.privacy.attacks.labels.label_candidates import choose, without_best
from isthmus.privacy.attacks.labels.labelled_rows import LabelledRow, Row, labelled_row
from isthmus.privacy.attacks.labels.model_top import ModelTop, RowTop
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
    _progress: Progress = staticmethod(unseen)

    def prepare(self, knowledge: Knowledge) -> None:
        """Set the threshold by public texts, whose gradients pass through the defence and the wire's codec."""
        received = (knowledge.defence or KnownDefence()).expect_output
        self._top, self._label_places = ModelTop(knowledge.model, knowledge.plan, received), knowledge.label_places
        self._progress, self._smoothing = knowledge.progress, knowledge.label_smoothing
        # The edge smooths a row's own label alone, and candidates are smoothed all: this is the own share of a pair.
        self._own_share = (knowledge.own_share - self._smoothing) / (1 - self._smoothing)
        texts = [tokens for tokens in knowledge.public if len(tokens) > 1][:_PUBLIC_TEXTS]
        partners = texts[1:] + texts[:1] if self._own_share < 1 else [None] * len(texts)
        pairs = enumerate(zip(texts, partners, strict=True))
        self.calibrate([labelled_row(knowledge, own, len(own) // 2, n, partner) for n, (own, partner) in pairs])

    def calibrate(self, public: Sequence[LabelledRow]) -> None:
        """Set the threshold."""
        self._set_threshold(torch.cat([self.match(each.row)[1] for each in public]), public)

    def _set_threshold(self, cosines: Tensor, public: Sequence[LabelledRow]) -> None:
        labelled = torch.cat([each.labelled for each in public])
        silent = cosines[~labelled]  # none where public texts are so short that labels are everywhere
        self.threshold = float(silent.quantile(_SILENT)) if len(silent) else 0.0

    def run(self, traffic: Traffic) -> Guess:
        """Guess the labels of each row of each backward: at place t the token that position t learns to predict.

        Raises:
            DataError: The traffic has a gradient without the span's output.
        """
        forwards = {(forward.session, forward.call): forward for forward in traffic.forwards}
        labels = []
        for backward in watched(self._progress, "reading labels: calls", traffic.backwards):
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
            what = f"learning from public gradients, lists of {self._listed}"
            plain = [self._match(each.row, each.labelled) for each in watched(self._progress, what, public)]
            right = torch.cat([each.tokens for each in plain]) == labels
            if right.any():
                own, others = (
                    torch.cat(each)[right] for each in zip(*((e.unexplained, e.others) for e in plain), strict=True)
                )
                self._explained = float(max(own.quantile(_EXPLAINED), (own.median() * others.median()).sqrt()))
            matched = [self._match(each.row, each.labelled) for each in watched(self._progress, what, public)]
            self.listed = tuple(each.in_lists(found.lists) for each, found in zip(public, matched, strict=True))
            if torch.cat(self.listed).all():
                break
        self._set_threshold(torch.cat([each.cosines for each in matched]), public)

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
            lists = self._lists(top, left, twice)
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
            lists[place], directions[place] = self._nearest(top, place, found.left, twice)
            found = self._chosen(top, gradient, lists, directions, found.left, twice)
        return found

    def _lists(self, top: RowTop, left: Tensor, twice: Tensor) -> Tensor:
        """Candidates by how well they explain what is left; where rows are mixed, half of them what the best leaves."""

        def scores(left: Tensor) -> Tensor:
            along = top.along(left)
            return along.abs() * along / twice + top.prior

        if self._own_share == 1:
            return scores(left).topk(min(self._listed, top.size)).indices
        half = min(self._listed, top.size) // 2
        lists = scores(left).topk(half).indices
        rest = without_best(left, top.drawn(lists), top.prior.gather(1, lists), twice)
        return torch.cat([lists, scores(rest).scatter(1, lists, -torch.inf).topk(half).indices], 1)

    def _nearest(self, top: RowTop, place: int, left: Tensor, twice: Tensor) -> tuple[Tensor, Tensor]:
        """The same for one position, by exact directions of the whole vocabulary; see `RowTop.nearest`."""
        if self._own_share == 1:
            return top.nearest(place, left, twice, min(self._listed, top.size))
        half = min(self._listed, top.size) // 2
        tokens, directions = top.nearest(place, left, twice, half)
        here = slice(place, place + 1)
        rest = left.clone()
        rest[here] = without_best(left[here], directions[None], top.prior[here, tokens], twice[here])
        further, further_directions = top.nearest(place, rest, twice, 2 * half)
        new = (~torch.isin(further, tokens)).nonzero()[:half, 0]
        return torch.cat([tokens, further[new]]), torch.cat([directions, further_directions[new]])

    def _chosen(
        self, top: RowTop, gradient: Tensor, lists: Tensor, directions: Tensor, left: Tensor, twice: Tensor
    ) -> _Matched:
        """The best candidates of lists, for what is `left` of the gradient without later labels.

        Args:
            lists: `[S, candidates]`.
            directions: The gradient of each candidate, `[S, candidates, h]`.
        """
        prior = top.prior.gather(1, lists)
        shares = torch.tensor([self._own_share, 1 - self._own_share] if self._own_share < 1 else [1.0])
        for _ in range(len(lists)):
            best = choose(left, directions, prior, twice, self._own_share)
            tokens, chosen = lists.gather(1, best.picked), best.direction
            scales = (left * chosen).sum(-1) / chosen.square().sum(-1).clamp_min(_TINY)
            scales = scales.where(best.cosine > self.threshold, 0)[:, None]
            together = top.drawn_together(tokens, scales * shares)
            before, left = left, gradient - (together - scales * chosen)  # without what later labels give
            if (left - before).norm() <= _SETTLED * gradient.norm():
                break
        unexplained = 1 - best.cosine.square()
        return _Matched(lists, directions, tokens[:, 0], best.cosine, unexplained, best.others, left)


class _Matched(NamedTuple):
    """What a row's gradient was matched with.

    Attributes:
        lists: The candidates of each position, `[S, candidates]`.
        directions: Their gradients, `[S, candidates, h]`.
        tokens: The best of each, `[S]`: the row's own one, where rows are mixed.
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
