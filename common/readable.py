"""Numbers for people. What a program reads (`--json`) is exact and does not come through here."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping


def size(n_bytes: float) -> str:
    """Bytes for people: 1.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def period(seconds: float) -> str:
    """A time for people, of seconds: 31.4 ms, 12.0 s, 9.5 minutes, 3.2 hours, 4.1 days."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    for unit, length, below in (("s", 1, 120), ("minutes", 60, 7200), ("hours", 3600, 172_800)):
        if seconds < below:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def date(when: float) -> str:
    """A date and a time of Unix seconds, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))


def moment(when: float) -> str:
    """A date and a time of Unix seconds, to the second, in this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(when))


def labelled(name: str, value: object) -> tuple[str, str]:
    """A name and its value for people: of a number, the unit that the name ends with, `_bytes` or `_s`, moves to it."""
    label = name.replace("_", " ")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return label, str(value)
    if name.endswith("_bytes"):
        return label.removesuffix(" bytes"), size(value)
    if name.endswith("_s") and not name.endswith("_per_s"):
        return label.removesuffix(" s"), period(value)
    if isinstance(value, int):
        return label, str(value)
    return label, f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def lines(values: Mapping[str, object], width: int) -> Iterable[str]:
    """A line for each value, after its name in `width` columns."""
    for label, text in (labelled(name, value) for name, value in values.items()):
        yield f"{label:{width}} {text}"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A question for whoever mistyped one of the known names; None where none of them is like it."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else None


def bracketed(host: str) -> str:
    """A host as it is written before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host
