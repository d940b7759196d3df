"""The ledger as JSON: the entries of all rows, with what compares a row with the undefended one of as many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from isthmus.privacy.measures.bootstrap import Interval, means_ratio_interval, ratio_interval, share_interval
from isthmus.privacy.measures.token_accuracy import Hits


def ledger(rows: Sequence[Mapping[str, Any]], circumstances: Mapping[str, Any]) -> dict[str, Any]:
    """Put finished rows together.

    Args:
        rows: Each with `settings`, `seconds`, and what `RowLab.make` returns.
        circumstances: Further keys of the result.

    Returns:
        `circumstances`; `data`, the tasks; `seconds`, of all rows' runs, scores and attacks together; and `runs`,
        entries as `RowLab.make` has them with `task_loss`, `task_accuracy`, `zero_shot_accuracy` (of the model without
        training), and four ratios over the undefended split run over fp32 of the same plan, task and number of steps,
        null where there is none in the ledger: `task_loss_ratio`; `loss_ratio_without_defence`, of the adapter in the
        whole model with the defence off, null where there is none; `zero_shot_loss_ratio`; and `step_ratio`, null for a
        further codec, which the run's steps are not of. The interval of `step_ratio` is of steps, redrawn; it says
        nothing of what else the machine did at the time of either run.
    """
    baselines = {_comparable(row): row for row in rows if _is_baseline(row)}
    runs = []
    for row in rows:
        base = baselines.get(_comparable(row))
        for entry in row["runs"]:
            own = row["settings"]["row"]["codec"]
            codec = entry["codec"] if entry["codec"] in row["task"] else own
            compared = _compared(row, codec, base)
            steps = None if base is None or codec != own else _step_ratio(row, base)
            runs.append({**entry, **compared, **_measured("step_ratio", steps)})
    return {
        **circumstances,
        "data": sorted({row["settings"]["row"]["data"] for row in rows}),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "runs": runs,
    }


def _comparable(row: Mapping[str, Any]) -> tuple[str, str, int]:
    about = row["settings"]["row"]
    return about["edge_layers"], about["data"], about["steps"]


def _is_baseline(row: Mapping[str, Any]) -> bool:
    about = row["settings"]["row"]
    return about["mode"] == "split" and not about["defence"] and about["codec"] == "fp32"


def _compared(row: Mapping[str, Any], codec: str, base: Mapping[str, Any] | None) -> dict[str, Any]:
    task, zero_shot = row["task"][codec], row["task_zero_shot"]
    baseline = None if base is None else _hits(base["task"]["fp32"]["losses"])

    def over(score: Mapping[str, Any] | None) -> Interval | None:
        return None if baseline is None or score is None else ratio_interval(_hits(score["losses"]), baseline)

    return {
        **_measured("task_loss", share_interval(_hits(task["losses"]))),
        **_measured("task_accuracy", share_interval(_hits(task["hits"]))),
        **_measured("zero_shot_accuracy", share_interval(_hits(zero_shot["hits"]))),
        **_measured("task_loss_ratio", over(task)),
        **_measured("loss_ratio_without_defence", over(row["task_without_defence"])),
        **_measured("zero_shot_loss_ratio", over(zero_shot)),
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
