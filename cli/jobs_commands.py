"""The commands of a daemon's jobs: `isthmus edge jobs list | show | submit | follow | steps | result`, and changes.

They ask the daemon that runs, over its Unix socket, so a person, a script and the page see one list.
"""

from __future__ import annotations

import json
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.common.errors import ConfigError
from isthmus.daemon.daemon_settings import DEFAULT_HOME

if TYPE_CHECKING:
    from isthmus.daemon.daemon_client import DaemonClient

app = typer.Typer(help="Jobs of the daemon that runs: what is queued, how it goes, and what came of it.",
                  no_args_is_help=True)  # fmt: skip

JOBS = "/isthmus/v1/jobs"
ENDED = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 0.5
PAGE = 100
_FILES = ("data", "validation", "prompts", "public")
_PATHS = (*_FILES, "adapter", "start_from", "package")

DaemonHome = Annotated[Path, typer.Option("--home", help="The daemon's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, as `list` shows it.")]


@app.command("list")
def list_jobs(
    home: DaemonHome = DEFAULT_HOME,
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="The newest ones, so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first.

    Example: isthmus edge jobs list
    """
    from isthmus.common.readable import date
    from isthmus.common.terminal import printable

    jobs = _client(home).get(JOBS, limit=limit)["jobs"]
    if as_json:
        typer.echo(json.dumps(jobs))
        return
    if not jobs:
        typer.echo("no jobs", err=True)
    else:
        typer.echo(f"{'JOB':30} {'KIND':8} {'STATUS':9} {'DONE':>13} {'LEFT':>12}")
    for job in jobs:
        typer.echo(f"{job['id']:30} {job['kind']:8} {_status(job):9} {_done(job):>13} {_left(job):>12}".rstrip())
        named = f"  {date(job['created_at'])}  {job['model']}  {job['suffix']}".rstrip()
        for line in (named, *([f"  waits for {_wait(job['waiting'])}"] if job["waiting"] else [])):
            typer.echo(printable(line if len(line) <= 80 else f"{line[:79]}…"))


@app.command()
def show(job: JobId, home: DaemonHome = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Show a job.

    Example: isthmus edge jobs show ftjob-0123456789abcdef01234567
    """
    _print(_client(home).get(f"{JOBS}/{job}"), as_json=as_json)


@app.command()
def submit(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="train, tune, evaluate or generate.")],
    model: Annotated[str, typer.Option(help="The base model's name, as `isthmus edge daemon status` shows it.")],
    data: Annotated[str | None, typer.Option(help="File of the data, or the id of an uploaded one.")] = None,
    validation: Annotated[str | None, typer.Option(help="Held-out data, likewise.")] = None,
    prompts: Annotated[str | None, typer.Option(help="File of prompts (generate), likewise.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="A tuned model's name, or an adapter's folder (evaluate, generate).")
    ] = None,
    package: Annotated[
        str | None,
        typer.Option(
            help="Name of an emulator package that the model's cloud offers, or the folder of one (tune); by default "
            "the only one that is offered."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with further settings, named as the flags of the kind's command.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A further setting; wins over the file.")
    ] = None,
    suffix: Annotated[str, typer.Option(help="What stands in the tuned model's name.")] = "",
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher ones go first.")] = 0,
    home: DaemonHome = DEFAULT_HOME,
    wait: Annotated[bool, typer.Option("--follow", help="Follow it to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a job into the queue.

    Settings are those of `isthmus edge train`, `emulator tune`, `edge eval` and `edge generate`, with `_` for `-`.

    Example: isthmus edge jobs submit train --model smollm2-135m --data tickets.jsonl --set steps=200 --follow
    """
    from isthmus.edge.config.config_text import read_toml

    spec: dict[str, Any] = {} if config is None else read_toml(config)
    spec |= dict(map(_setting, settings or []))
    named = {"data": data, "validation": validation, "prompts": prompts, "adapter": adapter, "package": package}
    spec |= {name: value for name, value in named.items() if value is not None}
    spec |= {name: _absolute(spec[name]) for name in _PATHS if isinstance(spec.get(name), str)}
    _check_files(spec)
    client = _client(home)
    body = {"kind": kind, "model": model, "spec": spec, "suffix": suffix, "priority": priority}
    made = client.post(JOBS, body)
    if wait:
        _follow(client, made["id"], as_json=as_json)
    elif as_json:
        typer.echo(json.dumps(made))
    else:
        typer.echo(made["id"])


@app.command()
def follow(job: JobId, home: DaemonHome = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Print a job's events to its end; Ctrl-C ends the printing, and not the job.

    Ends with 0 if it has succeeded, and else with the code of its error.

    Example: isthmus edge jobs follow ftjob-0123456789abcdef01234567
    """
    _follow(_client(home), job, as_json=as_json)


@app.command()
def pause(job: JobId, home: DaemonHome = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Let a job rest; a training saves a checkpoint at its next micro-batch.

    Example: isthmus edge jobs pause ftjob-0123456789abcdef01234567
    """
    _change(home, job, "pause", as_json=as_json)


@app.command()
def resume(job: JobId, home: DaemonHome = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Put a paused job back into the queue.

    Example: isthmus edge jobs resume ftjob-0123456789abcdef01234567
    """
    _change(home, job, "resume", as_json=as_json)


@app.command()
def cancel(job: JobId, home: DaemonHome = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """End a job; `retry` goes on with it.

    Example: isthmus edge jobs cancel ftjob-0123456789abcdef01234567
    """
    _change(home, job, "cancel", as_json=as_json)


@app.command()
def retry(job: JobId, home: DaemonHome = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Go on with a job that has failed or was cancelled, from its newest checkpoint.

    Example: isthmus edge jobs retry ftjob-0123456789abcdef01234567
    """
    _change(home, job, "retry", as_json=as_json)


@app.command()
def delete(job: JobId, home: DaemonHome = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Delete a job that has ended, with its checkpoints, its tuned model and its result, for good.

    Example: isthmus edge jobs delete ftjob-0123456789abcdef01234567
    """
    told = _client(home).delete(f"{JOBS}/{job}")
    typer.echo(json.dumps(told) if as_json else f"{job} is deleted")


@app.command()
def steps(
    job: JobId,
    after: Annotated[int, typer.Option(min=0, help="Only steps after this one.")] = 0,
    home: DaemonHome = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Print a training's log, step by step.

    Example: isthmus edge jobs steps ftjob-0123456789abcdef01234567 --json
    """
    lines = list(_steps(_client(home), job, after))
    if as_json:
        typer.echo(json.dumps(lines))
        return
    for line in lines:
        typer.echo(f"step {line['step']:6}  loss {line['loss']:.4f}  rate {line['learning_rate']:.3g}")


@app.command()
def result(
    job: JobId,
    out: Annotated[Path | None, typer.Option(help="Where it goes; without it, it is printed.")] = None,
    home: DaemonHome = DEFAULT_HOME,
) -> None:
    """Fetch what a job has made: figures (CSV), an evaluation (JSON) or answers (JSON Lines).

    A tuned model is asked by its name, and its adapter lies in the folder that `show` names.

    Example: isthmus edge jobs result ftjob-0123456789abcdef01234567 --out figures.csv
    """
    from isthmus.common.files import new_file

    path, client = f"{JOBS}/{job}/result", _client(home)
    if out is None:
        client.download(path, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    if not client.get(f"{JOBS}/{job}")["results"]:
        raise ConfigError(f"{job} has no result: it is there once the job has succeeded")
    with new_file(out) as file:
        client.download(path, file)


def _client(home: Path) -> DaemonClient:
    from isthmus.daemon.daemon_client import DaemonClient
    from isthmus.daemon.home import Home

    return DaemonClient(Home(home.expanduser().absolute()))


def _change(home: Path, job: str, action: str, *, as_json: bool) -> None:
    _print(_client(home).post(f"{JOBS}/{job}/{action}"), as_json=as_json)


def _follow(client: DaemonClient, job_id: str, *, as_json: bool) -> None:
    from isthmus.common.readable import moment
    from isthmus.common.shutdown import interruptible
    from isthmus.common.terminal import printable

    shown = 0
    with interruptible("stopped following; the job goes on"):
        while True:
            job = client.get(f"{JOBS}/{job_id}")
            for event in _events_after(client, job_id, shown):
                shown = _number(event)
                typer.echo(json.dumps(event) if as_json else printable(f"{moment(event['at'])}  {event['message']}"))
            if job["status"] in ENDED:
                break
            time.sleep(POLL_SECONDS)
    if job["status"] != "succeeded":
        raise typer.Exit(job["error"]["code"] if job["error"] else 1)


def _events_after(client: DaemonClient, job_id: str, number: int) -> list[dict[str, Any]]:
    """A job's events after that of a number, the oldest first."""
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        page = client.get(f"{JOBS}/{job_id}/events", after=after, limit=PAGE)
        new = [event for event in page["events"] if _number(event) > number]
        found += new
        if len(new) < len(page["events"]) or not page["has_more"]:
            return found[::-1]
        after = new[-1]["id"]


def _number(event: dict[str, Any]) -> int:
    return int(event["id"].rpartition("-")[2])


def _steps(client: DaemonClient, job_id: str, after: int) -> Iterator[dict[str, Any]]:
    while lines := client.get(f"{JOBS}/{job_id}/steps", after=after)["steps"]:
        yield from lines
        after = lines[-1]["step"]


def _setting(text: str) -> tuple[str, Any]:
    """A setting as TOML has its value; what is no value there is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} is no setting: write NAME=VALUE")
    try:
        return name.strip().replace("-", "_"), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip().replace("-", "_"), value


def _absolute(value: str) -> str:
    """A path that is there as an absolute one; ids, names and what a hub has stay as they are."""
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value


def _check_files(spec: dict[str, Any]) -> None:
    """Say so here where a file is missing: the daemon, which has another folder, could not."""
    from isthmus.common.errors import DataError

    for name in _FILES:
        value = spec.get(name)
        if isinstance(value, str) and not value.startswith(("/", "file-", "hub:")):
            raise DataError(f"{name} = {value!r} is no file here: give its path, or the id of an uploaded one")


def _print(job: dict[str, Any], *, as_json: bool) -> None:
    from isthmus.common.readable import moment
    from isthmus.common.terminal import printable

    if as_json:
        typer.echo(json.dumps(job))
        return

    def when(name: str) -> str:
        return "-" if job[name] is None else moment(job[name])

    error = "" if job["error"] is None else f"{job['error']['message']} (exit code {job['error']['code']})"
    rows = {
        "job": job["id"],
        "kind": job["kind"],
        "status": _status(job),
        "model": job["model"],
        "tuned model": job["tuned_model"],
        "adapter": job["adapter"],
        "waits for": job["waiting"] and _wait(job["waiting"], job["status"]),
        "because": job["waiting"] and job["waiting"]["reason"],
        "done": _done(job),
        "left": _left(job),
        "created": when("created_at"),
        "started": when("started_at"),
        "ended": when("finished_at"),
        "error": error,
    }
    for name, value in rows.items():
        if value:
            typer.echo(printable(f"{name:12} {value}"))


def _status(job: dict[str, Any]) -> str:
    ways = {"pause": "pausing", "cancel": "ending"}
    shown = "waiting" if job["waiting"] else str(job["status"])
    return ways.get(job["wanted"], shown) if job["status"] == "running" else shown


def _wait(waiting: dict[str, Any], status: str = "") -> str:
    """The cloud that is waited for, since when, and until when; with a job's status also what follows then."""
    from isthmus.common.readable import moment, period

    if not status:
        now = time.time()
        away, left = period(max(0.0, now - waiting["since"])), period(max(0.0, waiting["until"] - now))
        return f"the cloud {waiting['cloud']}, away for {away}; gives up in {left}"
    then = "it is queued again" if status == "running" else "the job has failed"
    return (
        f"the cloud {waiting['cloud']}, since {moment(waiting['since'])}, until {moment(waiting['until'])}: then {then}"
    )


def _done(job: dict[str, Any]) -> str:
    return "-" if job["total"] is None else f"{job['step']}/{job['total']}"


def _left(job: dict[str, Any]) -> str:
    from isthmus.common.readable import period

    return "" if job["seconds_left"] is None else period(job["seconds_left"])
