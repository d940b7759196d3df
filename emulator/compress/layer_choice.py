"""Which of the middle's layers an emulator runs, and in which order. Pure, no torch.

Indices count within the middle, 0 to M - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.common.errors import ConfigError
from isthmus.emulator.compress.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Measures:
    """What the middle's layers do to public text.

    Attributes:
        influence: Block influence of each layer, `1 - E[cos(input, output)]` (Men et al. 2024, "ShortGPT").
        removed: Layers in the order in which they can go with the least harm to the middle's output.
        removal_errors: Relative error of the middle's output after each of those removals.
        removed_by_kl: The same, with the least harm to the next-token distribution above the middle.
        removal_kl: KL divergence of that distribution from the whole model's after each of these removals, in nats.
        similarity: Linear CKA between the outputs of each two layers, each token's divided by its rms, M x M; empty if
            it was not measured.
    """

    influence: tuple[float, ...]
    removed: tuple[int, ...] = ()
    removal_errors: tuple[float, ...] = ()
    similarity: tuple[tuple[float, ...], ...] = ()
    removed_by_kl: tuple[int, ...] = ()
    removal_kl: tuple[float, ...] = ()


def select_layers(recipe: Recipe, n_middle: int, measures: Measures | None) -> tuple[int, ...]:
    """The layers that an emulator runs, in running order; a layer that stands several times is shared.

    Args:
        n_middle: Number of layers of the middle, M.
        measures: What public text says about them; None where there is no text.

    Raises:
        ConfigError: The recipe chooses by public text, and there is none.
        PlanError: No layer would be kept.
    """
    n_kept = recipe.layers_kept(n_middle)
    if recipe.selection == "uniform":
        return uniform(n_middle, n_kept)
    if measures is None:
        raise ConfigError(f"{recipe.selection!r} chooses layers by public text; give some with --text, or use uniform")
    if n_kept == n_middle:
        return tuple(range(n_middle))
    if recipe.selection in ("importance", "kl"):
        order = measures.removed if recipe.selection == "importance" else measures.removed_by_kl
        gone = set(order[: n_middle - n_kept])
        return tuple(layer for layer in range(n_middle) if layer not in gone)
    clusters = cluster(measures.similarity, n_kept)
    return tuple(
        layer for group in clusters for layer in [group[(len(group) - 1) // 2]] * (len(group) if recipe.shares else 1)
    )


def uniform(n_middle: int, n_kept: int) -> tuple[int, ...]:
    """`round(i * (M - 1) / (S - 1))` for i = 0 … S - 1 (Xiao et al. 2023); a single layer is the middle one."""
    if n_kept == 1:
        return ((n_middle - 1) // 2,)
    return tuple(round(i * (n_middle - 1) / (n_kept - 1)) for i in range(n_kept))


def cluster(similarity: Sequence[Sequence[float]], n_clusters: int) -> list[list[int]]:
    """Runs of neighbouring layers that are alike: agglomerative, with average linkage, neighbours only.

    Args:
        similarity: How alike each two layers are, M x M.
        n_clusters: Number of clusters, 1 to M.

    Returns:
        The clusters in order; each is a run of layers.
    """
    clusters = [[layer] for layer in range(len(similarity))]
    while len(clusters) > n_clusters:
        best = max(range(len(clusters) - 1), key=lambda i: _linkage(similarity, clusters[i], clusters[i + 1]))
        clusters[best : best + 2] = [clusters[best] + clusters[best + 1]]
    return clusters


def _linkage(similarity: Sequence[Sequence[float]], left: list[int], right: list[int]) -> float:
    return sum(similarity[i][j] for i in left for j in right) / (len(left) * len(right))
