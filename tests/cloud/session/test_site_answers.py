"""Answers to the questions of calls with sites: one that does not fit ends its call and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models.tiny import HIDDEN
from support.protocol.site_messages import (
    answer,
    asked,
    backward,
    bind,
    converse,
    forward,
    q_and_v,
    refusal,
    tensor,
)

from isthmus.backbone.sites.site_call import SiteCall
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import MessageError
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Payload, Role, decode, encode


def payload(
    width: int, *, role: Role = Role.ACTIVATION, rows: int = 2, length: int = 6, codec: str = "fp32"
) -> Payload:
    return encode(tensor(rows, length, width), codec, role)


GOOD_Q, GOOD_V = payload(32), payload(16)


@pytest.mark.parametrize(
    ("tensors", "texts"),
    [
        ((), ["0 contributions for 2 sites"]),
        ((GOOD_Q,), ["1 contributions for 2 sites"]),
        ((GOOD_Q, GOOD_V, GOOD_V), ["3 contributions for 2 sites"]),
        ((GOOD_Q, payload(17)), ["[2, 6, 17]", "2.self_attn.v_proj", "[2, 6, 16]"]),
        ((GOOD_V, GOOD_Q), ["[2, 6, 16]", "2.self_attn.q_proj", "[2, 6, 32]"]),
        ((payload(32, rows=1), GOOD_V), ["[1, 6, 32]", "[2, 6, 32]"]),
        ((GOOD_Q, payload(16, length=5)), ["[2, 5, 16]", "[2, 6, 16]"]),
        ((payload(32, role=Role.GRADIENT), GOOD_V), ["FORWARD", "another role"]),
    ],
)
def test_contributions_that_do_not_fit_end_the_call_and_no_more(
    tenant: TenantSession, cloud: Served, tensors: tuple[Payload, ...], texts: list[str]
) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    question = asked(tenant.handle(forward()))
    text = refusal(tenant.handle(m.SiteAnswer(question.id, tensors)))
    assert all(each in text for each in texts), text
    assert "has not asked" in refusal(tenant.handle(m.SiteAnswer(question.id, (GOOD_Q, GOOD_V))))
    assert cloud.executor.cache.used == 0
    reply, _ = converse(tenant, SiteCall(sites, keep=False), tenant.handle(forward(keep=False)))
    assert isinstance(reply, m.ForwardReply)


GRADIENT = payload(HIDDEN, role=Role.GRADIENT)


@pytest.mark.parametrize(
    ("wanted", "tensors", "texts"),
    [
        (True, (), ["0 gradients for 2 sites"]),
        (True, (GRADIENT,) * 3, ["3 gradients for 2 sites"]),
        (True, (GRADIENT, payload(31, role=Role.GRADIENT)), ["[2, 6, 31]", "[2, 6, 32]"]),
        (True, (payload(HIDDEN, role=Role.GRADIENT, rows=1),), ["[1, 6, 32]"]),
        (True, (GOOD_Q, GRADIENT), ["BACKWARD", "another role"]),
        (False, (GRADIENT,), ["1 gradients"]),
    ],
)
def test_gradients_that_do_not_fit_end_the_call_and_no_more(
    tenant: TenantSession, cloud: Served, wanted: bool, tensors: tuple[Payload, ...], texts: list[str]
) -> None:
    sites = q_and_v()[:2]
    bind(tenant, sites)
    adapters = SiteCall(sites, keep=True)
    converse(tenant, adapters, tenant.handle(forward(wanted=wanted)))
    question = asked(tenant.handle(backward(wanted=wanted)))
    text = refusal(tenant.handle(m.SiteAnswer(question.id, tensors)))
    assert all(each in text for each in texts), text
    assert cloud.executor.cache.used == 0
    said = tenant.handle(backward(wanted=wanted))
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.ACTIVATIONS_LOST  # what has begun is gone, and can be repeated
    back, _ = converse(tenant, adapters, tenant.handle(backward(wanted=wanted, replay=True)))
    assert isinstance(back, m.BackwardReply)


def test_one_gradient_may_stand_for_all_sites_of_a_group(tenant: TenantSession) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    results = []
    for call, summed in enumerate((False, True)):
        adapters = SiteCall(sites, keep=True, summed=summed)
        converse(tenant, adapters, tenant.handle(forward(call=call)))
        question = asked(tenant.handle(backward(call=call)))
        assert len(answer(adapters, question).tensors) == (1 if summed else 2)
        back, _ = converse(tenant, adapters, question)
        assert isinstance(back, m.BackwardReply)
        assert back.gradient is not None
        results.append(decode(back.gradient))
    exact, summed_up = results
    assert not torch.equal(exact, summed_up)
    assert (exact - summed_up).norm() <= 1e-6 * exact.norm()


def test_an_answer_without_a_question_is_refused(tenant: TenantSession) -> None:
    bind(tenant, q_and_v())
    assert "call 4 has not asked" in refusal(tenant.handle(m.SiteAnswer(m.CallId(1, 4), (GOOD_Q,))))
    question = asked(tenant.handle(forward()))
    assert "attempt 2" in refusal(tenant.handle(m.SiteAnswer(m.CallId(1, 1, 2), (GOOD_Q, GOOD_V))))
    assert "has not asked" in refusal(tenant.handle(m.SiteAnswer(question.id, (GOOD_Q, GOOD_V))))


def test_an_answer_that_is_no_tensor_breaks_the_session_and_leaves_nothing(tenant: TenantSession) -> None:
    bind(tenant, q_and_v())
    question = asked(tenant.handle(forward()))
    bad = payload(200, codec="int4-outliers")
    channels = torch.full((2,), -1, dtype=torch.int32).numpy().tobytes()
    with pytest.raises(MessageError, match="do not ascend"):
        tenant.handle(m.SiteAnswer(question.id, (replace(bad, buffers=(channels, *bad.buffers[1:])), GOOD_V)))
    assert "has not asked" in refusal(tenant.handle(m.SiteAnswer(question.id, (GOOD_Q, GOOD_V))))
