"""Labels from the gradients at the span's output, which the edge sends where it trains something below its top.

The loss of a position with the label y is the cross entropy of the head's logits. Its gradient, where the head reads,
is `c * W^T (p - onehot(y))`: p is the model's own prediction, `c` one over the number of labels. What the edge sends is
that gradient, drawn through the final norm and the top layers.

`DirectLabels` takes the gradient as sent for the gradient where the head reads: the label's row of the head points
against it. `ExactLabels` undoes the top layers. The cloud knows the span's output, so it can compute the Jacobian J of
the layers above (as far as it knows these) and solve `J^T v = g` by GMRES (Saad & Schultz 1986), since J is the
identity and something small. Then v points at each position in the direction of one label's gradient at the norm.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from isthmus.backbone.families import family_of
from isthmus.common.errors import DataError
from isthmus.privacy.attacks.attack import UNKNOWN, Guess, Knowledge
from isthmus.privacy.attacks.model_top import ModelTop
from isthmus.privacy.recording.traffic import Forward, Traffic
from isthmus.protocol.tensor_codecs import Role, decode, encode

_PUBLIC_TEXTS = 8
_NOISE = 0.99  # so many positions without a label stay below the threshold
_SHORTLIST = 512
_TOLERANCE = 1e-7  # of the residual; products have the rounding of fp32
_TINY = 1e-300
_ROUNDS = 400
_CHECKED = 10  # products between two looks at the residual


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


class _LabelAttack:
    """What both have in common: a label and a cosine for each position, and a threshold for the cosine.

    A position without a label has a gradient too: that of later labels, through attention. Its best cosine is that of
    noise. The threshold comes from public texts of which the second half are labels.
    """

    sees: ClassVar[str] = "gradients at the span's output, and the span's output"
    knows: ClassVar[str] = "the head, and the base weights of the top layers"

    def prepare(self, knowledge: Knowledge) -> None:
        """Set the threshold by public texts, whose gradients pass through the wire's codec."""
        self._top = ModelTop(knowledge.model, knowledge.plan)
        texts = [ids for ids in knowledge.public if len(ids) > 1][:_PUBLIC_TEXTS]
        noise = []
        for ids in texts:
            start = len(ids) // 2
            _, cosines = self.match(_public_row(knowledge, ids, start))
            noise.append(cosines[: max(1, start - 1)])
        self.threshold = float(torch.cat(noise).quantile(_NOISE))

    def run(self, traffic: Traffic) -> Guess:
        """Guess the labels of each row of each backward: at place t the token that position t learns to predict."""
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
                labels.append(torch.where(cosines > self.threshold, tokens, UNKNOWN))
        return Guess((), labels=tuple(labels))

    @abstractmethod
    def match(self, row: Row) -> tuple[Tensor, Tensor]:
        """The likeliest label of each position `[S]`, and the cosine that speaks for it, `[S]`."""


class DirectLabels(_LabelAttack):
    """The row of the head that points most against the gradient as it was sent."""

    name: ClassVar[str] = "labels-direct"
    knows: ClassVar[str] = "the head"

    def match(self, row: Row) -> tuple[Tensor, Tensor]:
        """See `_LabelAttack`."""
        cosines, tokens = (normalize(-row.gradient[0].double(), dim=-1) @ normalize(self._top.head, dim=-1).T).max(-1)
        return tokens, cosines


