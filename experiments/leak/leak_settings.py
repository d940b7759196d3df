"""The settings of `isthmus experiment leak`, and where the function is that measures. Imports nothing heavy.

The docstring of the class is the help of the command; `Measurement` says how the flags come about.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from typer import Option

from isthmus.experiments.harness import bench_flags as flags
from isthmus.experiments.harness.command import Measurement


@dataclass(frozen=True, slots=True)
class LeakSettings:
    """Train over a cloud that records, attack what it has, and set what each attack gets beside the task's loss.

    Each row of a grid is a run with its split, codec and defences. A row that is finished is a file in the folder of
    --out, and is not made again; an interrupted one resumes after its run, and after each attack. Ends with exit code
    73 where an attack on a row without a defence was limited by its lists of candidates.

    Example: isthmus experiment leak --json

    A first look: isthmus experiment leak --quick

    One row: isthmus experiment leak --edge-layers 2:2 --codec int4 --defence smoothing:share=0.1
    """

    grid: Annotated[
        list[Path] | None,
        Option(help="TOML file of rows, repeatable; by default the grid of the documents, unless flags name rows."),
    ] = None
    row: Annotated[list[str] | None, Option(help="Rows of the grid by name, repeatable; by default all.")] = None
    edge_layers: Annotated[
        str | None, Option(help="Instead of a grid: split plans, comma-separated, each of which makes a row.")
    ] = None
    codec: Annotated[str | None, Option(help="Codecs of these rows, comma-separated; by default fp32.")] = None
    defence: Annotated[
        list[str] | None, Option(help="Defences of these rows, as for `edge train`, repeatable; they act together.")
    ] = None
    mode: Annotated[str | None, Option(help="Mode of these rows: split, top-only or emulator.")] = None
    package: Annotated[
        Path | None,
        Option(
            help="With --mode emulator: a package, as `emulator build --preset` writes it. Rate, rank and what is "
            "tuned are as it advises; the steps and the length are the row's."
        ),
    ] = None
    data: Annotated[str | None, Option(help="What these rows are trained on: e2e or sst2.")] = None
    steps: Annotated[int | None, Option(min=1, help="Optimizer steps of each row, instead of the grid's.")] = None
    quick: Annotated[
        bool,
        Option(
            "--quick",
            help="A first look in minutes: one row unless flags name others, 4 texts, 10 steps, the strongest attack "
            "on texts and the quickest on labels. Numbers that you give stay. It prints first how long it takes.",
        ),
    ] = False
    model: flags.Model = "smollm2-135m"
    texts: Annotated[int, Option(min=8, help="Private texts that each run trains on.")] = 400
    attacked: Annotated[int, Option(min=4, help="Private texts with a planted secret that are attacked.")] = 40
    public: Annotated[int, Option(min=16, help="Public texts of the attacker.")] = 500
    scored: Annotated[int, Option(min=4, help="Held-out texts for the task's loss.")] = 120
    max_length: Annotated[int, Option(min=24, help="Tokens of a private text at most, with its secret.")] = 72
    batch: flags.StepExamples = 4
    learning_rate: flags.OneRate = 1e-3
    inverter_steps: Annotated[int, Option(min=20, help="Steps that the learned inverter is trained for.")] = 240
    record_mib: Annotated[
        int, Option(min=1, help="MiB of a recording at most; it lies in --out until its row is finished.")
    ] = 8192
    seed: Annotated[int, Option(min=0, help="Of the texts, the runs and the attacks.")] = 0
    threads: flags.Threads = 2
    data_folder: flags.DataFolder = None
    page: Annotated[
        Path | None, Option(help="Folder for the figures and the page of the ledger (needs matplotlib).")
    ] = None
    out: flags.Out = Path("isthmus-leak")


LEAK: Final = Measurement(LeakSettings, "leak.leak:run_leak", "leak.leak_table:show", folder="none")
