"""A tenant's session with sites inside the span: questions, backwards that do not fit, and ends in the middle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
import torch
from support.protocol.site_messages import (
    SHAPE,
    answer,
    asked,
    backward,
    bind,
    converse,
    forward,
    q_and_v,
    refusal,
    site,
    tensor,
)
from support.protocol.span_messages import FP32
from support.protocol.wire import TENANT
from torch import Tensor

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.site_calls import MAX_PAUSED
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role, codec_id, decode

THREADS = CallThreads(1, 16)


def directly(cloud: Served, sites: Sequence[Site], hidden: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of the sites' weights, by hooks on the span and one graph over everything."""
    span = cloud.executor.host.span
    layers = dict(zip(span.layer_span, span.base.layers, strict=True))  # type: ignore[arg-type]  # a list of layers
    hooks = []
    for each in sites:
        if each.part:
            module = layers[each.layer].get_submodule(each.part)
            hooks.append(module.register_forward_hook(lambda _m, args, out, s=each: out + s.module(args[0])))
        else:
            hooks.append(layers[each.layer].register_forward_hook(lambda _m, _args, out, s=each: out + s.module(out)))
    leaf = hidden.clone().requires_grad_(True)
    try:
        output = span(leaf)
    finally:
        for hook in hooks:
            hook.remove()
    weights = [each.parameters[0] for each in sites]
    return [output.detach(), *torch.autograd.grad(output, [leaf, *weights], gradient)]


