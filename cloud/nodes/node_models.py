"""The model on a node: on a path that nodes share, in the cache, from the hub, or from another machine of the cloud.

A model that was fetched stays, for the workers to come. Where another one does not fit beside it, it goes, unless a
process uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from rich.console import Console

from isthmus.backbone.checkpoints.sources import Checkpoint, resolve
from isthmus.cloud.nodes.peers import Peers
from isthmus.cloud.nodes.worker_home import node_home
from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import CheckpointError, IsthmusError
from isthmus.common.files import disk_errors, locked, open_lock
from isthmus.common.ownership import private_folder
from isthmus.protocol.messages import FileSet

LOOK_SECONDS, PAUSE_SECONDS = 0.2, 1.0
"""Between two looks at which other workers have the model, and after a fetch that has failed."""
_PART = ".part"
_IN_USE: list[contextlib.ExitStack] = []
"""Locks on the fetched models that this process uses, for as long as it lives: it loads them, and hands them out."""


@dataclass(frozen=True, slots=True)
class NodeModel:
    """A model that a worker looks for.

    Attributes:
        name: what edges get.
        path: folder where the cloud's owner has it, and where this node may have it as well.
        digest: SHA-256 (hex) of its configuration and tensors.
        hub: its name on the hub, with its revision; "" where it is not from there.
    """

    name: str
    path: str
    digest: str
    hub: str


def find_model(
    model: NodeModel, peers: Peers, models_at: Callable[[], Sequence[str]], say: Callable[[str], None]
) -> Path:
    """The folder of a model on this node, with the digest that it must have. Takes as long as it takes.

    One that was fetched is kept from being removed while this process lives.

    Args:
        model: which.
        peers: fetches from other workers.
        models_at: tells the addresses of workers that have it now.
        say: told what is waited for.

    Raises:
        CheckpointError: the model on the path, or under the name, is another one.
    """
    own = Path(model.path)
    if (own / "config.json").is_file():
        say("checking the model")
        found = Checkpoint(own, model.name)
        if found.digest() == model.digest:
            return own
        raise CheckpointError(
            f"{own} on this node has the digest {found.digest()[:16]}, and the cloud serves {model.digest[:16]}: copy "
            "the model anew, or remove it there, and it is fetched"
        )
    kept = node_home() / "models" / model.digest[:16]
    private_folder(kept.parent)
    with contextlib.ExitStack() as use:
        use.enter_context(_using(kept))
        with locked(kept):
            if kept.is_dir():
                say("checking the model")
                if Checkpoint(kept, model.name).digest() == model.digest:
                    _IN_USE.append(use.pop_all())
                    return kept
                log("kept_model_damaged", logging.WARNING, folder=str(kept))
                shutil.rmtree(kept)
            if model.hub:
                found_there = _named(model, say)
                if found_there is not None:
                    return found_there
            fetched = _fetched(model, kept, peers, models_at, say)
            _IN_USE.append(use.pop_all())
            return fetched


@contextlib.contextmanager
def _using(kept: Path) -> Iterator[None]:
    """Keep a model from being removed. Waits while it is."""
    with _open_use(kept) as use:
        fcntl.flock(use, fcntl.LOCK_SH)
        os.utime(use.fileno())
        yield


def _open_use(kept: Path) -> IO[str]:
    with disk_errors(kept):
        return open_lock(_use_of(kept))


def _use_of(kept: Path) -> Path:
    """The file that whoever uses a model has a lock on; it tells as well when a process began to use it last."""
    return kept.with_name(f".{kept.name}.use")


def _used_at(kept: Path) -> float:
    path = _use_of(kept)
    return path.stat().st_mtime if path.exists() else 0.0


def _remove_another(kept: Path, lacking: int) -> bool:
    """Remove the model beside this one that was used least recently, of those that no process uses, or its part.

    Returns whether there was one; False, too, where all that no process uses has fewer bytes than are lacking.
    """
    names = {path.name.removesuffix(_PART) for path in kept.parent.iterdir() if path.is_dir()} - {kept.name}
    others = [kept.with_name(name) for name in names if re.fullmatch("[0-9a-f]{16}", name)]
    others = [other for other in others if not _is_used(other)]
    if sum(map(_bytes_of, others)) < lacking:
        return False
    return any(_removed(other) for other in sorted(others, key=_used_at))


def _is_used(kept: Path) -> bool:
    """Whether a process uses a model; it may be so a moment later."""
    if not _use_of(kept).exists():  # and to open it would make it, as if the model had been used now
        return False
    with _open_use(kept) as use:
        try:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _bytes_of(kept: Path) -> int:
    """Of a model and its part."""
    folders = (kept, kept.with_name(f"{kept.name}{_PART}"))
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def _removed(kept: Path) -> bool:
    """Remove a model and its part; False where a process uses it, or it cannot be removed."""
    part = kept.with_name(f"{kept.name}{_PART}")
    with _open_use(kept) as use:
        try:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(part, ignore_errors=True)
        if kept.is_dir() and not part.exists():
            with disk_errors(kept):
                kept.rename(part)  # a crash in between leaves the part of a model, not half of one that looks whole
            shutil.rmtree(part, ignore_errors=True)
    gone = not kept.exists() and not part.exists()
    log("kept_model_removed" if gone else "kept_model_not_removed", logging.WARNING, folder=str(kept))
    return gone


def _named(model: NodeModel, say: Callable[[str], None]) -> Path | None:
    """What the hub has of that name; None where it cannot be had."""
    say(f"looking for {model.hub} on the hub")
    try:
        found = resolve(model.hub, console=Console(quiet=True))
    except IsthmusError as error:
        log("model_not_found_by_name", logging.WARNING, model=model.hub, error=str(error))
        return None
    if found.digest() != model.digest:
        log("model_of_another_digest", logging.WARNING, model=model.hub, digest=found.digest()[:16])
        return None
    return found.folder


def _fetched(
    model: NodeModel, kept: Path, peers: Peers, models_at: Callable[[], Sequence[str]], say: Callable[[str], None]
) -> Path:
    part = kept.with_name(f"{kept.name}{_PART}")
    private_folder(part)
    make_room = partial(_remove_another, kept)
    logged: dict[str, str] = {}  # by address: a worker that hashes a large model refuses for minutes
    while True:
        addresses = models_at()
        if not addresses:
            say(f"waiting for a worker that has the model: it is not at {model.path} on this node")
            time.sleep(LOOK_SECONDS)
            continue
        for address in addresses:
            try:
                told = _progress(address, say)
                asyncio.run(peers.fetch(address, FileSet.MODEL, part, told, make_room))
            except IsthmusError as error:
                if logged.get(address) != str(error):
                    log("model_not_fetched", logging.WARNING, at=address, error=str(error))
                logged[address] = str(error)
                say(f"the model, which was not fetched from {address}: {error}")
                time.sleep(PAUSE_SECONDS)
                continue
            came = Checkpoint(part, model.name).digest()
            if came != model.digest:
                shutil.rmtree(part, ignore_errors=True)
                raise CheckpointError(f"the model that came from {address} has the digest {came[:16]}: it was damaged")
            part.rename(kept)
            return kept


def _progress(address: str, say: Callable[[str], None]) -> Callable[[int, int], None]:
    def told(done: int, total: int) -> None:
        say(f"fetching the model from {address}: {done / 2**20:.0f} of {total / 2**20:.0f} MiB")

    return told
