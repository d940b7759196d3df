"""The commands of the edge's daemon: `isthmus edge daemon start | status | stop | logs | doctor | token | config`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.common.errors import ConfigError, HomeInUseError, NotRunningError
from isthmus.daemon.daemon_settings import DEFAULT_HOME, EXPORT_NO_PROXY, FILE
from isthmus.daemon.tokens import CODE_SECONDS, HUB

if TYPE_CHECKING:
    from isthmus.daemon.daemon_server import Started
    from isthmus.daemon.daemon_settings import DaemonSettings
    from isthmus.daemon.home import Home
    from isthmus.daemon.state.tables import Owner

app = typer.Typer(
    help="A process that stays: it tunes and answers for programs of this machine that speak OpenAI's API or Tinker's.",
    no_args_is_help=True,
)

DaemonHome = Annotated[Path, typer.Option("--home", help="The daemon's folder.")]
Config = Annotated[
    Path | None, typer.Option(help="The daemon's settings; without it, daemon.toml of its folder, where there is one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
POLL_SECONDS = 0.1
_REMOTE = (
    "note    other machines can connect: prompts, data and answers cross the network inside TLS, and whoever has a "
    "token uses your clouds' quotas"
)
FIRST_LOOK_SECONDS = 60.0
"""So long `start --background` waits until the daemon has asked its clouds."""


@app.command()
def start(
    home: DaemonHome = DEFAULT_HOME,
    config: Config = None,
    cloud: Annotated[
        str | None,
        typer.Option(
            help="A cloud that daemon.toml then has, which is written where there is none: its connection string, or a "
            "file that holds it."
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="Address and port; wins over the file's. Port 0 is any free one.")
    ] = None,
    background: Annotated[
        bool, typer.Option("--background", help="Leave the terminal once it answers and has asked its clouds.")
    ] = False,
    detached: Annotated[bool, typer.Option("--detached", hidden=True, help="Say nothing on standard error.")] = False,
) -> None:
    """Start the daemon: it serves until Ctrl-C, or `isthmus edge daemon stop`.

    In a terminal, and with `--cloud`, it prints a link that signs in to its page once.

    Example: isthmus edge daemon start --cloud cloud.txt
    """
    with _extra():
        from isthmus.daemon.daemon_log import logging_to
        from isthmus.daemon.daemon_server import run
        from isthmus.daemon.home import Home
        from isthmus.daemon.settings_file import read_daemon_settings
    place = home.expanduser().absolute()
    if cloud is not None:
        _know_cloud(place, cloud, config)
    settings = read_daemon_settings(_config(place, config), {"listen": listen})
    folder = Home.make(place)
    link = cloud is not None or sys.stdout.isatty()  # and in no log of a service
    if background:
        _start_in_background(folder, settings, config, listen, link=link)
        return

    def announce(started: Started) -> None:
        code = started.code if link else None
        typer.echo("\n".join(_message(started.url, folder, started.clouds, remote=started.remote, code=code)))
        sys.stdout.flush()

    with logging_to(folder.log, to_stderr=not detached):
        run(settings, folder, announce)


@app.command()
def status(home: DaemonHome = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Show how the daemon is: its address, disk, jobs, and what the clouds serve.

    Example: isthmus edge daemon status --json
    """
    from isthmus.common.readable import moment, size
    from isthmus.common.terminal import printable
    from isthmus.daemon.daemon_client import DaemonClient

    folder = _home(home)
    said: dict[str, Any] = {**_record(folder), **DaemonClient(folder).get("/isthmus/v1/status")}
    if as_json:
        typer.echo(json.dumps(said))
        return
    jobs = ", ".join(f"{count} {state}" for state, count in said["jobs"].items()) or "none"
    disk = said["disk"]
    lines = [
        f"url     {said['url']}  (process {said['pid']}, release {said['version']})",
        f"home    {said['home']}: {size(disk['used_bytes'])} of {size(disk['most_bytes'])}",
        *([f"aside   {size(disk['set_aside_bytes'])} of that in set-aside"] if disk["set_aside_bytes"] else []),
        f"clouds  {', '.join(said['clouds']) or 'none'}",
        *_models(said),
        f"jobs    {jobs}",
        *(
            f"waits   {each['job']} for the cloud {each['cloud']}, since {moment(each['since'])}, until "
            f"{moment(each['until'])}: {each['reason']}"
            for each in said["waiting"]
        ),
    ]
    typer.echo("\n".join(map(printable, lines)))