# Questions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "places",
    [
        [(2, "self_attn.q_proj"), (2, "self_attn.v_proj"), (3, "self_attn.q_proj"), (3, "self_attn.v_proj")],
        [(3, "mlp.down_proj")],
        [(2, "")],
        [(3, "")],
        [(3, "self_attn.v_proj"), (2, ""), (2, "self_attn.q_proj")],  # the order of a list is the edge's own
    ],
)
def test_forward_and_backward_are_those_of_one_graph(
    tenant: TenantSession, cloud: Served, places: list[tuple[int, str]]
) -> None:
    sites = [site(*place) for place in places]
    bind(tenant, sites)
    adapters = SiteCall(sites, keep=True)
    reply, phases = converse(tenant, adapters, tenant.handle(forward()))
    groups = len({(layer, part.split("_")[0]) for layer, part in places})  # q and v share their input
    assert phases == ["FORWARD"] * groups
    back, phases = converse(tenant, adapters, tenant.handle(backward()))
    assert phases == ["BACKWARD"] * groups
    assert isinstance(reply, m.ForwardReply)
    assert isinstance(back, m.BackwardReply)
    assert (reply.id, back.id) == (m.CallId(1, 1), m.CallId(1, 1, 3))
    assert back.gradient is not None
    mine = [decode(reply.hidden), decode(back.gradient), *adapters.gradients()]
    for got, expected in zip(mine, directly(cloud, sites, tensor(*SHAPE), tensor(*SHAPE, seed=9)), strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert cloud.executor.cache.used == 0


def test_a_question_has_the_input_once_and_says_what_it_is_about(tenant: TenantSession) -> None:
    bind(tenant, q_and_v())
    question = asked(tenant.handle(forward()))
    assert (question.id, question.phase, question.sites) == (m.CallId(1, 1), m.SitePhase.FORWARD, (0, 1))
    (x,) = question.tensors
    assert (x.shape, x.role, x.codec) == (SHAPE, Role.ACTIVATION, FP32)
    assert question.compute_ns > 0
    tenant.close()


def test_questions_use_the_codec_of_the_reply(tenant: TenantSession) -> None:
    bind(tenant, q_and_v())
    question = asked(tenant.handle(replace(forward(), reply_codec=codec_id("int8"))))
    assert question.tensors[0].codec == codec_id("int8")
    tenant.close()


def test_without_keep_nothing_is_kept_and_the_answer_is_the_same(tenant: TenantSession, cloud: Served) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    replies = []
    for call, keep in enumerate((True, False)):
        said = tenant.handle(forward(call=call, keep=keep))
        replies.append(converse(tenant, SiteCall(sites, keep=keep), said)[0])
        cloud.executor.cache.release(b"s" * 16)
    kept, plain = replies
    assert isinstance(kept, m.ForwardReply)
    assert isinstance(plain, m.ForwardReply)
    assert kept.hidden == plain.hidden
    assert cloud.executor.cache.used == 0


def test_what_nothing_below_needs_is_not_asked_for(tenant: TenantSession, cloud: Served) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    exact = SiteCall(sites, keep=True)
    converse(tenant, exact, tenant.handle(forward()))
    converse(tenant, exact, tenant.handle(backward()))
    adapters = SiteCall(sites, keep=True)
    converse(tenant, adapters, tenant.handle(forward(call=2, wanted=False)))
    back, phases = converse(tenant, adapters, tenant.handle(backward(call=2, wanted=False)))
    assert phases == ["BACKWARD", "BACKWARD_ONLY"]
    assert isinstance(back, m.BackwardReply)
    assert back.gradient is None
    for mine, expected in zip(adapters.gradients(), exact.gradients(), strict=True):
        assert mine is not None
        assert expected is not None
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("lost", [False, True], ids=["graph evicted", "everything lost"])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_forgetful_cloud_asks_again_and_ends_in_the_same_bits(
    tenant: TenantSession, cloud: Served, lost: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    exact = SiteCall(sites, keep=True)
    converse(tenant, exact, tenant.handle(forward(wanted=wanted)))
    expected, _ = converse(tenant, exact, tenant.handle(backward(wanted=wanted)))
    adapters = SiteCall(sites, keep=True)
    monkeypatch.setattr(cloud.executor.cache, "budget", 0 if lost else tensor(*SHAPE).nbytes)
    converse(tenant, adapters, tenant.handle(forward(wanted=wanted)))
    if lost:
        said = tenant.handle(backward(wanted=wanted))
        assert isinstance(said, m.Status)
        assert said.code == m.StatusCode.ACTIVATIONS_LOST
    back, phases = converse(tenant, adapters, tenant.handle(backward(replay=lost, wanted=wanted)))
    assert phases == ["AGAIN", "AGAIN", "BACKWARD", "BACKWARD" if wanted else "BACKWARD_ONLY"]
    assert isinstance(back, m.BackwardReply)
    assert isinstance(expected, m.BackwardReply)
    assert back.recomputed
    assert back.gradient == expected.gradient
    for mine, theirs in zip(adapters.gradients(), exact.gradients(), strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)


def test_calls_that_have_paused_do_not_disturb_each_other(tenant: TenantSession, cloud: Served) -> None:
    """Two of one session and one of another, answered in turns."""
    sites = q_and_v()
    other = cloud.session(b"t" * 16, TENANT, THREADS)
    alone = {}
    for seed in (1, 2, 3):
        bind(tenant, sites)
        said, _ = converse(
            tenant, SiteCall(sites, keep=False), tenant.handle(forward(call=seed, keep=False, seed=seed))
        )
        assert isinstance(said, m.ForwardReply)
        alone[seed] = said.hidden
    bind(other, sites, number=5)
    open_calls = [
        (session, seed, SiteCall(sites, keep=False), session.handle(forward(call=seed, keep=False, sites=n, seed=seed)))
        for session, n, seed in ((tenant, 1, 1), (tenant, 1, 2), (other, 5, 3))
    ]
    for turn in count():
        session, seed, adapters, said = open_calls.pop(turn % len(open_calls))
        if isinstance(said, m.ForwardReply):
            assert said.hidden == alone[seed]
        else:
            open_calls.append((session, seed, adapters, session.handle(answer(adapters, asked(said)))))
        if not open_calls:
            break


def test_a_session_may_not_pause_without_end(tenant: TenantSession) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    questions = [asked(tenant.handle(forward(call=call))) for call in range(MAX_PAUSED)]
    assert f"{MAX_PAUSED} have paused" in refusal(tenant.handle(forward(call=MAX_PAUSED)))
    assert "cannot begin" in refusal(tenant.handle(forward(call=0)))  # it has not ended
    assert isinstance(tenant.handle(forward(call=MAX_PAUSED, sites=0)), m.ForwardReply)  # a plain call never pauses
    replies = [converse(tenant, SiteCall(sites, keep=True), question)[0] for question in questions]
    assert all(isinstance(reply, m.ForwardReply) for reply in replies)


# Backwards that do not fit their forwards -----------------------------------------------------------------------------


def test_a_backward_names_the_sites_of_its_forward(tenant: TenantSession) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    bind(tenant, sites[:1], number=2)
    bind(tenant, sites, number=3)
    adapters = SiteCall(sites, keep=True)
    converse(tenant, adapters, tenant.handle(forward()))
    for number in (0, 2):
        assert "the sites of its forward" in refusal(tenant.handle(backward(sites=number)))
    back, _ = converse(tenant, adapters, tenant.handle(backward(sites=3)))  # the same list under a newer number
    assert isinstance(back, m.BackwardReply)
    assert not back.recomputed


def test_a_backward_wants_no_gradient_that_its_forward_did_not_want(tenant: TenantSession) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    adapters = SiteCall(sites, keep=True)
    converse(tenant, adapters, tenant.handle(forward(wanted=False)))
    assert "wants no gradient" in refusal(tenant.handle(backward(wanted=True)))
    back, _ = converse(tenant, adapters, tenant.handle(backward(wanted=False)))
    assert isinstance(back, m.BackwardReply)


def test_a_call_whose_gradient_nobody_wants_is_not_kept(tenant: TenantSession) -> None:
    assert "has no backward" in refusal(tenant.handle(forward(sites=0, wanted=False)))
    assert "has no backward" in refusal(tenant.handle(backward(sites=0, wanted=False, replay=True)))
    assert isinstance(tenant.handle(forward(sites=0, wanted=False, keep=False)), m.ForwardReply)


def test_a_graph_that_begins_inside_is_not_taken_for_a_whole_one(tenant: TenantSession, cloud: Served) -> None:
    """A shape may be measured once; what is kept of a call depends on where its gradients end, too."""
    sites = [site(3, "mlp.down_proj")]
    bind(tenant, sites)
    sizes = []
    for call, wanted in enumerate((False, True, False, True)):
        converse(tenant, SiteCall(sites, keep=True), tenant.handle(forward(call=call, wanted=wanted)))
        sizes.append(cloud.executor.cache.used - sum(sizes))
    assert sizes[0] == sizes[2] < sizes[1] / 2
    assert sizes[1] == sizes[3]


# The end in the middle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_session_that_ends_while_a_call_has_paused_leaves_nothing(cloud: Served, where: str) -> None:
    threads = CallThreads(1, limit=1)  # one thread: while it waits, no other call begins
    sites = q_and_v()
    cloud.executor.cache.evict_all()
    session, other = (cloud.session(each * 16, TENANT, threads) for each in (b"s", b"t"))
    for each in (session, other):
        bind(each, sites)
    if where == "backward":
        converse(session, SiteCall(sites, keep=True), session.handle(forward()))
        asked(session.handle(backward()))
    else:
        asked(session.handle(forward()))
    assert "no thread is free" in refusal(other.handle(forward(keep=False)))
    session.close()
    assert cloud.executor.cache.used == 0
    assert "has not asked" in refusal(session.handle(m.SiteAnswer(m.CallId(1, 1), ())))
    reply, _ = converse(other, SiteCall(sites, keep=False), other.handle(forward(keep=False)))
    assert isinstance(reply, m.ForwardReply)


def test_a_call_that_is_over_leaves_no_activations_in_the_executors_own_copy(
    tenant: TenantSession, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the executor copied of a message is overwritten, also where the call does not come to its end."""
    copies: list[Tensor] = []
    original = type(cloud.executor).copy_inputs

    def own(*args: object, **options: bool) -> object:
        made = original(*args, **options)  # type: ignore[arg-type]  # as it was called
        copies.append(made.hidden)
        return made

    monkeypatch.setattr(type(cloud.executor), "copy_inputs", own)
    bind(tenant, q_and_v())
    for call, keep in enumerate((True, False)):
        question = asked(tenant.handle(forward(call=call, keep=keep)))
        assert copies[-1].any()
        refusal(tenant.handle(m.SiteAnswer(question.id, ())))
        assert not copies[-1].any()
    asked(tenant.handle(forward(call=3)))
    tenant.close()
    assert not copies[-1].any()
