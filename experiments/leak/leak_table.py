"""The ledger for people: a table of at most 80 columns, and its frontier in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten, wrap
from typing import Any

from isthmus.edge.budget.text_overlap import RUN
from isthmus.experiments.leak.page.ledger_rows import TWO_LOSSES, Measure, frontier_sentence, ledger_rows, percent

WIDTH = 80
_NAME = 30
_COLUMNS: Mapping[str, Measure] = {
    "tokens": "token_accuracy",
    "rare": "rare_accuracy",
    "secrets": "secret_recall",
    "labels": "label_accuracy",
}


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    for line in table(result):
        print(line)


def table(result: Mapping[str, Any]) -> list[str]:
    """The lines: of each row what the strongest attack got, the prior, the loss and the step over the undefended's."""
    rows = ledger_rows(result)
    lines = [f"{'':{_NAME}}{''.join(f'{name:>8}' for name in _COLUMNS)}{'prior':>7}{'loss':>6}{'step':>5}"]
    for row in rows:
        cells = []
        for measure in _COLUMNS.values():
            worst = row.worst(measure)
            cells.append(f"{percent(None if worst is None else worst.value):>8}")
        ratios = [row.loss_ratio, row.common("step_ratio")]
        loss, step = ("-" if ratio is None else f"{ratio:.{2 if ratio < 10 else 0}f}" for ratio in ratios)
        name = shorten(row.name, _NAME - 1, placeholder="…")
        lines.append(f"{name:{_NAME}}{''.join(cells)}{percent(row.common('prior_accuracy')):>7}{loss:>6}{step:>5}")
    for row in rows:
        found = [(run["real_row_found"], run["attack"]) for run in row.runs if run.get("real_row_found") is not None]
        if found:
            share, attack = max(found)
            lines += wrap(
                f"{row.name}: {attack} picks the real one of a text and its decoys in {percent(share)}.", WIDTH
            )
        read, private = (row.runs[0].get(f"fit_{name}_accuracy") for name in ("public", "private"))
        if read is not None:
            lines += wrap(
                f"{row.name}: of the public texts that `emulator fit` sent, {percent(read)} of the tokens are read. In "
                f"runs of {RUN} tokens, which the fit leaves out, {percent(private)} of the private texts were sent.",
                WIDTH,
            )
        epsilon = row.common("epsilon")
        if epsilon is not None:
            lines += wrap(
                f"{row.name}: epsilon {epsilon:.3g} at delta {row.common('delta'):g}, of {row.common('unit')}.", WIDTH
            )
    if any(row.common("loss_ratio_without_defence") is not None for row in rows):
        lines += wrap(TWO_LOSSES, WIDTH)
    return [*lines, *wrap(frontier_sentence(rows), WIDTH)]
