"""A tenant's rate and pace."""

from __future__ import annotations

import pytest

from isthmus.cloud.engine.requests import Share
from isthmus.cloud.engine.tenant_account import TenantAccount


def test_a_rate_saves_up_a_second_and_may_be_overdrawn_once() -> None:
    account = TenantAccount(Share(1.0, 10.0), 0.0, 0.0)
    account.refill(100.0)
    assert account.budget == 10.0
    account.budget -= 40
    assert account.overdrawn == pytest.approx(3.0)
    account.refill(103.0)
    assert account.overdrawn == 0.0
    assert TenantAccount(Share(), 0.0, 0.0).overdrawn == 0.0


def test_a_charge_is_by_weight() -> None:
    account = TenantAccount(Share(4.0), 1.0, 0.0)
    account.charge(2.0)
    assert account.virtual_time == 1.5


def test_work_is_paced_by_its_part() -> None:
    account = TenantAccount(Share(), 0.0, 0.0)
    for begun, until in ((10.0, 14.0), (12.0, 18.0), (100.0, 104.0)):
        account.pace(begun, 1.0, 0.25)
        assert account.paced_until == until
