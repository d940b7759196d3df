"""Every way of training side by side: what a step costs, whether it equals a single process, and how well it learns.

Costs are in `isthmus.experiments.placements.placement_costs`, scores in `placement_scores`; each result is a cell in
`out`, so an interrupted benchmark goes on. Beside what was measured stands what `isthmus plan` says of the same step,
from this machine's speed as it is measured right before it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.sources import Checkpoint, resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.common.figures import plotting
from isthmus.common.torch_threads import torch_threads
from isthmus.edge.codecs.wire_codecs import WireCodecs
from isthmus.experiments.harness.bench_flags import numbers_of, precision_of
from isthmus.experiments.harness.bench_settings import PlacementSettings
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import LocalCloud, working_folder
from isthmus.experiments.placements.placement_costs import Cost, CostSettings, measure_cost
from isthmus.experiments.placements.placement_figures import draw_budgets, draw_losses, draw_sites
from isthmus.experiments.placements.placement_modes import SINGLE, Mode, modes_of, policy_of
from isthmus.experiments.placements.placement_scores import Regime, Scorer, described
from isthmus.experiments.scoring.tasks import Sizes, default_data_folder
from isthmus.planner.cost_model import ModeCost, PlanSettings, predict
from isthmus.planner.link_spec import LOCAL, LinkSpec
from isthmus.planner.model_facts import ModelFacts
from isthmus.planner.speed_probe import measure
from isthmus.planner.speed_profile import ProbeSettings

ALWAYS_ON = "edge"
KILL_REVIVE = "kill_revive"
CELLS = "cells.jsonl"


def run_placements(settings: PlacementSettings) -> dict[str, Any]:
    """Measure, and draw the figures that are asked for; see the module.

    Returns:
        `runs`, one for each mode, with null for what was not measured or does not apply:

        - `mode`, and `step_ratio`: the time of a step over that of a single process with the same trainables, where a
          policy chooses among sites with all of them
        - `bytes_per_token_up`, `bytes_per_token_down` and `round_trips` of a step, and `first_epoch_bytes_per_token`
          where later epochs are cheaper
        - `edge_flops_share`, by the formulas of `isthmus plan`; `edge_peak_bytes`
        - `bitwise_equal` and `max_abs_diff`, of losses and adapter, to the single process
        - `score`, the held-out loss (mean over `seeds`) at `rate`; `scores` has all metrics
        - `site_traffic_share` and `site_computation_share` of always-on, over a whole run
        - `step_over_plan` and `bytes_over_plan`: measured over predicted, of the first epoch where nothing crosses
          after it

        Also `kill_revive`: its part of always-on's gain and its yardsticks', and `decisions` of its first seed; and
        `zero_shot`, and the settings.
    """
    cost, regime, modes = _cost_settings(settings), _regime(settings), modes_of(settings.modes)
    if settings.figure or settings.budget_figure or settings.sites_figure:
        plotting()  # a missing package is reported before the long run, not after it
    cells = Cells(settings.out / CELLS, Console(stderr=True))
    checkpoint = resolve(settings.model)
    rows: dict[str, dict[str, Any]] = {mode.name: {**dict.fromkeys(_COLUMNS), "mode": mode.name} for mode in modes}
    zero_shot = None
    with working_folder() as folder:
        if settings.costs:
            for name, found in _costs(modes, cost, checkpoint, cells, folder).items():
                rows[name] |= found
        if settings.scores:
            zero_shot = _add_scores(modes, settings.edge_layers, regime, checkpoint, cells, folder, rows)
    runs = list(rows.values())
    decided = {name: row.pop("decisions", None) for name, row in rows.items()}
    decisions = decided.get(KILL_REVIVE)
    result = {
        "runs": runs,
        "kill_revive": _verdict(rows, zero_shot),
        "decisions": decisions,
        "zero_shot": zero_shot,
        "settings": {
            "model": checkpoint.name,
            "edge_layers": settings.edge_layers,
            "costs": asdict(cost) | {"model": checkpoint.name} if settings.costs else None,
            "scores": described(regime) if settings.scores else None,
        },
    }
    if settings.figure is not None:
        draw_losses(result, settings.figure)
    if settings.budget_figure is not None:
        draw_budgets(result, settings.budget_figure)
    if settings.sites_figure is not None and decisions:
        draw_sites(decisions, settings.steps, settings.sites_figure)
    return result


def _cost_settings(settings: PlacementSettings) -> CostSettings:
    names = ("model", "edge_layers", "dropout", "batch", "seq", "rounds", "steps", "threads")
    return CostSettings(shared=_shared(settings), **{name: getattr(settings, name) for name in names})


def _regime(settings: PlacementSettings) -> Regime:
    return Regime(
        task=settings.task,
        data_folder=settings.data_folder or default_data_folder(),
        sizes=Sizes(test=settings.test, validation=settings.validation, max_length=settings.max_length),
        steps=settings.steps,
        batch=settings.score_batch,
        rates=numbers_of(settings.learning_rates, "learning-rates"),
        seeds=settings.seeds,
        precision=precision_of(settings.precision, "precision"),
        cloud_dtype=precision_of(settings.cloud_dtype, "cloud-dtype"),
        threads=settings.threads,
        shared=_shared(settings),
    )


def _shared(settings: PlacementSettings) -> dict[str, Any]:
    """Fields of `TrainConfig` that all modes have."""
    targets = {} if settings.target_modules is None else {"target_modules": settings.target_modules}
    return {"rank": settings.rank, "taps": settings.taps, **targets}


_COLUMNS = (
    *("mode", "bytes_per_token_up", "bytes_per_token_down", "first_epoch_bytes_per_token", "round_trips"),
    *("edge_flops_share", "edge_peak_bytes", "step_ratio", "score", "scores", "rate", "seeds", "bitwise_equal"),
    *("max_abs_diff", "site_traffic_share", "site_computation_share", "step_s", "step_over_plan", "bytes_over_plan"),
)


# Costs ----------------------------------------------------------------------------------------------------------------


def _costs(
    modes: Sequence[Mode], cost: CostSettings, checkpoint: Checkpoint, cells: Cells, folder: Path
) -> dict[str, dict[str, Any]]:
    with ExitStack() as stack:
        options = ("--threads", str(cost.threads))
        cloud = clouds(stack, checkpoint, folder / "costs", options)

        def make(mode: Mode) -> dict[str, Any]:
            own = None if mode.name == SINGLE else cloud(mode.edge_layers(cost.edge_layers))
            planned = _planner(checkpoint, cost)
            return _cost_row(mode, measure_cost(mode, cost, own, folder / "costs" / mode.name), planned, cost)

        def key(mode: Mode) -> dict[str, Any]:
            """What a mode's costs depend on: the length of a run only where a policy plans for it."""
            known = asdict(cost) | {"model": checkpoint.digest(), "mode": asdict(mode)}
            return known if mode.chooses else {name: value for name, value in known.items() if name != "steps"}

        return {mode.name: cells.get(f"{mode.name} cost", key(mode), partial(make, mode)) for mode in modes}


