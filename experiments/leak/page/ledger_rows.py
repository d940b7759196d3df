"""The rows of a ledger as figures and page show them: what the strongest attack got in each, and at what price."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Measure = Literal["token_accuracy", "rare_accuracy", "secret_recall", "label_accuracy"]

SMALL_LOSS = 1.03
"""The loss over the undefended run's up to which a defence counts as one of little cost: page and sentence say it."""
HALF = 0.5
"""The share of the tokens that the frontier's sentence asks about: a text of which half is read is hardly hidden."""
TWO_LOSSES = (
    "A defended row has two losses: with the defence on, and of its adapter in the whole model with the defence off, "
    "which can be used where nothing is sent. The lower one is shown."
)
"""What a reader must know of each loss that is shown."""
SPACED = str.maketrans("_-", "  ")
"""Makes words of an attack's name."""
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
    """A row of the grid in one codec.

    Attributes:
        name: As the ledger calls the row, with the codec or the data where the ledger has it in several.
        runs: The ledger's entries, one for each attack and each side that it was attacked from.
    """

    name: str
    runs: tuple[Mapping[str, Any], ...]

    def against(self, front: str) -> LedgerRow:
        """The same with only the attacks of those who know the edge's layers (`known`) or do not (`tuned`).

        Of the latter, those who know none of the texts that were sent.
        """
        seen = (run for run in self.runs if (run.get("front") or "known") == front and not run.get("known_texts"))
        return LedgerRow(self.name, tuple(seen))

    def common(self, key: str) -> Any:
        """What all entries say of the row, None where none says it."""
        return next((run[key] for run in self.runs if run.get(key) is not None), None)

    def worst(self, measure: Measure) -> Value | None:
        """What the strongest attack got; None where no attack applies or none was measured."""
        values = [value for run in self.runs if (value := measured(run, measure)) is not None]
        return max(values, key=lambda each: each.value, default=None)

    @property
    def undefended(self) -> bool:
        """Whether it is an ordinary split run."""
        return self.common("mode") == "split" and (self.common("defence") or "none") == "none"

    @property
    def loss_ratio(self) -> float | None:
        """Task loss over that of the undefended split run of the same plan and number of steps; see `TWO_LOSSES`."""
        ratios = (self.common("task_loss_ratio"), self.common("loss_ratio_without_defence"))
        return min((float(ratio) for ratio in ratios if ratio is not None), default=None)

    @property
    def blind(self) -> float:
        """What somebody gets of the tokens who sees no traffic at all."""
        priors = (self.common("prior_free_accuracy"), self.common("prior_unigram_accuracy"))
        return max((float(prior) for prior in priors if prior is not None), default=0.0)

    @property
    def exposed(self) -> float | None:
        """Tokens that the cloud gets, by the strongest attack or the blind guess; None where no attack was made."""
        worst = self.worst("token_accuracy")
        if worst is None and self.common("mode") != "emulator":
            return None
        return self.blind if worst is None else max(worst.value, self.blind)


def measured(run: Mapping[str, Any], name: str) -> Value | None:
    """A number of an entry with its interval; None where it was not measured."""
    value = run.get(name)
    if value is None:
        return None
    low, high = run.get(f"{name}_interval") or (None, None)
    return Value(float(value), low, high, str(run.get("attack") or ""))


def ledger_rows(ledger: Mapping[str, Any]) -> list[LedgerRow]:
    """The rows in the ledger's order."""
    grouped: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in ledger.get("runs") or ():
        key = str(run.get("row")), str(run.get("codec") or ""), str(run.get("data") or "")
        grouped.setdefault(key, []).append(run)
    return [LedgerRow(_name(key, grouped), tuple(runs)) for key, runs in grouped.items()]


def _name(key: tuple[str, str, str], keys: Iterable[tuple[str, str, str]]) -> str:
    """The row's name, and of codec and data what tells it from the first row of that name."""
    first = next(other for other in keys if other[0] == key[0])
    return ", ".join([key[0], *(mine for mine, its in zip(key[1:], first[1:], strict=True) if mine != its)])


