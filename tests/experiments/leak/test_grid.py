"""The grid: what rows are read, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.privacy.small_leak import grid_file

from isthmus.common.errors import ConfigError, PlanError
from isthmus.experiments.leak.grid import DOCUMENTED, Row, file_names, known_texts, read_grid
from isthmus.experiments.leak.leak_settings import LeakSettings
from isthmus.privacy.defences.defence_options import DefenceOptions

SMOLLM2_LAYERS = 30


def test_the_documented_grid_fits_its_model_and_has_a_dozen_rows_at_most() -> None:
    rows = read_grid(LeakSettings())
    assert len(rows) <= 12
    assert {row.plan(SMOLLM2_LAYERS).bottom for row in rows if not row.defence} == {1, 2, 4, 8, 15}
    assert {row.mode for row in rows} == {"split", "top-only", "emulator"}
    assert {row.data for row in rows} == {"e2e", "sst2"}


def test_the_two_grids_together_try_every_defence_that_is_not_known_to_be_broken() -> None:
    both = read_grid(LeakSettings(grid=[DOCUMENTED, DOCUMENTED.with_name("defences.toml")]))
    plain = {(row.edge_layers, row.data, row.steps) for row in both if row.mode == "split" and not row.defence}
    assert {(row.edge_layers, row.data, row.steps) for row in both} <= plain  # each has its baseline
    tried = {text.split(":")[0] for row in both for text in row.defence}
    assert tried == {options.name for options in DefenceOptions.__subclasses__()} - {"rotation", "quantization"}


def test_keys_above_the_rows_are_of_all_and_rows_are_chosen_by_name(tmp_path: Path) -> None:
    path = grid_file(tmp_path / "grid.toml", {"name": "a"}, {"name": "b", "steps": 7})
    path.write_text(f"steps = 5\n{path.read_text()}")
    assert [(row.name, row.steps) for row in read_grid(LeakSettings(grid=[path]))] == [("a", 5), ("b", 7)]
    assert [row.name for row in read_grid(LeakSettings(grid=[path], row=["b"]))] == ["b"]
    assert [row.steps for row in read_grid(LeakSettings(grid=[path], steps=2))] == [2, 2]


def test_flags_make_a_row_for_each_plan_and_codec() -> None:
    rows = read_grid(LeakSettings(edge_layers="1:2,2:2", codec="fp32,int4", defence=["smoothing:share=0.1"]))
    assert [(row.edge_layers, row.codec) for row in rows] == [
        ("1:2", "fp32"), ("1:2", "int4"), ("2:2", "fp32"), ("2:2", "int4"),
    ]  # fmt: skip
    assert {row.defence for row in rows} == {("smoothing:share=0.1",)}
    assert len(set(file_names(rows))) == 4


def test_names_that_differ_in_signs_alone_have_files_of_their_own() -> None:
    assert len(set(file_names([Row(name="cut 1"), Row(name="cut-1"), Row(name="€")]))) == 3


def test_decoys_get_their_file_later() -> None:
    row = Row(name="a", defence=("decoys:count=2",))
    assert row.n_decoys == 2
    (options,) = row.defences("/some/file")
    assert options.text() == "decoys:file=/some/file,count=2"
    assert Row(name="b").n_decoys == 0


def test_views_say_how_many_texts_are_known() -> None:
    row = Row(name="a", views=("known", "tuned", "tuned+8"))
    assert [known_texts(view) for view in row.views] == [0, 0, 8]
    assert row.n_known == 8


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"steps": 5}, "name"),
        ({"name": "a", "step": 5}, "step"),
        ({"name": "a", "codec": "int3"}, "codec 'int3'"),
        ({"name": "a", "also_codecs": ["int3"]}, "codec 'int3'"),
        ({"name": "a", "views": ["seen"]}, "view 'seen'"),
        ({"name": "a", "views": []}, "views is empty"),
        ({"name": "a", "data": "sst2", "defence": "decoys:count=1"}, "holds the whole text"),
        ({"name": "a", "defence": "fog"}, "'fog' is no defence"),
        ({"name": "a", "defence": ["mixing", "dp-sgd:clip=1,sigma=1"]}, "exclude each other"),
        ({"name": "a", "mode": "emulator", "codec": "int4"}, "sends nothing"),
        ({"name": "a", "package": "somewhere"}, "package is an emulator's"),
        ({"name": "a", "defence": "rotation"}, "no attack of the ledger knows a secret rotation"),
        ({"name": "a", "defence": "mixing", "also_codecs": ["int4"]}, "also_codecs sends without defences"),
        ({"name": "a", "mode": "top-only", "views": ["tuned"]}, "its front is known"),
        ({"name": "a", "data": "mnist"}, "data"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grid\.toml, row 1: ") as refusal:
        read_grid(LeakSettings(grid=[grid_file(tmp_path / "grid.toml", row)]))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_grid_without_rows_or_with_one_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two rows are named 'a'"):
        read_grid(LeakSettings(grid=[grid_file(tmp_path / "twice.toml", {"name": "a"}, {"name": "a"})]))
    with pytest.raises(ConfigError, match="has no rows"):
        read_grid(LeakSettings(grid=[grid_file(tmp_path / "empty.toml")]))


def test_grids_are_read_together_and_a_name_is_of_one_row(tmp_path: Path) -> None:
    first = grid_file(tmp_path / "first.toml", {"name": "a"}, {"name": "b"})
    second = grid_file(tmp_path / "second.toml", {"name": "c"})
    assert [row.name for row in read_grid(LeakSettings(grid=[first, second]))] == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="two rows are named 'a'"):
        read_grid(LeakSettings(grid=[first, second, first]))


@pytest.mark.parametrize("plan", ["6:2", "0:2", "2:0", "x"])
def test_a_plan_outside_the_model_is_refused(plan: str) -> None:
    with pytest.raises(PlanError, match="row 'a'"):
        Row(name="a", edge_layers=plan).plan(8)
    assert Row(name="a", edge_layers="5:2").plan(8).bottom == 5
