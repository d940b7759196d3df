"""The settings of `isthmus experiment leak-weights`, and where the function is that measures. Imports nothing heavy.

The docstring of the class is the help of the command; `Measurement` says how the flags come about.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from typer import Option

from isthmus.experiments.harness import bench_flags as flags
from isthmus.experiments.harness.command import Measurement

PARTS: Final = ("membership", "extraction", "theft")
"""The measurements."""


@dataclass(frozen=True, slots=True)
class LeakWeightsSettings:
    """Attack weights, where `experiment leak` attacks texts: what adapters, sites, answers and packages give away.

    A measurement that is finished for the same settings is taken from the folder of `--out`.

    Example: isthmus experiment leak-weights --json
    """

    parts: Annotated[
        str,
        Option(
            help="Measurements, comma-separated, by default all. membership: which texts an adapter was trained on. "
            "extraction: the adapters at sites. theft: the cloud's layers, learned from their answers. What a thief of "
            "an emulator's package makes of it is in `emulator table`."
        ),
    ] = ""
    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    task: Annotated[str, Option(help="Where the texts come from: e2e, openbookqa, arc_easy or sst2.")] = "e2e"
    members: Annotated[
        int,
        Option(min=2, help="Texts that the attacked adapters are trained on; the attacker trains on as many others."),
    ] = 80
    others: Annotated[int, Option(min=1000, help="Texts that they are told from.")] = 1000
    epochs: Annotated[int, Option(min=1, help="Passes over the members.")] = 8
    batch: Annotated[int, Option(min=1, help="Members of a step.")] = 16
    learning_rate: Annotated[float, Option(min=0, help="Peak rate of the adapter without a defence.")] = 3e-3
    defence: Annotated[
        str, Option(help="Of a second adapter, to compare: NAME:PARAMETER=VALUE,…, as for `edge train`.")
    ] = "dp-sgd:clip=1,sigma=4"
    defended_rate: Annotated[float, Option(min=0, help="Peak rate of the adapter with the defence.")] = 1e-3
    package: Annotated[
        Path | None,
        Option(
            help="For membership: tune over this package's emulator, of its split whatever --edge-layers says, and "
            "attack the adapter in the model. What is tuned is as the package advises; rates, rank and passes are "
            "those of this command, so the adapter is not the one that `emulator tune` makes by itself."
        ),
    ] = None
    epsilons: Annotated[
        str,
        Option(help="With --package, comma-separated: an adapter for each, with the sigma of dp-sgd that gives it."),
    ] = ""
    rank: Annotated[int, Option(min=1, help="Rank of LoRA, in both and at sites.")] = 8
    sites: Annotated[str, Option(help="Sites of the recorded run, as for `edge train`.")] = "all"
    site_steps: Annotated[int, Option(min=2, help="Optimizer steps of the recorded run.")] = 3
    site_codec: Annotated[str, Option(help="Codec of its wire.")] = "fp32"
    calls: Annotated[str, Option(help="Budgets of a thief's queries to the cloud's layers, of one text each.")] = (
        "0,50,300"
    )
    theft_steps: Annotated[int, Option(min=1, help="Steps of each theft, of one text each.")] = 300
    held_out: Annotated[int, Option(min=2, help="Texts that stolen models are scored on.")] = 100
    seed: Annotated[int, Option(min=0, help="Of all that is drawn.")] = 0
    threads: flags.Threads = 2
    data_folder: flags.DataFolder = None
    out: Annotated[Path, Option(help="Folder for finished measurements; the same command goes on there.")] = Path(
        "isthmus-leak-weights"
    )


LEAK_WEIGHTS: Final = Measurement(
    LeakWeightsSettings,
    "leak.weights.leak_weights:run_leak_weights",
    "leak.weights.leak_weights:show",
    folder="none",
)
