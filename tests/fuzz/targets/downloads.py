"""What the cloud answers to an edge that fetches files: lists, and chunks, until the folder is whole."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from fuzz.target import Cursor, Target, block, scratch
from fuzz.targets.messages import LIMITS, canonical, packed
from support.protocol.wire import TENANT, session_info

from isthmus.backbone.split.edge_parts import Weights
from isthmus.common.errors import IsthmusError, RemoteProtocolError
from isthmus.edge.client import fetch
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import unpack
from isthmus.protocol.secure.keys import Fingerprint

INFO = session_info(TENANT, bytes(16))
_PARTS = {"config.json": b"{}", "edge.safetensors": b"weights"}


class _OverError(Exception):
    """The script is at its end."""


@functools.cache
def _cache() -> Path:
    return scratch() / "cache"


def _run(data: bytes) -> None:
    script, came = Cursor(data), 0
    shutil.rmtree(_cache(), ignore_errors=True)
    _cache().mkdir()

    def ask(kind: type[Any], question: m.Message, *, answer_bytes: int = 0) -> Any:
        nonlocal came
        if not script:
            raise _OverError
        part = Cursor(script.block())
        answer = unpack(canonical(part.block()), part.rest(), LIMITS)
        if not isinstance(answer, kind):
            raise RemoteProtocolError("the link refuses an answer of another kind")
        came += len(answer.data) if isinstance(answer, m.Blob) else 0
        return answer

    cloud: Any = SimpleNamespace(info=INFO, ask=ask)
    package = script.number() & 1
    with (
        contextlib.suppress(IsthmusError, _OverError),
        patch.dict(os.environ, ISTHMUS_CACHE=str(_cache())),
        # How much a configuration weighs takes transformers to read it, and is bounded elsewhere.
        patch.object(fetch, "_weights", lambda *_: Weights(1 << 20, 1 << 20)),
        patch.object(fetch, "transfer_bar", lambda *_: contextlib.nullcontext(lambda _: None)),
    ):
        if package:
            fetch.fetch_package(cloud, _cache() / "out", Fingerprint(bytes(32)))
        else:
            fetch.fetch_parts(cloud, Fingerprint(bytes(32)))
    files = [path for path in _cache().parent.rglob("*") if path.is_file()]
    if sum(path.stat().st_size for path in files) > came:
        raise AssertionError("more bytes are on the disk than came")
    strange = [path for path in files if not path.is_relative_to(_cache())]
    if strange or any(path.suffix == ".py" for path in files):
        raise AssertionError(f"{strange} were written outside the cache")


def _script(*messages: m.Message, package: bool = False) -> bytes:
    return bytes((package,)) + b"".join(block(packed(message)) for message in messages)


def _files(files: dict[str, bytes]) -> tuple[m.FileList, list[m.Blob]]:
    entries = tuple(m.FileEntry(name, len(data), sha256(data).digest()) for name, data in files.items())
    blobs = [m.Blob(each.name, 0, each.size, each.sha256, files[each.name]) for each in entries]
    return m.FileList(entries), blobs


def _seeds() -> Iterator[bytes]:
    listing, blobs = _files(_PARTS)
    yield _script(listing, *blobs)
    yield _script(listing, *blobs, package=True)
    first = blobs[1]
    halves = (m.Blob(first.name, at, first.total, first.sha256, first.data[at : at + 4]) for at in (0, 4))
    yield _script(listing, blobs[0], *halves)
    yield _script(listing, blobs[1])
    yield _script(listing, m.Blob("config.json", 0, 2, listing.entries[0].sha256, b"[]"))
    yield _script(_files({"tokenizer.py": b"import os"})[0])
    yield _script(_files({"vocab.x" * 15: b"x"})[0], *_files({"vocab.x" * 15: b"x"})[1])
    yield _script(m.FileList((m.FileEntry("config.json", (1 << 64) - 1, bytes(32)),)))
    yield _script(m.Status(m.StatusCode.OK, None, ""))


TARGET = Target(
    _run,
    _seeds,
    [
        fetch.fetch_parts,
        fetch.fetch_package,
        fetch._cached,
        fetch._listing,
        fetch._complete,
        fetch._fetch,
        fetch._remove_others,
    ],
    floor=0.7,
    max_len=2048,
    words=[b"config.json", b"tokenizer", b"vocab.", b"chat_template", b".jinja", b"manifest.json"],
)
