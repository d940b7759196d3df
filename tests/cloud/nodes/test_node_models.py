"""Where a node finds its model: on the path, in what it has kept, by the model's name, or at another worker."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cloud.nodes import node_models
from isthmus.cloud.nodes.node_models import NodeModel, find_model
from isthmus.cloud.nodes.peers import RESERVE, Peers
from isthmus.cloud.session.file_store import FileStore
from isthmus.common.errors import CheckpointError, UnknownModelError
from isthmus.protocol import messages as m

Offering = Callable[[FileStore], str]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_SECONDS", "PAUSE_SECONDS"):
        monkeypatch.setattr(node_models, name, 0.0)


def end_the_others() -> None:
    """What the end of the processes that use models does."""
    for use in node_models._IN_USE:
        use.close()
    node_models._IN_USE.clear()


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    yield
    end_the_others()


@pytest.fixture
def wanted(model: Path, tmp_path: Path) -> NodeModel:
    """The model of the cloud, which this node has not on the owner's path."""
    path = str(tmp_path / "owners" / "model")
    return NodeModel("tiny", path, Checkpoint(model, "tiny").digest(), "")


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    return tiny_checkpoint("llama", tmp_path / "other-model", seed=3)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were looked for; nothing is found by any."""
    asked: list[str] = []

    def resolve(name: str, **_: object) -> Checkpoint:
        asked.append(name)
        raise UnknownModelError("there is no network")

    monkeypatch.setattr(node_models, "resolve", resolve)
    return asked


def nobody() -> Sequence[str]:
    raise AssertionError("other workers are not to be asked")


def kept(node: Path, wanted: NodeModel) -> Path:
    return node / "models" / wanted.digest[:16]


def same_files(one: Path, other: Path) -> bool:
    return {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


def test_a_model_on_the_owners_path_is_used_where_it_is_the_clouds(
    wanted: NodeModel, peers: Peers, node: Path, model: Path, named: list[str]
) -> None:
    shutil.copytree(model, wanted.path)
    assert find_model(wanted, peers, nobody, lambda text: None) == Path(wanted.path)
    assert not (node / "models").exists()
    assert named == []


def test_another_model_on_the_owners_path_is_refused(
    wanted: NodeModel, peers: Peers, node: Path, other_model: Path
) -> None:
    shutil.copytree(other_model, wanted.path)
    found = Checkpoint(other_model, "tiny").digest()[:16]
    with pytest.raises(CheckpointError, match=f"has the digest {found}, and the cloud serves {wanted.digest[:16]}"):
        find_model(wanted, peers, nobody, lambda text: None)
    assert not (node / "models").exists()


def test_a_model_is_fetched_from_another_worker_once_and_kept(
    wanted: NodeModel, peers: Peers, address: str, node: Path, model: Path, named: list[str]
) -> None:
    said: list[str] = []
    assert find_model(wanted, peers, lambda: (address,), said.append) == kept(node, wanted)
    assert same_files(kept(node, wanted), model)
    assert f"fetching the model from {address}: 0 of 0 MiB" in said
    assert [path.name for path in (node / "models").iterdir() if path.is_dir()] == [wanted.digest[:16]]
    assert (node / "models").stat().st_mode & 0o077 == 0
    assert find_model(wanted, peers, nobody, said.append) == kept(node, wanted)
    assert named == []  # a path is no name that leads anywhere


def test_a_worker_waits_until_another_one_has_the_model(
    wanted: NodeModel, peers: Peers, address: str, node: Path, model: Path
) -> None:
    said: list[str] = []
    places = iter([(), (), (), (address,)])
    assert find_model(wanted, peers, lambda: next(places), said.append) == kept(node, wanted)
    assert same_files(kept(node, wanted), model)
    waits = f"waiting for a worker that has the model: it is not at {wanted.path} on this node"
    assert said[0] == waits
    assert said[-1] != waits


def test_a_worker_that_is_gone_is_passed_over(
    wanted: NodeModel, peers: Peers, address: str, node: Path, model: Path, log: Callable[[], list[dict[str, object]]]
) -> None:
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{gone.getsockname()[1]}"
        assert find_model(wanted, peers, lambda: (dead, address), lambda text: None) == kept(node, wanted)
    assert same_files(kept(node, wanted), model)
    assert [line["at"] for line in log() if line["event"] == "model_not_fetched"] == [dead]


def test_another_model_from_another_worker_is_refused_and_removed(
    wanted: NodeModel, peers: Peers, offering: Offering, node: Path, other_model: Path, model: Path
) -> None:
    """Each of its files arrives as it was listed, and still they are not the cloud's model."""
    lying, honest = (offering(FileStore(folder, m.FileSet.MODEL)) for folder in (other_model, model))
    with pytest.raises(CheckpointError, match=f"that came from {lying} has the digest .*: it was damaged"):
        find_model(wanted, peers, lambda: (lying,), lambda text: None)
    assert [path.name for path in (node / "models").iterdir() if path.is_dir()] == []
    assert find_model(wanted, peers, lambda: (honest,), lambda text: None) == kept(node, wanted)


