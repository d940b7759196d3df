"""What became of the cases of `openai_conformance`: counts, a table of 80 columns, and what is missing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROW = "{:<39}{:>7}{:>7}{:>8}{:>9}{:>4}{:>6}"
HEAD = ("operation", "cases", "first", "mended", "distinct", "5xx", "fail")


@dataclass
class Tally:
    """What became of an operation's cases.

    Attributes:
        takes: Whether the operation has any parameter or body; without one, all of its cases are the same.
        first, mended: Valid cases that were accepted (2xx) as they were drawn, and after a field was mended.
        distinct: What was accepted, once each: parameters and body, written in one way.
    """

    takes: bool = True
    first: int = 0
    mended: int = 0
    distinct: set[str] = field(default_factory=set)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """How many were sent."""
        return self.statuses.total()

    @property
    def errors(self) -> int:
        """How many were answered by 5xx."""
        return sum(count for status, count in self.statuses.items() if status >= 500)

    def accept(self, case: Any, *, mended: bool) -> None:
        """Count a valid case that was accepted."""
        self.mended += mended
        self.first += not mended
        said = [case.path_parameters or {}, case.query or {}, case.body]
        self.distinct.add(json.dumps(said, sort_keys=True, default=repr))

    def row(self) -> dict[str, int]:
        """Its counts, by the table's heads."""
        counts = (self.sent, self.first, self.mended, len(self.distinct), self.errors, len(self.failures))
        return dict(zip(HEAD[1:], counts, strict=True))


def missing(tallies: Mapping[str, Tally], distinct: int, in_all: int) -> list[str]:
    """What a run lacks, a line each; nothing where it is good.

    Args:
        distinct: Distinct accepted cases that each operation has at least; one is enough for one that takes nothing.
        in_all: Cases of all operations together at least.
    """
    found = []
    for label, tally in tallies.items():
        wanted = distinct if tally.takes else min(distinct, 1)
        if len(tally.distinct) < wanted:
            found.append(f"{label}: {len(tally.distinct)} distinct cases were accepted, and {wanted} are wanted")
        if tally.errors:
            found.append(f"{label}: {tally.errors} cases were answered by 5xx")
        if tally.failures:
            found.append(f"{label}: {len(tally.failures)} cases failed")
    sent = sum(tally.sent for tally in tallies.values())
    if sent < in_all:
        found.append(f"{sent} cases were sent, and {in_all} are wanted")
    return found


def table(tallies: Mapping[str, Tally]) -> str:
    """The counts, a line for each operation."""
    lines = [ROW.format(*HEAD)]
    total: Counter[str] = Counter()
    for label, tally in tallies.items():
        total.update(tally.row())
        lines.append(ROW.format(re.sub(r"\{\w+\}", "{id}", label), *tally.row().values()))
    lines.append(ROW.format("all", *(total[name] for name in HEAD[1:])))
    alike = [label for label, tally in tallies.items() if not tally.takes]
    lines += [f"{label} takes nothing, so that all its cases are the same." for label in alike]
    return "\n".join(lines)


def tree(tallies: Mapping[str, Tally], lacks: list[str]) -> dict[str, Any]:
    """The same for programs: `operations`, each with the table's columns, and `missing`."""
    rows = [
        {"operation": label, **tally.row(), "takes_nothing": not tally.takes, "failures": tally.failures}
        for label, tally in tallies.items()
    ]
    return {"operations": rows, "cases": sum(tally.sent for tally in tallies.values()), "missing": lacks}
