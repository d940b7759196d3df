"""The commands of the data owner: `isthmus edge keygen | train | eval | generate | audit`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.common.shutdown import interruptible
from isthmus.edge.config.audit_config import AuditCommandConfig
from isthmus.edge.config.client_config import DEFAULT_KEY, EvalConfig, GenerateConfig
from isthmus.edge.config.flags import (
    AsJson,
    GroupedCommand,
    SharedConfigFile,
    read_settings,
    run_to_its_end,
    with_flags,
)
from isthmus.edge.config.training_config import TrainConfig

app = typer.Typer(
    help="Tune a model whose middle layers run in the cloud, on data that stay here.", no_args_is_help=True
)

Adapter = Annotated[
    Path | None,
    typer.Option(help="An adapter's folder; without it, the model as it is served.", rich_help_panel="Adapter"),
]


@app.command()
def keygen(
    out: Annotated[
        Path, typer.Option(help="Where the private key goes; the public one gets `.pub` behind it.")
    ] = DEFAULT_KEY,
    comment: Annotated[str, typer.Option(help="A name for the key, which the cloud's owner sees.")] = "",
    passphrase: Annotated[
        bool, typer.Option(help="Whether the key has a passphrase, which each command that connects then asks for.")
    ] = False,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            help="File that holds the passphrase; commands find it by ISTHMUS_EDGE_PASSPHRASE_FILE, or else ask."
        ),
    ] = None,
) -> None:
    """Make this edge's key pair. Send the .pub file to the cloud's owner.

    Example: isthmus edge keygen --comment alice
    """
    import getpass

    from isthmus.protocol.secure.keys import generate_edge
    from isthmus.protocol.secure.passphrases import Passphrase

    path = out.expanduser()
    new = Passphrase("edge", passphrase_file, asks=True) if passphrase or passphrase_file else None
    line = generate_edge(path, comment or getpass.getuser(), new)
    typer.echo(f"private key  {path}")
    typer.echo(f"public key   {path}.pub (send it to the cloud's owner)")
    typer.echo(line.strip())


@app.command(cls=GroupedCommand)
@with_flags(TrainConfig)
def train(
    config: SharedConfigFile = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Tune adapters on your data: text and labels are not sent, but activations and their gradients are.

    A cloud that attacks can recover nearly all of the text and the labels from these.

    Ends with the adapter's folder (OUT/adapter) and OUT/report.json.

    Example: isthmus edge train --cloud cloud.txt --data tickets.jsonl --steps 200 --out run
    """
    settings = read_settings(TrainConfig, config, flags)
    from isthmus.edge.split_run import run_training

    run_to_its_end(lambda: run_training(settings), settings.out, as_json=as_json)


@app.command("eval", cls=GroupedCommand)
@with_flags(EvalConfig)
def evaluate(
    config: SharedConfigFile = None,
    adapter: Adapter = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Measure the loss on all of your data, with or without an adapter.

    Example: isthmus edge eval --cloud cloud.txt --data held-out.jsonl --adapter run/adapter --json
    """
    settings = read_settings(EvalConfig, config, flags)
    from isthmus.edge.split_run import run_evaluation

    result = run_evaluation(settings, adapter)
    typer.echo(json.dumps(result) if as_json else f"loss {result['loss']:.4f} over {result['examples']} examples")


@app.command(cls=GroupedCommand)
@with_flags(GenerateConfig)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.", show_default=False)] = None,
    config: SharedConfigFile = None,
    adapter: Adapter = None,
    chat: Annotated[
        bool,
        typer.Option(
            help="Put the prompt into the model's chat template. Without a PROMPT, hold a conversation: Ctrl-C ends an "
            "answer, Ctrl-D the conversation.",
            rich_help_panel="Generation",
        ),
    ] = False,
    batch: Annotated[
        Path | None,
        typer.Option(
            help="Answer all texts of a file of JSON Lines, each with `prompt` (text) or `messages` (a chat), and an "
            "`id` if you like.",
            rich_help_panel="Generation",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the answers to --batch, one line each; one that has some already is gone on with. By "
            "default they are printed.",
            rich_help_panel="Generation",
        ),
    ] = None,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Continue a prompt with the split model, hold a conversation, or answer a file of prompts.

    Example: isthmus edge generate --cloud cloud.txt --adapter run/adapter "Ticket: my card was charged twice"
    """
    _check_use(prompt, chat=chat, batch=batch, out=out, as_json=as_json)
    settings = read_settings(GenerateConfig, config, flags)
    from isthmus.edge.cloud_link import open_link
    from isthmus.edge.generation.batch_file import Answers, read_texts
    from isthmus.edge.generation.generation_run import answer_all, answer_once, converse
    from isthmus.edge.generation.text_generator import text_generator

    texts = [] if batch is None else read_texts(batch)
    answers = None if out is None else Answers.find(out, texts)
    with (
        interruptible(),
        open_link(settings, interactive=batch is None, deadline=settings.deadline) as link,
        text_generator(link, settings, adapter) as generator,
    ):
        if texts:
            answer_all(generator, texts, answers, sys.stdout)
        elif prompt is None:
            converse(generator, sys.stdout)
        else:
            answer_once(generator, link, prompt, chat=chat, as_json=as_json, out=sys.stdout)


@app.command(cls=GroupedCommand)
@with_flags(AuditCommandConfig, without={"codec"})
def audit(
    run: Annotated[Path, typer.Option(help="The run's folder, trained with --audit-sample.")],
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Have sampled calls of a run computed again elsewhere, and say where the first answer differs.

    Whoever computes them sees the activations, and so the text. Ends with exit code 71 where an answer differs, and
    with 10 where bits differ that only a --threshold could judge.

    Example: isthmus edge audit --run run --cloud other-cloud.txt
    """
    settings = read_settings(AuditCommandConfig, None, flags)
    from isthmus.common.errors import AuditError, ConfigError
    from isthmus.edge.audit.audit_command import lines, run_audit

    with interruptible():
        report = run_audit(run, settings)
    typer.echo(json.dumps(report.to_json()) if as_json else lines(report))
    if report.first_lie is not None:
        lie = report.first_lie
        raise AuditError(
            f"{len(report.lies)} of {report.replayed} replayed calls are others elsewhere, first call {lie.call} of "
            f"step {lie.step} (exchange {lie.exchange} of session {lie.session[:16]}): keep {run}, and ask the cloud's "
            "owner"
        )
    if report.undecided:
        raise ConfigError(
            f"{report.undecided} of {report.replayed} replayed calls have other bits, where those of honest clouds may "
            "differ, too: replay where the cloud's numerics are the same, or state a distance with --threshold"
        )


def _check_use(prompt: str | None, *, chat: bool, batch: Path | None, out: Path | None, as_json: bool) -> None:
    """Refuse what does not go together, as a usage error."""
    if batch is not None and (prompt is not None or chat or as_json):
        raise typer.BadParameter(
            "--batch FILE has its own prompts, and its answers are JSON: leave out PROMPT, --chat and --json"
        )
    if batch is None and out is not None:
        raise typer.BadParameter("--out is for the answers to --batch FILE: give both, or neither")
    if batch is None and prompt is None and not chat:
        raise typer.BadParameter("give a PROMPT to continue, --chat for a conversation, or --batch FILE")
    if batch is None and prompt is None and as_json:
        raise typer.BadParameter(
            "--json prints one answer, and a conversation has many: give a PROMPT, or leave --json out"
        )
