"""Lists of sites: which ones a session takes, what they may take, and which matrices they share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from support.models.tiny import HIDDEN
from support.protocol.site_messages import asked, bind, forward, q_and_v, refusal, site
from support.protocol.wire import TENANT

from isthmus.backbone.runtime import site_host
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.sites.site_spec import Basis, Placement, SiteSpec
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.handler import TenantSession
from isthmus.cloud.session.served_model import Served
from isthmus.protocol import messages as m
from isthmus.protocol.enrolment import Quota

THREADS = CallThreads(1, 16)


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
    return sum(each.untyped_storage().nbytes() for one in tenant.calls.lists._matrices.values() for each in one.each)


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


def test_an_owner_who_wants_no_sites_has_none(cloud: Served) -> None:
    closed = replace(cloud, sites=False).session(b"n" * 16, TENANT, THREADS)
    answer = closed.handle(m.Sites(1, (SiteSpec(2, "self_attn.q_proj"),)))
    assert isinstance(answer, m.Status)
    assert answer.code == m.StatusCode.BAD_REQUEST
    assert "--no-sites" in answer.message


def test_a_basis_from_an_svd_is_computed_once_for_all_sessions(cloud: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = site_host.site_basis

    def counted(name: str, *args: Any, **options: Any) -> Any:
        made.append(name)
        return original(name, *args, **options)

    monkeypatch.setattr(site_host, "site_basis", counted)
    spec = SiteSpec(2, "self_attn.q_proj", Placement.LOW_RANK, rank=4, basis=Basis.SVD)
    sessions = [cloud.session(bytes([number]) * 16, TENANT, CallThreads(1, 16)) for number in range(3)]
    for session in sessions:
        session.handle(m.Sites(1, (spec,)))
    assert len(made) == 1
    matrices = [session.calls.lists.of(1).sites.matrices[0] for session in sessions]
    assert all(each is matrices[0] for each in matrices)
