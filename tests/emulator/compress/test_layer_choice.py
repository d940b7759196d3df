"""Which layers a recipe takes, given what was measured."""

from __future__ import annotations

import pytest

from isthmus.common.errors import ConfigError
from isthmus.emulator.compress.layer_choice import Measures, cluster, select_layers, uniform
from isthmus.emulator.compress.recipe import Recipe


@pytest.mark.parametrize(
    ("n_middle", "n_kept", "layers"),
    [(6, 3, (0, 2, 5)), (26, 2, (0, 25)), (5, 1, (2,)), (4, 1, (1,)), (7, 4, (0, 2, 4, 6)), (1, 1, (0,))],
)
def test_uniform_takes_the_papers_layers(n_middle: int, n_kept: int, layers: tuple[int, ...]) -> None:
    assert uniform(n_middle, n_kept) == layers


@pytest.mark.parametrize("n_middle", [1, 2, 5, 26, 33])
def test_uniform_never_takes_a_layer_twice(n_middle: int) -> None:
    for n_kept in range(1, n_middle + 1):
        layers = uniform(n_middle, n_kept)
        assert len(set(layers)) == n_kept
        assert list(layers) == sorted(layers)
    assert uniform(n_middle, n_middle) == tuple(range(n_middle))


def test_importance_drops_in_the_measured_order() -> None:
    measures = Measures((0.1,) * 6, removed=(4, 1, 2), removal_errors=(0.1, 0.2, 0.3))
    assert select_layers(Recipe("importance", 0.5), 6, measures) == (0, 3, 5)
    assert select_layers(Recipe("importance", 1.0), 6, measures) == tuple(range(6))


def block_similarity(*sizes: int) -> tuple[tuple[float, ...], ...]:
    """1 within runs of these sizes and 0.1 between them."""
    names = [name for name, size in enumerate(sizes) for _ in range(size)]
    return tuple(tuple(1.0 if one == other else 0.1 for other in names) for one in names)


def test_clusters_are_runs_of_layers_that_are_alike() -> None:
    assert cluster(block_similarity(3, 1, 2), 3) == [[0, 1, 2], [3], [4, 5]]
    assert cluster(block_similarity(3, 1, 2), 6) == [[0], [1], [2], [3], [4], [5]]
    assert cluster(block_similarity(3, 1, 2), 1) == [[0, 1, 2, 3, 4, 5]]


def test_layers_far_apart_never_form_a_cluster() -> None:
    alike = [[1.0 if (i - j) % 2 == 0 else 0.2 for j in range(6)] for i in range(6)]
    for group in cluster(alike, 3):
        assert group == list(range(group[0], group[-1] + 1))


def test_crash_repeats_the_centre_as_often_as_its_cluster_was_long() -> None:
    measures = Measures((0.1,) * 6, similarity=block_similarity(3, 1, 2))
    assert select_layers(Recipe("crash", 0.5), 6, measures) == (1, 1, 1, 3, 4, 4)
    assert select_layers(Recipe("crash-drop", 0.5), 6, measures) == (1, 3, 4)
    assert select_layers(Recipe("crash", 1.0), 6, measures) == tuple(range(6))


@pytest.mark.parametrize("selection", ["importance", "crash", "crash-drop"])
def test_what_chooses_by_text_asks_for_it(selection: str) -> None:
    with pytest.raises(ConfigError, match="--text"):
        select_layers(Recipe(selection, 0.5), 6, None)