def _cost_row(
    mode: Mode, cost: Cost, planner: Callable[[Mode, float], ModeCost], settings: CostSettings
) -> dict[str, Any]:
    tokens = settings.batch * settings.seq
    planned = planner(mode, cost.shares.get("traffic", 1.0))
    up, down = cost.per_step("bytes_up"), cost.per_step("bytes_down")
    if mode.chooses:  # the steps differ, and the shares are of all
        both = [step.spent for step in (*cost.first_epoch, *cost.steps)]
        up, down = statistics.mean(s.bytes_up for s in both), statistics.mean(s.bytes_down for s in both)
    first = cost.per_step("bytes_up", first=True) + cost.per_step("bytes_down", first=True)
    crossing, expected = up + down, planned.step.traffic.total
    if planned.first_epoch is not None:
        crossing, expected = first, planned.first_epoch.traffic.total
    flops = planned.step.edge.flops, planned.step.cloud.flops
    return {
        "bytes_per_token_up": up / tokens,
        "bytes_per_token_down": down / tokens,
        "first_epoch_bytes_per_token": None if planned.first_epoch is None else first / tokens,
        "round_trips": cost.per_step("round_trips"),
        "edge_flops_share": flops[0] / sum(flops),
        "edge_peak_bytes": cost.steps[-1].peak,
        "step_ratio": 1.0 if mode.name == SINGLE else cost.ratio,
        "step_s": cost.seconds,
        "step_over_plan": cost.seconds / planned.step.seconds,
        "bytes_over_plan": crossing / expected if expected else None,
        **cost.parity,
        **{f"site_{name}_share": share for name, share in cost.shares.items()},
    }


