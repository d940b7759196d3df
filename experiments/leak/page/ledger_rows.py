"""The rows of a ledger as figures and page show them: what the strongest attack got in each, and at what price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Measure = Literal["token_accuracy", "rare_accuracy", "secret_recall", "label_accuracy"]

SMALL_LOSS = 1.03
"""The loss over the undefended run's up to which a defence counts as one that costs little."""
HALF = 0.5
MISSING = "\u2013"
"""Stands for a number that was not measured."""


class Value(NamedTuple):
    """A measured number, with its 95 % interval where it has one, and the attack that got it."""

    value: float
    low: float | None = None
    high: float | None = None
    attack: str = ""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """A row of the grid.

    Attributes:
        name: As the ledger calls it, with the data where the ledger has it on several.
        runs: The ledger's entries, one for each attack.
    """

    name: str
    runs: tuple[Mapping[str, Any], ...]

    def common(self, key: str) -> Any:
        """What all entries say of the row, None where none says it."""
        return next((run[key] for run in self.runs if run.get(key) is not None), None)

    def worst(self, measure: Measure) -> Value | None:
        """What the strongest attack got; None where no attack applies or none was measured."""
        values = [value for run in self.runs if (value := measured(run, measure)) is not None]
        return max(values, key=lambda each: each.value, default=None)

    @property
    def loss_ratio(self) -> float | None:
        """Task loss over that of the undefended split run of the same plan."""
        value = self.common("task_loss_ratio")
        return None if value is None else float(value)

    @property
    def blind(self) -> float:
        """What somebody gets of the tokens who sees no traffic at all."""
        priors = (self.common("prior_free_accuracy"), self.common("prior_unigram_accuracy"))
        return max((float(prior) for prior in priors if prior is not None), default=0.0)

    @property
    def exposed(self) -> float | None:
        """Tokens that the cloud gets: by the strongest attack, or where nothing is sent, those of the blind guess."""
        worst = self.worst("token_accuracy")
        if worst is not None:
            return worst.value
        return self.blind if self.common("mode") == "emulator" else None


def measured(run: Mapping[str, Any], name: str) -> Value | None:
    """A number of an entry with its interval; None where it was not measured."""
    value = run.get(name)
    if value is None:
        return None
    low, high = run.get(f"{name}_interval") or (None, None)
    return Value(float(value), low, high, str(run.get("attack") or ""))


def ledger_rows(ledger: Mapping[str, Any]) -> list[LedgerRow]:
    """The rows in the ledger's order."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in ledger.get("runs") or ():
        grouped.setdefault((str(run.get("row")), str(run.get("data") or "")), []).append(run)
    names = [name for name, _ in grouped]
    return [
        LedgerRow(f"{name} ({data})" if names.count(name) > 1 else name, tuple(runs))
        for (name, data), runs in grouped.items()
    ]


def frontier(rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Rows of which no other one has both fewer exposed tokens and a lower loss, from the lowest loss on."""
    found: list[LedgerRow] = []
    placed = [(row.loss_ratio, row.exposed, row) for row in rows]
    known = [(loss, exposed, row) for loss, exposed, row in placed if loss is not None and exposed is not None]
    for _, exposed, row in sorted(known, key=lambda each: each[:2]):
        least = min((each.exposed or 0.0 for each in found), default=float("inf"))
        if exposed < least:
            found.append(row)
    return found


def frontier_sentence(rows: Sequence[LedgerRow]) -> str:
    """What the ledger says of defences, whichever way it falls."""
    sending = [row for row in rows if row.common("mode") != "emulator" and row.exposed is not None]
    trained = [row for row in sending if row.loss_ratio is not None]
    if not trained:
        return "No row of this ledger has both an attack on tokens and a task loss, so it has no frontier."
    near = [row for row in trained if (row.loss_ratio or 0) <= SMALL_LOSS]
    parts = []
    if near:
        least = min(near, key=lambda row: row.exposed or 0)
        parts.append(
            f"Of the {len(near)} rows that send activations and whose loss is at most {SMALL_LOSS - 1:.0%} above the "
            f"undefended run's, the least exposed one ({least.name}) still gives up {percent(least.exposed)} of the "
            "tokens."
        )
    half = [row for row in trained if (row.exposed or 0) < HALF]
    if half:
        best = min(half, key=lambda row: row.loss_ratio or 0)
        parts.append(
            f"To keep the strongest attack below half of the tokens costs {best.loss_ratio:.2f} times the loss "
            f"({best.name})."
        )
    else:
        parts.append("No row that sends activations keeps the strongest attack below half of the tokens.")
    for row in rows:
        if row.common("mode") == "emulator" and row.loss_ratio is not None:
            parts.append(f"{row.name} sends no activations, at {row.loss_ratio:.2f} times the loss.")
    return " ".join(parts)


def modes(rows: Sequence[LedgerRow]) -> list[tuple[str, LedgerRow]]:
    """One row for each way of training that a reader can choose, with its name; those that the ledger has."""

    def of(mode: str, *, front: str = "known", defended: bool = False) -> list[LedgerRow]:
        found = [
            row
            for row in rows
            if row.common("mode") == mode
            and any((run.get("front") or "known") == front for run in row.runs)
            and ((row.common("defence") or "none") != "none") == defended
        ]
        # A row whose task was trained and scored says more than one that was only attacked.
        return sorted(found, key=lambda row: row.loss_ratio is None)

    cheap = [row for row in of("split", defended=True) if (row.loss_ratio or float("inf")) <= SMALL_LOSS]
    best = sorted(cheap, key=lambda row: 1.0 if row.exposed is None else row.exposed)
    choices = [
        ("Split", of("split")),
        ("Private front", of("split", front="tuned")),
        ("Defence at ≤ 3 % loss", best),
        ("Top layers only", of("top-only")),
        ("Emulator", of("emulator")),
    ]
    return [(title, found[0]) for title, found in choices if found]


def percent(value: float | None) -> str:
    """A share in percent; with one decimal where rounding would say all or nothing of what is neither."""
    if value is None:
        return MISSING
    near_end = 0 < value < 0.005 or 0.995 <= value < 1
    return f"{100 * min(max(value, 0.001), 0.999):.1f}\u00a0%" if near_end else f"{100 * value:.0f}\u00a0%"


def times(value: float | None) -> str:
    """A ratio."""
    return MISSING if value is None else f"{value:.2f}\u00a0\u00d7"


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels: as near to `values` as it goes with `gap` between any two, within `low` and `high`.

    Where they do not fit, they are closer together than `gap`.
    """
    if not values:
        return []
    gap = min(gap, (high - low) / max(1, len(values) - 1))
    order = sorted(range(len(values)), key=lambda index: values[index])
    blocks: list[list[float]] = []  # [sum of where its labels would start, count]
    for rank, index in enumerate(order):
        blocks.append([values[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    starts = [total / count for total, count in blocks for _ in range(int(count))]
    places = [0.0] * len(values)
    for rank, index in enumerate(order):
        # Clamped starts keep their order, so the gaps stay.
        start = min(max(starts[rank], low), high - (len(values) - 1) * gap)
        places[index] = start + rank * gap
    return places
