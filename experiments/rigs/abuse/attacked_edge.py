"""An edge in a process of its own that a hostile cloud attacks, and what it must answer each attack with.

    python -m isthmus.experiments.rigs.abuse.attacked_edge KEY

Each line of its standard input is `ATTACK CONNECTION_STRING BOUND`. The process connects and fetches what it needs, and
prints an empty line; after another line it does what the attack waits for, and prints the error that came, as JSON.
BOUND names one of `LIFTED` that it does without, or is `-`. That is the control of the measurement: ceilings that hold
without the bound would say nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal
from unittest import mock

import torch

from isthmus.backbone.checkpoints import chat_template
from isthmus.common.errors import ChatTemplateError, IsthmusError, LimitError, RemoteProtocolError
from isthmus.edge.client.link import Link, connect
from isthmus.edge.data.batches import encode
from isthmus.edge.data.readers import Example
from isthmus.experiments.rigs.abuse.gauge import Gauge, Taken
from isthmus.experiments.rigs.abuse.hostile_cloud import HostileCloud
from isthmus.protocol.session import EdgeSession

BATCH, SEQUENCE = 1, 32
CHAT: Final = Example("", "", (("user", "hello"), ("assistant", "hello")))


@dataclass(frozen=True, slots=True)
class EdgeAttack:
    """An attack on an edge, by the trick of the same name of `isthmus.experiments.rigs.abuse.hostile_cloud.TRICKS`.

    Attributes:
        prepare: Brings the edge to where the attack waits, and gives what it does then.
        error: The class of the error that it must end with.
        says: Part of its text.
    """

    prepare: Callable[[Link], Callable[[], object]]
    error: type[IsthmusError]
    says: str
    by: Literal["cloud"] = "cloud"


def _call(link: Link) -> Callable[[], object]:
    hidden = torch.zeros(BATCH, SEQUENCE, link.info.hidden_size)
    return lambda: link.forward_span(hidden, None, None, keep=False)


def _train(link: Link) -> Callable[[], object]:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(link.load_model(), config)
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def _chat(link: Link) -> Callable[[], object]:
    tokenizer = link.load_tokenizer()
    return lambda: encode([CHAT], tokenizer, SEQUENCE)


def _fetch(link: Link) -> Callable[[], object]:
    return link.load_tokenizer


EDGE_ATTACKS: Final[dict[str, EdgeAttack]] = {
    "large_answer": EdgeAttack(_call, LimitError, "were asked for"),
    "endless_questions": EdgeAttack(_train, RemoteProtocolError, "asks about sites more than"),
    "large_file": EdgeAttack(_fetch, LimitError, "are taken of such a file"),
    "many_bytes": EdgeAttack(_fetch, LimitError, "--max-fetch-gib"),
    "endless_template": EdgeAttack(_chat, ChatTemplateError, "s of computing"),
    "exploding_template": EdgeAttack(_chat, ChatTemplateError, "MiB of memory"),
}

_EXPECT = EdgeSession.expect
LIFTED: Final[dict[str, Callable[[], Any]]] = {
    "large_answer": lambda: mock.patch.object(EdgeSession, "expect", lambda session, size: _EXPECT(session, None)),
    "exploding_template": lambda: mock.patch.object(
        chat_template, "TemplateLimits", partial(chat_template.TemplateLimits, memory_bytes=1 << 30)
    ),
}
"""Attacks that a bound holds back which the edge can be made to do without: what takes its place meanwhile."""


class Edge:
    """The process; a context manager, which ends it.

    Args:
        key: The edge's private key.
        folder: For its cache.
        log: File for its output.
    """

    def __init__(self, key: Path, folder: Path, log: Path) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "isthmus.experiments.rigs.abuse.attacked_edge", str(key)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, "ISTHMUS_CACHE": str(folder / "edge-cache")},
                start_new_session=True,
            )

    def attacked(self, name: str, cloud: HostileCloud, *, lifted: bool = False) -> Taken:
        """Let a cloud attack it; what it took.

        Args:
            name: A name of `EDGE_ATTACKS`.
            cloud: The cloud, which gets the trick.
            lifted: Whether the edge does without the bound that holds the attack back, a name of `LIFTED`; then it may
                end with any error.

        Raises:
            IsthmusError: The edge has not answered the attack by its own refusal.
        """
        attack = EDGE_ATTACKS[name]
        cloud.trick = name
        self._say(f"{name} {cloud.connection} {name if lifted else '-'}")
        with Gauge(self._process.pid) as gauge:
            told = json.loads(self._say("go"))
        if not lifted and (told["error"] != attack.error.__name__ or attack.says not in told["message"]):
            raise IsthmusError(
                f"the edge answers the attack {name!r} with {told['error']} ({told['message']}) instead of a "
                f"{attack.error.__name__} that says {attack.says!r}"
            )
        return gauge.taken

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _say(self, line: str) -> bytes:
        answer = b""
        if self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise IsthmusError(f"the edge that is attacked has ended; its output is in {self._log}")
        return answer


def _main(key: Path) -> None:
    for line in sys.stdin:
        name, connection, bound = line.split()
        with LIFTED.get(bound, contextlib.nullcontext)(), connect(connection, key=key) as link:
            act = EDGE_ATTACKS[name].prepare(link)
            print(flush=True)
            sys.stdin.readline()
            told = {"error": "no error", "message": ""}
            try:
                act()
            except IsthmusError as error:
                told = {"error": type(error).__name__, "message": str(error)}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
