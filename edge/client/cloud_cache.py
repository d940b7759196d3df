"""The cache of the cloud's layers, as the edge knows it: how long it is, and what to send where it is lost.

Every call says after how many positions its tokens come. So cropping needs no message, a repeated call has the effect
of one, and a cloud that has lost the cache, or a new session that never had it, says how much it has; then what is
missing goes along.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.common.errors import OverQuotaError, RefusedError, RemoteProtocolError, UnsupportedCallError
from isthmus.edge.client.hidden_history import HiddenHistory
from isthmus.edge.client.questions import Attempt, Question
from isthmus.edge.client.session_keeper import SessionKeeper
from isthmus.edge.client.site_answerer import SentLists
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import body_bytes
from isthmus.protocol.session import edge_limits
from isthmus.protocol.tensor_codecs import Role, codec_id, decode_as, encode, encode_mask, encode_positions

MAX_LOSSES = 8
"""Times that the cloud may lose a cache in one call. Each costs a replay of the whole text, so a cloud that loses it
more often than a restart, a cut and some evictions in a row explain is of no use."""


class CloudCaches:
    """The caches that a link has in its cloud.

    Args:
        keeper: The link's session.
        codecs: Returns how tensors cross.
        numbers: Numbers of calls.
        lists: What the cloud was sent of leased adapters.

    Attributes:
        exact: Whether new caches are computed exactly, see `isthmus.backbone.decoding.decode_pass`.
        replayed: Token positions that were sent again so far.
    """

    def __init__(
        self, keeper: SessionKeeper, codecs: Callable[[], WireCodecs], numbers: Iterator[int], lists: SentLists
    ) -> None:
        self.exact = False
        self.replayed = 0
        self.keeper, self.codecs, self.numbers, self.lists = keeper, codecs, numbers, lists
        self._free = list(range(m.MAX_CACHES))  # a heap is not needed: the lowest number is taken

    def new(self) -> CloudCache:
        """An empty cache. Its number is free again when nothing refers to it any more.

        Raises:
            UnsupportedCallError: There are too many at a time.
        """
        if not self._free:
            raise UnsupportedCallError(
                f"a link has {m.MAX_CACHES} caches at a time: release those of texts that are finished"
            )
        number = min(self._free)
        self._free.remove(number)
        cache = CloudCache(self, number, exact=self.exact)
        weakref.finalize(cache, self._free.append, number)
        return cache


class CloudCache:
    """One cache; see `isthmus.backbone.split.split_cache.RemoteCache`. Made by `CloudCaches.new`."""

    def __init__(self, caches: CloudCaches, number: int, *, exact: bool) -> None:
        self.version: Any = None
        self._caches, self._number, self._exact = caches, number, exact
        self._history = HiddenHistory()
        self._blocks: list[int] = []  # exact: how many tokens attended at once, of all that are there
        self._rows: Tensor | None = None  # those that the next call goes on with
        self._valid = 0  # token positions that the cloud has, if it has lost none, and that are good

    @property
    def length(self) -> int:
        """Token positions."""
        return self._history.length

    @property
    def rows(self) -> int:
        """Sequences."""
        return self._history.rows

    def extend(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, sites: Sequence[Site] = ()
    ) -> Tensor:
        """The span's output for the next tokens.

        Raises:
            IsthmusError: Of whatever kind fits what the cloud answered; then the tokens are not in the cache.
        """
        start, length = self.length, hidden.shape[1]
        if self.rows and len(hidden) != self.rows:
            raise UnsupportedCallError(f"{len(hidden)} sequences do not fit a cache of {self.rows}")
        if attention_mask is not None and attention_mask.shape[1] != start + length:
            raise UnsupportedCallError(
                f"an attention mask of {attention_mask.shape[1]} tokens does not fit {start} in the cache and {length} "
                "more: pass that of all"
            )
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        try:
            self._history.append(hidden, position_ids)
            if self._exact:
                self._blocks += _blocks(length, 1 if start else m.MAX_BLOCK)
            output = self._sent(start, hidden.shape[2], mask, SiteCall(sites, keep=False) if sites else None)
        except BaseException:
            self.crop(start)
            raise
        return output.to(device=hidden.device, dtype=hidden.dtype)

    def crop(self, length: int) -> None:
        """Forget what comes after so many positions."""
        self._history.crop(length)
        self._valid = min(self._valid, length)
        if not length:
            self._rows = None
        left = length
        for at, size in enumerate(self._blocks):
            if size >= left:
                if 0 < left < size:
                    self._valid = 0  # a shorter block attends in another way
                self._blocks[at:] = [left] * bool(left)
                break
            left -= size

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order.

        Raises:
            DiskError: There is no room for them; then the rows are those of before.
        """
        rows = rows.cpu()
        self._history = self._history.selected(rows)
        self._rows = rows if self._rows is None else self._rows[rows]

    def _sent(self, start: int, width: int, mask: Tensor | None, sites: SiteCall | None) -> Tensor:
        """Send the tokens from `start` on, and those before that the cloud has lost; the output of the former."""
        outputs: dict[int, Tensor] = {}
        at, stop, losses, number = min(start, self._valid), self.length, 0, next(self._caches.numbers)
        while at < stop:
            end = self._end_of_call(at, stop)
            reply = self._ask(at, end, mask, sites, m.CallId(0, number, losses))
            if isinstance(reply, m.CacheLost):
                losses += 1
                if reply.have >= at:
                    raise RemoteProtocolError(
                        f"the cloud has lost a cache of {at} tokens, and has {reply.have} of them"
                    )
                if losses == MAX_LOSSES:
                    raise OverQuotaError(
                        f"the cloud has lost the cache {MAX_LOSSES} times while it was filled again: it has too little "
                        "room for all who generate; try later, or ask its owner for more (serve --cache-bytes)"
                    )
                self._caches.replayed += at - reply.have
                at = reply.have
                continue  # under the same number: a stage that has taken the rows does not take them again
            number, self._rows, self._valid = next(self._caches.numbers), None, end
            codec, limits = self._caches.codecs().forward_down, edge_limits(self._caches.keeper.info)
            shape = torch.Size((self.rows, end - at, width))
            output = decode_as(reply.hidden, shape, codec, limits, "the output of the cloud's layers")
            if end > start:
                outputs[max(at, start)] = output[:, max(0, start - at) :]
            at = end
        return torch.cat([outputs[each] for each in sorted(outputs)], dim=1)

    def _ask(
        self, at: int, end: int, mask: Tensor | None, sites: SiteCall | None, call: m.CallId
    ) -> m.ForwardReply | m.CacheLost:
        caches = self._caches
        codecs = caches.codecs()
        hidden, positions = self._history.take(at, end)
        sent = encode(hidden, codecs.forward_up, Role.ACTIVATION, "the hidden states for the cloud's layers")
        rows = () if self._rows is None or not at else tuple(self._rows.tolist())

        def message(attempt: Attempt) -> m.Decode:
            number, lease = (0, 0) if sites is None else caches.lists.send(sites, attempt)
            return m.Decode(
                dataclasses.replace(call, attempt=call.attempt + attempt.number),
                self._number,
                at,
                rows,
                tuple(self._blocks_of(at, end)) if self._exact else (),
                sent,
                None if mask is None else encode_mask(mask[:, :end]),
                None if positions is None else encode_positions(positions),
                codec_id(codecs.forward_down),
                number,
                lease,
            )

        most = body_bytes(codecs.forward_down, tuple(hidden.shape))
        question: Question[m.ForwardReply | m.CacheLost] = Question((m.ForwardReply, m.CacheLost), message, most)
        return caches.keeper.call(question)

    def _end_of_call(self, at: int, stop: int) -> int:
        """Where a call that begins at a token ends: at the last token, or before the cloud's limit for one call."""
        most = self._caches.keeper.info.limits.max_tokens_per_call
        end = min(stop, at + most // self.rows)
        if self._exact:
            ends = itertools.accumulate(self._blocks_of(at, stop), initial=at)
            end = max(each for each in itertools.islice(ends, m.MAX_BLOCKS + 1) if each <= end)
        if end == at:
            least = next(self._blocks_of(at, stop)) if self._exact else 1
            raise RefusedError(
                f"{self.rows} x {least} tokens have to be computed at once, and the cloud takes {most} in one call: "
                "generate fewer texts at a time, or decode fast"
            )
        return end

    def _blocks_of(self, at: int, end: int) -> Iterator[int]:
        """The blocks of the tokens from `at` on and before `end`."""
        place = 0
        for size in self._blocks:
            first, last = max(place, at), min(place + size, end)
            if first < last:
                yield last - first
            place += size


def _blocks(length: int, most: int) -> Iterator[int]:
    """How tokens attend in an exact call: a prompt in blocks, what follows one by one."""
    yield from [most] * (length // most)
    if length % most:
        yield length % most
