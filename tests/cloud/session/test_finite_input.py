"""NaN and infinity from an edge: the call that brings them is refused, and no other call notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.models.tiny import HIDDEN
from support.protocol.wire import TENANT, unchecked
from torch import Tensor

from isthmus.backbone.sites.site_spec import Placement, SiteSpec
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.batched_calls import handle_batch, step_batch
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Payload, Role, codec_id, decode, encode

FP32 = codec_id("fp32")
SHAPE = (2, 6, HIDDEN)
THREADS = CallThreads(1, 16)
BAD = [torch.nan, torch.inf, -torch.inf]
Q = "self_attn.q_proj"


def session(cloud: Served, number: int = 0) -> TenantSession:
    return cloud.session(bytes([number]) * 16, TENANT, THREADS)


@pytest.fixture
def tenant(cloud: Served) -> TenantSession:
    cloud.executor.cache.evict_all()
    return session(cloud)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sent(tensor: Tensor, role: Role = Role.ACTIVATION, value: float | None = None) -> Payload:
    """A payload whose last number is `value`."""
    changed = tensor.clone()
    if value is not None:
        changed.view(-1)[-1] = value
    return unchecked(changed, "fp32", role)


def forward(value: float | None = None, *, seed: int = 0, sites: int = 0, lease: int = 0) -> m.Forward:
    return m.Forward(
        m.CallId(1, 1), True, sent(tensor(*SHAPE, seed=seed), value=value), None, None, FP32, sites, lease=lease
    )


def backward(value: float | None = None, *, replay: float | None = None, seed: int = 9) -> m.Backward:
    inputs = None if replay is None else m.SpanInputs(sent(tensor(*SHAPE), value=replay))
    return m.Backward(m.CallId(1, 1), sent(tensor(*SHAPE, seed=seed), Role.GRADIENT, value), inputs, FP32)


def refused(answer: m.Message | Exception | None, name: str) -> None:
    assert isinstance(answer, m.Status)
    assert answer.code == m.StatusCode.NON_FINITE
    assert answer.message.startswith(f"{name} of shape")
    assert "Use the same release" in answer.message


@pytest.mark.parametrize("value", BAD)
def test_hidden_states(tenant: TenantSession, cloud: Served, value: float) -> None:
    assert isinstance(tenant.handle(forward()), m.ForwardReply)
    cloud.executor.cache.evict_all()
    refused(tenant.handle(forward(value)), "the hidden states for the cloud's layers")
    assert cloud.executor.cache.used == 0


@pytest.mark.parametrize("value", BAD)
def test_gradients_and_what_is_replayed_for_them(tenant: TenantSession, value: float) -> None:
    tenant.handle(forward())
    refused(tenant.handle(backward(value)), "the gradient for the cloud's layers")
    refused(tenant.handle(backward(replay=value)), "the hidden states for the cloud's layers")
    assert isinstance(tenant.handle(backward()), m.BackwardReply)  # the forward state is still there


def test_a_scale_that_makes_no_number_is_one_of_them(tenant: TenantSession) -> None:
    """It ends the call, where it used to end the session."""
    payload = encode(tensor(*SHAPE), "int8", Role.ACTIVATION)
    scales = torch.full((12,), torch.nan).numpy().tobytes()
    message = replace(forward(), hidden=replace(payload, buffers=(scales, payload.buffers[1])))
    refused(tenant.handle(message), "the hidden states for the cloud's layers")
    assert isinstance(tenant.handle(forward()), m.ForwardReply)


@pytest.mark.parametrize("place", ["down", "up"])
@pytest.mark.parametrize("value", BAD)
def test_leased_weights(tenant: TenantSession, value: float, place: str) -> None:
    tenant.handle(m.Sites(1, (SiteSpec(2, Q, Placement.LEASED),)))
    leased = m.LeasedWeights(sent(tensor(4, HIDDEN)), sent(tensor(HIDDEN, 4)), 0.5)
    good = m.Lease(1, 1, (leased,))
    answer = tenant.handle(good)
    assert isinstance(answer, m.Status)
    assert answer.code == m.StatusCode.OK
    before = tenant.handle(forward(sites=1, lease=1))
    worse = sent(decode(getattr(leased, place)), value=value)
    refused(
        tenant.handle(m.Lease(2, 1, (replace(leased, **{place: worse}),))),
        "a matrix leased for site 2.self_attn.q_proj",
    )
    after = tenant.handle(forward(sites=1, lease=1))  # the lease before is still the one
    assert isinstance(before, m.ForwardReply)
    assert isinstance(after, m.ForwardReply)
    assert after.hidden == before.hidden


@pytest.mark.parametrize("value", BAD)
def test_contributions_and_gradients_of_sites(tenant: TenantSession, cloud: Served, value: float) -> None:
    tenant.handle(m.Sites(1, (SiteSpec(2, Q),)))
    name = "an answer of sites 2.self_attn.q_proj"
    good = sent(tensor(*SHAPE))
    tenant.handle(forward(sites=1))
    refused(tenant.handle(m.SiteAnswer(m.CallId(1, 1), (sent(tensor(*SHAPE), value=value),))), name)
    assert not tenant.calls.begun
    assert cloud.executor.cache.used == 0
    tenant.handle(forward(sites=1))
    assert isinstance(tenant.handle(m.SiteAnswer(m.CallId(1, 1), (good,))), m.ForwardReply)
    assert isinstance(tenant.handle(replace(backward(), sites=1)), m.SiteQuestion)
    refused(tenant.handle(m.SiteAnswer(m.CallId(1, 1), (sent(tensor(*SHAPE), Role.GRADIENT, value),))), name)
    assert not tenant.calls.begun
    assert cloud.executor.cache.used == 0


# What several sessions share ------------------------------------------------------------------------------------------


def hidden_of(answer: m.Message | Exception | None) -> Payload:
    assert isinstance(answer, m.ForwardReply), answer
    return answer.hidden


def gradient_of(answer: m.Message | Exception | None) -> Payload:
    assert isinstance(answer, m.BackwardReply), answer
    assert answer.gradient is not None
    return answer.gradient


def run(cloud: Served, spoil: Callable[[int, m.Message], m.Message]) -> list[list[m.Message | Exception]]:
    """A forward and a backward of three sessions together; `spoil` may change the messages of a session."""
    cloud.executor.cache.evict_all()
    sessions = [session(cloud, number) for number in range(3)]
    answers = []
    for kind in (forward, backward):
        asked = [(each, spoil(number, kind(seed=number))) for number, each in enumerate(sessions)]
        answers.append(handle_batch(asked))  # type: ignore[arg-type]  # of one kind each time
    for each in sessions:
        each.close()
    return answers


@pytest.mark.parametrize("value", [*BAD, 3e38])
def test_a_shared_pass_gives_the_others_the_same_bits(cloud: Served, value: float) -> None:
    """Also where the numbers are finite and run over inside the layers: rows of a pass do not see each other."""
    forwards, backwards = run(cloud, lambda number, message: message)
    layer = cloud.executor.host.span.base.layers[1]
    hook = layer.register_forward_pre_hook(lambda _, args: (args[0].masked_fill(args[0] > 1e38, torch.inf), *args[1:]))

    def spoil(number: int, message: m.Message) -> m.Message:
        if number != 1 or not isinstance(message, m.Forward):
            return message
        everywhere = torch.full(SHAPE, value)
        return replace(message, hidden=sent(everywhere))

    with hook:
        bad, backs = run(cloud, spoil)
    assert isinstance(bad[1], m.Status)
    assert bad[1].code == m.StatusCode.NON_FINITE
    for at in (0, 2):
        assert hidden_of(bad[at]) == hidden_of(forwards[at])
        assert gradient_of(backs[at]) == gradient_of(backwards[at])


@pytest.mark.parametrize("value", [*BAD, 3e38])
def test_a_shared_backward_gives_the_others_the_same_bits(cloud: Served, value: float) -> None:
    _, backwards = run(cloud, lambda number, message: message)

    def spoil(number: int, message: m.Message) -> m.Message:
        if number != 1 or not isinstance(message, m.Backward):
            return message
        return replace(message, gradient=sent(torch.full(SHAPE, value), Role.GRADIENT))

    _, backs = run(cloud, spoil)
    assert isinstance(backs[1], m.Status)
    assert backs[1].code == m.StatusCode.NON_FINITE
    for at in (0, 2):
        assert gradient_of(backs[at]) == gradient_of(backwards[at])


@pytest.mark.parametrize("value", BAD)
def test_calls_with_sites_that_go_on_together(cloud: Served, value: float) -> None:
    def outputs(spoilt: int | None) -> list[m.Message | Exception]:
        cloud.executor.cache.evict_all()
        sessions = [session(cloud, number) for number in range(3)]
        for each in sessions:
            each.handle(m.Sites(1, (SiteSpec(2, Q),)))
        questions = step_batch([(each, forward(sites=1, seed=n)) for n, each in enumerate(sessions)])
        assert all(isinstance(each, m.SiteQuestion) for each in questions)
        answers = [
            m.SiteAnswer(m.CallId(1, 1), (sent(tensor(*SHAPE, seed=n), value=value if n == spoilt else None),))
            for n in range(3)
        ]
        result = step_batch(list(zip(sessions, answers, strict=True)))
        for each in sessions:
            each.close()
        return result

    expected, got = outputs(None), outputs(1)
    refused(got[1], "an answer of sites 2.self_attn.q_proj")
    for at in (0, 2):
        assert hidden_of(got[at]) == hidden_of(expected[at])
