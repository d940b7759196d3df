"""A tenant's session with sites inside the span: lists, questions, answers that do not fit, and ends in the middle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
import torch
from support.clouds import served
from support.tiny import HIDDEN, tiny_checkpoint
from support.wire import TENANT
from torch import Tensor, nn

from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import Basis, Placement, SiteSpec
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.cloud.session.site_calls import MAX_PAUSED
from isthmus.common.errors import MessageError
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.tensor_codecs import Payload, Role, codec_id, decode, encode

FP32 = codec_id("fp32")
SHAPE = (2, 6, HIDDEN)
THREADS = CallThreads(1)
WIDTHS = {"self_attn.q_proj": 32, "self_attn.v_proj": 16, "mlp.down_proj": 32, "": HIDDEN}


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Served:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sites")
    return served(tiny_checkpoint("llama", folder / "model"), folder / "parts", max_tokens=64)


@pytest.fixture
def tenant(cloud: Served) -> TenantSession:
    cloud.executor.evict_all()
    return cloud.session(b"s" * 16, TENANT, THREADS)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(layer: int, part: str) -> Site:
    """An adapter that is a matrix of its own."""
    n_in = 64 if part == "mlp.down_proj" else HIDDEN
    module = nn.Linear(n_in, WIDTHS[part], bias=False)
    with torch.no_grad():
        module.weight.copy_(0.1 * tensor(WIDTHS[part], n_in, seed=layer + len(part)))
    return Site(f"model.layers.{layer}.{part}", SiteSpec(layer, part), module)


def q_and_v() -> list[Site]:
    return [site(layer, part) for layer in (2, 3) for part in ("self_attn.q_proj", "self_attn.v_proj")]


def bind(tenant: TenantSession, sites: Sequence[Site], number: int = 1) -> m.Message | None:
    return tenant.handle(m.Sites(number, tuple(SiteSpec(each.layer, each.part) for each in sites)))


def forward(*, call: int = 1, keep: bool = True, sites: int = 1, wanted: bool = True, seed: int = 0) -> m.Forward:
    hidden = encode(tensor(*SHAPE, seed=seed), "fp32", Role.ACTIVATION)
    return m.Forward(m.CallId(1, call), keep, hidden, None, None, FP32, sites, wanted)


def backward(*, call: int = 1, sites: int = 1, wanted: bool = True, replay: bool = False) -> m.Backward:
    gradient = encode(tensor(*SHAPE, seed=9), "fp32", Role.GRADIENT)
    inputs = m.SpanInputs(encode(tensor(*SHAPE), "fp32", Role.ACTIVATION)) if replay else None
    return m.Backward(m.CallId(1, call, 3), gradient, inputs, FP32, sites, wanted)


def answer(visitor: SiteCall, question: m.SiteQuestion) -> m.SiteAnswer:
    tensors = [decode(each).clone() for each in question.tensors]
    if question.phase in (m.SitePhase.FORWARD, m.SitePhase.AGAIN):
        given: Sequence[Tensor | None] = visitor.forward(
            question.sites, [tensors[0]] * len(question.sites) if tensors else None
        )
        role = Role.ACTIVATION
    else:
        given = visitor.backward(question.sites, tensors, wanted=question.phase == m.SitePhase.BACKWARD)
        role = Role.GRADIENT
    return m.SiteAnswer(question.id, tuple(encode(each, "fp32", role) for each in given if each is not None))


def converse(tenant: TenantSession, visitor: SiteCall, said: m.Message | None) -> tuple[m.Message | None, list[str]]:
    """Answer until there is no further question; returns what came then, and the phases of the questions."""
    phases = []
    while isinstance(said, m.SiteQuestion):
        phases.append(said.phase.name)
        said = tenant.handle(answer(visitor, said))
    return said, phases


def asked(said: m.Message | None) -> m.SiteQuestion:
    assert isinstance(said, m.SiteQuestion)
    return said


def refusal(said: m.Message | None) -> str:
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.BAD_REQUEST
    return said.message


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


# Lists ----------------------------------------------------------------------------------------------------------------


def test_a_list_of_sites_is_taken(tenant: TenantSession) -> None:
    said = bind(tenant, [site(2, "self_attn.q_proj"), site(3, "")])
    assert said == m.Status(m.StatusCode.OK, None, "2 sites")


@pytest.mark.parametrize(
    ("entries", "texts"),
    [
        ([SiteSpec(2, "self_attn.nothing")], ["2.self_attn.nothing", "self_attn.q_proj", "mlp.down_proj"]),
        ([SiteSpec(2, "input_layernorm")], ["2.input_layernorm"]),  # no linear
        ([SiteSpec(2, "self_attn")], ["2.self_attn"]),
        ([SiteSpec(1, "self_attn.q_proj")], ["1.self_attn.q_proj", "2:4"]),
        ([SiteSpec(4, "")], ["layer 4", "2:4"]),
        ([SiteSpec(2, "mlp.up_proj")] * 2, ["2.mlp.up_proj", "twice"]),
        ([SiteSpec(3, "")] * 2, ["layer 3", "twice"]),
    ],
)
def test_a_list_that_does_not_fit_the_span_is_refused(
    tenant: TenantSession, entries: list[SiteSpec], texts: list[str]
) -> None:
    text = refusal(tenant.handle(m.Sites(1, tuple(entries))))
    assert all(each in text for each in texts), text
    assert "no list 1" in refusal(tenant.handle(forward()))


def test_a_call_names_a_list_of_its_own_session(tenant: TenantSession, cloud: Served) -> None:
    bind(tenant, q_and_v(), number=7)
    assert "no list 1" in refusal(tenant.handle(forward(sites=1)))
    other = cloud.session(b"t" * 16, TENANT, THREADS)
    assert "no list 7" in refusal(other.handle(forward(sites=7)))
    assert isinstance(tenant.handle(forward(sites=0)), m.ForwardReply)
    assert asked(tenant.handle(forward(sites=7))).sites == (0, 1)
    tenant.close()


def test_of_too_many_lists_the_oldest_is_forgotten(tenant: TenantSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_LISTS", 3)
    for number in (1, 2, 3, 2, 1):  # repeated ones take no new place
        bind(tenant, [site(2, "self_attn.q_proj")], number)
    bind(tenant, [site(3, "self_attn.q_proj")], 4)
    assert "no list 1" in refusal(tenant.handle(forward(sites=1)))
    for call, number in enumerate((2, 3, 4)):
        assert isinstance(tenant.handle(forward(call=call, sites=number)), m.SiteQuestion)
    tenant.close()


# What lists take ------------------------------------------------------------------------------------------------------


def full_rank(cloud: Served, seed: int, basis: Basis = Basis.SEEDED) -> tuple[SiteSpec, ...]:
    """Every linear of a layer at the highest rank that fits it, and the layer's tap."""
    parts = [part for group in cloud.executor.host.groups for layer, part in group if layer == 3]
    shapes = {part: cloud.executor.host.widths(SiteSpec(3, part)) for part in parts}
    low = [SiteSpec(3, part, Placement.LOW_RANK, min(shape), seed, basis) for part, shape in shapes.items()]
    return (*low, SiteSpec(3, "", Placement.TAP, HIDDEN, seed))


