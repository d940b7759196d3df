"""The model owner's commands for emulators: `isthmus emulator sample | build | verify | sign | plug`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cli.cloud_flags import DEFAULT_HOME
from isthmus.common.shutdown import interruptible
from isthmus.common.terminal import printable
from isthmus.edge.config.flags import AsJson
from isthmus.emulator.package.build_presets import FOR_DRAFTING, FOR_TUNING, PRESETS, top_heavy
from isthmus.experiments.harness.bench_flags import Model

if TYPE_CHECKING:
    from isthmus.emulator.package.package import Package

app = typer.Typer(
    help="Give data owners a lossy stand-in for the middle layers, and plug in what they tuned on it.",
    no_args_is_help=True,
)

_LAST_DATE = 253_402_300_799  # the year 9999

Home = Annotated[Path, typer.Option("--home", help="The cloud's folder with worker_key and worker_cert, which sign.")]
PackagePath = Annotated[Path, typer.Option("--package", help="The package's folder.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, or auto for a GPU if there is one.")]


@app.command()
def sample(
    model: Model,
    out: Annotated[Path, typer.Option(help="The new .jsonl file, one text a line.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at least.")] = 200_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a text at most.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 32,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the sampling, above 0; below 1 it keeps to what is likely.")
    ] = 0.9,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens", help="Keep special tokens in the texts, so that a draft learns the chat format."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Let the model write text itself, to choose layers by and to distil on where there is no public text.

    Ctrl-C keeps what is written by then.

    Example: isthmus emulator sample --model smollm2-135m --tokens 200000 --out public.jsonl
    """
    from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
    from isthmus.common.errors import ConfigError
    from isthmus.common.files import disk_errors

    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists and is not overwritten: move it away, or give another --out")
    if out.suffix.lower() != ".jsonl":
        raise ConfigError(f"{out} would be taken for plain text: give an --out that ends in .jsonl")
    from isthmus.emulator.distill.sampled_text import write_sample
    from isthmus.emulator.package.build import pick_device
    from isthmus.emulator.package.plug_in import load_whole

    place = pick_device(device)
    checkpoint = resolve(model)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    whole = load_whole(checkpoint).to(place)
    tokenizer = load_tokenizer(checkpoint.folder)
    with interruptible():
        n_texts = write_sample(
            out,
            whole,
            tokenizer,
            tokens,
            seed=seed,
            batch=batch,
            length=length,
            temperature=temperature,
            special_tokens=special_tokens,
        )
    if as_json:
        typer.echo(json.dumps({"out": str(out), "texts": n_texts}))
    else:
        typer.echo(f"{out} has {n_texts} texts that {checkpoint.name} wrote")


