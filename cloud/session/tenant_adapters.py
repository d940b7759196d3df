"""The adapters that tenants return: uploading, checking and plugging in. Each tenant reaches its own alone.

    <root>/<digest of the model, plan>/<tenant's fingerprint>/incoming/    files that are being uploaded
                                                             /plugged/     the adapter that this tenant may fetch

An adapter is hostile until `check_adapter` has accepted it. Then a few tokens are computed with it over the real span,
whose output must be finite. Only then it replaces the older adapter, as a whole folder. A refused adapter is removed,
and the older one stays. (A crash between the two renames of `new_folder` can leave no adapter; returning it again mends
that.)

All of it runs on a thread for files (`isthmus.cloud.session.file_threads`); only what the check computes over the span
has a turn on a compute thread. A lock for each tenant keeps other workers of the same home out.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.call_memory import CallShape, Pass
from isthmus.backbone.split.span import SpanInput
from isthmus.cloud.engine.executor import Executor
from isthmus.cloud.session.file_store import FileStore
from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import AdapterError, IsthmusError
from isthmus.common.files import disk_errors, locked, new_folder, sha256_of
from isthmus.emulator.package.intake import SPARE_BYTES, AdapterSummary, check_adapter
from isthmus.emulator.package.offered_files import adapter_prefix, belongs
from isthmus.emulator.package.plug_in import plug_in
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Tenant

R = TypeVar("R")

MAX_INCOMING = 2 * m.MAX_PUT_FILES
"""Most unfinished files of a tenant: those of two adapters."""

_PROBE = b"probe"
_PLUGGED = "plugged"
# Errors of a check or a probe that are no refusal; their texts may contain paths or values.
_FAILURES = (IsthmusError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class Compute(Protocol):
    """Has `run` computed in the tenant's turn: over so many token positions, within so many bytes of memory."""

    def __call__(self, run: Callable[[], R], positions: int, nbytes: int) -> R:
        """Returns what `run` returns, and raises what it raises."""


def at_once(run: Callable[[], R], positions: int, nbytes: int) -> R:
    """Compute at once on this thread, where nobody else computes."""
    return run()


