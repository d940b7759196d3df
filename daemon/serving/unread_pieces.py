"""What answers hold that nobody has read yet.

An answer's turn is over once it is computed, however slowly its client reads: what is left waits here. All that waits
has one bound. Beyond it, the request that holds the most of the owner who holds the most is ended, so that whoever
reads slowly takes nothing of others.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from isthmus.daemon.serving.answer_forms import Piece
from isthmus.daemon.workers.asking import WorkerError

MOST_UNREAD = 64 << 20
"""Bytes of memory, about, that may wait for all clients."""


class Unread:
    """All that waits, of all requests. For one event loop.

    Args:
        most: Its bytes.
    """

    def __init__(self, most: int = MOST_UNREAD) -> None:
        self.most = most
        self._requests: list[UnreadPieces] = []

    def request(self, owner: str) -> UnreadPieces:
        """The pieces of another request of an owner; to be closed at its end."""
        made = UnreadPieces(self, owner)
        self._requests.append(made)
        return made

    def forget(self, request: UnreadPieces) -> None:
        """Count a request's pieces no longer."""
        self._requests.remove(request)

    def make_room(self) -> None:
        """End requests until what waits is no more than may."""
        while sum(request.bytes for request in self._requests) > self.most:
            owners: Counter[str] = Counter()
            for request in self._requests:
                owners[request.owner] += request.bytes
            ((owner, _),) = owners.most_common(1)
            largest = max((each for each in self._requests if each.owner == owner), key=lambda each: each.bytes)
            mib = largest.bytes / 2**20
            largest.drop(WorkerError(f"the answer was read too slowly: {mib:.1f} MiB of it wait; read it faster"))


class UnreadPieces:
    """The pieces of a request that were not read yet.

    Attributes:
        owner: Whose request it is.
        bytes: What they take, about.
        wanted: Whether the request has not ended, so that its answers are still to be computed.
    """

    def __init__(self, all_of_them: Unread, owner: str) -> None:
        self.owner, self.bytes = owner, 0
        self.wanted = True
        self._all = all_of_them
        self._pieces: asyncio.Queue[tuple[Piece | Exception | None, int]] = asyncio.Queue()

    def put(self, piece: Piece) -> None:
        """Take a piece, unless the request has ended."""
        if self.wanted:
            size = _size(piece)
            self._pieces.put_nowait((piece, size))
            self.bytes += size
            self._all.make_room()

    def end(self, error: Exception | None = None) -> None:
        """Nothing follows but perhaps an error."""
        if self.wanted:
            self.wanted = False
            self._pieces.put_nowait((error, 0))

    def drop(self, error: Exception) -> None:
        """Drop what waits, and let whoever reads have an error."""
        while not self._pieces.empty():
            self._pieces.get_nowait()
        self.bytes, self.wanted = 0, False
        self._pieces.put_nowait((error, 0))

    async def next(self) -> Piece | None:
        """The next piece; None at the end, and nothing after that. Raises the error that ends it."""
        piece, size = await self._pieces.get()
        self.bytes -= size
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self) -> None:
        """Nobody reads any more."""
        self._all.forget(self)


def _size(piece: Piece) -> int:
    """Bytes of memory that a piece takes, about: its texts, and Python's objects."""
    chances = [*piece.chances, *(each for each in piece.prompt_chances if each is not None)]
    shown = len(chances) + sum(len(each.top) for each in chances)
    return 400 + 4 * len(piece.text) + 40 * len(piece.tokens) + 300 * shown + 8 * len(piece.prompt_chances)
