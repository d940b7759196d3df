"""Whether audits catch lying clouds, how often they accuse honest ones, and what they cost.

Tenants call a cloud at the same time, with transcripts and samples. Each tenant's session breaks once, so that there
are calls which the cloud has not signed. Every call is then computed again by another worker, so it is known of each
whether a replay would have caught it. The calls are then offered again, many times, to a sampler that has room for few
of them, and what it keeps is audited; the share of audits that caught the cloud is compared with the formula.

The same is done by a worker with other numerics, which stands for another processor: its attention is computed by other
kernels, so its bits differ. There a threshold decides. It is measured on calls of an honest cloud that nothing else is
judged on.

Two more replay some calls of honest clouds. A worker without batching computes calls with more threads than one with
it, and says so: other bits are then undecided, or judged by the threshold. This process, with the weights, has the bits
of a worker without batching.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.audit.conditioning import MAX_ROUNDING_RATIO
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.rig_settings import AuditSettings
from isthmus.experiments.rigs.lying.audited_cloud import QUANTIZED, AuditedCloud
from isthmus.experiments.rigs.lying.forgeries import UNTOUCHED
from isthmus.experiments.rigs.lying.lies import KINDS
from isthmus.privacy.transcript.detection import share_interval

CELLS = "cells.jsonl"
VERSION = 8
"""Of what a cell holds, raised where that changes: cells that an earlier one has left are made anew."""
LONGER = (2, 8)
"""Times the length of most calls, 64 and 256 tokens by default: a short text's and a long one's, with thresholds of
their own."""


def run_audit_bench(settings: AuditSettings, folder: Path) -> dict[str, Any]:
    """Measure; see the module.

    Returns:
        `lies`: a row for each kind and quantization; `honest_clouds`: one for each quantization, with batching and
        without; `thresholds`: one for each quantization and length; `longer`: honest and lying clouds at the longer
        lengths, by their thresholds; `forgeries`: transcripts that were tampered with; `cost`: of transcript, sample
        and replay. The keys of `Measurement.passed` sum them up.
    """
    set_torch_threads(settings.threads)
    cells = Cells(folder / CELLS, Console(stderr=True))
    longest = resolve(settings.model).config.max_position_embeddings
    lengths = sorted({min(times * settings.seq, longest) for times in (1, *LONGER)})
    cells.expect(len(QUANTIZED) * (len(KINDS) + 2 + 2 * len(lengths) - 1) + 2)
    lies, honest, thresholds, longer = [], [], [], []
    for quantize in QUANTIZED:
        cloud = AuditedCloud(settings, folder, quantize)
        fixed = {**asdict(settings), "quantize": quantize, "version": VERSION}

        def cell(name: str, make: Any, fixed: dict[str, Any] = fixed, **more: Any) -> dict[str, Any]:
            return cells.get(name, {**fixed, **more}, make)

        mine = [cell("threshold", partial(cloud.threshold, length), length=length) for length in lengths]
        thresholds += mine
        limit = mine[0]["threshold"]
        longer += [
            cell("longer", partial(cloud.longer, row["seq"], row["threshold"]), length=row["seq"]) for row in mine[1:]
        ]
        lies += [cell(f"lie {kind}", partial(cloud.lie, kind, limit)) for kind in KINDS]
        honest += [
            cell("honest", partial(cloud.honest, limit, batching=batching), batching=batching)
            for batching in (True, False)
        ]
        if quantize == "none":
            forgeries = cell("forgeries", cloud.forgeries)["rows"]
            cost = cell("cost", cloud.cost)
    calls, elsewhere = (sum(row[name] for row in honest) for name in ("calls", "elsewhere_calls"))
    unsigned = sum(row["altered_unsigned"] for row in lies)
    found_unsigned = sum(row["detected_unsigned"] for row in lies)
    every_found = all(row["detected"] == row["altered"] > 0 for row in (*lies, *longer))
    accused = any(row["false_alarms"] or row["elsewhere_alarms"] for row in (*lies, *honest, *longer))
    return {
        "all_caught": every_found and found_unsigned == unsigned > 0,
        "no_false_alarms": not accused and not any(row["again"]["alarms"] for row in honest),
        "as_predicted": all(row["as_predicted"] for row in lies),
        "forgeries_found": all(row["refused"] == (row["forgery"] != UNTOUCHED) for row in forgeries),
        "lies": lies,
        "honest_clouds": honest,
        "honest_calls": calls,
        "honest_calls_elsewhere": elsewhere,
        "false_alarms_at_most": [share_interval(0, each)[1] for each in (calls, elsewhere)],
        "thresholds": thresholds,
        "longer": longer,
        "forgeries": forgeries,
        "cost": cost,
        **asdict(settings),
    }


def show(result: dict[str, Any]) -> None:
    """Print a result for people."""
    for row in result["lies"]:
        low, high = row["caught_interval"]
        met = f"caught {row['caught']}/{row['asked']} ({low:.3f} to {high:.3f}), predicted {row['predicted']:.3f}"
        found = f"{row['detected']} of {row['altered']} altered calls, elsewhere {row['elsewhere_found']}"
        unsigned = f"unsigned {row['detected_unsigned']} of {row['altered_unsigned']}"
        largest = f"largest met {row['met_largest']}, predicted {row['predicted_largest']:.3f}"
        print(f"{row['kind']:15} {row['quantize']:5} {met}; {largest}; {found}; {unsigned}")
    for row in result["honest_clouds"]:
        how = "batching" if row["batching"] else "alone"
        there = f"elsewhere {row['elsewhere_alarms']} in {row['elsewhere_calls']}"
        ratio = f"largest ratio {row['elsewhere_largest_ratio']:.1f}, limit {MAX_ROUNDING_RATIO:g}"
        there += f"; {row['elsewhere_explained']} above the threshold are explained by rounding ({ratio})"
        print(f"honest {row['quantize']:5} {how}: {row['false_alarms']} false alarms in {row['calls']} calls, {there}")
        again = row["again"]
        found = f"{again['same_bits']} have the same bits, {again['undecided']} are undecided without a threshold"
        print(f"  of {again['calls']} by {again['by']} {found}, {again['alarms']} false alarms")
    for row in result["thresholds"]:
        print(f"threshold elsewhere, {row['quantize']}, {row['seq']} tokens: {row['threshold']:.2g}")
    for row in result["longer"]:
        alarms = f"{row['false_alarms'] + row['elsewhere_alarms']} false alarms in {row['calls']} calls"
        found = f"{row['detected']} of {row['altered']} altered calls, elsewhere {row['elsewhere_found']}"
        print(f"{row['quantize']}, {row['seq']} tokens: {alarms}; {found}")
    for row in result["forgeries"]:
        print(f"{row['forgery']}: {row['said'] or 'verifies'}")
    print("cost: " + ", ".join(f"{name} {value:.3g}" for name, value in result["cost"].items()))
