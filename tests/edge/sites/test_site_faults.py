"""Sites of a cloud that forgets, a connection that breaks, and a cloud that does not do its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.memory_cloud import (
    CUT,
    Fault,
    FaultyTransport,
    MemoryCloud,
    MemoryTransport,
    flip,
    messages,
    new_link,
)
from support.models.lora_runs import EVERY_LINEAR, Run, adapted, assert_same, batch, lora, train, whole
from support.models.tiny import HIDDEN

from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.site_calls import MAX_PAUSED
from isthmus.common.errors import NonFiniteError, RefusedError, RemoteProtocolError
from isthmus.edge.client import session_keeper
from isthmus.edge.client.site_answerer import SiteAnswerer
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role, encode

pytestmark = pytest.mark.usefixtures("no_waiting", "cache_folder")


# What breaks on the way -----------------------------------------------------------------------------------------------


def test_a_cloud_that_forgets_between_forward_and_backward(cloud: MemoryCloud, undisturbed: Run) -> None:
    link = new_link(cloud)
    assert_same(train(adapted(link.load_model()), between=cloud.served.executor.cache.evict_all), undisturbed)
    assert len(messages(cloud, m.Backward)) == 6
    assert cloud.served.executor.cache.counters.recomputed >= 3


def test_a_cloud_that_keeps_inputs_alone(cloud: MemoryCloud, undisturbed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud.served.executor.cache, "budget", 4000)
    before = cloud.served.executor.cache.counters.recomputed
    link = new_link(cloud)
    assert_same(train(adapted(link.load_model())), undisturbed)
    assert cloud.served.executor.cache.counters.recomputed == before + 3
    assert link.traffic.retries == 0


# The first step's messages: Sites, Forward, two answers; Backward, two answers. Each is a frame, and has one in reply.
@pytest.mark.parametrize("fault", [CUT, flip], ids=["cut", "flip"])
@pytest.mark.parametrize("place", range(1, 8))
@pytest.mark.parametrize("way", ["send", "receive"])
def test_a_connection_that_breaks_anywhere_changes_no_bit(
    cloud: MemoryCloud, undisturbed: Run, way: str, place: int, fault: Fault
) -> None:
    transport = FaultyTransport(MemoryTransport(cloud), {})
    link = new_link(transport)
    model = adapted(link.load_model())
    hit = (way, transport.counts[way] + place)
    transport.faults = {hit: fault}
    assert_same(train(model), undisturbed)
    assert transport.hit == [hit]
    assert link.traffic.sessions == 2
    assert len(messages(cloud, m.Sites)) == (2 if (way, place) != ("send", 1) else 1)  # each session has its own lists
    assert cloud.served.executor.cache.used == 0


def test_a_connection_that_breaks_again_and_again(cloud: MemoryCloud, undisturbed: Run) -> None:
    transport = FaultyTransport(MemoryTransport(cloud), {})
    link = new_link(transport)
    model = adapted(link.load_model())
    start = transport.counts["send"]
    transport.faults = {("send", start + 8 * n): CUT for n in range(1, 9)}
    assert_same(train(model), undisturbed)
    assert len(transport.hit) == 8
    assert link.traffic.sessions == 9


def test_two_tenants_at_once(shared: Served, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the first one's call has paused, the second one does as much as it can."""
    shared.executor.cache.evict_all()
    first, second = (new_link(MemoryCloud(shared)) for _ in range(2))
    mine, theirs = adapted(first.load_model(), lora()), adapted(second.load_model(), lora(EVERY_LINEAR))
    expected = [train(adapted(whole(folder), config), steps=2) for config in (lora(), lora(EVERY_LINEAR))]
    others: list[Run] = []
    busy: list[bool] = []

    def step_in(visits: SiteAnswerer, question: m.SiteQuestion) -> m.SiteAnswer:
        answered = answer(visits, question)
        if not busy:  # the second one's own questions
            busy.append(True)
            state = torch.get_rng_state()
            fresh = {name: p.detach().clone() for name, p in theirs.named_parameters() if p.requires_grad}
            with torch.enable_grad():
                others.append(train(theirs, steps=2))
            with torch.no_grad():
                for name, value in fresh.items():
                    theirs.get_parameter(name).copy_(value)
            torch.set_rng_state(state)
            busy.clear()
        return answered

    answer = SiteAnswerer.answer
    monkeypatch.setattr(SiteAnswerer, "answer", step_in)
    assert_same(train(mine, steps=2), expected[0])
    assert len(others) == 2 * 2 * 2
    for other in others:
        assert_same(other, expected[1])
    assert shared.executor.cache.used == 0


def test_a_bad_contribution_is_the_edges_own_error_and_no_call_stays_open(cloud: MemoryCloud, folder: Path) -> None:
    link = new_link(cloud)
    model = adapted(link.load_model(), lora())
    weight = model.get_parameter("base_model.model.model.layers.3.self_attn.v_proj.lora_B.default.weight")
    good = weight.detach().clone()
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            weight.fill_(value)
        for _ in range(MAX_PAUSED):
            with pytest.raises(NonFiniteError, match=r"contribution of model\.layers\.3\.self_attn\.v_proj"):
                model(**batch(0))
    with torch.no_grad():
        weight.copy_(good)
        assert torch.equal(model(**batch(0)).logits, adapted(whole(folder), lora())(**batch(0)).logits)