class ExactLabels(_LabelAttack):
    """The label whose gradient, at the final norm, has the direction that the gradient has with the top undone."""

    name: ClassVar[str] = "labels-exact"

    def match(self, row: Row) -> tuple[Tensor, Tensor]:
        """See `_LabelAttack`."""
        top = self._top
        output = row.output.detach().requires_grad_()
        states = top.through(output, row.mask, row.positions)

        def transposed(v: Tensor) -> Tensor:
            return torch.autograd.grad(states, output, v.to(states), retain_graph=True)[0].double()

        found = gmres(transposed, row.gradient.double())[0]
        states_here = states.detach()[0]
        jacobians = torch.func.vmap(torch.func.jacrev(top.tail))(states_here).double()  # [S, width, h]
        logits, slopes = top.logit_slopes(top.tail(states_here).double() @ top.head.T)
        means = (slopes * logits.softmax(-1)) @ top.head
        tokens, cosines = [], []
        shortlists = self._shortlists(found, jacobians, means, slopes)
        for v, jacobian, mean, slope, listed in zip(found, jacobians, means, slopes, shortlists, strict=True):
            candidates = (mean - slope[listed, None] * top.head[listed]) @ jacobian
            cosine, place = cosine_similarity(candidates, v[None], dim=-1, eps=_TINY).max(0)
            tokens.append(listed[place])
            cosines.append(cosine)
        return torch.stack(tokens), torch.stack(cosines)

    def _shortlists(self, found: Tensor, jacobians: Tensor, means: Tensor, slopes: Tensor) -> Tensor:
        """The likeliest labels of each position, by the cosine as if `J J^T` were diagonal, which it nearly is."""
        head = self._top.head
        along = torch.einsum("swh,sh->sw", jacobians, found)
        scales = jacobians.square().sum(-1)
        products = (along * means).sum(-1, keepdim=True) - slopes * (along @ head.T)
        squares = (scales * means.square()).sum(-1, keepdim=True) - 2 * slopes * ((scales * means) @ head.T)
        squares += slopes.square() * (scales @ head.square().T)
        return (products / squares.clamp_min(_TINY).sqrt()).topk(min(_SHORTLIST, len(head))).indices


def gmres(matrix: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """Solve `matrix(x) = right`, to a relative residual of 1e-7 or as near as 400 products come.

    Args:
        matrix: A linear map of tensors of `right`'s shape.
        right: The right side, in fp64.
    """
    norm = right.norm()
    if norm == 0:
        return torch.zeros_like(right)
    basis = [right / norm]
    columns: list[Tensor] = []
    solution = torch.zeros(0, dtype=right.dtype)
    most = min(_ROUNDS, right.numel())
    for count in range(1, most + 1):
        product = matrix(basis[-1])
        flat = torch.stack(basis).flatten(1)
        first = flat @ product.flatten()
        rest = product.flatten() - first @ flat
        again = flat @ rest  # a second time, as rounding leaves a part of the basis in the rest
        rest = rest - again @ flat
        length = rest.norm()
        columns.append(torch.cat([first + again, length[None]]))
        if count % _CHECKED == 0 or length < _TOLERANCE or count == most:
            solution, residual = _least_squares(columns, norm)
            if residual < _TOLERANCE * norm or length < _TOLERANCE:
                break
        basis.append((rest / length).view_as(right))
    return torch.einsum("n,n...->...", solution, torch.stack(basis[: len(solution)]))


def _least_squares(columns: list[Tensor], norm: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates of the best solution in the basis so far, and its residual."""
    hessenberg = torch.zeros(len(columns) + 1, len(columns), dtype=norm.dtype)
    for place, column in enumerate(columns):
        hessenberg[: len(column), place] = column
    wanted = torch.zeros(len(columns) + 1, 1, dtype=norm.dtype)
    wanted[0] = norm
    solution = torch.linalg.lstsq(hessenberg, wanted).solution
    return solution[:, 0], (hessenberg @ solution - wanted).norm()


def _rows(forward: Forward, output: Tensor, gradient: Tensor) -> list[Row]:
    masks = [None] * len(output) if forward.mask is None else forward.mask.long().split(1)
    positions = [None] * len(output)
    if forward.positions is not None:
        positions = forward.positions.expand(output.shape[:2]).split(1)
    return [Row(*row) for row in zip(output.split(1), gradient.split(1), masks, positions, strict=True)]


def _public_row(knowledge: Knowledge, ids: Tensor, start: int) -> Row:
    """What the edge would send for a public text whose tokens from `start` on are labels."""
    model = knowledge.model
    family = family_of(model.config)
    layer = getattr(model.get_submodule(family.base), family.layers)[knowledge.plan.cloud.stop - 1]
    kept = []

    def keep(_module: object, _args: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = layer.register_forward_hook(keep)
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        handle.remove()
    loss = cross_entropy(logits[start - 1 : -1], ids[start:])
    (gradient,) = torch.autograd.grad(loss, kept)
    sent = decode(encode(gradient, knowledge.codec, Role.GRADIENT))
    return Row(kept[0].detach(), sent)
