"""The process that keeps links open and adapters hot, and generates.

Run as `python -m isthmus.daemon.serving.serving_worker` by `isthmus.daemon.serving.answers`. Its first frame has the
settings; what follows are questions:

    generate          one answer, piece by piece; `answers_at_once` of them at a time, each over a link of its own
    tokenizer_files   of a base model
    look              what the clouds serve now
    state, traffic    figures of this process; they wait for nothing
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from isthmus.common.errors import IsthmusError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.serving.answer_forms import Piece, Sampling
from isthmus.daemon.serving.hot_models import HotModels
from isthmus.daemon.serving.offered_drafts import OfferedDrafts
from isthmus.daemon.serving.one_answer import prompt_ids, write_answer
from isthmus.daemon.serving.served_cloud import ServedCloud
from isthmus.daemon.state.crossings import COUNTERS
from isthmus.daemon.workers.answering import Answer, Handler, Question, answer_questions
from isthmus.daemon.workers.frames import read_frame
from isthmus.edge.config.adapter_config import Sites

_STATM = Path("/proc/self/statm")


class CancelledError(IsthmusError):
    """Nobody waits for the answer any more."""


class Serving:
    """What the process does.

    Args:
        settings: Of the daemon.
    """

    def __init__(self, settings: DaemonSettings) -> None:
        self._leased: Sites = "all" if settings.training_layers == "all" else "none"
        at_once = settings.answers_at_once
        self._clouds = {name: ServedCloud(name, config, at_once) for name, config in settings.clouds.items()}
        self._hot = HotModels(settings.adapters_hot)
        self._drafts = OfferedDrafts(settings.offered_draft)

    @property
    def handlers(self) -> dict[str, Handler]:
        """By the names of methods."""
        return {
            "generate": self.generate,
            "tokenizer_files": self.tokenizer_files,
            "look": self.look,
            "state": self.state,
            "traffic": self.traffic,
        }

    def close(self) -> None:
        """Close what is open."""
        for cloud in self._clouds.values():
            cloud.close()

    def generate(self, question: Question) -> Iterator[Answer]:
        """The pieces of one answer."""
        values = question.values
        adapter = None if values["adapter"] is None else Path(values["adapter"])
        check = _check_of(question)
        with self._clouds[values["cloud"]].link(check) as link:
            parts = self._clouds[values["cloud"]].parts_of(link, values["base"])
            ids = prompt_ids(parts, values["prompt"])

            def send(piece: Piece) -> None:
                question.send(piece.to_tree(), b"")

            with (
                self._hot.lend(parts.key, lambda: parts.model, adapter) as model,
                self._drafts.lend(model, adapter, link.pin) as draft,
            ):
                write_answer(
                    model,
                    link,
                    parts,
                    ids,
                    Sampling(**values["sampling"]),
                    adapter=adapter,
                    leased=self._leased,
                    draft=draft,
                    send=send,
                    cancelled=question.cancelled.is_set,
                )
        yield from ()

    def tokenizer_files(self, question: Question) -> Iterator[Answer]:
        """The files of a tokenizer: their names and places in the bytes."""
        cloud, base = self._clouds[question.values["cloud"]], question.values["base"]
        parts = cloud.parts
        if parts is None or parts.info.model != base:
            with cloud.link(_check_of(question)) as link:
                parts = cloud.parts_of(link, base)
        places, at = [], 0
        for name, data in parts.tokenizer_files.items():
            places.append([name, at, at + len(data)])
            at += len(data)
        yield {"files": places}, b"".join(parts.tokenizer_files.values())

    def look(self, _question: Question) -> Iterator[Answer]:
        """What the clouds serve now; those that are away are left out."""
        clouds = list(self._clouds.values())
        with ThreadPoolExecutor(max(1, len(clouds))) as pool:
            there = list(pool.map(ServedCloud.look, clouds))
        found = [
            {"name": cloud.name, "model": cloud.parts.info.model, "facts": cloud.parts.facts}
            for cloud, is_there in zip(clouds, there, strict=True)
            if is_there and cloud.parts is not None
        ]
        yield {"clouds": found}, b""

    def state(self, _question: Question) -> Iterator[Answer]:
        """See `isthmus.daemon.serving.answers.Answers.state`."""
        clouds = [_state_of(cloud) for cloud in self._clouds.values()]
        yield {"pid": os.getpid(), "rss_bytes": _resident(), "hot": self._hot.adapters, "clouds": clouds}, b""

    def traffic(self, _question: Question) -> Iterator[Answer]:
        """What has crossed since this was asked last, for clouds with which something has."""
        taken = {name: cloud.take_counts() for name, cloud in self._clouds.items()}
        counts = {name: {count: getattr(each, count) for count in COUNTERS} for name, each in taken.items()}
        yield {"clouds": {name: each for name, each in counts.items() if any(each.values())}}, b""


def _check_of(question: Question) -> Callable[[], None]:
    def check() -> None:
        if question.cancelled.is_set():
            raise CancelledError("nobody waits for this answer any more")

    return check


def _state_of(cloud: ServedCloud) -> dict[str, Any]:
    totals, now, seen = cloud.totals, cloud.now, cloud.seen
    return {
        "name": cloud.name,
        "reachable": now.reachable,
        "model": None if cloud.parts is None else cloud.parts.info.model,
        "error": now.error,
        "since": now.since,
        "until": now.until,
        "seen": {"reachable": seen.reachable, "error": seen.error, "since": seen.since},
        "bytes_up": totals.bytes_up,
        "bytes_down": totals.bytes_down,
    }


def _resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not say it."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if _STATM.exists() else 0


def main() -> None:
    """Answer the daemon's questions until it has gone."""
    greeting = read_frame(sys.stdin.buffer)
    if greeting is None:
        return
    settings = DaemonSettings.model_validate(greeting.values["settings"])
    at_once = {"generate": settings.answers_at_once, "look": 1, "tokenizer_files": 1}
    answer_questions(Serving(settings).handlers, at_once)


if __name__ == "__main__":
    main()
