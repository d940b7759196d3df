"""The controls of places with text are found in each form, in whatever they are written into, and only there."""

from __future__ import annotations

import os
import tempfile
import urllib.request
from pathlib import Path

import pytest

from isthmus.experiments.rigs.secrets.looked_at import _page_of, own_surroundings
from isthmus.experiments.rigs.secrets.memory_scan import Scanner
from isthmus.experiments.rigs.secrets.text_controls import AS_IT_IS, Planted
from isthmus.experiments.rigs.secrets.text_forms import TextScanner


def scanner_for(planted: Planted) -> TextScanner:
    return TextScanner(planted.canaries, planted.runs)


@pytest.mark.parametrize("_", range(20))
def test_each_form_is_found_once_in_files_and_logs(_: int) -> None:
    planted, other = Planted("files"), Planted("files")
    for written in (planted.lines, planted.log_lines, b"\n".join(planted.pieces)):
        assert set(planted.found(scanner_for(planted).count([written])).values()) == {1}
        assert set(other.found(scanner_for(other).count([written])).values()) == {0}


def test_a_form_that_is_missing_is_missed() -> None:
    planted = Planted("files")
    for form, text in planted.texts.items():
        left = planted.lines.replace(text.encode(), b"")
        counts = planted.found(scanner_for(planted).count([left]))
        assert [each for each, count in counts.items() if not count] == [form]


def test_a_scanner_of_bytes_as_they_are_finds_only_these() -> None:
    planted = Planted("files")
    counts = planted.found(Scanner(planted.canaries).count([planted.lines]))
    assert [form for form, count in counts.items() if count] == [AS_IT_IS]


def test_each_form_is_found_in_the_labels_of_metrics() -> None:
    planted = Planted("metrics", as_it_is=False)
    with _page_of(planted) as where, urllib.request.urlopen(f"http://{where}/metrics") as page:
        counts = planted.found(scanner_for(planted).count([page.read()]))
    assert AS_IT_IS not in counts
    assert all(counts.values())


def test_processes_have_folders_of_their_own_and_a_control_in_their_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    before, folder = dict(os.environ), tempfile.gettempdir()
    with own_surroundings(tmp_path / "own") as around:
        assert Path(tempfile.gettempdir()) == around.temporary
        assert os.environ["ISTHMUS_CACHE"] == str(around.cache)
        written = "\0".join(f"{name}={value}" for name, value in os.environ.items()).encode()
        assert all(around.planted.found(scanner_for(around.planted).count([written])).values())
    assert dict(os.environ) == before
    assert tempfile.gettempdir() == folder