def test_what_came_before_a_fetch_was_cut_off_is_not_fetched_again(
    wanted: NodeModel, peers: Peers, offering: Offering, node: Path, model: Path
) -> None:
    part = node / "models" / f"{wanted.digest[:16]}.part"
    part.mkdir(parents=True, mode=0o700)
    (node / "models").chmod(0o700)
    shutil.copy(model / "model.safetensors", part)
    asked: list[str] = []

    class Counting(FileStore):
        def read(self, name: str, offset: int) -> m.Blob | m.Status:
            asked.append(name)
            return super().read(name, offset)

    address = offering(Counting(model, m.FileSet.MODEL))
    find_model(wanted, peers, lambda: (address,), lambda text: None)
    assert same_files(kept(node, wanted), model)
    assert set(asked) == {path.name for path in model.iterdir()} - {"model.safetensors"}


def test_a_kept_model_that_is_damaged_is_fetched_anew(
    wanted: NodeModel, peers: Peers, address: str, node: Path, model: Path, log: Callable[[], list[dict[str, object]]]
) -> None:
    find_model(wanted, peers, lambda: (address,), lambda text: None)
    weights = kept(node, wanted) / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert find_model(wanted, peers, lambda: (address,), lambda text: None) == kept(node, wanted)
    assert same_files(kept(node, wanted), model)
    assert [line["event"] for line in log()].count("kept_model_damaged") == 1


# Where the disk has no room for one more ------------------------------------------------------------------------------