@app.command()
def stop(
    home: DaemonHome = DEFAULT_HOME,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait until it has ended.")] = 180.0,
) -> None:
    """Stop the daemon: its jobs are paused, and go on at the next start.

    Example: isthmus edge daemon stop
    """
    from isthmus.daemon.daemon_lock import holder

    folder = _home(home)
    pid = holder(folder)
    if pid is None:
        raise _not_running(folder)
    with suppress(ProcessLookupError):  # it ends by itself just now
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + patience
    while holder(folder) == pid:
        if time.monotonic() > until:
            raise ConfigError(
                f"the daemon (process {pid}) has not ended within {patience:g} s: a job may be in a long micro-batch; "
                "wait, give a longer --patience, or look at `isthmus edge daemon logs`"
            )
        time.sleep(POLL_SECONDS)
    typer.echo(f"stopped process {pid}")


@app.command()
def logs(
    home: DaemonHome = DEFAULT_HOME,
    count: Annotated[int, typer.Option("-n", min=0, help="Lines to begin with.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
) -> None:
    """Print what the daemon has said.

    Example: isthmus edge daemon logs --follow
    """
    from isthmus.common.shutdown import interruptible
    from isthmus.daemon.daemon_log import last_lines, new_lines

    folder = _home(home)
    for line in last_lines(folder.log, count):
        typer.echo(line)
    if follow:
        with interruptible():
            for line in new_lines(folder.log):
                typer.echo(line)


@app.command()
def doctor(home: DaemonHome = DEFAULT_HOME, config: Config = None, as_json: AsJson = False) -> None:
    """Check settings, keys, clouds, disk, port, proxy variables and permissions, and say what to do.

    Ends with 0 where all is well, and else with 10.

    Example: isthmus edge daemon doctor
    """
    from isthmus.common.terminal import plain

    with _extra():
        from isthmus.daemon.doctor import examine
        from isthmus.daemon.home import Home
    place = home.expanduser().absolute()
    found = []
    for finding in examine(Home(place), _config(place, config)):
        found.append(finding)
        if not as_json:
            typer.echo(plain(finding.line()))
    if as_json:
        typer.echo(json.dumps([finding.tree() for finding in found]))
    if not all(finding.ok for finding in found):
        raise typer.Exit(ConfigError.exit_code)


@app.command()
def token(
    name: Annotated[str | None, typer.Argument(help="Whose; one who is unknown is made.")] = None,
    show_all: Annotated[bool, typer.Option("--list", help="List who has a token.")] = False,
    revoke: Annotated[
        str | None, typer.Option(metavar="NAME", help="End this one's token; their jobs go on.", show_default=False)
    ] = None,
    home: DaemonHome = DEFAULT_HOME,
) -> None:
    """Print a new token for somebody else, whose jobs and files are apart from yours. An older one of theirs ends.

    It is shown this once. Your own is in the file `token` of the daemon's folder.

    Example: isthmus edge daemon token ci
    """
    if (name is not None) + show_all + (revoke is not None) != 1:
        raise ConfigError("give a name, --list or --revoke NAME, and one of them alone")
    with _extra():
        from isthmus.daemon.home import Home
        from isthmus.daemon.state.database import Database
        from isthmus.daemon.state.migrate import check_newest
        from isthmus.daemon.state.owners import READ_EVERY, give_token, list_owners, revoke_token
    place = Home.make(home.expanduser()).database
    check_newest(place)  # to bring it up to date is the daemon's, which may run
    database = Database(place)
    try:
        if name is not None:
            typer.echo(give_token(database, name))
        elif revoke is not None:
            revoke_token(database, revoke)
            time.sleep(READ_EVERY)  # a daemon that runs knows it then
            typer.echo(f"the token of {revoke} is refused from now on; their jobs go on")
        else:
            typer.echo("\n".join(map(_owner_line, list_owners(database))))
    finally:
        database.close()


@app.command()
def config(
    cloud: Annotated[
        str | None, typer.Option(help="A cloud that the file then has: its connection string, or a file that holds it.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write it as daemon.toml into the daemon's folder, where there is none.")
    ] = False,
    home: DaemonHome = DEFAULT_HOME,
) -> None:
    """Print a daemon.toml with every setting, its default and what it means; or write it into the daemon's folder.

    Example: isthmus edge daemon config --cloud cloud.txt --write
    """
    from isthmus.daemon.settings_file import example

    cloud = None if cloud is None else _located(cloud)
    if not write:
        typer.echo(example(cloud), nl=False)
        return
    path = home.expanduser().absolute() / FILE
    if path.exists():
        raise ConfigError(f"{path} is there already: edit it, or move it away")
    _write_settings(path, cloud)


def _located(cloud: str) -> str:
    """A cloud as a daemon.toml names it: its connection string, or the absolute path of a file."""
    from isthmus.edge.config.client_config import SCHEMES

    if cloud.startswith(SCHEMES):
        return cloud
    place = Path(cloud).expanduser().absolute()
    if not place.is_file():
        raise ConfigError(f"--cloud {cloud} is neither a connection string nor a file: give isthmus://…")
    return str(place)


def _write_settings(path: Path, cloud: str | None) -> None:
    from isthmus.common.files import disk_errors, write_atomic
    from isthmus.daemon.home import Home
    from isthmus.daemon.settings_file import example

    Home.make(path.parent)
    with disk_errors(path):
        write_atomic(path, example(cloud).encode(), 0o600)
    typer.echo(f"wrote {path}")


def _know_cloud(home: Path, cloud: str, config: Path | None) -> None:
    """Write the home's settings with a cloud, where there are none; those that are there must have it."""
    from isthmus.daemon.settings_file import read_daemon_settings

    wanted, path = _located(cloud), _config(home, config)
    if path is None:
        _write_settings(home / FILE, wanted)
    elif wanted not in {each.cloud for each in read_daemon_settings(path).clouds.values()}:
        raise ConfigError(f"{path} is there already, without --cloud {cloud}: add [clouds.NAME] with its `cloud` there")


def _owner_line(owner: Owner) -> str:
    from isthmus.common.readable import moment
    from isthmus.daemon.state.owners import is_revoked

    return f"{owner.name:20} {moment(owner.created_at)}{'  revoked' if is_revoked(owner) else ''}"


def _message(url: str, home: Home, clouds: list[str], *, remote: bool, code: str | None) -> list[str]:
    """What the start of the daemon says."""
    known = ", ".join(clouds) or (
        f"none: give --cloud FILE once, or add [clouds.NAME] to {home.path / FILE} (see `isthmus edge daemon config`)"
    )
    file = shlex.quote(str(home.token))
    key = f"$(cat {file})"
    return [
        f"page    {url}",
        *([f"sign in {url}/#code={code}  (once, within {CODE_SECONDS / 60:.0f} minutes)"] if code else []),
        *([_REMOTE] if remote else []),
        f"socket  {home.socket}",
        f"token   {home.token}",
        f"clouds  {known}",
        "for scripts:",
        f"  {EXPORT_NO_PROXY}",
        f"  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}",
        f"  export TINKER_BASE_URL={url} TINKER_API_KEY={key}",
        f"  export HF_ENDPOINT={url}/hub HF_TOKEN={HUB}$(tr -d '\\n' < {file} | sha256sum | cut -c1-64)",
    ]


def _start_in_background(
    home: Home, settings: DaemonSettings, config: Path | None, listen: str | None, *, link: bool
) -> None:
    """Start a process that outlives this one, and wait until it answers or has ended."""
    from isthmus.common.files import disk_errors, private_opener
    from isthmus.common.terminal import printable
    from isthmus.daemon.daemon_lock import occupied
    from isthmus.daemon.web.access import is_loopback

    # What a killed daemon has left may name the number that the new process gets, as in a container.
    with suppress(HomeInUseError), occupied(home):
        home.running.unlink(missing_ok=True)
    command = [sys.executable, "-m", "isthmus.cli.main", "edge", "daemon", "start", "--detached"]
    command += ["--home", str(home.path)]
    command += [] if config is None else ["--config", str(config.absolute())]
    command += [] if listen is None else ["--listen", listen]
    said = home.path / "start.log"
    with disk_errors(said), open(said, "wb", opener=private_opener) as errors:  # `Path.open` has none
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
    while (record := _read_record(home)) is None or record["pid"] != process.pid:
        if process.poll() is not None:
            sys.stderr.write(said.read_text(encoding="utf-8", errors="replace"))
            raise typer.Exit(process.returncode or 1)
        time.sleep(POLL_SECONDS)
    remote = not is_loopback(settings.address[0])
    code = record.get("code") if link else None
    lines = _message(record["url"], home, sorted(settings.clouds), remote=remote, code=code)
    typer.echo("\n".join([f"started process {process.pid}", *lines]))
    if settings.clouds:
        typer.echo("\n".join(map(printable, _models(_seen(home)))))


def _seen(home: Home) -> dict[str, Any]:
    """The daemon's status once it knows models, or has asked its clouds in vain. At the first start that takes a while,
    and scripts that come before it would find no model."""
    from isthmus.daemon.daemon_client import DaemonClient

    until = time.monotonic() + FIRST_LOOK_SECONDS
    while True:
        said: dict[str, Any] = DaemonClient(home).get("/isthmus/v1/status")
        asked = [cloud["reachable"] for cloud in said["answers"].get("clouds", [])]
        if said["models"] or (asked and None not in asked) or time.monotonic() > until:
            return said
        time.sleep(POLL_SECONDS)


def _models(said: dict[str, Any]) -> list[str]:
    """Which models there are, and which clouds are not to be had."""
    from isthmus.common.readable import moment

    named = ", ".join(f"{model['name']} ({model['cloud']})" for model in said["models"]) or "none seen yet"
    clouds = [each for each in said["answers"].get("clouds", []) if each["error"]]
    away = [f"away    {each['name']}: {each['error']} (since {moment(each['since'])})" for each in clouds]
    return [f"models  {named}", *away]


@contextmanager
def _extra() -> Iterator[None]:
    """Say what to install where the daemon's libraries are missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("isthmus"):
            raise
        raise ConfigError(f"the daemon needs {error.name}: install isthmus[daemon]") from error


def _config(home: Path, config: Path | None) -> Path | None:
    if config is not None:
        return config.expanduser()
    return home / FILE if (home / FILE).exists() else None


def _home(path: Path) -> Home:
    """A home that must be there."""
    from isthmus.daemon.home import Home

    folder = Home(path.expanduser().absolute())
    if not folder.path.is_dir():
        raise _not_running(folder)
    return folder


def _record(home: Home) -> dict[str, Any]:
    record = _read_record(home)
    if record is None:
        raise _not_running(home)
    record.pop("code", None)  # a secret that is told to nobody
    return record


def _read_record(home: Home) -> dict[str, Any] | None:
    """What the running daemon says of itself; None where none says anything."""
    try:
        record: dict[str, Any] = json.loads(home.running.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record


def _not_running(home: Home) -> NotRunningError:
    return NotRunningError(
        f"no daemon runs with the home {home.path}: start one with `isthmus edge daemon start`, or give --home"
    )
