"""A random sample of calls, with inputs and answers, that can be computed again elsewhere.

Each call draws a random number after its answer came, and those with the lowest are kept: as many as the budget has
room for if all were as large as the largest. So the cloud cannot know which calls are kept, and each has the same
chance, however many there are and however large it is. A call that is larger than the whole budget is counted and never
kept.

    RUN/audit/NUMBER-SESSION-N.call   the call: its sites and lease if any, the question, the answer
    RUN/audit/sample.json             the lowest number that was dropped, the largest call, those that were too large
"""

from __future__ import annotations

import heapq
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from isthmus.common.errors import ConfigError, RemoteProtocolError, TranscriptError
from isthmus.common.files import disk_errors, write_atomic
from isthmus.common.ownership import private_folder
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack, unpack
from isthmus.protocol.limits import GIB, Buffer, Limits

AUDIT_FOLDER = "audit"
_STATE_FILE = "sample.json"
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


@dataclass(slots=True)
class _State:
    """What a sample has seen: the lowest number that was dropped, bytes of the largest call, calls above the budget."""

    limit: int = _NUMBERS
    largest: int = 1  # that of a call, once there is one
    too_large: int = 0


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
        self._kept: list[tuple[int, Path]] = []  # a heap of negated numbers and files: the highest first
        self._state = _read_state(folder) if resume else _State()
        with disk_errors(folder):
            for path in sorted(folder.iterdir()):
                if not resume:
                    path.unlink()
                elif path.suffix == _SUFFIX:
                    heapq.heappush(self._kept, (-_number(path), path))
            self._drop()  # where the budget is smaller now

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
        parts = [*adapters, *_parts(whole(call)), *_parts(answer)]
        size, number = sum(map(len, parts)), int.from_bytes(self._random(8))
        with self._lock:
            state = self._state
            if size > self._budget:
                state.too_large += 1
                self._note()
                return
            if size > state.largest:
                state.largest = size
                self._note()
                self._drop()
            if number >= state.limit:
                return
            path = self._folder / f"{number:016x}-{session.hex()}-{exchange}{_SUFFIX}"
            write_atomic(path, b"".join(parts), 0o600)
            heapq.heappush(self._kept, (-number, path))
            self._drop()

    def _drop(self) -> None:
        """Drop the highest numbers until there is room for as many calls as large as the largest."""
        while len(self._kept) > self._budget // self._state.largest:
            negated, path = heapq.heappop(self._kept)
            self._state.limit = -negated
            self._note()
            path.unlink()

    def _note(self) -> None:
        write_atomic(self._folder / _STATE_FILE, json.dumps(asdict(self._state)).encode(), 0o600)


def _number(path: Path) -> int:
    try:
        return int(path.name.partition("-")[0], 16)
    except ValueError:
        raise _foreign(path) from None


def _read_state(folder: Path) -> _State:
    path = folder / _STATE_FILE
    try:
        state = _State(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return _State()
    except (OSError, ValueError, TypeError, RecursionError):
        raise _foreign(path) from None
    if any(type(each) is not int or each < 0 for each in asdict(state).values()) or not state.largest:
        raise _foreign(path)
    return state


def _foreign(path: Path) -> TranscriptError:
    return TranscriptError(f"{path} is none of a sample of calls: remove it, or begin with another --out")


def too_large(folder: Path) -> int:
    """How many calls of the run were larger than the whole budget of its sample.

    Raises:
        TranscriptError: The file that says it is none.
    """
    return _read_state(folder).too_large


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
    return b"".join(_parts(message))


def _parts(message: m.Message) -> Sequence[Buffer]:
    header, body = pack(message)
    return _SIZES.pack(len(header), sum(map(len, body))), header, *body


def _unpacked(data: bytes) -> Sequence[m.Message]:
    messages, at = [], 0
    while at < len(data):
        header, body = _SIZES.unpack_from(data, at)
        at += _SIZES.size
        messages.append(unpack(data[at : at + header], bytearray(data[at + header : at + header + body]), _LIMITS))
        at += header + body
    return messages