@pytest.fixture
def disk(node: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has room for two models of that size, whatever else is to stay free."""

    def statvfs(path: object) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=RESERVE + 2 * size_of(model) - size_of(node / "models"), f_frsize=1)

    monkeypatch.setattr(os, "statvfs", statvfs)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fetched_before(node: Path, model: Path, digest: str, used_at: float | None = None) -> Path:
    """A model of another digest that no process uses."""
    folder = node / "models" / digest
    (node / "models").mkdir(mode=0o700, exist_ok=True)
    shutil.copytree(model, folder)
    if used_at is not None:
        use = folder.with_name(f".{digest}.use")
        use.touch()
        os.utime(use, (used_at, used_at))
    return folder


def few_times(address: str) -> Callable[[], Sequence[str]]:
    """The address, for as often as a fetch may be tried."""
    places = iter([(address,)] * 3)
    return lambda: next(places)


@pytest.mark.usefixtures("disk")
def test_models_that_no_process_uses_make_room_and_the_one_used_last_stays(
    wanted: NodeModel, peers: Peers, address: str, node: Path, model: Path, log: Callable[[], list[dict[str, object]]]
) -> None:
    newest, oldest = (fetched_before(node, model, name * 16, at) for name, at in (("a", 2e9), ("b", 1e9)))
    part = fetched_before(node, model, f"{'c' * 16}.part")  # which nothing tells the use of
    other = node / "models" / "notes"  # which is no model
    other.mkdir()
    assert find_model(wanted, peers, few_times(address), lambda text: None) == kept(node, wanted)
    assert same_files(kept(node, wanted), model)
    assert [path.exists() for path in (newest, oldest, part, other)] == [True, False, False, True]
    removed = [line["folder"] for line in log() if line["event"] == "kept_model_removed"]
    assert removed == [str(part).removesuffix(".part"), str(oldest)]


@pytest.mark.usefixtures("disk")
def test_models_stay_where_their_room_is_not_enough(node: Path, model: Path) -> None:
    wanted = node / "models" / ("f" * 16)
    others = [fetched_before(node, model, name * 16) for name in "ab"]
    assert not node_models._remove_another(wanted, 2 * size_of(model) + 1)
    assert all(other.exists() for other in others)
    assert node_models._remove_another(wanted, 2 * size_of(model))
    assert sum(other.exists() for other in others) == 1


@pytest.mark.usefixtures("disk")
def test_what_a_process_uses_counts_as_no_room(node: Path, model: Path) -> None:
    wanted = node / "models" / ("f" * 16)
    used, free = (fetched_before(node, model, name * 16) for name in "ab")
    with node_models._using(used):
        assert not node_models._remove_another(wanted, size_of(model) + 1)
        assert free.exists()  # it would have gone in vain
        assert node_models._remove_another(wanted, size_of(model))
    assert [used.exists(), free.exists()] == [True, False]


def test_models_stay_where_there_is_room(
    wanted: NodeModel, peers: Peers, address: str, node: Path, model: Path
) -> None:
    others = [fetched_before(node, model, name * 16) for name in "ab"]
    find_model(wanted, peers, lambda: (address,), lambda text: None)
    assert all(other.exists() for other in others)


@pytest.mark.usefixtures("disk")
def test_a_model_that_another_process_uses_stays_and_the_worker_says_what_it_waits_for(
    wanted: NodeModel, peers: Peers, address: str, offering: Offering, node: Path, model: Path, other_model: Path
) -> None:
    elsewhere = offering(FileStore(other_model, m.FileSet.MODEL))
    another = dataclasses.replace(wanted, digest=Checkpoint(other_model, "tiny").digest())
    used = find_model(another, peers, few_times(elsewhere), lambda text: None)
    fetched_before(node, model, "mine")  # so that the disk is full
    said: list[str] = []
    asked: list[None] = []

    def models_at() -> Sequence[str]:
        asked.append(None)
        assert used.exists()
        if len(asked) == 3:
            end_the_others()
        assert len(asked) < 5
        return (address,)

    assert find_model(wanted, peers, models_at, said.append) == kept(node, wanted)
    refusal = f"the model, which was not fetched from {address}: {node}/models/{wanted.digest[:16]}.part has "
    assert [text.startswith(refusal) and "make room" in text for text in said[:2]] == [True, True]
    assert len(asked) == 3
    assert not used.exists()


# By its name ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_hub(wanted: NodeModel) -> NodeModel:
    return dataclasses.replace(wanted, hub="somebody/tiny")


def resolving(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    asked: list[str] = []

    def resolve(name: str, **_: object) -> Checkpoint:
        asked.append(name)
        return Checkpoint(folder, name)

    monkeypatch.setattr(node_models, "resolve", resolve)
    return asked


def test_a_model_of_the_hub_is_looked_for_there_before_others_are_asked(
    on_the_hub: NodeModel, peers: Peers, node: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolving(monkeypatch, model)
    said: list[str] = []
    assert find_model(on_the_hub, peers, tuple[str, ...], said.append) == model
    assert (asked, said) == (["somebody/tiny"], ["looking for somebody/tiny on the hub"])
    assert not kept(node, on_the_hub).exists()


def once_nobody_then(address: str) -> Callable[[], Sequence[str]]:
    places: Iterator[tuple[str, ...]] = iter([()])
    return lambda: next(places, (address,))


def test_another_model_behind_the_name_is_not_taken(
    on_the_hub: NodeModel, peers: Peers, address: str, node: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch,
    log: Callable[[], list[dict[str, object]]],
) -> None:  # fmt: skip
    asked = resolving(monkeypatch, other_model)
    assert find_model(on_the_hub, peers, once_nobody_then(address), lambda text: None) == kept(node, on_the_hub)
    assert asked == ["somebody/tiny"]
    assert "model_of_another_digest" in {line["event"] for line in log()}


def test_a_name_that_leads_nowhere_is_no_failure(
    on_the_hub: NodeModel, peers: Peers, address: str, node: Path, named: list[str]
) -> None:
    assert find_model(on_the_hub, peers, once_nobody_then(address), lambda text: None) == kept(node, on_the_hub)
    assert named == ["somebody/tiny"]
