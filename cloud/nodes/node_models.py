"""The model on a node: on a path that nodes share, in the cache, from the hub, or from another machine of the cloud."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from isthmus.backbone.checkpoints.sources import Checkpoint, resolve
from isthmus.cloud.nodes.peers import Peers
from isthmus.cloud.nodes.worker_home import node_home
from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import CheckpointError, IsthmusError
from isthmus.common.files import locked
from isthmus.common.ownership import private_folder
from isthmus.protocol.messages import FileSet

LOOK_SECONDS, PAUSE_SECONDS = 0.2, 1.0
"""Between two looks at which other workers have the model, and after a fetch that has failed."""


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
    with locked(kept):
        if kept.is_dir():
            say("checking the model")
            if Checkpoint(kept, model.name).digest() == model.digest:
                return kept
            log("kept_model_damaged", logging.WARNING, folder=str(kept))
            shutil.rmtree(kept)
        if model.hub:
            found_there = _named(model, say)
            if found_there is not None:
                return found_there
        return _fetched(model, kept, peers, models_at, say)


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
    part = kept.with_name(f"{kept.name}.part")
    private_folder(part)
    logged: dict[str, str] = {}  # by address: a worker that hashes a large model refuses for minutes
    while True:
        addresses = models_at()
        if not addresses:
            say(f"waiting for a worker that has the model: it is not at {model.path} on this node")
            time.sleep(LOOK_SECONDS)
            continue
        for address in addresses:
            try:
                asyncio.run(peers.fetch(address, FileSet.MODEL, part, told=_progress(address, say)))
            except IsthmusError as error:
                if logged.get(address) != str(error):
                    log("model_not_fetched", logging.WARNING, at=address, error=str(error))
                logged[address] = str(error)
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