def bytes_of(cloud: Served, specs: Sequence[SiteSpec]) -> int:
    return sum(map(cloud.executor.host.matrix_bytes, specs))


def held_bytes(tenant: TenantSession) -> int:
    """What there is of the session's matrices."""
    return sum(each.untyped_storage().nbytes() for one in tenant.calls._matrices.values() for each in one.each)


def with_quota(cloud: Served, nbytes: int) -> TenantSession:
    return cloud.session(b"s" * 16, replace(TENANT, quota=Quota(max_inflight_bytes=nbytes)), THREADS)


def over_quota(said: m.Message | None) -> str:
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.OVER_QUOTA
    return said.message


@pytest.mark.parametrize("basis", Basis)
@pytest.mark.parametrize("lower", [0, 5])
def test_bytes_of_matrices_are_known_before_they_are_made(cloud: Served, basis: Basis, lower: int) -> None:
    host = cloud.executor.host
    for spec in full_rank(cloud, 1, basis):
        made = host.matrices(replace(spec, rank=spec.rank - lower))
        assert made is not None
        nbytes = sum(each.untyped_storage().nbytes() for each in made.each)
        assert host.matrix_bytes(replace(spec, rank=spec.rank - lower)) == nbytes
    for spec in (SiteSpec(3, "mlp.down_proj"), SiteSpec(3, "", Placement.TAP)):
        assert host.matrices(spec) is None
        assert host.matrix_bytes(spec) == 0


