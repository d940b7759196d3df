"""A cloud of the settings: links to it, and the edge's part of the model that it serves."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from isthmus.backbone.checkpoints.chat_template import ChatTemplate
from isthmus.common.errors import (
    ChatTemplateError,
    ConfigError,
    DataError,
    IsthmusError,
    OverQuotaError,
    UnknownModelError,
    UnreachableError,
    UnsupportedCallError,
)
from isthmus.daemon.serving.token_chances import TokenTexts
from isthmus.edge.client.link import Link
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.client_config import ClientConfig
from isthmus.edge.run_report import WireTotals
from isthmus.protocol.session_info import SessionInfo

AWAY_SECONDS = 30.0
"""Seconds that a cloud may stay away in the middle of an answer; `give_up_after` may say less."""
LOOK_SECONDS = 5.0
"""Seconds that a cloud may take to say what it serves."""

_OF_THE_REQUEST = (ConfigError, DataError, UnknownModelError, UnsupportedCallError, ChatTemplateError)
"""Errors after which a link is as good as before."""
_MOMENT = 0.25
"""Seconds between two looks at whether somebody still waits."""


class EdgeParts:
    """The edge's part of a model, as all answers share it.

    Args:
        link: To the cloud that serves it.

    Attributes:
        info: What the cloud says of it.
        tokenizer: The model's.
        template: Its chat template, rendered by a process of its own.
        texts: The bytes of its tokens.
    """

    def __init__(self, link: Link) -> None:
        self.info: SessionInfo = link.info
        self.tokenizer: Any = link.load_tokenizer()
        self.texts = TokenTexts(self.tokenizer)
        self.model: Any = link.load_model()
        self._template = ChatTemplate(self.tokenizer)
        self._rendering = threading.Lock()

    @property
    def key(self) -> str:
        """Tells it from others."""
        return f"{self.info.digest} {self.info.plan} {self.info.attn_implementation}"

    @property
    def facts(self) -> dict[str, Any]:
        """See `isthmus.daemon.state.tables.BaseModel`."""
        return {
            "digest": self.info.digest,
            "plan": self.info.plan,
            "n_layers": self.info.n_layers,
            "longest": self.model.isthmus_longest,
            "hidden_size": self.info.hidden_size,
            "span_dtype": self.info.span_dtype,
            "chat_template": self._template.exists,
        }

    def render(self, messages: list[dict[str, str]]) -> str:
        """Messages in the chat template, with the beginning of an answer.

        Raises:
            ConfigError: The model has no template.
            ChatTemplateError: It takes too much for them.
            DataError: It refuses them.
        """
        if not self._template.exists:
            raise ConfigError(f"{self.info.model} has no chat template: give a prompt instead of messages")
        with self._rendering:
            return self._template.render(messages, add_generation_prompt=True)

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, by name."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}

    def close(self) -> None:
        """End the process that renders."""
        with self._rendering:
            self._template.close()


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a cloud.

    Attributes:
        reachable: Whether it could be used when it was asked last; None before.
        error: Why it could not.
        since: Since when it could not, in seconds since 1970.
        until: Until when an answer that is under way waits for it; None where none does.
    """

    reachable: bool | None = None
    error: str | None = None
    since: float | None = None
    until: float | None = None