def marks(rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Rows with a loss and an attack by somebody who knows the front, or with no attack as nothing was sent.

    Of the undefended ones, whose loss is about that of the undefended run, the least exposed. From the lowest loss on,
    and of one loss the most exposed first.
    """
    known = [
        row for row in rows if row.against("known").runs and row.loss_ratio is not None and row.exposed is not None
    ]
    plain = min((row for row in known if row.undefended), key=lambda row: row.exposed or 0, default=None)
    shown = [row for row in known if not row.undefended or row is plain]
    return sorted(shown, key=lambda row: (row.loss_ratio or 0, -(row.exposed or 0)))


def frontier(rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Rows of which no other one has both fewer exposed tokens and a lower loss, from the lowest loss on."""
    found: list[LedgerRow] = []
    for row in sorted(marks(rows), key=lambda row: (row.loss_ratio or 0, row.exposed or 0)):
        if not found or (row.exposed or 0) < (found[-1].exposed or 0):
            found.append(row)
    return found


def frontier_sentence(rows: Sequence[LedgerRow]) -> str:
    """What the ledger says of defences, whichever way it falls."""
    trained = [row for row in marks(rows) if row.common("mode") != "emulator"]
    if not trained:
        return "No row of this ledger has both an attack on tokens and a task loss, so it has no frontier."
    near = [row for row in trained if (row.loss_ratio or 0) <= SMALL_LOSS]
    parts = []
    if near:
        least = min(near, key=lambda row: row.exposed or 0)
        bound = f"at a loss of at most {percent(SMALL_LOSS - 1)} above the undefended run's"
        parts.append(
            f"Of {len(near)} ways to train that send activations, {bound}, even the least exposed one ({least.name}) "
            f"gives up {percent(least.exposed)} of the tokens."
            if len(near) > 1
            else f"One way to train sends activations {bound} ({least.name}), and gives up {percent(least.exposed)} of "
            "the tokens."
        )
    half = [row for row in trained if (row.exposed or 0) < HALF]
    if half:
        best = min(half, key=lambda row: row.loss_ratio or 0)
        parts.append(
            f"To keep the strongest attack below half of the tokens costs {times(best.loss_ratio)} the loss "
            f"({best.name})."
        )
    else:
        parts.append("None that sends activations keeps the strongest attack below half of the tokens.")
    parts += [
        f"Where none are sent ({row.name}), the loss is {times(row.loss_ratio)} the undefended run's."
        for row in rows
        if row.common("mode") == "emulator" and row.loss_ratio is not None
    ]
    zero_shot = zero_shot_ratio(rows)
    if zero_shot is not None:
        parts.append(f"The model without training has {times(zero_shot)} the undefended run's loss.")
    return " ".join(parts)


def zero_shot_ratio(rows: Sequence[LedgerRow]) -> float | None:
    """The loss of the model without training over that of the undefended run, of the plan that most marks have."""
    ratios = [float(ratio) for row in marks(rows) if (ratio := row.common("zero_shot_loss_ratio")) is not None]
    return max(ratios, key=ratios.count, default=None)


def modes(rows: Sequence[LedgerRow]) -> list[tuple[str, LedgerRow]]:
    """One row for each way of training that a reader can choose, with its name; those that the ledger has."""

    plain = sorted((row for row in rows if row.undefended), key=lambda row: row.loss_ratio is None)  # scored ones first
    private = [seen for row in plain if (seen := row.against("tuned")).runs]
    known = [seen for row in plain if (seen := row.against("known")).runs]
    plans = [row.common("plan") for row in private[:1]]
    others = [row for row in rows if not row.undefended]
    cheap = [row for row in _in_mode(others, "split") if (row.loss_ratio or float("inf")) <= SMALL_LOSS]
    choices = [
        ("Split", sorted(known, key=lambda row: row.common("plan") not in plans)),  # beside its private front
        ("Private front", private),
        ("Cheap defence", sorted(cheap, key=lambda row: 1.0 if row.exposed is None else row.exposed)),
        ("Top only", _in_mode(others, "top-only")),
        ("Emulator", _in_mode(others, "emulator")),
    ]
    return [(title, found[0]) for title, found in choices if found]


def _in_mode(rows: Sequence[LedgerRow], mode: str) -> list[LedgerRow]:
    return [row for row in rows if row.common("mode") == mode]


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