def _planner(checkpoint: Checkpoint, cost: CostSettings) -> Callable[[Mode, float], ModeCost]:
    """`isthmus plan`, from this machine's speed as it is now."""
    rank = int(cost.shared["rank"])
    targets = cost.shared.get("target_modules")
    facts = ModelFacts.of(checkpoint.config, rank, targets.split(",") if targets else None)
    speed = measure(checkpoint.config, facts, ProbeSettings(cost.batch, cost.seq, rank, "fp32", cost.threads))

    def planned(mode: Mode, live_share: float) -> ModeCost:
        plan = PlanSettings(
            SplitPlan.parse(cost.edge_layers, facts.n_layers),
            cost.batch,
            cost.seq,
            WireCodecs(),
            rank=rank,
            live_share=live_share,
            taps=int(cost.shared["taps"]),
            summed=mode.summed,
            own_layers=True,
        )
        costs = predict(facts, plan, LinkSpec.parse(LOCAL), speed, speed)
        return next(found for found in costs if found.mode == mode.planned_as)

    return planned


# Scores ---------------------------------------------------------------------------------------------------------------


def _add_scores(
    modes: Sequence[Mode],
    edge_layers: str,
    regime: Regime,
    checkpoint: Checkpoint,
    cells: Cells,
    folder: Path,
    rows: Mapping[str, dict[str, Any]],
) -> dict[str, float]:
    with torch_threads(regime.threads), ExitStack() as stack:
        options = ("--threads", str(regime.threads), "--dtype", regime.cloud_dtype)
        cloud = clouds(stack, checkpoint, folder / "scores", options)
        scorer = Scorer(checkpoint, edge_layers, regime, cells, folder, cloud)
        zero_shot = scorer.zero_shot()
        reference = _reference({mode.name for mode in modes})
        for mode in modes:
            seeds = regime.seeds if mode.chooses or mode.name == reference else 1
            rows[mode.name].update(_score_row(mode, scorer, seeds))
    return zero_shot


def _reference(names: Container[str]) -> str:
    """What kill-and-revive is held against: always-on, or the single process, which learns the same bit for bit."""
    return ALWAYS_ON if ALWAYS_ON in names else SINGLE


def _score_row(mode: Mode, scorer: Scorer, seeds: int) -> dict[str, Any]:
    rate = scorer.best_rate(mode)
    runs = [scorer.run(mode, rate, seed) for seed in range(seeds)]
    means = {metric: statistics.mean(run["scores"][metric] for run in runs) for metric in runs[0]["scores"]}
    row = {
        "score": means["completion_loss"],
        "scores": {metric: [run["scores"][metric] for run in runs] for metric in means},
        "rate": rate,
        "seeds": seeds,
    }
    if "shares" in runs[0]:
        for name in ("traffic", "computation"):
            row[f"site_{name}_share"] = statistics.mean(run["shares"][name] for run in runs)
        row["decisions"] = runs[0]["decisions"]
    return row


def _verdict(rows: Mapping[str, Mapping[str, Any]], zero_shot: Mapping[str, float] | None) -> dict[str, Any] | None:
    """What kill-and-revive has of always-on's gain, beside its yardsticks; None where one of the scores is missing."""
    found = {name: float(row["score"]) for name, row in rows.items() if row.get("score") is not None}
    reference = _reference(found)
    if zero_shot is None or reference not in found or KILL_REVIVE not in found:
        return None
    start = zero_shot["completion_loss"]
    names = [name for name in found if policy_of(name) in (KILL_REVIVE, "random", "even", "u_shape")]
    return {
        "gain_shares": {name: (start - found[name]) / (start - found[reference]) for name in names},
        "less_site_traffic": 1 - rows[KILL_REVIVE]["site_traffic_share"],
        "less_adapter_computation": 1 - rows[KILL_REVIVE]["site_computation_share"],
    }


# Shared ---------------------------------------------------------------------------------------------------------------


def clouds(
    stack: ExitStack, checkpoint: Checkpoint, folder: Path, options: Sequence[str]
) -> Callable[[str], LocalCloud]:
    """Clouds by split plan, each started when it is first asked for."""
    started: dict[str, LocalCloud] = {}

    def cloud(plan: str) -> LocalCloud:
        if plan not in started:
            place = folder / f"cloud-{plan.replace(':', '-')}"
            place.mkdir(parents=True)
            own = LocalCloud(place, str(checkpoint.folder), "--edge-layers", plan, *options)
            started[plan] = stack.enter_context(own)
        return started[plan]

    return cloud
