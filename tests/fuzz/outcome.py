"""What came of fuzzing a target: libFuzzer's log, read; the verdict; and the table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_PROGRESS = re.compile(r"^#(\d+)\s+(\w+)\s+cov: (\d+) ft: \d+", re.MULTILINE)
_EXECUTED = re.compile(r"^stat::number_of_executed_units:\s+(\d+)", re.MULTILINE)
_ERROR = re.compile(r"=== Uncaught Python exception: ===\n(.*)|ERROR: libFuzzer: (.*)")


@dataclass(frozen=True, slots=True)
class Log:
    """A run of libFuzzer: executions, edges covered by what it began with and in the end, and the error it ended in."""

    executions: int
    edges_start: int
    edges_end: int
    error: str


def read_log(text: str) -> Log:
    """Read what libFuzzer wrote; zeros where it did not even begin."""
    progress = [(int(count), what, int(edges)) for count, what, edges in _PROGRESS.findall(text)]
    start = next((edges for _, what, edges in progress if what == "INITED"), 0)
    executed = _EXECUTED.search(text)
    executions = int(executed[1]) if executed else max((count for count, _, _ in progress), default=0)
    error = _ERROR.search(text)
    return Log(
        executions,
        start,
        max((edges for _, _, edges in progress), default=0),
        "" if error is None else (error[1] or error[2])[:200],
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one target.

    Attributes:
        target: Its name.
        executions: How often it ran.
        edges_start: Edges of the instrumented code that seeds and corpus cover, libFuzzer's `cov`.
        edges_end: The same at the end.
        lines: Lines of the decoder.
        lines_empty: Those that an empty input reaches.
        lines_reached: Those that seeds and corpus reach.
        floor: Least share of the lines that must be reached.
        corpus: Inputs that the run has added to the seeds and the kept corpus.
        findings: Files with the inputs that the decoder failed at.
        fault: What is wrong; empty if nothing is.
        missed: The lines that are not reached.
    """

    target: str
    executions: int
    edges_start: int
    edges_end: int
    lines: int
    lines_empty: int
    lines_reached: int
    floor: float
    corpus: int
    findings: list[str]
    fault: str
    missed: list[str] = field(default_factory=list, repr=False)

    @property
    def verdict(self) -> str:
        """The fault, or that there is none."""
        return self.fault or ("found, as it must be" if self.target == "planted" else "no finding")


def judged(
    name: str, log: Log, lines: Mapping[str, Any] | None, findings: list[str], corpus: int, *, planted: bool
) -> Outcome:
    """Say what is wrong with a run, if something is.

    Args:
        name: The target.
        log: What libFuzzer said.
        lines: What `fuzz.child lines` printed; None where it failed.
        findings: What libFuzzer left.
        corpus: Inputs that the run has added.
        planted: Whether the target is wrong on purpose, so that a run without a finding is the fault.
    """
    told = lines or {"lines": 0, "empty": 0, "reached": 0, "floor": 0.0, "missed": []}
    fault = ""
    if planted:
        fault = "" if findings else "the planted bug was not found"
        findings = []
    elif findings or log.error:
        fault = f"a finding: {log.error}"
    elif not log.edges_start:
        fault = "it did not begin: see its log"
    elif lines is None:
        fault = "its corpus cannot be replayed: see its file `lines`"
    elif told["reached"] < told["floor"] * told["lines"] or told["reached"] <= told["empty"]:
        fault = f"the corpus reaches {told['reached']} of {told['lines']} lines, {told['floor']:.0%} are needed"
    return Outcome(
        name,
        log.executions,
        log.edges_start,
        log.edges_end,
        told["lines"],
        told["empty"],
        told["reached"],
        told["floor"],
        corpus,
        findings,
        fault,
        told["missed"],
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes for people."""
    rows = [("target", "executions", "edges", "lines of the decoder", "floor", "new inputs", "outcome")]
    for each in outcomes:
        edges, lines = f"{each.edges_start} -> {each.edges_end}", f"{each.lines_empty} -> {each.lines_reached}"
        rows.append(
            (
                each.target,
                str(each.executions),
                edges,
                f"{lines} of {each.lines}",
                f"{each.floor:.0%}",
                str(each.corpus),
                each.verdict,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ((first.ljust(widths[0]), *map(str.rjust, middle, widths[1:-1]), last) for first, *middle, last in rows)
    return "\n".join("  ".join(row) for row in aligned)
