"""What each command says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from support.commands import in_process

from isthmus.cli.main import app


def commands() -> Iterator[tuple[str, Any]]:
    def walk(prefix: str, command: Any) -> Iterator[tuple[str, Any]]:
        children = getattr(command, "commands", {})
        if not children:
            yield prefix, command
        for name, child in children.items():
            yield from walk(f"{prefix} {name}".strip(), child)

    yield from walk("", typer.main.get_command(app))


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[name for name, _ in commands()])
def test_every_command_explains_itself(name: str, command: Any) -> None:
    assert f"Example: isthmus {name}" in command.help
    assert command.help.splitlines()[0].rstrip().endswith((".", ":"))
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            ("edge", "train"),
            ["--codec-every", "--overlap", "--span-cache-mib", "--sites", "--site-policy", "--site-traffic"],
        ),
        (("plan",), ["--link", "--edge-speed", "--cloud-speed", "--probe", "--goal", "--json"]),
        (("bench", "link"), ["--rate", "--rtt", "--overlap", "--micro-batches", "--json"]),
    ],
)
def test_help_shows_the_flags(capsys: pytest.CaptureFixture[str], command: tuple[str, ...], flags: list[str]) -> None:
    done = in_process(capsys, *command, "--help")
    assert done.returncode == 0
    assert not [flag for flag in flags if f"{flag} " not in done.stdout]


HELP = ("--help", "edge train --help", "cloud serve --help", "plan --help", "bench link --help", "--version")


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from isthmus.cli.main import app\n"
        "for words in sys.argv[1:]:\n"
        "    app(words.split(), standalone_mode=False)\n"
        "    heavy = {'torch', 'transformers', 'ray', 'grpc', 'peft', 'numpy', 'cryptography'} & set(sys.modules)\n"
        "    if heavy:\n"
        "        sys.exit(f'{words} loads {sorted(heavy)}')\n"
    )
    command = [sys.executable, "-c", program, *HELP]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == len(HELP) - 1  # all but the version's


@pytest.mark.parametrize(("asked", "told"), [(None, "NONE"), ("INFO", "INFO")])
def test_grpc_writes_nothing_unless_it_is_asked_to(asked: str | None, told: str) -> None:
    program = "import os; from isthmus.cli import main; main.main = lambda: print(os.environ['GRPC_VERBOSITY'])"
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    environment |= {"GRPC_VERBOSITY": asked} if asked else {}
    command = [sys.executable, "-c", f"{program}; main.console()"]
    assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip() == told
