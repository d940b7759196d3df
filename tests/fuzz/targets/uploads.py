"""An adapter on its way in: chunks of files, as a tenant sends them, until they are plugged in."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from fuzz.target import Cursor, Target, block, scratch
from fuzz.targets.messages import LIMITS, canonical, packed
from support.protocol.wire import TENANT

from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.session.tenant_adapters import MAX_INCOMING, AdapterStore, Compute, TenantAdapters, at_once
from isthmus.common.errors import AdapterError, RemoteProtocolError
from isthmus.emulator.package.intake import AdapterSummary
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import unpack

BOUND = 1 << 10


class _Store(AdapterStore):
    """A store that takes what begins with a brace, so that what is around the check is fuzzed without a model."""

    def check(self, adapter: Path, compute: Compute = at_once) -> AdapterSummary:
        files = list(adapter.iterdir())
        if not all(path.read_bytes().startswith(b"{") for path in files):
            raise AdapterError("it is no adapter")
        return AdapterSummary("lora", 1, sum(path.stat().st_size for path in files), None)


@functools.cache
def _home() -> Path:
    folder = scratch()
    (folder / EDGE_FILE).write_bytes(b"")
    return folder


def _run(data: bytes) -> None:
    root, script = _home() / "adapters", Cursor(data)
    shutil.rmtree(root, ignore_errors=True)
    unused: Any = None
    store = _Store(
        root, _home(), "00" * 32, SplitPlan(6, 1, 1), unused, max_tokens=1, attn_implementation="sdpa", packages=()
    )
    store.max_bytes = BOUND
    mine = store.of(TENANT)
    for _ in range(24):
        if not script:
            break
        with contextlib.suppress(RemoteProtocolError):
            part = Cursor(script.block())
            message = unpack(canonical(part.block()), part.rest(), LIMITS)
            if isinstance(message, m.Put | m.PlugIn):
                _answer(mine, message)
                _check(root)


def _answer(mine: TenantAdapters, message: m.Put | m.PlugIn) -> None:
    if isinstance(message, m.Put):
        reply = mine.put(message)
        if isinstance(reply, m.PutReply) and reply.held > max(message.total, BOUND):
            raise AssertionError(f"{reply.held} bytes are held of a file of {message.total}")
        return
    status = mine.plug_in(message)
    if status.code == m.StatusCode.INTERNAL:
        raise AssertionError(f"plugging in failed: {status.message}")
    if status.code == m.StatusCode.OK:
        shelf = mine.files()
        if shelf is None or set(shelf.listing().entries) != set(message.entries):
            raise AssertionError("another adapter is plugged in than was asked for")


def _check(root: Path) -> None:
    incoming = [path for path in root.rglob("incoming/*") if path.is_file()]
    held = sum(path.stat().st_size for path in incoming)
    if len(incoming) > MAX_INCOMING or held > 2 * BOUND:
        raise AssertionError(f"{len(incoming)} unfinished files of {held} bytes are kept")
    strange = {path.name for path in _home().iterdir()} - {EDGE_FILE, "adapters"}
    if strange:
        raise AssertionError(f"{strange} were written outside the folder")


def _put(name: str, data: bytes, total: int | None = None, offset: int = 0, digest: bytes | None = None) -> m.Put:
    return m.Put(name, offset, len(data) if total is None else total, digest or sha256(data).digest(), data)


def _script(*messages: m.Message) -> bytes:
    return b"".join(block(packed(message)) for message in messages)


def _seeds() -> Iterator[bytes]:
    puts = (_put("adapter_config.json", b"{}"), _put("adapter_model.safetensors", b"{tensors"))
    entries = tuple(m.FileEntry(put.name, put.total, put.sha256) for put in puts)
    plug = m.PlugIn(entries)
    yield _script(*puts, plug, plug, *puts, plug)
    yield _script(plug)
    for wrong in (_put("adapter_config.json", b"{}", digest=bytes(32)), _put("adapter_config.json", b"[]")):
        yield _script(wrong, m.PlugIn((m.FileEntry(wrong.name, wrong.total, wrong.sha256),)))
    yield _script(_put("strange", b"{}"))
    yield _script(_put("README.md", b"", 1 << 20))
    yield _script(*(_put("README.md", b"x" * 200, 1000, digest=bytes((each,)) * 32) for each in range(20)))
    half = _put("README.md", b"{abc", 8, 0, bytes(32))
    yield _script(half, half, _put("README.md", b"defg", 8, 4, bytes(32)), _put("README.md", b"", 8, 0, bytes(32)))
    yield _script(_put("README.md", b""), m.PlugIn((m.FileEntry("README.md", 0, _put("a", b"").sha256),)))


TARGET = Target(_run, _seeds, [TenantAdapters], floor=0.85, max_len=4096, words=[b"adapter_config.json", b"README.md"])