class AdapterStore:
    """The folder with the adapters of all tenants. It outlives the worker.

    Args:
        root: the folder; made when it is needed.
        parts: the edge's parts of the model.
        digest: SHA-256 (hex) of the model.
        plan: who holds which layers.
        executor: the real span, for the probe.
        max_tokens: largest batch x sequence of one call, for the probe as well.
        attn_implementation: attention implementation of the span.
        packages: ids of the packages that the cloud offers. An adapter that was tuned on another one is refused.
    """

    def __init__(
        self,
        root: Path,
        parts: Path,
        digest: str,
        plan: SplitPlan,
        executor: Executor,
        *,
        max_tokens: int,
        attn_implementation: str,
        packages: Collection[str],
    ) -> None:
        self._root = root / f"{digest[:16]}-{plan.bottom}-{plan.top}"
        self._parts = parts
        self._plan = plan
        self._executor = executor
        self._max_tokens = max_tokens
        self._attn_implementation = attn_implementation
        self._packages = packages
        self._stores: dict[Path, tuple[tuple[int, int], FileStore]] = {}
        self.max_bytes = 2 * (parts / EDGE_FILE).stat().st_size + SPARE_BYTES
        """Most bytes of one adapter: twice the edge's weights, and `SPARE_BYTES`."""

    def of(self, tenant: Tenant) -> TenantAdapters:
        """The adapters of one tenant, and no other's."""
        return TenantAdapters(self, tenant, self._root / tenant.fingerprint.digest.hex())

    def check(self, adapter: Path, compute: Compute) -> AdapterSummary:
        """Check an adapter's files, then compute a few tokens with it over the real span. Raises what both raise."""
        summary = check_adapter(adapter, self._packages, self._parts, self._plan, max_bytes=self.max_bytes)
        span = partial(self._span, compute)
        plug_in(adapter, self._parts, self._plan, span, attn_implementation=self._attn_implementation)
        return summary

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Hold the lock of a tenant's folder."""
        with disk_errors(self._root):
            self._root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # adapters are the tenants' own
        with locked(folder):
            yield

    def files(self, folder: Path) -> FileStore:
        """The files of a plugged adapter; they are hashed again only where another adapter has replaced it."""
        status = folder.stat()
        stamp = status.st_ino, status.st_mtime_ns
        known = self._stores.get(folder)
        if known is None or known[0] != stamp:
            known = self._stores[folder] = stamp, FileStore(folder, m.FileSet.ADAPTER)
        return known[1]

    def held(self) -> dict[str, int]:
        """When each tenant's adapter was plugged in (Unix milliseconds), by the digest of the fingerprint (hex)."""
        with disk_errors(self._root):
            found = [folder / _PLUGGED for folder in self._root.iterdir()] if self._root.is_dir() else []
            return {each.parent.name: each.stat().st_mtime_ns // 10**6 for each in found if each.is_dir()}

    def shared_files(self) -> FileStore:
        """The plugged adapters of all tenants, for the cloud's other workers."""
        stores = {
            adapter_prefix(tenant, plugged_at): self.files(self._root / tenant / _PLUGGED)
            for tenant, plugged_at in self.held().items()
        }
        return FileStore.joined(stores)

    def take(self, fingerprint: str, plugged_at: int, files: Mapping[str, Path]) -> None:
        """Plug in a copy of what another worker has checked and plugged in, unless a newer one is here.

        Args:
            fingerprint: digest (hex) of the tenant's.
            plugged_at: when it was plugged in there, in Unix milliseconds.
            files: by name; they are moved.

        Raises:
            AdapterError: they are no adapter that fits the model. The older one stays.
            DiskError: they cannot be written.
        """
        folder = self._root / fingerprint
        with self.locked(folder), disk_errors(folder):
            if self.held().get(fingerprint, 0) >= plugged_at:
                return
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with new_folder(folder / _PLUGGED) as new:
                for name, path in files.items():
                    path.replace(new / name)
                check_adapter(new, self._packages, self._parts, self._plan, max_bytes=self.max_bytes)
                _stamp(new, plugged_at)
        log("adapter_copied", tenant=fingerprint, plugged_at=plugged_at)

    def _span(self, compute: Compute, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        tokens = hidden.shape[0] * hidden.shape[1]
        if tokens > self._max_tokens:
            raise AdapterError(
                f"a text of a few words becomes {tokens} tokens with this adapter, and the cloud takes "
                f"{self._max_tokens} in a call: tune a shorter prompt"
            )
        executor = self._executor
        nbytes = executor.memory.of(CallShape(hidden.shape[0], hidden.shape[1], Pass.FORWARD, masked=True))
        if nbytes > executor.compute_bytes:
            raise AdapterError(
                f"a text of a few words takes {nbytes} bytes of memory with this adapter, and the cloud computes "
                f"within {executor.compute_bytes:.0f}: tune a shorter prompt"
            )
        inputs = SpanInput(hidden, mask, positions)
        output = compute(lambda: executor.forward(_PROBE, 0, inputs, keep=False).hidden, tokens, nbytes)
        return output.to(hidden.device, hidden.dtype)


class TenantAdapters:
    """The adapters of one tenant. Made by `AdapterStore.of`.

    Attributes:
        tenant: Whose they are.
    """

    def __init__(self, store: AdapterStore, tenant: Tenant, folder: Path) -> None:
        self._store = store
        self.tenant = tenant
        self._folder = folder
        self._incoming = folder / "incoming"
        self._plugged = folder / _PLUGGED

    def files(self) -> FileStore | None:
        """The files of the adapter that is plugged in; None if there is none."""
        return self._store.files(self._plugged) if self._plugged.is_dir() else None

    def put(self, chunk: m.Put) -> m.PutReply | m.Status:
        """Append a chunk to its file where it continues what is here; answers how many bytes are here now."""
        entry = m.FileEntry(chunk.name, chunk.total, chunk.sha256)
        fault = self._fault((entry,))
        if fault is not None:
            return _refused(fault)
        try:
            with self._store.locked(self._folder):
                held = self._append(entry, chunk)
        except OSError as error:  # its text has a path of this machine
            log("adapter_not_stored", logging.ERROR, tenant=self.tenant.name, error=type(error).__name__)
            text = f"the cloud cannot store {chunk.name}: its disk may be full; its owner has a log of it"
            return m.Status.saying(m.StatusCode.INTERNAL, None, text)
        return m.PutReply(chunk.name, chunk.sha256, held)

    def plug_in(self, request: m.PlugIn, compute: Compute = at_once) -> m.Status:
        """Check the adapter that these files are, and replace the older one by it.

        Asking again is harmless: where the adapter is plugged in already, the answer says so.

        Args:
            request: the files.
            compute: has something computed over the span, for the check.
        """
        fault = self._fault(request.entries)
        if fault is not None:
            return _refused(fault)
        try:
            with self._store.locked(self._folder):
                plugged = self.files()
                if plugged is not None and set(plugged.listing().entries) == set(request.entries):
                    self._remove(request.entries)
                    return m.Status(m.StatusCode.OK, None, "this adapter is plugged in")
                fault = self._unfinished(request.entries)
                if fault is not None:
                    return _refused(fault)
                summary = self._install(request.entries, compute)
        except AdapterError as error:
            log("adapter_refused", logging.WARNING, tenant=self.tenant.name, reason=str(error))
            return _refused(str(error))
        except _FAILURES as error:
            log("plug_in_failed", logging.ERROR, tenant=self.tenant.name, error=type(error).__name__)
            text = f"the cloud failed to plug the adapter in ({type(error).__name__}); its owner has a log of it"
            return m.Status.saying(m.StatusCode.INTERNAL, None, text)
        log("adapter_plugged_in", tenant=self.tenant.name, method=summary.method, bytes=summary.size)
        tuned = "the model itself" if summary.package is None else f"the package {summary.package[:16]}"
        return m.Status.saying(
            m.StatusCode.OK,
            None,
            f"the adapter is plugged in: {summary.method}, {summary.n_params} weights, tuned on {tuned}",
        )

    def _fault(self, entries: Sequence[m.FileEntry]) -> str | None:
        """Why files of these names and sizes are refused; None where they are accepted."""
        for entry in entries:
            if not belongs(entry.name, m.FileSet.ADAPTER):
                return f"{entry.name!r} is no file of an adapter: return the folder that tuning wrote"
        size, most = sum(entry.size for entry in entries), self._store.max_bytes
        return f"{size} bytes are more than the {most} that an adapter may have: tune less" if size > most else None

    def _append(self, entry: m.FileEntry, chunk: m.Put) -> int:
        self._incoming.mkdir(parents=True, exist_ok=True)
        path = self._unfinished_path(entry)
        held = path.stat().st_size if path.exists() else 0
        if chunk.offset == held and (len(chunk.data) or not entry.size):
            self._make_room(path, entry.size)
            # A chunk that a full disk cuts off is continued where it was cut.
            with path.open("ab") as file:
                file.write(chunk.data)
            held += len(chunk.data)
        return held

    def _make_room(self, path: Path, size: int) -> None:
        """Remove the oldest unfinished files, so that abandoned ones do not pile up."""
        others = sorted(
            (other for other in self._incoming.iterdir() if other != path), key=lambda other: other.stat().st_mtime_ns
        )
        held = sum(other.stat().st_size for other in others)
        while others and (len(others) >= MAX_INCOMING or held + size > 2 * self._store.max_bytes):
            oldest = others.pop(0)
            held -= oldest.stat().st_size
            oldest.unlink()

    def _unfinished(self, entries: Sequence[m.FileEntry]) -> str | None:
        """Which of the files is not here whole, for the edge; None where all are."""
        for entry in entries:
            path = self._unfinished_path(entry)
            held = path.stat().st_size if path.exists() else 0
            if held != entry.size or not path.exists():
                return f"{entry.name} is not here whole ({held} of {entry.size} bytes): send the rest"
            if sha256_of(path) != entry.sha256:
                path.unlink()
                return f"{entry.name} arrived with another hash than was announced: return it again"
        return None

    def _install(self, entries: Sequence[m.FileEntry], compute: Compute) -> AdapterSummary:
        try:
            with new_folder(self._plugged) as new:
                for entry in entries:
                    (new / entry.name).hardlink_to(self._unfinished_path(entry))
                summary = self._store.check(new, compute)
                held = self._plugged.stat().st_mtime_ns // 10**6 if self._plugged.is_dir() else 0
                _stamp(new, max(time.time_ns() // 10**6, held + 1))  # newer than the last, whatever the clocks say
        except AdapterError:
            self._remove(entries)
            raise
        self._remove(entries)
        return summary

    def _remove(self, entries: Sequence[m.FileEntry]) -> None:
        with disk_errors(self._incoming):
            for entry in entries:
                self._unfinished_path(entry).unlink(missing_ok=True)

    def _unfinished_path(self, entry: m.FileEntry) -> Path:
        # Hash and size are in the name, so that nothing is appended to a whole file: after a crash it may be a link to
        # the plugged one.
        return self._incoming / f"{entry.name}.{entry.sha256.hex()}.{entry.size}.part"


def _stamp(folder: Path, plugged_at: int) -> None:
    """Set when an adapter was plugged in, in Unix milliseconds: it is copied to workers that have an older one."""
    os.utime(folder, ns=(plugged_at * 10**6,) * 2)


def _refused(text: str) -> m.Status:
    return m.Status.saying(m.StatusCode.BAD_REQUEST, None, text)