@pytest.mark.parametrize("basis", Basis)
def test_lists_that_take_more_than_the_tenant_may_have_are_refused_before_anything_is_made(
    cloud: Served, basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bytes_of(cloud, full_rank(cloud, 1, basis))
    tenant = with_quota(cloud, 2 * one + one // 2)
    for number in (1, 2):
        tenant.handle(m.Sites(number, full_rank(cloud, number, basis)))
    assert held_bytes(tenant) == 2 * one
    with monkeypatch.context() as patch:
        patch.setattr(SiteHost, "matrices", lambda *_: pytest.fail("it was made"))
        said = over_quota(tenant.handle(m.Sites(3, full_rank(cloud, 3, basis))))
        assert f"{3 * one} bytes, over the {2 * one + one // 2}" in said
        assert "max-bytes-in-flight" in said
        assert "lower rank" in said
        assert "no list 3" in refusal(tenant.handle(forward(sites=3)))
        again = tenant.handle(m.Sites(3, full_rank(cloud, 2, basis)[:3]))  # what is there is not made twice
    assert isinstance(again, m.Status)
    assert again.code == m.StatusCode.OK
    assert held_bytes(tenant) == 2 * one
    assert asked(tenant.handle(forward(sites=3))).sites
    tenant.close()


def test_matrices_of_a_list_that_is_gone_count_as_long_as_a_call_holds_them(cloud: Served) -> None:
    one = bytes_of(cloud, full_rank(cloud, 1))
    tenant = with_quota(cloud, 2 * one)
    for call in (1, 2):
        tenant.handle(m.Sites(1, full_rank(cloud, call)))
        asked(tenant.handle(forward(call=call)))
    over_quota(tenant.handle(m.Sites(1, full_rank(cloud, 3))))
    assert held_bytes(tenant) == 2 * one
    tenant.calls.drop(1)
    deadline = time.monotonic() + 10
    while held_bytes(tenant) > one:  # its thread is about to leave
        assert time.monotonic() < deadline
        time.sleep(0.01)
    said = tenant.handle(m.Sites(1, full_rank(cloud, 3)))
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.OK
    tenant.close()


def test_a_rank_that_does_not_fit_is_refused(tenant: TenantSession) -> None:
    too_high = SiteSpec(3, "self_attn.v_proj", Placement.LOW_RANK, 17)
    assert "rank 17 does not fit" in refusal(tenant.handle(m.Sites(1, (too_high,))))
    assert held_bytes(tenant) == 0


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
    visitor = SiteCall(sites, keep=True)
    reply, phases = converse(tenant, visitor, tenant.handle(forward()))
    groups = len({(layer, part.split("_")[0]) for layer, part in places})  # q and v share their input
    assert phases == ["FORWARD"] * groups
    back, phases = converse(tenant, visitor, tenant.handle(backward()))
    assert phases == ["BACKWARD"] * groups
    assert isinstance(reply, m.ForwardReply)
    assert isinstance(back, m.BackwardReply)
    assert (reply.id, back.id) == (m.CallId(1, 1), m.CallId(1, 1, 3))
    assert back.gradient is not None
    mine = [decode(reply.hidden), decode(back.gradient), *visitor.gradients()]
    for got, expected in zip(mine, directly(cloud, sites, tensor(*SHAPE), tensor(*SHAPE, seed=9)), strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert cloud.executor.used_bytes == 0


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
        cloud.executor.release(b"s" * 16)
    kept, plain = replies
    assert isinstance(kept, m.ForwardReply)
    assert isinstance(plain, m.ForwardReply)
    assert kept.hidden == plain.hidden
    assert cloud.executor.used_bytes == 0


def test_what_nothing_below_needs_is_not_asked_for(tenant: TenantSession, cloud: Served) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    exact = SiteCall(sites, keep=True)
    converse(tenant, exact, tenant.handle(forward()))
    converse(tenant, exact, tenant.handle(backward()))
    visitor = SiteCall(sites, keep=True)
    converse(tenant, visitor, tenant.handle(forward(call=2, wanted=False)))
    back, phases = converse(tenant, visitor, tenant.handle(backward(call=2, wanted=False)))
    assert phases == ["BACKWARD", "BACKWARD_ONLY"]
    assert isinstance(back, m.BackwardReply)
    assert back.gradient is None
    for mine, expected in zip(visitor.gradients(), exact.gradients(), strict=True):
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
    visitor = SiteCall(sites, keep=True)
    monkeypatch.setattr(cloud.executor.cache, "budget", 0 if lost else tensor(*SHAPE).nbytes)
    converse(tenant, visitor, tenant.handle(forward(wanted=wanted)))
    if lost:
        said = tenant.handle(backward(wanted=wanted))
        assert isinstance(said, m.Status)
        assert said.code == m.StatusCode.ACTIVATIONS_LOST
    back, phases = converse(tenant, visitor, tenant.handle(backward(replay=lost, wanted=wanted)))
    assert phases == ["AGAIN", "AGAIN", "BACKWARD", "BACKWARD" if wanted else "BACKWARD_ONLY"]
    assert isinstance(back, m.BackwardReply)
    assert isinstance(expected, m.BackwardReply)
    assert back.recomputed
    assert back.gradient == expected.gradient
    for mine, theirs in zip(visitor.gradients(), exact.gradients(), strict=True):
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
        session, seed, visitor, said = open_calls.pop(turn % len(open_calls))
        if isinstance(said, m.ForwardReply):
            assert said.hidden == alone[seed]
        else:
            open_calls.append((session, seed, visitor, session.handle(answer(visitor, asked(said)))))
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


# Answers that do not fit ----------------------------------------------------------------------------------------------


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
    assert cloud.executor.used_bytes == 0
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
    visitor = SiteCall(sites, keep=True)
    converse(tenant, visitor, tenant.handle(forward(wanted=wanted)))
    question = asked(tenant.handle(backward(wanted=wanted)))
    text = refusal(tenant.handle(m.SiteAnswer(question.id, tensors)))
    assert all(each in text for each in texts), text
    assert cloud.executor.used_bytes == 0
    said = tenant.handle(backward(wanted=wanted))
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.ACTIVATIONS_LOST  # what has begun is gone, and can be repeated
    back, _ = converse(tenant, visitor, tenant.handle(backward(wanted=wanted, replay=True)))
    assert isinstance(back, m.BackwardReply)


def test_one_gradient_may_stand_for_all_sites_of_a_group(tenant: TenantSession) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    results = []
    for call, summed in enumerate((False, True)):
        visitor = SiteCall(sites, keep=True, summed=summed)
        converse(tenant, visitor, tenant.handle(forward(call=call)))
        question = asked(tenant.handle(backward(call=call)))
        assert len(answer(visitor, question).tensors) == (1 if summed else 2)
        back, _ = converse(tenant, visitor, question)
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


# Backwards that do not fit their forwards -----------------------------------------------------------------------------


def test_a_backward_names_the_sites_of_its_forward(tenant: TenantSession) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    bind(tenant, sites[:1], number=2)
    bind(tenant, sites, number=3)
    visitor = SiteCall(sites, keep=True)
    converse(tenant, visitor, tenant.handle(forward()))
    for number in (0, 2):
        assert "the sites of its forward" in refusal(tenant.handle(backward(sites=number)))
    back, _ = converse(tenant, visitor, tenant.handle(backward(sites=3)))  # the same list under a newer number
    assert isinstance(back, m.BackwardReply)
    assert not back.recomputed


def test_a_backward_wants_no_gradient_that_its_forward_did_not_want(tenant: TenantSession) -> None:
    sites = q_and_v()
    bind(tenant, sites)
    visitor = SiteCall(sites, keep=True)
    converse(tenant, visitor, tenant.handle(forward(wanted=False)))
    assert "wants no gradient" in refusal(tenant.handle(backward(wanted=True)))
    back, _ = converse(tenant, visitor, tenant.handle(backward(wanted=False)))
    assert isinstance(back, m.BackwardReply)


def test_a_call_whose_gradient_nobody_wants_is_not_kept(tenant: TenantSession) -> None:
    assert "has no backward" in refusal(tenant.handle(forward(sites=0, wanted=False)))
    assert "has no backward" in refusal(tenant.handle(backward(sites=0, wanted=False, replay=True)))
    assert isinstance(tenant.handle(forward(sites=0, wanted=False, keep=False)), m.ForwardReply)


def test_a_graph_that_begins_inside_is_not_taken_for_a_whole_one(tenant: TenantSession, cloud: Served) -> None:
    """The stash measures a shape once; what is kept of a call depends on where its gradients end, too."""
    sites = [site(3, "mlp.down_proj")]
    bind(tenant, sites)
    sizes = []
    for call, wanted in enumerate((False, True, False, True)):
        converse(tenant, SiteCall(sites, keep=True), tenant.handle(forward(call=call, wanted=wanted)))
        sizes.append(cloud.executor.used_bytes - sum(sizes))
    assert sizes[0] == sizes[2] < sizes[1] / 2
    assert sizes[1] == sizes[3]


# The end in the middle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_session_that_ends_while_a_call_has_paused_leaves_nothing(cloud: Served, where: str) -> None:
    threads = CallThreads(1, limit=1)  # one thread: while it waits, no other call begins
    sites = q_and_v()
    cloud.executor.evict_all()
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
    assert cloud.executor.used_bytes == 0
    assert "has not asked" in refusal(session.handle(m.SiteAnswer(m.CallId(1, 1), ())))
    reply, _ = converse(other, SiteCall(sites, keep=False), other.handle(forward(keep=False)))
    assert isinstance(reply, m.ForwardReply)


def test_a_call_that_is_over_leaves_no_activations_in_the_executors_own_copy(
    tenant: TenantSession, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the executor copied of a message is overwritten, also where the call does not come to its end."""
    copies: list[Tensor] = []
    original = type(cloud.executor)._own

    def own(*args: object, **options: bool) -> object:
        made = original(*args, **options)  # type: ignore[arg-type]  # as it was called
        copies.append(made.hidden)
        return made

    monkeypatch.setattr(type(cloud.executor), "_own", own)
    bind(tenant, q_and_v())
    for call, keep in enumerate((True, False)):
        question = asked(tenant.handle(forward(call=call, keep=keep)))
        assert copies[-1].any()
        refusal(tenant.handle(m.SiteAnswer(question.id, ())))
        assert not copies[-1].any()
    asked(tenant.handle(forward(call=3)))
    tenant.close()
    assert not copies[-1].any()


def test_an_owner_who_wants_no_sites_has_none(cloud: Served) -> None:
    closed = replace(cloud, sites=False).session(b"n" * 16, TENANT, THREADS)
    answer = closed.handle(m.Sites(1, (SiteSpec(2, "self_attn.q_proj"),)))
    assert isinstance(answer, m.Status)
    assert answer.code == m.StatusCode.BAD_REQUEST
    assert "--no-sites" in answer.message
