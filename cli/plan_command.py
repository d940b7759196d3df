"""The command `isthmus plan`: what training and generation cost over a link, before anything is set up."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isthmus.common.readable import lines
from isthmus.edge.config.flags import AsJson
from isthmus.experiments.harness.bench_flags import EdgeLayers, Model, Threads

if TYPE_CHECKING:
    from isthmus.planner.model_facts import ModelFacts
    from isthmus.planner.speed_profile import ProbeSettings, SpeedProfile

Speed = Annotated[
    Path | None,
    typer.Option(help="A file that `isthmus plan --probe --json` wrote; by default this machine is measured."),
]


def plan(
    model: Model = "smollm2-135m",
    link: Annotated[str, typer.Option(help="Rate and round-trip time: 100mbit,50ms or 12.5MB/s,20ms; or local.")] = (
        "local"
    ),
    edge_layers: EdgeLayers = "2:2",
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 4,
    seq: Annotated[int, typer.Option(min=2, help="Token positions of a sequence.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps whose time is given.")] = 200,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    target_modules: Annotated[
        str, typer.Option(help="Linears that carry adapters, comma-separated; by default PEFT's usual ones.")
    ] = "",
    codec: Annotated[
        str, typer.Option(help="Codec of the wire: one, forward,backward, or direction=codec for each.")
    ] = "fp32",
    dtype: Annotated[str, typer.Option(help="Of the edge's weights: fp32 or bf16.")] = "fp32",
    cloud_dtype: Annotated[str, typer.Option(help="Of the cloud's weights: fp32 or bf16.")] = "fp32",
    threads: Threads = 1,
    edge_speed: Speed = None,
    cloud_speed: Speed = None,
    live_share: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the sites' traffic that kill-and-revive leaves.")
    ] = 0.15,
    taps: Annotated[int, typer.Option(min=1, help="Taps of a ladder side network.")] = 8,
    tap_width: Annotated[
        int | None, typer.Option(min=1, help="Width of a tap; by default that of the hidden states.")
    ] = None,
    emulator_keep: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the cloud's layers that an emulator keeps.")
    ] = 0.5,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt of a generated text.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a generated text.")] = 64,
    draft_layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers of a small draft in the place of the cloud's; by default 3, or all if fewer."),
    ] = None,
    acceptance_rate: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Probability that a drafted token is accepted, given that all before it were; by default what one "
            "model had, as printed.",
        ),
    ] = None,
    summed: Annotated[bool, typer.Option(help="One gradient per input of the edge's sites, not one per site.")] = False,
    own_layers: Annotated[bool, typer.Option(help="Adapt the edge's layers beside the cloud's.")] = False,
    goal: Annotated[
        Literal["quality", "speed", "privacy"], typer.Option(help="What the recommendation is for.")
    ] = "quality",
    leak_budget: Annotated[
        list[str] | None,
        typer.Option(
            help="tokens<=X, labels<=X, or both with a comma: recommend only what keeps it, if all that is sent is "
            "read. With --goal privacy both are 0 by default."
        ),
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Only measure this machine, for another's plan.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict what training and generation cost over a link: of every way to train time, bytes, memory and FLOPs.

    It recommends a way to train, and predicts tokens per second with and without drafts. With --goal privacy it says
    first what the private mode needs, `isthmus emulator tune` on each preset's package, and what it does not give.

    Only the model's configuration is used. This machine's speed is measured with the model's shapes, which takes some
    seconds for a small model. The cloud counts as a machine like this one unless its speed is given.

    Example: isthmus plan --model smollm2-135m --link 100mbit,50ms --json

    With the cloud's own speed: run `isthmus plan --probe --json > cloud.json` there, with --dtype bf16 if that is what
    it computes in, then here: isthmus plan --link 100mbit,50ms --cloud-speed cloud.json
    """
    from isthmus.backbone.checkpoints.sources import resolve
    from isthmus.backbone.plan import SplitPlan
    from isthmus.common.errors import ConfigError, PlanError
    from isthmus.edge.codecs.wire_codecs import WireCodecs
    from isthmus.planner.cost_model import PlanSettings, predict, predict_packages
    from isthmus.planner.generation_cost import GenerationSettings, predict_generation
    from isthmus.planner.generation_report import (
        as_json as generation_json,
        draft_table,
        generation_assumptions,
        summary,
    )
    from isthmus.planner.link_spec import LinkSpec
    from isthmus.planner.model_facts import ModelFacts
    from isthmus.planner.plan_report import (
        assumptions,
        budget_lines,
        notes,
        private_json,
        private_lines,
        recommend,
        rows,
        table,
    )
    from isthmus.planner.speed_profile import ProbeSettings, SpeedProfile
    from isthmus.privacy.ledger.mode_leaks import read_limits

    try:
        limits = read_limits(leak_budget or ())
    except ValueError as error:
        raise ConfigError(f"leak_budget: {error}.") from error
    where = LinkSpec.parse(link)
    config = resolve(model).config
    facts = ModelFacts.of(config, rank, target_modules.split(",") if target_modules else None)
    here = ProbeSettings(batch, seq, rank, dtype, threads)
    if probe:
        _print_speed(_measure(config, facts, here), as_json)
        return
    settings = PlanSettings(
        SplitPlan.parse(edge_layers, facts.n_layers),
        batch,
        seq,
        WireCodecs.parse(codec),
        rank=rank,
        live_share=live_share,
        taps=taps,
        tap_width=tap_width,
        emulator_keep=emulator_keep,
        summed=summed,
        own_layers=own_layers,
    )
    generated = GenerationSettings.of(settings.plan, prompt, tokens, draft_layers, acceptance_rate)
    edge = _measure(config, facts, here) if edge_speed is None else SpeedProfile.read(edge_speed)
    if cloud_speed is not None:
        cloud = SpeedProfile.read(cloud_speed)
    elif edge_speed is None and cloud_dtype == dtype:
        cloud = edge
    else:
        cloud = _measure(config, facts, ProbeSettings(batch, seq, rank, cloud_dtype, threads))
    costs, positions = predict(facts, settings, where, edge, cloud), batch * seq
    private, package = None, None
    if goal == "privacy":
        try:
            packages = predict_packages(facts, settings, where, edge)
        except PlanError:
            packages = []  # too few layers
        private = private_json(packages, costs, where, edge.memory_bytes, facts.hidden)
        if packages:
            package = packages[0]
            costs = [package.tuning if cost.mode == "emulator" else cost for cost in costs]
    advice = recommend(costs, goal, positions, steps, edge.memory_bytes, limits)
    kept = budget_lines(costs, goal, limits)
    generation = predict_generation(facts, settings, generated, where, edge, cloud)
    if as_json:
        tree = {
            "modes": rows(costs, positions, steps),
            "recommendation": advice,
            "leak_budget": kept,
            "generation": generation_json(generation, generated),
            "assumptions": assumptions(settings, where, edge, cloud, package) + generation_assumptions(generated),
        }
        if private is not None:
            tree = {"private": private, **tree}
        typer.echo(json.dumps(tree))
        return
    from rich.console import Console

    console = Console(width=80)
    if private is not None:
        _print_lines(*private_lines(private, where), "")
    console.print(table(costs, positions, steps))
    _print_lines("", *kept, *([""] if kept else []), advice, "")
    _print_lines(summary(generation, generated), "")
    console.print(draft_table(generation, generated))
    _print_lines("", *notes(settings, edge, cloud, package))


def _print_lines(*lines: str) -> None:
    for line in lines:
        typer.echo(textwrap.fill(line, 80))


def _measure(config: Any, facts: ModelFacts, settings: ProbeSettings) -> SpeedProfile:
    from isthmus.experiments.harness.launch import stderr_progress
    from isthmus.planner.speed_probe import ROUNDS, measure

    with stderr_progress(f"measuring this machine ({settings.dtype})", ROUNDS) as advance:
        return measure(config, facts, settings, advance)


def _print_speed(speed: SpeedProfile, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(speed)))
        return
    for line in lines(asdict(speed), 20):
        typer.echo(line)