class ServedCloud:
    """Links to one cloud. Its methods may be called by several threads.

    Args:
        name: The cloud's in the settings.
        config: How to connect.
        most: Links at a time.

    Attributes:
        seen: Whether it is there.
        parts: The edge's part of what it serves; None before it was asked.
    """

    def __init__(self, name: str, config: ClientConfig, most: int) -> None:
        self.name, self.seen = name, Seen()
        self.parts: EdgeParts | None = None
        self._config = config.model_copy(update={"give_up_after": min(config.give_up_after, AWAY_SECONDS)})
        self._most = most
        self._idle: list[Link] = []
        self._used: set[Link] = set()
        self._closed = WireTotals()  # what links have carried that are closed
        self._taken = WireTotals()
        self._opening, self._looking = 0, 0  # links that are being opened, by `_take` and by `look`
        self._change = threading.Condition()
        self._loading = threading.Lock()

    @contextmanager
    def link(self, check: Callable[[], None]) -> Iterator[Link]:
        """A link that nobody else uses meanwhile.

        Args:
            check: Called a few times a second while something is waited for; what it raises ends the wait.

        Raises:
            IsthmusError: None can be opened, of whatever kind fits.
        """
        link = self._take(check)
        link.watch(check)
        good = False
        try:
            yield link
            good = True
        except _OF_THE_REQUEST:
            good = True
            raise
        except UnreachableError as error:
            self._miss(error)
            raise
        finally:
            link.watch(lambda: None)
            self._give_back(link, good=good)

    def load(self, link: Link) -> EdgeParts:
        """The edge's part of the model at the other end of a link."""
        with self._loading:
            info = link.info
            known = self.parts
            if known is None or (known.info.digest, known.info.plan) != (info.digest, info.plan):
                old, self.parts = known, EdgeParts(link)
                known = self.parts
                if old is not None:
                    old.close()
            known.info = info
            return known

    def parts_of(self, link: Link, base: str) -> EdgeParts:
        """The same, of the model with this name.

        Raises:
            UnknownModelError: The cloud serves another one by now.
        """
        if link.info.model != base:
            raise UnknownModelError(
                f"the cloud {self.name} serves {link.info.model} now, and not {base}: choose a model of the list"
            )
        return self.load(link)

    def look(self) -> bool:
        """Ask anew what the cloud serves, over a new link, which takes the place of an idle one.

        Returns:
            Whether it can be used. Where not, `seen` says why.
        """
        config = self._config.model_copy(update={"connect_timeout": min(self._config.connect_timeout, LOOK_SECONDS)})
        with self._change:
            self._looking += 1
        try:
            link = open_link(config, interactive=True)
            with self._change:
                self._used.add(link)
        except OverQuotaError:  # its other links are in use, so it is there
            self.seen = Seen(True)
            return self.parts is not None
        except IsthmusError as error:
            self._miss(error)
            self._close_idle()
            return False
        finally:
            with self._change:
                self._looking -= 1
        self._close_idle()
        good = False
        try:
            self.load(link)
            good = True
        except IsthmusError as error:  # nothing can be asked of it, and the other clouds go on
            self._miss(error)
            return False
        finally:
            self._give_back(link, good=good)
        self.seen = Seen(True)
        return True

    def close(self) -> None:
        """Close the links that nobody uses, and end the process that renders chat templates."""
        self._close_idle()
        if self.parts is not None:
            self.parts.close()

    @property
    def now(self) -> Seen:
        """`seen`, or that an answer waits for the cloud just now."""
        with self._change:
            waits = [link.wait for link in self._used]
        wait = next((wait for wait in waits if wait is not None), None)
        return self.seen if wait is None else Seen(False, wait.reason, wait.since, wait.until)

    @property
    def totals(self) -> WireTotals:
        """What the links have carried so far."""
        with self._change:
            return sum((link.totals() for link in self._used), self._closed)

    def take_counts(self) -> WireTotals:
        """What they have carried since this was asked last."""
        before, self._taken = self._taken, self.totals
        return self._taken - before

    def _take(self, check: Callable[[], None]) -> Link:
        while True:
            check()
            with self._change:
                if self._idle:
                    return self._idle.pop()
                if len(self._used) + self._opening >= self._most:
                    self._change.wait(_MOMENT)
                    continue
                self._opening += 1
            try:
                return self._opened()
            except OverQuotaError as error:
                refused = error
            finally:
                with self._change:
                    self._opening -= 1
            with self._change:
                if not (self._used or self._opening or self._looking):
                    raise refused  # what has the sessions is another process
                self._change.wait(_MOMENT)

    def _opened(self) -> Link:
        try:
            link = open_link(self._config, interactive=True)
        except UnreachableError as error:
            self._miss(error)
            raise
        self.seen = Seen(True)
        with self._change:
            self._used.add(link)
        return link

    def _miss(self, error: IsthmusError) -> None:
        since = time.time() if self.seen.since is None else self.seen.since
        self.seen = Seen(False, str(error), since)

    def _close_idle(self) -> None:
        with self._change:
            stale, self._idle = self._idle, []
        for link in stale:
            self._close(link)

    def _give_back(self, link: Link, *, good: bool) -> None:
        with self._change:
            keep = good and len(self._used) <= self._most
            if keep:
                self._idle.append(link)
                self._change.notify()
        if not keep:
            self._close(link)

    def _close(self, link: Link) -> None:
        with suppress(IsthmusError):
            link.close()
        with self._change:
            self._closed += link.totals()
            self._used.remove(link)
            self._change.notify()