@pytest.mark.parametrize("kind", [m.Forward, m.Backward])
def test_a_cloud_that_leaves_adapters_out_is_noticed(cloud: MemoryCloud, kind: type[m.Forward | m.Backward]) -> None:
    """Its answers have every form that they need: only the questions are missing."""

    def unasked(message: m.Message) -> m.Message | None:
        if not isinstance(message, kind):
            return None
        if isinstance(message, m.Forward):
            return m.ForwardReply(message.id, message.inputs.hidden, 0, 0, 0)
        return m.BackwardReply(message.id, message.gradient, 0, 0, 0, recomputed=False)

    link = new_link(cloud)
    model = adapted(link.load_model(), lora())
    train(model, steps=1)
    cloud.answer = unasked
    with pytest.raises(RemoteProtocolError, match=r"without asking for the adapter at 2\.self_attn\.q_proj"):
        train(model, steps=1)


# Lists of sites -------------------------------------------------------------------------------------------------------


def test_each_set_of_sites_is_sent_once(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    model = adapted(link.load_model(), lora())
    model.add_adapter("other", lora(["o_proj"]))
    with torch.no_grad():
        for name in ("default", "other", "default", "other"):
            model.set_adapter(name)
            model(**batch(0))
    assert [each.number for each in messages(cloud, m.Sites)] == [1, 2]
    assert [each.sites for each in messages(cloud, m.Forward)] == [1, 2, 1, 2]
    link._keeper.drop()
    with torch.no_grad():
        model(**batch(0))
    assert [each.number for each in messages(cloud, m.Sites)] == [1, 2, 3]  # the new session knows none


def test_lists_that_the_cloud_has_forgotten_are_sent_again(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_LISTS", 1)
    link = new_link(cloud)
    model = adapted(link.load_model(), lora())
    model.add_adapter("other", lora(["o_proj"]))
    first = model(**batch(0)).loss
    model.set_adapter("other")
    model(**batch(0))
    model.set_adapter("default")
    first.backward()  # its list has got another number meanwhile
    assert [each.number for each in messages(cloud, m.Sites)] == [1, 2, 3]
    assert link.traffic.retries == 0


# A cloud that does not do its part ------------------------------------------------------------------------------------


def test_a_cloud_that_takes_no_sites(cloud: MemoryCloud) -> None:
    model = adapted(new_link(cloud).load_model())
    cloud.answer = lambda message: (
        m.Status(m.StatusCode.BAD_REQUEST, None, "there is no such site\x1b[2J")
        if isinstance(message, m.Sites)
        else None
    )
    with pytest.raises(RefusedError, match=r"refused the adapters inside its layers: there is no such site\?"):
        model(**batch(0))
    assert not messages(cloud, m.Forward)


X = encode(torch.ones(2, 8, HIDDEN), "fp32", Role.ACTIVATION)
NARROW = encode(torch.ones(2, 8, HIDDEN - 1), "fp32", Role.ACTIVATION)
G = encode(torch.ones(2, 8, HIDDEN), "fp32", Role.GRADIENT)
FORWARD, AGAIN, BACKWARD = m.SitePhase.FORWARD, m.SitePhase.AGAIN, m.SitePhase.BACKWARD


@pytest.mark.parametrize(
    ("phase", "sites", "tensors", "call", "text"),
    [
        (FORWARD, (4,), (X,), 1, "no site 4 among 4"),
        (FORWARD, (0,), (NARROW,), 1, "site 0, whose input is 32 wide"),
        (AGAIN, (0,), (), 1, "site 0 was asked for its contribution again"),
        (BACKWARD, (0,), (G,), 1, "site 0, which has not contributed"),
        (FORWARD, (0,), (X,), 2, "answered Forward with SiteQuestion"),
    ],
)
def test_a_question_that_makes_no_sense_is_the_clouds_fault(
    cloud: MemoryCloud, phase: m.SitePhase, sites: tuple[int, ...], tensors: Any, call: int, text: str
) -> None:
    model = adapted(new_link(cloud).load_model())
    cloud.answer = lambda message: (
        m.SiteQuestion(m.CallId(0, call, message.id.attempt), phase, sites, tensors, 0, 0, 0)
        if isinstance(message, m.Forward)
        else None
    )
    with pytest.raises(RemoteProtocolError, match=text):
        model(**batch(0))
    assert len(messages(cloud, m.Forward)) == session_keeper.PROTOCOL_FAULTS
    cloud.answer = lambda message: None
    model(**batch(0)).loss.backward()


def test_a_gradient_of_another_shape_is_the_clouds_fault(cloud: MemoryCloud) -> None:
    model = adapted(new_link(cloud).load_model())
    loss = model(**batch(0)).loss
    cloud.answer = lambda message: (
        m.SiteQuestion(message.id, BACKWARD, (1,), (G,), 0, 0, 0) if isinstance(message, m.Backward) else None
    )
    with pytest.raises(RemoteProtocolError, match=r"gradient of shape \[2, 8, 32\] came for site 1.*\[2, 8, 16\]"):
        loss.backward()


def test_a_call_without_sites_answers_no_question(cloud: MemoryCloud) -> None:
    model = new_link(cloud).load_model()
    cloud.answer = lambda message: (
        m.SiteQuestion(message.id, FORWARD, (0,), (X,), 0, 0, 0) if isinstance(message, m.Forward) else None
    )
    with pytest.raises(RemoteProtocolError, match="answered Forward with SiteQuestion"):
        model(**batch(0))
    assert not messages(cloud, m.SiteAnswer)
