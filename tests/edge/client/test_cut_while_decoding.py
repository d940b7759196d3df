"""The connection is cut in each phase of a decode call: the text is that of an undisturbed run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.generated_text import prompt, text

from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.cloud.decoding.decode_calls import DecodeCall
from isthmus.cloud.session.served_model import Served
from isthmus.edge.client import cloud_cache
from isthmus.edge.client.hidden_history import HiddenHistory
from isthmus.edge.client.link import Link
from isthmus.edge.client.session_keeper import SessionKeeper
from isthmus.edge.generation.exact import exact_decoding
from isthmus.experiments.rigs.network.relay import Relay
from isthmus.protocol.secure.keys import load_edge
from isthmus.rpc.transport import GrpcTransport

pytestmark = pytest.mark.usefixtures("cache_folder", "one_thread")
PROMPT, GUESSED = 23, 3
STEPS = EngineOptions(prefill_tokens=5)
MIDDLE = 40
"""Bytes into a question, or an answer: behind what HTTP/2 and gRPC put before the sealed frame."""


@dataclass
class Cuts:
    """Cuts the connection at the first, second, fourth, eighth … time that a phase is reached: a call gets through.

    Attributes:
        relay: What the edge's bytes go through.
        phase: At which phase.
        seen: How often it was reached.
        made: How often the connection was cut there.
    """

    relay: Relay
    phase: str = ""
    seen: int = 0
    made: int = 0

    def at(self, phase: str, cut: Callable[[], None] | None = None) -> None:
        """A phase is reached."""
        if phase != self.phase:
            return
        self.seen += 1
        if self.seen.bit_count() == 1:
            self.made += 1
            (cut or self.relay.cut)()


def on_the_edge(cuts: Cuts) -> Callable[[str, str], None]:
    """Sees the phases that an edge has: before it sends, and while it sends."""

    def observe(question: str, phase: str) -> None:
        if (question, phase) == ("decode", "sending"):
            cuts.at("before sending")
            cuts.at("while sending", lambda: cuts.relay.cut_after(MIDDLE, "up"))

    return observe


def in_the_cloud(cuts: Cuts, patch: pytest.MonkeyPatch) -> None:
    """See the phases that a cloud has: at the crop, between two steps, in a replay, and before and in an answer."""
    trim_cache, take = DecodeCall.trim_cache, DecodeCall.take

    def trimming(self: DecodeCall) -> None:
        cropped = 0 < self.message.start < self.entry.keys.length
        trim_cache(self)
        if cropped:
            cuts.at("at a crop")

    def taking(self: DecodeCall, *rest: Any) -> Any:
        replayed = not self.message.start and self.message.hidden.shape[1] > PROMPT + GUESSED
        answer = take(self, *rest)
        if answer is None:
            cuts.at("during a replay" if replayed else "during the prompt")
        else:
            cuts.at("before the answer")
            cuts.at("in the answer", lambda: cuts.relay.cut_after(MIDDLE, "down"))
        return answer

    patch.setattr(DecodeCall, "trim_cache", trimming)
    patch.setattr(DecodeCall, "take", taking)


@pytest.fixture
def edge(tiny_cloud: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Link, Cuts]]:
    bounds = Bounds(engine=STEPS)
    monkeypatch.setattr(cloud_cache.m, "MAX_BLOCK", STEPS.prefill_tokens)  # an exact prompt has several steps, too
    monkeypatch.setattr(SessionKeeper, "_pause", lambda *_: None)
    with ThreadServer(tiny_cloud, Home(tmp_path), bounds=bounds) as server, Relay("127.0.0.1", server.port) as relay:
        cuts, transport = Cuts(relay), GrpcTransport(f"127.0.0.1:{relay.port}")
        in_the_cloud(cuts, monkeypatch)
        with Link(transport, server.home.pin, load_edge(server.home.key_file), name="test") as link:
            link.open(5)
            link.observer = on_the_edge(cuts)
            yield link, cuts


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "phase",
    ["before sending", "while sending", "during the prompt", "during a replay", "at a crop", "before the answer",
     "in the answer"],
)  # fmt: skip
def test_the_text_is_that_of_an_undisturbed_run(edge: tuple[Link, Cuts], phase: str, exact: bool) -> None:
    link, cuts = edge
    ids = torch.cat([prompt(PROMPT - 10), prompt(10)], dim=1)  # repeats itself, so that tokens are guessed
    model = link.load_model()
    with exact_decoding(link, model) if exact else contextlib.nullcontext():
        undisturbed = text(model, ids, prompt_lookup_num_tokens=GUESSED)
        retries = link.traffic.retries
        assert retries == 0
        cuts.phase = phase
        if phase == "during a replay":  # a session that begins anew has to replay
            cut_once(link, cuts)
        disturbed = text(model, ids, prompt_lookup_num_tokens=GUESSED)
    assert cuts.made > 0
    assert link.traffic.retries > retries
    assert torch.equal(disturbed[0], undisturbed[0])
    if exact:
        assert torch.equal(disturbed[1], undisturbed[1])
    else:
        assert torch.allclose(disturbed[1], undisturbed[1], atol=1e-4)


def cut_once(link: Link, cuts: Cuts) -> None:
    """Cut at the seventh call besides, so that there is something to replay."""
    observe, calls = link.observer, iter(range(10**6))

    def observing(question: str, phase: str) -> None:
        observe(question, phase)
        if (question, phase) == ("decode", "sending") and next(calls) == 6:
            cuts.relay.cut()

    link.observer = observing


def test_a_replay_that_is_wrong_is_noticed(edge: tuple[Link, Cuts], monkeypatch: pytest.MonkeyPatch) -> None:
    link, cuts = edge
    model = link.load_model()
    undisturbed = text(model, prompt(PROMPT))
    cuts.phase = "before sending"
    whole = HiddenHistory.take

    def spoiled(self: HiddenHistory, start: int, stop: int) -> Any:
        hidden, positions = whole(self, start, stop)
        return (hidden if stop - start == 1 or stop == PROMPT else hidden.flip(1)), positions

    monkeypatch.setattr(HiddenHistory, "take", spoiled)
    assert not torch.allclose(text(model, prompt(PROMPT))[1], undisturbed[1], atol=1e-4)
