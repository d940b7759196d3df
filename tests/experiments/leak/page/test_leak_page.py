"""The ledger's page: all that it must show, nothing from elsewhere, and whatever a ledger says as text alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.privacy.small_ledger import run, small_ledger

from isthmus.experiments.leak.page.leak_page import write_page

pytest.importorskip("matplotlib")

FIGURES = ("modes", "frontier", "rarity", "cuts")
SCRIPT = "</title><script>alert(1)</script><img src=https://elsewhere.example/x>&$x^2$"


class _Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    @property
    def asked_for(self) -> list[str]:
        """Whatever a browser would fetch or could be sent to, but for places in the page itself."""
        found = [
            value or ""
            for _, attributes in self.elements
            for name, value in attributes.items()
            if name in {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
        ]
        styles = [
            value or "" for _, attributes in self.elements for name, value in attributes.items() if name == "style"
        ]
        found += re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s]+)", self.words + " ".join(styles))
        return [place for place in found if not place.startswith("#")]


def _written(folder: Path, ledger: dict[str, Any]) -> str:
    return write_page(json.loads(json.dumps(ledger)), folder).read_text(encoding="utf-8")


def _elements(figure: Path) -> list[str]:
    """The names of a figure's elements, as a reader of XML finds them."""
    root = ElementTree.fromstring(figure.read_text(encoding="utf-8"))  # noqa: S314  # just written by the test
    return [element.tag.rpartition("}")[2] for element in root.iter()]


def test_a_page_of_three_rows_says_what_each_leaks_and_how_it_was_made(tmp_path: Path) -> None:
    page = _Page(_written(tmp_path / "new", small_ledger()))
    for said in (
        *("99.8\u00a0%", "99 to 100", "95\u00a0%", "1.21\u00a0\u00d7", "cut 2", "noise", "emulator", "a processor"),
        *("gives up 99.8\u00a0% of the tokens", "(epsilon, delta)", "activations"),
        "defence on: 1.34\u00a0\u00d7",
        "gradients at the output of the cloud's layers",
        "isthmus experiment leak --json",
    ):
        assert said in page.words, said
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("svg"), tags.count("script"), tags.count("button")) == (4, 1, 19)
    assert page.asked_for == []
    for name in FIGURES:
        assert len(_elements(tmp_path / "new" / f"{name}.svg")) > 20


def test_what_would_come_from_elsewhere_is_noticed() -> None:
    text = (
        '<img src="//elsewhere.example/x"><a href="#here"></a><i style="background: url(https://elsewhere.example/y)">'
    )
    assert _Page(text + "<style>@import 'z.css'</style>").asked_for == [
        "//elsewhere.example/x",
        "z.css",
        "https://elsewhere.example/y",
    ]


def test_whatever_a_ledger_says_is_text(tmp_path: Path) -> None:
    plain = _Page(_written(tmp_path / "plain", small_ledger()))
    runs = [
        run(SCRIPT, SCRIPT, token_accuracy=0.9, task_loss_ratio=1.1, data=SCRIPT, codec=SCRIPT, plan=SCRIPT),
        run("x", SCRIPT, token_accuracy=0.9, task_loss_ratio=1.01, defence=SCRIPT, defence_claim=SCRIPT, unit=SCRIPT),
    ]
    hostile = small_ledger(SCRIPT, model=SCRIPT, processor=SCRIPT, settings={SCRIPT: SCRIPT, "command": SCRIPT})
    text = _written(tmp_path / "hostile", {**hostile, "runs": [*hostile["runs"], *runs]})
    page = _Page(text)
    assert page.asked_for == []
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "alert(1)" in page.words
    assert SCRIPT not in text
    for name in FIGURES:
        assert {"script", "img", "image"}.isdisjoint(_elements(tmp_path / "hostile" / f"{name}.svg"))


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    text = _written(tmp_path, small_ledger())
    policy = next(each["content"] for tag, each in _Page(text).elements if tag == "meta" and "content" in each)
    assert re.fullmatch(r"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-[\w+/]{43}='", policy or "")


def test_a_ledger_of_nothing_is_a_page(tmp_path: Path) -> None:
    page = _Page(_written(tmp_path, {"runs": []}))
    assert "no frontier" in page.words
    assert page.asked_for == []


def test_the_same_ledger_gives_the_same_files(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        _written(tmp_path / folder, small_ledger())
    for name in ("index.html", *(f"{name}.svg" for name in FIGURES)):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_every_colour_of_a_figure_follows_the_theme(tmp_path: Path) -> None:
    _written(tmp_path, small_ledger())
    for name in FIGURES:
        text = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        drawn = text.partition("</style>")[2]
        assert re.findall(r"(?:fill|stroke): (#\w+)", drawn) == []
        assert "var(--text)" in drawn
        assert "prefers-color-scheme: dark" in text
