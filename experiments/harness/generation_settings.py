"""The settings of the commands of `isthmus bench` that generate, and where the function is that measures.

Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from typer import Option

from isthmus.experiments.harness import bench_flags as flags
from isthmus.experiments.harness.command import Measurement


@dataclass(frozen=True, slots=True)
class GenerateSettings:
    """Compare what the split model generates, and how fast, with one process; and drafts over long links with none.

    One session is compared with eight, too.

    The links need root, for network namespaces, and a draft and an adapter tuned with it, which are made where none are
    given. What is finished of them stays in --out: the same command goes on there.

    Example: isthmus bench generate --json

    Without links: isthmus bench generate --parts local

    Links alone, shorter: isthmus bench generate --parts links --rtt-ms 0 --rtt-ms 80 --link-prompts 2
    """

    model: flags.Model = "smollm2-135m"
    parts: Annotated[
        str,
        Option(
            help="local (one process, the span, eight edges) and links (drafts over long links), comma-separated; by "
            "default both."
        ),
    ] = ""
    edge_layers: flags.EdgeLayers = "2:2"
    prompts: Annotated[int, Option(min=4, max=50, help="Prompts that both generate from.")] = 50
    tokens: Annotated[int, Option(min=8, help="Tokens that follow each of them.")] = 32
    rounds: Annotated[int, Option(min=3, help="Steps of the span alone that count.")] = 20
    turns: Annotated[int, Option(min=1, help="Turns of eight edges, one by one and all at a time.")] = 3
    threads: Annotated[int, Option(min=1, help="torch threads on either side and in the single process.")] = 2
    rtt_ms: Annotated[
        list[float] | None,
        Option(min=0, help="Round trip of a link in milliseconds, repeatable; by default 0, 20, 50, 80 and 150."),
    ] = None
    texts: Annotated[str, Option(help="On links: chat, and tuned (E2E), comma-separated; by default both.")] = ""
    drafts: Annotated[
        str,
        Option(
            help="On links: ngram, small draft, tuned draft, and fixed 2 and fixed 4 (so many tokens, whatever pays), "
            "comma-separated; by default the first three. None is always there."
        ),
    ] = ""
    link_prompts: Annotated[int, Option(min=1, max=49, help="Prompts for each link, text and draft.")] = 12
    link_tokens: Annotated[int, Option(min=8, help="Tokens that follow each of them at most.")] = 64
    draft: Annotated[
        Path | None,
        Option(
            help="Package of the small draft (`emulator build --draft`), with --adapter where the text is tuned; by "
            "default one is made."
        ),
    ] = None
    adapter: Annotated[
        Path | None,
        Option(
            help="Folder OUT of `edge train --draft PACKAGE --out OUT`, tuned on E2E, beside --draft; by default one "
            "is tuned with the draft."
        ),
    ] = None
    sample_tokens: Annotated[
        int, Option(min=1, help="Tokens that the model writes for the draft to be distilled on.")
    ] = 200_000
    distill_steps: Annotated[int, Option(min=1, help="Steps of the draft's distillation.")] = 400
    tune_steps: Annotated[int, Option(min=1, help="Optimizer steps of tuning on E2E, with the draft.")] = 200
    data_folder: flags.DataFolder = None
    out: Annotated[Path, Option(help="Folder for the draft and the adapter that are made.")] = Path("isthmus-links")
    figure: Annotated[Path | None, Option(help="PNG of tokens per second against round trip (needs matplotlib).")] = (
        None
    )

    def cloud_options(self, dtype: Literal["fp32", "bf16"] = "fp32") -> tuple[str, ...]:
        """Options of `isthmus cloud serve` for a cloud that computes in this dtype."""
        return "--edge-layers", self.edge_layers, "--threads", str(self.threads), "--dtype", dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Replay real requests against eight tenants, half of which train meanwhile; with batching and without.

    When they came and their lengths are real, their prompts are random tokens.

    Example: isthmus bench serve --traces azure-llm-2023 --json
    """

    traces: Annotated[Path, Option(help="Folder with the Azure LLM inference traces of 2023.")]
    model: flags.Model = "smollm2-135m"
    edge_layers: flags.EdgeLayers = "2:2"
    n: Annotated[int, Option(min=2, help="Tenants; half of them train.")] = 8
    requests: Annotated[int, Option(min=2, help="Of each of the two traces.")] = 40
    rate: Annotated[float, Option(min=0.01, help="Requests per second of all tenants, on average.")] = 0.4
    fewer: Annotated[float, Option(min=1, help="The traces' numbers of tokens are divided by this.")] = 8.0
    threads: Annotated[int, Option(min=1, help="torch threads of the cloud.")] = 2
    figure: Annotated[Path | None, Option(help="PNG of the times and shares of both (needs matplotlib).")] = None


GENERATION: Final = {
    "generate": Measurement(
        GenerateSettings, "generation.generate_bench:run_generate", "generation.generate_bench:show"
    ),
    "serve": Measurement(ServeSettings, "generation.serve_bench:run_serve", "generation.serve_bench:show"),
}
"""The commands by name."""
