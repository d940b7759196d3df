"""What each of the middle's layers does to public text, as far as a recipe asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cosine_similarity

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import arrange_layers, distinct_layers, load_layers, run_layers
from isthmus.common.errors import NonFiniteError
from isthmus.common.progress import bar
from isthmus.emulator.compress.layer_choice import Measures
from isthmus.emulator.compress.outer_layers import OuterLayers
from isthmus.emulator.compress.public_text import spread
from isthmus.emulator.compress.recipe import Recipe
from isthmus.training.logit_divergence import logit_divergence

# Enough for a stable order of the layers, and little enough for minutes of work: each removal tries all the layers that
# are left, and runs for each trial those after it.
MEASURED_TOKENS = 1024
KL_TOKENS = 512  # fewer, as in each trial the top of the model and its head run too; other texts may give other orders
_LOGIT_TOKENS = 256  # whose logits are made at a time


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """`mean(((T - S) / rms(T))^2)` (Xiao et al. 2023), half with the rms of all, half with that of each position.

    A single position can carry a norm a hundred times that of the others ("massive activations", Sun et al. 2024). The
    rms of everything then sees that position only, and that of each position nearly none of it; both matter.

    Args:
        student: Hidden states S, `[B, S, h]`.
        teacher: Hidden states T of the same positions.

    Returns:
        A scalar in fp32.
    """
    difference, target = (teacher - student).float().square(), teacher.float().square()
    of_positions = (difference.mean(-1) / target.mean(-1)).mean()
    return (of_positions + difference.mean() / target.mean()) / 2


_NOTHING = Measures(())


@torch.no_grad()
def measure(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    recipe: Recipe,
    blocks: Tensor,
    *,
    device: torch.device | str = "cpu",
    progress: Console | None = None,
    known: Measures = _NOTHING,
) -> Measures:
    """Run some public text through the middle and measure what its layers do: about `MEASURED_TOKENS`, for `kl` half.

    Args:
        recipe: Says what is needed: an order of removal for `importance` and `kl`, similarities for `crash`.
        blocks: Public text, `[n, length]`; blocks at even distances are used.
        known: What was measured before on the same text, for another recipe; a removal order goes on from there.

    Raises:
        NonFiniteError: The model gives NaN or infinite hidden states.
        PlanError: The recipe leaves no layer.
    """
    by_kl = recipe.selection == "kl"
    used = spread(blocks, KL_TOKENS if by_kl else MEASURED_TOKENS).to(device)
    ends = OuterLayers(checkpoint, plan, with_top=by_kl, device=device)
    entry = ends.entry(used)
    middle = Middle.of(checkpoint, plan, device)
    n_middle = len(plan.cloud)
    everything = tuple(range(n_middle))
    gone = known.removed_by_kl if by_kl else known.removed
    n_removed = n_middle - recipe.layers_kept(n_middle) if by_kl or recipe.selection == "importance" else 0
    rounds = range(len(gone), n_removed)
    total = n_middle + sum(n_middle - done for done in rounds)
    with bar(progress, "measuring layers", total) as advance:
        states = middle.states(everything, entry, advance)
        if not states[-1].isfinite().all():
            raise NonFiniteError(
                "the middle's output on this text is not finite; check the checkpoint with its own software"
            )
        influence = tuple(_influence(before, after) for before, after in pairwise(states))
        harm = _divergence(ends, used, states[-1]) if by_kl else partial(_error, states[-1])
        removed, harms = removal_order(middle, states, gone, len(rounds), harm, advance)
    if by_kl:
        return replace(known, influence=influence, removed_by_kl=removed, removal_kl=known.removal_kl + harms)
    similarity = known.similarity
    if recipe.selection in ("crash", "crash-drop"):
        similarity = linear_cka([_normalised(state) for state in states[1:]])
    return replace(
        known,
        influence=influence,
        removed=removed,
        removal_errors=known.removal_errors + harms,
        similarity=similarity,
    )


class Middle:
    """Layers of the middle, to be run in any choice. They are numbered within the middle.

    Args:
        base: From `load_layers`; its own order is not kept.
        first: Index of the middle's first layer in the whole model.
    """

    def __init__(self, base: Any, layers: Sequence[int], first: int, config: Any) -> None:
        self._base, self._first, self._config = base, first, config
        self._layers = distinct_layers(base, layers)

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: SplitPlan, device: torch.device | str) -> Self:
        """The whole middle, frozen."""
        layers = tuple(plan.cloud)
        base = load_layers(checkpoint, layers)
        return cls(base.requires_grad_(False).eval().to(device), layers, plan.bottom, checkpoint.config)

    def run(self, layers: Sequence[int], hidden: Tensor) -> Tensor:
        """Hidden states `[B, S, h]` after these layers."""
        if not layers:
            return hidden
        indices = [self._first + layer for layer in layers]
        arrange_layers(self._base, [self._layers[index] for index in indices], indices, self._config)
        return run_layers(self._base, hidden)

    def states(self, layers: Sequence[int], hidden: Tensor, advance: Callable[[], None] = lambda: None) -> list[Tensor]:
        """The hidden states before the first layer and after each one."""
        states = [hidden]
        for layer in layers:
            states.append(self.run((layer,), states[-1]))
            advance()
        return states


def removal_order(
    middle: Middle,
    states: list[Tensor],
    gone: Sequence[int],
    rounds: int,
    harm: Callable[[Tensor], float],
    advance: Callable[[], None],
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Greedy backward elimination: in each round the layer goes whose absence does the least harm.

    A layer's absence is tried from the cached state before it, so only the layers after it run.

    Args:
        states: The hidden states of the whole middle, from its entry to its output.
        gone: Layers that have gone before, in their order.
        rounds: How many more go.
        harm: Of the middle's output, `[B, S, h]`.

    Returns:
        The layers in the order in which they go, those that have gone before first, and the harm after each further
        removal.
    """
    left = [layer for layer in range(len(states) - 1) if layer not in gone]
    removed = list(gone)
    harms: list[float] = []
    if gone and rounds:
        states = middle.states(left, states[0])
    for _ in range(rounds):
        trials = []
        for place in range(len(left)):
            output = middle.run(left[place + 1 :], states[place])
            trials.append(harm(output))
            advance()
        place = min(range(len(left)), key=lambda i: trials[i] if math.isfinite(trials[i]) else math.inf)
        harms.append(trials[place])
        removed.append(left.pop(place))
        states = states[:place] + middle.states(left[place:], states[place])
    return tuple(removed), tuple(harms)


