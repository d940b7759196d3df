"""Every command that a file of `deploy/` runs is one that `isthmus` has, with flags and values that it takes."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from support.kubernetes_manifests import DEPLOY, containers, ray_cluster

from isthmus.cli.main import app


def _with_values(line: str, values: dict[str, str]) -> list[str]:
    """The words of a command line, its variables replaced."""
    return shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], line))


def _commands() -> Iterator[tuple[str, list[str]]]:
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        text = unit.read_text()
        (line,) = re.findall(r"^ExecStart=\S+/isthmus (.*)$", text, re.MULTILINE)
        values = dict(re.findall(r"^#\s+(ISTHMUS_\w+)=(.*)$", text, re.MULTILINE))  # the examples in its comments
        yield unit.name, _with_values(line, values)
    for line in re.findall(r"^CMD (\[.*\])$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE):
        yield "Containerfile", json.loads(line)
    for container in containers(ray_cluster()):
        values = {entry["name"]: entry.get("value", "1") for entry in container.get("env", [])}
        script = re.sub(r"\\\n", " ", container["args"][0])
        for line in re.findall(r"^(?:exec )?isthmus (.*)$", script, re.MULTILINE):
            yield container["name"], _with_values(line, values)
    yield from (("README.md", words) for words in _shown((DEPLOY / "README.md").read_text()))


def _shown(text: str) -> Iterator[list[str]]:
    """The commands in a document's shell code: alone, behind a command that runs others, or behind an image's name."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            found = re.search(
                r"(?:^|\s-- |^\w+=\w+ )(?:/opt/isthmus/bin/)?isthmus (.*)|\sisthmus-\w+:[\d.]+ +(\w.*)", line
            )
            if found:
                yield shlex.split(found[1] or found[2], comments=True)


COMMANDS = list(_commands())
USAGE_ERROR = typer.BadParameter.__bases__[0]


def _parse(words: list[str]) -> None:
    """Let `isthmus` parse a command line, without running it.

    Raises:
        USAGE_ERROR: it would refuse it.
    """
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while rest and not rest[0].startswith("-") and hasattr(command, "commands"):
        name = rest.pop(0)
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    with contextlib.suppress(typer.Exit):  # --help
        command.make_context("isthmus", rest)


def test_both_sides_are_started_from_every_kind_of_file() -> None:
    assert {place for place, _ in COMMANDS} == {
        "isthmus-cloud.service",
        "isthmus-edge-daemon.service",
        "isthmus-edge-train@.service",
        "Containerfile",
        "owner",
        "ray-tls",
        "README.md",
    }


def test_the_readmes_commands_are_found() -> None:
    shown = [tuple(words[:2]) for place, words in COMMANDS if place == "README.md"]
    edge = [("edge", "keygen"), ("edge", "daemon"), ("edge", "train")]
    keys = ("keygen", "issuer", "node-keygen", "enroll-node", "enroll", "ray-ca")
    assert shown == [
        ("cloud", "keygen"),
        ("cloud", "enroll"),
        *edge,
        *(("cloud", each) for each in keys),
        ("cloud", "status"),
    ]


@pytest.mark.parametrize(("place", "words"), COMMANDS)
def test_isthmus_takes_the_command(place: str, words: list[str]) -> None:
    _parse(words)


def test_a_misspelt_flag_is_noticed() -> None:
    (_, words) = next(pair for pair in COMMANDS if pair[0] == "owner")
    with pytest.raises(USAGE_ERROR, match="--lisen"):
        _parse([word.replace("--listen", "--lisen") for word in words])
