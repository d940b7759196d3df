"""A random sample of calls, with inputs and answers, that can be computed again elsewhere.

Each call draws a random number after its answer came, and the calls with the lowest ones that fit the budget are kept.
So the cloud cannot know which calls are kept, and each has the same chance, however many there are. Once a call has
been dropped for want of room, none with a higher number is taken any more.

    RUN/audit/NUMBER-SESSION-N.call   the call: its sites and lease if any, the question, the answer
    RUN/audit/limit                   the lowest number that was dropped
"""

from __future__ import annotations

import heapq
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.common.errors import ConfigError, RemoteProtocolError, TranscriptError
from isthmus.common.files import disk_errors, write_atomic
from isthmus.common.ownership import private_folder
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.limits import GIB, Limits

AUDIT_FOLDER = "audit"
_LIMIT_FILE = "limit"
_SUFFIX = ".call"
_SIZES = struct.Struct("!IQ")  # of a header and a body
_NUMBERS = 1 << 64
_LIMITS = Limits(max_message_bytes=4 * GIB)


@dataclass(frozen=True, slots=True)
class SampledCall:
    """A call that was kept.

    Attributes:
        session: The session's id.
        exchange: Its number in the session's transcript.
        adapters: The list of sites and the lease that it names; empty for none.
        question: What can be asked of anybody with the model: a backward has its forward's inputs with it.
        answer: What came back.
    """

    session: bytes
    exchange: int
    adapters: tuple[m.Sites | m.Lease, ...]
    question: m.Forward | m.Backward
    answer: m.ForwardReply | m.BackwardReply


class AuditSample:
    """Keeps a sample in a folder. Several links may share one.

    Args:
        folder: Where; made, with mode 0700, where it is not there. Files have mode 0600: they hold activations.
        budget: Bytes of all files.
        resume: Whether what is there is of the same run; else it is removed.
        random: A cryptographic source of bytes.

    Raises:
        DiskError: It cannot be written.
        TranscriptError: A file of it is none of a sample.
    """

    def __init__(
        self, folder: Path, budget: int, *, resume: bool = False, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._folder, self._budget, self._random = private_folder(folder), budget, random
        self._lock = threading.Lock()
        self._kept: list[tuple[int, int, Path]] = []  # a heap of negated numbers, sizes and files: the highest first
        self._limit = _NUMBERS
        with disk_errors(folder):
            for path in sorted(folder.iterdir()):
                if not resume:
                    path.unlink()
                elif path.suffix == _SUFFIX:
                    number = _number(path, path.name.partition("-")[0])
                    heapq.heappush(self._kept, (-number, path.stat().st_size, path))
                elif path.name == _LIMIT_FILE:
                    self._limit = _number(path, path.read_text(encoding="ascii", errors="replace"))

    def offer(
        self,
        session: bytes,
        exchange: int,
        call: m.Message,
        answer: m.Message,
        whole: Callable[[m.Message], m.Message],
        adapters: Sequence[bytes] = (),
    ) -> None:
        """A call was answered: keep it, or do not.

        Args:
            session: The session's id.
            exchange: Its number in the session's transcript.
            call, answer: What was asked, and what came back.
            whole: Makes of the call one that needs nothing of its session.
            adapters: The list of sites and the lease that it names, as `packed` has written them.
        """
        if not isinstance(call, m.Forward | m.Backward):  # a decode call depends on a cache
            return
        number = int.from_bytes(self._random(8))
        with self._lock:
            if number >= self._limit:
                return
            data = b"".join((*adapters, packed(whole(call)), packed(answer)))
            path = self._folder / f"{number:016x}-{session.hex()}-{exchange}{_SUFFIX}"
            write_atomic(path, data, 0o600)
            heapq.heappush(self._kept, (-number, len(data), path))
            self._drop()

    def _drop(self) -> None:
        """Drop the highest numbers until the rest fits."""
        while sum(size for _, size, _ in self._kept) > self._budget:
            negated, _, path = heapq.heappop(self._kept)
            self._limit = -negated
            write_atomic(self._folder / _LIMIT_FILE, f"{self._limit:016x}".encode(), 0o600)
            path.unlink()


def _number(path: Path, text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        raise TranscriptError(f"{path} is none of a sample of calls: remove it, or begin with another --out") from None


def read_sample(folder: Path) -> Iterator[SampledCall]:
    """The calls of a sample, those with the lowest numbers first.

    Raises:
        ConfigError: There is no sample.
        TranscriptError: A file is none.
    """
    paths = sorted(folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []
    if not paths:
        raise ConfigError(f"{folder} has no calls to replay: train with --audit-sample MIB")
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}): it is a call of a run's sample") from error
        try:
            _, session, exchange = path.stem.split("-")
            call = _call(bytes.fromhex(session), int(exchange), _unpacked(data))
        except (RemoteProtocolError, struct.error, ValueError) as error:
            raise TranscriptError(f"{path} is no sampled call: {error}") from error
        yield call


def _call(session: bytes, exchange: int, messages: Sequence[m.Message]) -> SampledCall:
    *before, question, answer = messages
    adapters = tuple(each for each in before if isinstance(each, m.Sites | m.Lease))
    if len(adapters) != len(before):
        raise ValueError("what stands before the question is no adapter")
    if not isinstance(question, m.Forward | m.Backward) or not isinstance(answer, m.ForwardReply | m.BackwardReply):
        raise ValueError(f"{type(question).__name__} and {type(answer).__name__} are no call and its answer")
    return SampledCall(session, exchange, adapters, question, answer)


def packed(message: m.Message) -> bytes:
    """A message as a file of the sample has it: the sizes of header and body, and both."""
    header, body = pack(message)
    return b"".join((_SIZES.pack(len(header), sum(map(len, body))), header, *body))


def _unpacked(data: bytes) -> Sequence[m.Message]:
    messages, at = [], 0
    while at < len(data):
        header, body = _SIZES.unpack_from(data, at)
        at += _SIZES.size
        messages.append(unpack(data[at : at + header], bytearray(data[at + header : at + header + body]), _LIMITS))
        at += header + body
    return messages
