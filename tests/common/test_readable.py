"""Numbers for people."""

from __future__ import annotations

from isthmus.common.readable import date, labelled, lines, period, size


def test_bytes_and_times_have_units() -> None:
    assert [size(n) for n in (0, 1023, 1024, 368170240, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "351.1 MiB",
        "5.0 GiB",
    ]
    times = [period(s) for s in (0.0314, 12, 119.9, 567.5, 7199, 7200, 172_800)]
    assert times == ["31.4 ms", "12.0 s", "119.9 s", "9.5 minutes", "120.0 minutes", "2.0 hours", "2.0 days"]
    assert date(1_800_000_000) == "2027-01-15 08:00 UTC"


def test_a_result_is_told_by_the_unit_in_its_names_and_everything_else_as_it_is() -> None:
    result = {"peak_bytes": 3 << 20, "wall_s": 1.737586259841919, "tokens_per_s": 1234.56, "equal": True}
    result |= {"share": 0.123456, "name": "tiny", "losses": [1.5, 2.25], "steps": 1000}
    expected = ["peak 3.0 MiB", "wall 1.7 s", "tokens per s 1,235", "equal True", "share 0.1235", "name tiny"]
    assert [" ".join(line.split()) for line in lines(result, 8)] == [*expected, "losses [1.5, 2.25]", "steps 1000"]
    assert labelled("missing_bytes", None) == ("missing bytes", "None")