def _error(target: Tensor, output: Tensor) -> float:
    return relative_error(output, target).item()


def _divergence(ends: OuterLayers, ids: Tensor, target: Tensor) -> Callable[[Tensor], float]:
    """Of a middle's output, the KL divergence of what is predicted above it from what is predicted above `target`.

    The logits of `target` are kept: 100 MB for 512 tokens and 50,000 words.
    """
    rows = max(1, _LOGIT_TOKENS // ids.shape[1])
    slices = torch.split(ids, rows)
    wanted = [
        ends.predict(part, states)[0].flatten(0, 1)
        for part, states in zip(slices, torch.split(target, rows), strict=True)
    ]

    def harm(output: Tensor) -> float:
        total = 0.0
        for part, states, theirs in zip(slices, torch.split(output, rows), wanted, strict=True):
            ours = ends.predict(part, states)[0].flatten(0, 1)
            total += logit_divergence(ours, theirs).item() * len(part)
        return total / len(ids)

    return harm


def linear_cka(outputs: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
    """Linear centred kernel alignment between each two of `outputs` (Kornblith et al. 2019), 0 to 1.

    Args:
        outputs: Hidden states `[B, S, h]` of the same tokens.
    """
    centred = []
    for output in outputs:
        values = output.flatten(0, -2).float()  # [tokens, h]
        values = values - values.mean(0)
        centred.append(values / values.norm())  # the alignment does not depend on the scale
    norms = [(values.T @ values).norm() for values in centred]
    table = [[1.0] * len(centred) for _ in centred]
    for i, left in enumerate(centred):
        for j in range(i):
            alignment = (left.T @ centred[j]).square().sum() / (norms[i] * norms[j])
            table[i][j] = table[j][i] = alignment.item()
    return tuple(map(tuple, table))


def _normalised(hidden: Tensor) -> Tensor:
    """Hidden states as the next layer's norm passes them on: else a few tokens of a thousandfold size decide alone."""
    return hidden.float() / hidden.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def _influence(before: Tensor, after: Tensor) -> float:
    return 1.0 - cosine_similarity(before.float(), after.float(), dim=-1).mean().item()
