"""Links as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from isthmus.common.errors import ConfigError
from isthmus.planner.link_spec import LinkSpec


@pytest.mark.parametrize(
    ("text", "bytes_per_s", "rtt_s"),
    [
        ("100mbit,50ms", 12.5e6, 0.05),
        ("1gbit", 125e6, 0.0),
        ("10mbit,200ms", 1.25e6, 0.2),
        ("12.5MB/s,20ms", 12.5e6, 0.02),
        ("500kB/s, 0.5s", 5e5, 0.5),
        ("1GB/s,800us", 1e9, 8e-4),
        ("64kbit,0ms", 8e3, 0.0),
        (" local ", math.inf, 0.0),
    ],
)
def test_a_link_is_a_rate_and_a_round_trip(text: str, bytes_per_s: float, rtt_s: float) -> None:
    link = LinkSpec.parse(text)
    assert link.bytes_per_s == pytest.approx(bytes_per_s)
    assert link.rtt_s == pytest.approx(rtt_s)
    assert link.text == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "100",
        "100mb,50ms",
        "12.5Mb/s",
        "0mbit",
        "0MB/s,5ms",
        "-1mbit",
        "100mbit,50",
        "100mbit,",
        "1mbit,1ms,1ms",
    ],
)
def test_what_is_no_link_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="link") as failure:
        LinkSpec.parse(text)
    assert repr(text) in str(failure.value)


@given(rate=st.integers(1, 10**6), rtt=st.integers(0, 10**4), n_bytes=st.integers(0, 10**9), trips=st.integers(0, 1000))
def test_bytes_and_round_trips_add_up(rate: int, rtt: int, n_bytes: int, trips: int) -> None:
    link = LinkSpec.parse(f"{rate}kB/s,{rtt}ms")
    assert link.seconds(n_bytes, trips) == pytest.approx(n_bytes / (rate * 1e3) + trips * rtt / 1e3)


def test_the_local_link_takes_no_time_of_its_own() -> None:
    assert LinkSpec.parse("local").seconds(10**9, 100) == 0
