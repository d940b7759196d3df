"""The ledger as JSON: the entries of all rows, with what compares a row with the undefended one of as many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isthmus.privacy.measures.bootstrap import Interval, means_ratio_interval, ratio_interval, share_interval
from isthmus.privacy.measures.token_accuracy import Hits


def ledger(
    rows: Sequence[Mapping[str, Any]], untuned: Mapping[str, Mapping[str, Any]], circumstances: Mapping[str, Any]
) -> dict[str, Any]:
    """Put finished rows together.

    Args:
        rows: Each with `settings`, `seconds`, and what `RowLab.make` returns.
        untuned: By task, what `RowLab.untuned` returns.
        circumstances: Further keys of the result.

    Returns:
        `circumstances`; `data`, the tasks; `seconds`, of all rows together; and `runs`, entries as `RowLab.make` has
        them with `task_loss`, `task_accuracy`, `task_loss_ratio`, `undefended_loss_ratio` (of the trained adapter
        without the defence that it was trained with; null where there was none), `untuned_loss_ratio` (of the model
        without training) and `step_ratio`: the ratios over the undefended split run over fp32 of the same plan, task
        and number of steps, null where there is none in the ledger. The steps of the run are not those of a further
        codec, so `step_ratio` is null there. Its interval is of steps, redrawn; it says nothing of what else the
        machine did at the time of either run.
    """
    baselines = {_place(row): row for row in rows if _is_baseline(row)}
    runs = []
    for row in rows:
        base = baselines.get(_place(row))
        for entry in row["runs"]:
            own = row["settings"]["row"]["codec"]
            codec = entry["codec"] if entry["codec"] in row["task"] else own
            compared = _compared(row, codec, base, untuned[row["settings"]["row"]["data"]])
            steps = None if base is None or codec != own else _step_ratio(row, base)
            runs.append({**entry, **compared, **_measured("step_ratio", steps)})
    return {
        **circumstances,
        "data": sorted({row["settings"]["row"]["data"] for row in rows}),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "runs": runs,
    }


def _place(row: Mapping[str, Any]) -> tuple[str, str, int]:
    about = row["settings"]["row"]
    return about["edge_layers"], about["data"], about["steps"]


def _is_baseline(row: Mapping[str, Any]) -> bool:
    about = row["settings"]["row"]
    return about["mode"] == "split" and not about["defence"] and about["codec"] == "fp32"


def _compared(
    row: Mapping[str, Any], codec: str, base: Mapping[str, Any] | None, untuned: Mapping[str, Any]
) -> dict[str, Any]:
    task = row["task"][codec]
    of = None if base is None else _hits(base["task"]["fp32"]["losses"])
    without = row["task_without_defence"]

    def over(score: Mapping[str, Any] | None) -> Interval | None:
        return None if of is None or score is None else ratio_interval(_hits(score["losses"]), of)

    return {
        **_measured("task_loss", share_interval(_hits(task["losses"]))),
        **_measured("task_accuracy", share_interval(_hits(task["hits"]))),
        **_measured("task_loss_ratio", over(task)),
        **_measured("undefended_loss_ratio", over(without)),
        **_measured("untuned_loss_ratio", over(untuned)),
    }


def _step_ratio(row: Mapping[str, Any], base: Mapping[str, Any]) -> Interval:
    ours, theirs = (torch.tensor(each["step_seconds"], dtype=torch.float64) for each in (row, base))
    return means_ratio_interval(ours, theirs)


def _measured(name: str, interval: Interval | None) -> dict[str, Any]:
    value = None if interval is None else interval.value
    return {name: value, f"{name}_interval": None if interval is None else [interval.low, interval.high]}


def _hits(values: Mapping[str, Any]) -> Hits:
    right, of = (torch.tensor(values[name], dtype=torch.float64) for name in ("right", "of"))
    return Hits(right, of)
