"""The house: no folder is crowded, each package says what lives there, and no two files share a name."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from support.file_order import LONGEST
from test_packaging import FOLDERS

ROOT = Path(__file__).parents[1]
MOST = 14
"""Modules that a folder may hold, beside its `__init__`."""


def _modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]


def _faults(root: Path, folder: str) -> list[str]:
    """What is wrong with a folder of the source."""
    found = [f"{folder} has {n} modules; {MOST} at most"] if (n := len(_modules(root / folder))) > MOST else []
    # `kernels` has no `__init__`: it would shadow another package of that name for whoever runs Python in the root.
    if folder != "kernels":
        init = root / folder / "__init__.py"
        if not init.is_file() or not ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))):
            found.append(f"{folder}/__init__.py does not say what lives there")
    return found


@pytest.mark.parametrize("folder", sorted(FOLDERS.values()))
def test_a_folder_is_small_and_says_what_lives_there(folder: str) -> None:
    assert _faults(ROOT, folder) == []


def test_a_crowded_folder_without_a_docstring_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    for index in range(MOST + 1):
        (tmp_path / "full" / f"m{index}.py").touch()
    assert len(_faults(tmp_path, "full")) == 2
    (tmp_path / "full" / "__init__.py").write_text("import os\n", encoding="utf-8")
    assert len(_faults(tmp_path, "full")) == 2
    (tmp_path / "full" / "__init__.py").write_text('"""Says it."""\n', encoding="utf-8")
    assert _faults(tmp_path, "full") == [f"full has {MOST + 1} modules; {MOST} at most"]


def test_no_two_files_share_a_name() -> None:
    names = Counter(path.name for folder in FOLDERS.values() for path in _modules(ROOT / folder))
    assert {name for name, count in names.items() if count > 1} == set()


def test_tests_lie_in_folders_like_those_of_the_source() -> None:
    own = {"abuse", "deploy", "fuzz", "integration", "support", "vectors"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    strays = {str(folder) for folder in folders if folder.parts and folder.parts[0] not in own} - set(FOLDERS.values())
    assert strays == set()


def test_no_folder_of_the_tests_support_is_crowded() -> None:
    support = ROOT / "tests" / "support"
    folders = [support, *(path for path in support.rglob("*") if path.is_dir() and path.name != "__pycache__")]
    assert {folder.name: n for folder in folders if (n := len(_modules(folder))) > MOST} == {}


def test_the_files_that_begin_are_there() -> None:
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
