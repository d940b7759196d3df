"""An edge in a process of its own that a hostile cloud attacks, and what it must answer each attack with.

Each question is an attack, a connection string, and a bound or null. The process connects and fetches what it needs,
and answers; asked again, it does what the attack waits for, and answers with the error that came. The bound is one of
`LIFTED` that it does without. That is the control of the measurement: ceilings that hold without the bound would say
nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

from isthmus.backbone.checkpoints import chat_template
from isthmus.common.errors import ChatTemplateError, IsthmusError, LimitError, RemoteProtocolError
from isthmus.edge.client.link import Link, connect
from isthmus.edge.data.batches import encode
from isthmus.edge.data.readers import Example
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve
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
    """

    prepare: Callable[[Link], Callable[[], object]]
    error: type[IsthmusError]
    says: str


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


class Edge(TaskProcess):
    """The process; a context manager, which ends it."""

    def __init__(self, key: Path, folder: Path, log: Path) -> None:
        module, cache = "isthmus.experiments.rigs.abuse.attacked_edge", str(folder / "edge-cache")
        environment = {"ISTHMUS_CACHE": cache}
        super().__init__("the attacked edge", module, {"key": str(key)}, log=log, environment=environment)

    def attacked(self, name: str, cloud: HostileCloud, *, lifted: bool = False) -> Taken:
        """Let a cloud make an attack of `EDGE_ATTACKS`; what the edge took.

        Raises IsthmusError where the edge has not answered the attack by its own refusal.
        """
        attack = EDGE_ATTACKS[name]
        cloud.trick = name
        self.ask([name, cloud.connection, name if lifted else None])
        with Gauge(self.pid) as gauge:
            ending = self.ask("go")
        if not lifted and (ending["error"] != attack.error.__name__ or attack.says not in ending["message"]):
            raise IsthmusError(
                f"the edge answers the attack {name!r} with {ending['error']} ({ending['message']}) instead of a "
                f"{attack.error.__name__} that says {attack.says!r}"
            )
        return gauge.taken


def _main(parent: Parent) -> None:
    for name, connection, bound in parent.questions():
        without = LIFTED.get(bound, contextlib.nullcontext)
        with without(), connect(connection, key=Path(parent.task["key"])) as link:
            act = EDGE_ATTACKS[name].prepare(link)
            parent.say("prepared")
            parent.question()
            ending = {"error": "no error", "message": ""}
            try:
                act()
            except IsthmusError as error:
                ending = {"error": type(error).__name__, "message": str(error)}
            parent.say(ending)


if __name__ == "__main__":
    serve(_main)