@app.command()
def build(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where the package goes: a new folder, or an older package.")],
    adapter_layers: Annotated[
        str | None,
        typer.Option(
            help="How many of the first and of the last layers the data owner tunes.",
            show_default="2:2; with --preset a fifth above the middle, as 2:6 of 30 layers",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="fidelity: keeps 0.75 of the middle; no protection from theft is claimed. guarded: keeps 0.25; for an "
            "edge that fits its own bridge. whole: all of it in four bits, and adapters below too; no protection. "
            "The package says how to tune on it, and how near the emulator comes. Without --text the model "
            "writes the text first. An option that makes another emulator drops the preset's name and advice.",
        ),
    ] = None,
    draft: Annotated[
        bool,
        typer.Option(
            "--draft",
            help="Make a small draft for `edge generate --draft`: three layers, distilled to predict the whole model's "
            "next token. It needs --distill.",
        ),
    ] = False,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the middle's layers that the emulator keeps.", show_default="0.5; three layers with --draft"
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="uniform, importance, kl, crash or crash-drop; then +bridged or +bridged+closed (not with crash), "
            "then +lowrank:F, then +int8 or +int4.",
            show_default=f"{FOR_TUNING.method}; {FOR_DRAFTING.method} with --draft; the preset's with --preset",
        ),
    ] = None,
    licence: Annotated[
        str, typer.Option(help="What may be done with the package; the data owner reads it.")
    ] = "not stated; ask the model's owner",
    allow_draft_tuning: Annotated[
        bool,
        typer.Option(
            "--allow-draft-tuning",
            help="Allow the data owner to distil the emulator further while tuning, as a draft, from the outputs of "
            "your layers that the edge gets anyway. The result stays on the edge.",
        ),
    ] = False,
    adapters_below: Annotated[
        bool,
        typer.Option(
            "--adapters-below",
            help="Allow the data owner of a preset's package to tune adapters below the emulator, whose gradient came "
            "through it: try first whether they pay.",
        ),
    ] = False,
    home: Home = DEFAULT_HOME,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Public text (.txt, or .jsonl with `text`) to choose layers and to fit bridges by; "
            "default: --distill's."
        ),
    ] = None,
    distill: Annotated[Path | None, typer.Option(help="Public text to distil on; without it, no distillation.")] = None,
    distill_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the distillation.", show_default="1000; 130 with --preset")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Blocks of a step.", show_default="8; 2 with --preset")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 256,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak of AdamW's learning rate.")] = 3e-4,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps in which the learning rate rises.")] = 20,
    mse_weight: Annotated[
        float | None,
        typer.Option(min=0, help="Weight of the error of the hidden states.", show_default="30; 0 with --draft"),
    ] = None,
    lm_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Weight of the language model's loss. On text like the task's it teaches the emulator the task, and "
            "a thief with it.",
            show_default="0",
        ),
    ] = None,
    loss_margin: Annotated[
        float | None,
        typer.Option(
            help="Nats a token by which the language model's loss shall be above the whole model's, instead of as low "
            "as it can (LLEOT). Whether it keeps a thief out is to be measured."
        ),
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Weight of the KL divergence from the whole model's next-token probabilities. A distillation with "
            "both this weight and --lm-weight at 0 is much faster.",
            show_default="1",
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="What the distillation computes in: fp32 or bf16, which took half the time on a CPU with AVX512-BF16."
        ),
    ] = "fp32",
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints of the distillation.")] = 100,
    figure: Annotated[
        Path | None, typer.Option(help="PNG to draw the losses of the distillation to (needs matplotlib).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of the blocks.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Build an emulator of a model's middle and write it, with the edge's parts, as a signed package.

    An interrupted distillation goes on when the same command is repeated; its state lies in OUT.distill.

    Example: isthmus emulator build --model smollm2-135m --keep 0.5 --method importance+bridged --distill public.txt
    --licence "tuning only" --out package

    A preset: isthmus emulator build --model smollm2-135m --preset fidelity --out package

    A draft: isthmus emulator build --model smollm2-135m --draft --distill public.jsonl --out draft
    """
    from isthmus.backbone.checkpoints.sources import check_name, resolve
    from isthmus.backbone.plan import SplitPlan
    from isthmus.common.errors import ConfigError
    from isthmus.emulator.compress.recipe import Recipe
    from isthmus.emulator.package.build import build_package, check_free
    from isthmus.protocol.secure.keys import load_worker

    if draft and distill is None:
        raise ConfigError("--draft needs a text to distil on: give --distill (`isthmus emulator sample` writes a text)")
    if preset is not None and (draft or preset not in PRESETS):
        said = "--draft is a preset of its own" if draft else f"--preset {preset!r} is not known"
        raise ConfigError(f"{said}: give --preset {', '.join(PRESETS)}, or --draft")
    chosen = FOR_DRAFTING if draft else PRESETS[preset] if preset is not None else FOR_TUNING
    check_free(out)
    distillation = None
    of_distillation = {
        "steps": distill_steps,
        "batch": batch,
        "mse_weight": mse_weight,
        "lm_weight": lm_weight,
        "kl_weight": kl_weight,
        "loss_margin": loss_margin,
    }
    if distill is not None or chosen.distils:
        options = chosen.distillation(
            **of_distillation,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            seed=seed,
            save_every=save_every,
            precision=precision,
        )
        distillation = options, distill
        if options.lm_weight:
            typer.echo(
                f"--lm-weight {options.lm_weight:g}: on text like the task's it teaches the emulator the task, and a "
                "thief with it",
                err=True,
            )
    elif given := [name for name, value in of_distillation.items() if value is not None]:
        option = {"steps": "--distill-steps"}.get(given[0], f"--{given[0].replace('_', '-')}")
        raise ConfigError(
            f"{option} {of_distillation[given[0]]:g} is for a distillation, and this build has none: give --distill a "
            "text, or leave it out"
        )
    check_name(model)
    signer = load_worker(home.expanduser())  # a key that is missing is told before a model is fetched
    checkpoint = resolve(model)
    n_layers = checkpoint.config.num_hidden_layers
    plan = SplitPlan.parse(adapter_layers or (top_heavy(n_layers) if chosen.name else "2:2"), n_layers)
    share = chosen.share(len(plan.cloud)) if keep is None else keep
    recipe = Recipe.parse(method or chosen.method, share)
    if preset is not None and not chosen.makes(plan, recipe, distillation[0] if distillation else None):
        typer.echo(f"options change what {preset} makes: the package has not its name and advice for tuning", err=True)
    with interruptible():
        package = build_package(
            out,
            checkpoint,
            plan,
            recipe,
            distillation,
            signer=signer,
            licence=licence,
            allow_draft_tuning=allow_draft_tuning,
            adapters_below=adapters_below,
            length=length,
            text=text,
            figure=figure,
            device=device,
            preset=chosen,
        )
    _show(package, as_json)


@app.command()
def verify(
    package: PackagePath,
    signer: Annotated[
        str | None,
        typer.Option(help="Fingerprint SHA256:… of the root key that must stand behind it, or a connection string."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a package's signature and every file of it, and show what it says about itself.

    Example: isthmus emulator verify --package package --signer SHA256:…
    """
    from isthmus.emulator.package.package import open_package
    from isthmus.protocol.secure.keys import Fingerprint

    pin = None if signer is None else Fingerprint.parse(signer.rpartition("#")[2])
    _show(open_package(package, signer=pin), as_json)


@app.command()
def sign(
    package: PackagePath,
    protection: Annotated[
        Path | None, typer.Option(help="Scores measured with it (`isthmus emulator table --json`); else the old ones.")
    ] = None,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Sign a package anew, with the figures of what it gives away. Do it before handing it out: its id changes.

    Example: isthmus emulator sign --package package --protection table.json
    """
    from isthmus.emulator.package.package import sign_package
    from isthmus.protocol.secure.keys import load_worker

    rows = None if protection is None else _rows(protection)
    _show(sign_package(package, load_worker(home.expanduser()), rows), as_json)


@app.command()
def plug(
    model: Model,
    package: PackagePath,
    adapter: Annotated[Path, typer.Option(help="The adapter that the data owner tuned on the package.")],
    out: Annotated[Path, typer.Option(help="Where the model with the adapter goes; a new folder.")],
    as_json: AsJson = False,
) -> None:
    """Check a returned adapter, plug it into the full model, and write the result as a model of its own.

    A bottleneck adapter or a learned prompt stays an adapter, with a reference to the model beside it.

    Example: isthmus emulator plug --model smollm2-135m --package package --adapter run/adapter --out tuned
    """
    from isthmus.backbone.checkpoints.sources import resolve
    from isthmus.backbone.split.span import load_span
    from isthmus.common.errors import ConfigError
    from isthmus.emulator.package.intake import check_adapter
    from isthmus.emulator.package.package import open_package
    from isthmus.emulator.package.plug_in import export_plugged, plug_in
    from isthmus.emulator.package.verification import check_package_fits

    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists and is not overwritten: move it away, or give another --out")
    opened = open_package(package)
    checkpoint = resolve(model)
    check_package_fits(opened.manifest, checkpoint)
    summary = check_adapter(adapter, (opened.id,), opened.folder, opened.plan)
    attention = opened.manifest.attn_implementation
    span = load_span(checkpoint, opened.plan, attn_implementation=attention)
    plug_in(adapter, opened.checkpoint, opened.plan, span, attn_implementation=attention)
    del span
    kind = export_plugged(adapter, checkpoint, opened.plan, out)
    if as_json:
        typer.echo(
            json.dumps({"out": str(out), "kind": kind, "method": summary.method, "parameters": summary.n_params})
        )
    elif kind == "model":
        typer.echo(f"{out} is {checkpoint.name} with the adapter ({summary.method}) in its weights")
    else:
        typer.echo(
            f"{out} has the adapter and names {checkpoint.name}: "
            f"{summary.method} is no part of the architecture, so it cannot be put into the weights"
        )


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of scores: a list, or an object with the list under `runs`."""
    from isthmus.common.errors import DataError

    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as JSON ({error}): give what `emulator table --json` printed"
        ) from error
    rows = table.get("runs") if isinstance(table, dict) else table
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} has no list of runs: give what `emulator table --json` printed")
    return rows


def _show(package: Package, as_json: bool) -> None:
    """Print a package's manifest."""
    manifest = package.manifest
    if as_json:
        said = manifest.model_dump(mode="json") | {
            "package": str(package.folder),
            "id": package.id,
            "refuses_below": manifest.refuses_below,
            "signer": str(package.signer),
            "share_of_parameters": manifest.share_of_parameters,
            "share_of_bytes": manifest.share_of_bytes,
            "bridge": str(package.bridge_file) if package.bridge_file.exists() else None,
        }
        typer.echo(json.dumps(said))
        return
    from datetime import UTC, datetime

    layers = ", ".join(map(str, manifest.layers))
    lines = {
        "package": package.folder,
        "id": package.id,
        "signer": package.signer,
        "signed": f"{datetime.fromtimestamp(min(manifest.created, _LAST_DATE), UTC):%Y-%m-%d %H:%M} UTC",
        "model": f"{manifest.model} ({manifest.family}), digest {manifest.digest[:16]}",
        "adapter layers": f"{manifest.plan} of {manifest.n_layers}",
        "emulator": f"{manifest.recipe}, keeps {manifest.keep:g} of the middle: layers {layers}",
        "gives away": f"{manifest.share_of_parameters:.1%} of the middle's parameters, "
        f"{manifest.share_of_bytes:.1%} of its bytes",
        "edge's parts": f"{manifest.edge_params:,} parameters",
        "distilled": "no",
        "draft tuning": "allowed" if manifest.allow_draft_tuning else "not allowed",
        "licence": manifest.licence or "(none stated)",
    }
    if package.bridge_file.exists():
        lines["your bridge"] = package.bridge_file
    if manifest.distilled is not None:
        done = manifest.distilled
        lines["distilled"] = (
            f"{done.steps} steps, {done.tokens:,} tokens, relative error {done.error_before:.4g} -> "
            f"{done.error_after:.4g}"
        )
        if done.kl_before is not None and done.kl_after is not None:
            lines["KL divergence"] = f"{done.kl_before:.4g} -> {done.kl_after:.4g} nats a token from the whole model"
        if done.agreement_before is not None and done.agreement_after is not None:
            lines["top-1 agreement"] = (
                f"{done.agreement_before:.1%} -> {done.agreement_after:.1%} of the tokens with the whole model"
            )
    if manifest.preset is not None:
        known = PRESETS.get(manifest.preset)
        lines["preset"] = manifest.preset + ("" if known is None else f" ({known.gives_not})")
    if manifest.tuning is not None:
        advised = manifest.tuning
        lines["tune with"] = (
            f"learning rate {advised.learning_rate:g}, {advised.steps} steps, rank {advised.rank}, "
            f"{advised.warmup_steps} warm-up steps, " + ("all layers" if advised.layers == "all" else "layers above")
        )
        lines["adapters below"] = "not allowed" if manifest.refuses_below else "allowed"
    if manifest.quality is not None:
        found = manifest.quality
        lines["quality"] = (
            f"KL {found.kl:.4g} nats a token from the whole model; cosine of LoRA's first gradient with the true one "
            f"{found.cosine_above:.2f} above, {found.cosine_below:.2f} below ({found.tokens:,} held-out tokens of the "
            "text that it was made by, not of your task)"
        )
    if not manifest.protection:
        lines["protection"] = "not measured"
    for name, value in lines.items():
        typer.echo(f"{name:16} {printable(str(value))}")
    for row in manifest.protection:
        typer.echo(
            f"{'protection':16} {printable(row.task)} ({printable(row.metric)}): plug-in {row.plug_in:.4g}, "
            f"thief {row.thief:.4g}, untuned {row.full_zero_shot:.4g}; recovered {_share(row.plug_in_recovery)} by "
            f"plug-in, {_share(row.thief_recovery)} by a thief (seeds: {row.seeds})"
        )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
