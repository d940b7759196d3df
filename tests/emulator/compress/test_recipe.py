"""Recipes: what is written, what is read back, what is refused."""

from __future__ import annotations

import pytest

from isthmus.common.errors import ConfigError, PlanError
from isthmus.emulator.compress.recipe import SELECTIONS, Recipe


@pytest.mark.parametrize(
    ("selection", "bridged"),
    [(selection, "") for selection in SELECTIONS]
    + [(each, "+bridged") for each in SELECTIONS if each != "crash"]
    + [("kl", "+bridged+closed")],
)
@pytest.mark.parametrize("rest", ["", "+lowrank:0.25", "+int8", "+lowrank:0.125+int4"])
def test_writing_and_reading_are_inverse(selection: str, bridged: str, rest: str) -> None:
    rest = bridged + rest
    recipe = Recipe.parse(selection + rest, 0.5)
    assert str(recipe) == selection + rest
    assert Recipe.parse(str(recipe), recipe.keep) == recipe
    assert (recipe.bridged, recipe.chooses_by_text) == (bool(bridged), selection != "uniform")
    assert recipe.needs_text == (bool(bridged) or selection != "uniform")
    assert (recipe.low_rank is not None, recipe.bits) == ("lowrank" in rest, {"8": 8, "4": 4}.get(rest[-1:]))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "''"),
        ("random", "'random'"),
        ("uniform+", "''"),
        ("uniform+int3", "'int3'"),
        ("uniform+int8+int4", "'int4'"),
        ("uniform+int8+lowrank:0.5", "'lowrank:0.5'"),
        ("uniform+lowrank", "'lowrank'"),
        ("uniform+lowrank:x", "'x'"),
        ("uniform+lowrank:0", "lowrank:0.0"),
        ("uniform+lowrank:1", "lowrank:1.0"),
        ("uniform+lowrank:nan", "lowrank:nan"),
        ("uniform+int8+bridged", "'bridged'"),
        ("uniform+bridged+bridged", "'bridged'"),
        ("crash+bridged", "crash-drop+bridged"),
        ("uniform+closed", "'closed'"),
        ("uniform+closed+bridged", "'closed'"),
    ],
)
def test_bad_text_is_refused_by_name(text: str, names: str) -> None:
    with pytest.raises(ConfigError, match=r"use|write") as caught:
        Recipe.parse(text, 0.5)
    assert names in str(caught.value)


@pytest.mark.parametrize("keep", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_out_of_range_is_refused(keep: float) -> None:
    with pytest.raises(ConfigError, match=f"keep {keep}"):
        Recipe.parse("uniform", keep)


@pytest.mark.parametrize(("keep", "n_middle", "kept"), [(0.5, 26, 13), (1.0, 26, 26), (0.75, 26, 20), (0.04, 26, 1)])
def test_how_many_layers_are_kept(keep: float, n_middle: int, kept: int) -> None:
    assert Recipe("uniform", keep).layers_kept(n_middle) == kept


@pytest.mark.parametrize("n_middle", [1, 2, 7, 26, 80])
def test_no_layer_is_refused_with_the_smallest_share_that_works(n_middle: int) -> None:
    with pytest.raises(PlanError, match=rf"keep 0 of {n_middle} ") as caught:
        Recipe("uniform", 0.0).layers_kept(n_middle)
    smallest = float(str(caught.value).split("use ")[1].split(" or")[0])
    assert Recipe("uniform", smallest).layers_kept(n_middle) == 1
    with pytest.raises(PlanError):
        Recipe("uniform", smallest - 0.001).layers_kept(n_middle)
