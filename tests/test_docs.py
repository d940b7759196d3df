"""The documents: what they show exists, what they link to is there, and what they tabulate is what the code says."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from test_packaging import FOLDERS

from isthmus.backbone.families import SUPPORTED
from isthmus.cli.main import app
from isthmus.common import errors
from isthmus.common.errors import IsthmusError
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.openai import training_files as rule
from isthmus.privacy.ledger.mode_leaks import CLOUD_READS
from isthmus.protocol import isthmus_pb2, messages, service, tensor_codecs
from isthmus.protocol.secure import framing

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
ARCHITECTURE = ROOT / "docs" / "architecture.md"
MOST_LINES = 250
"""Of the architecture: it is read in one sitting."""
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
DECISION_HEADINGS = ["Context", "Decision", "Consequences"]
DECISION_LINES = 60
"""Of a decision record: a page."""
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy").rglob("*.md"),
        ROOT / "emulator" / "README.md",
    ]
)
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
WITHOUT_ERROR = {0, 2, 60, 74, 130}  # success, usage, a drain that was cut short, a doctor's finding, Ctrl-C

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(isthmus [^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")

by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def _error_classes() -> list[type[IsthmusError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, IsthmusError)]
    assert len(found) > 20
    return found


def _exit_code_table() -> dict[int, str]:
    rows = re.findall(r"^\| (\d+) \| (.*)$", (ROOT / "docs" / "exit-codes.md").read_text(), re.MULTILINE)
    table = {int(code): text for code, text in rows}
    assert len(table) == len(rows), "a code stands in two rows"
    return table


def test_every_error_is_in_the_table_with_its_code() -> None:
    table = _exit_code_table()
    for error in _error_classes():
        assert f"`{error.__name__}`" in table[error.exit_code].split(" | ")[0], error


def test_the_table_has_no_other_codes() -> None:
    assert set(_exit_code_table()) == {error.exit_code for error in _error_classes()} | WITHOUT_ERROR


def test_no_two_kinds_of_error_share_a_code() -> None:
    # A class without a code of its own is a kind of the one that it inherits it from.
    own = [error.exit_code for error in _error_classes() if "exit_code" in vars(error)]
    assert len(own) == len(set(own))
    assert not set(own) & WITHOUT_ERROR


def _commands(text: str) -> Iterator[list[str]]:
    """The command lines of `isthmus` in a document: in blocks of shell code, and between backticks."""
    blocks = [body for language, body in _BLOCK.findall(text) if language == "sh"]
    lines = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    for line in [*(line for line in lines if line.startswith("isthmus ")), *_INLINE.findall(_BLOCK.sub("", text))]:
        yield shlex.split(line, comments=True)[1:]


@functools.cache
def _tree() -> Any:
    """All commands."""
    return typer.main.get_command(app)


def _check_command(words: list[str]) -> None:
    """Follow the words down the command tree, and look up every flag of the command that they end in."""
    command = _tree()
    rest = list(words)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        if rest[0] in {"…", "..."}:
            return
        assert rest[0] in command.commands, f"there is no command `isthmus {' '.join(words)}`"
        command = command.commands[rest.pop(0)]
    known = {"--help"} | {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"`isthmus {' '.join(words)}`: there is no {word}"


@by_name
def test_every_command_and_flag_that_a_document_shows_exists(document: Path) -> None:
    for words in _commands(document.read_text()):
        _check_command(words)


def _hidden_commands(texts: Iterable[str]) -> set[tuple[str, str]]:
    """The commands of the parties that none of the texts shows."""
    shown = {(words[0], words[1]) for text in texts for words in _commands(text) if len(words) > 1}
    tree = _tree()
    return {(party, name) for party in ("cloud", "edge", "emulator") for name in tree.commands[party].commands} - shown


def test_the_readme_or_a_guide_shows_every_command_of_the_parties() -> None:
    assert _hidden_commands(path.read_text() for path in (README, *GUIDES)) == set()


def test_a_command_that_no_document_shows_is_noticed() -> None:
    texts = [path.read_text().replace("isthmus edge eval", "isthmus edge train") for path in (README, *GUIDES)]
    assert _hidden_commands(texts) == {("edge", "eval")}


def test_the_readme_shows_the_commands_of_a_first_run() -> None:
    wanted = {("edge", "keygen"), ("cloud", "keygen"), ("cloud", "enroll"), ("cloud", "serve"), ("edge", "train")}
    assert _hidden_commands([README.read_text()]) & wanted == set()


@pytest.mark.parametrize(
    "document", [README, *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_flag_between_backticks_is_one_of_some_command(document: Path) -> None:
    def flags(command: Any) -> set[str]:
        own = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        return own.union(*(flags(sub) for sub in getattr(command, "commands", {}).values()))

    known = flags(_tree()) | {"--help"}
    named = set(re.findall(r"`(--[a-z][a-z-]*)", _BLOCK.sub("", document.read_text())))
    assert named - known == set()


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_every_flag_of_a_unit_exists(unit: Path) -> None:
    (line,) = re.findall(r"^ExecStart=\S+/isthmus (.*)$", unit.read_text(), re.MULTILINE)
    _check_command(shlex.split(line))


@by_name
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in _LINK.findall(_BLOCK.sub("", document.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name} links to {target}, which is not there"
        assert path.is_relative_to(ROOT), f"{document.name} links to {target}, outside the tree"
        if anchor:
            assert anchor in _anchors(path), f"{document.name} links to {target}, a heading that is not there"


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@by_name
def test_no_document_names_a_machines_paths_or_a_registry(document: Path) -> None:
    text = document.read_text()
    assert re.findall(r"(?<![\w.])/(?:work|tmp|root|home|Users|mnt)/\S*", text) == []
    assert (
        re.findall(r"(?i)\b(?:[\w-]+\.)*(?:pypi|pythonhosted|pytorch|anaconda|artifactory)\.(?:org|com|io|net)\b", text)
        == []
    )
    assert "—" not in text, "dashes are written with commas, colons or parentheses here"


@by_name
def test_python_in_a_document_compiles_and_imports_what_is_there(document: Path) -> None:
    for language, body in _BLOCK.findall(document.read_text()):
        if language != "python":
            continue
        compile(body, document.name, "exec")
        for module, names in re.findall(r"^\s*from (isthmus\.[\w.]+) import ([\w, ]+)$", body, re.MULTILINE):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip())


def test_the_protocol_has_every_message_with_its_number() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (\w+) \|", (ROOT / "docs" / "protocol.md").read_text(), re.MULTILINE)
    numbers = {field.message_type.name: field.number for field in isthmus_pb2.Header.DESCRIPTOR.fields}
    wanted = set()
    for kind in {*messages.EDGE_SENDS, *messages.CLOUD_SENDS}:
        senders = (kind in messages.EDGE_SENDS, kind in messages.CLOUD_SENDS)
        who = {(True, True): "both", (True, False): "edge", (False, True): "cloud"}[senders]
        wanted.add((str(numbers[kind.__name__]), kind.__name__, who))
    assert set(rows) == wanted


def test_the_protocol_has_the_frames_prefix_as_it_is() -> None:
    table = re.findall(r"^\| (\d+) \| (\d+) \| ", (ROOT / "docs" / "protocol.md").read_text(), re.MULTILINE)
    fields = [(int(offset), int(size)) for offset, size in table]
    assert [offset for offset, _ in fields] == [sum(size for _, size in fields[:n]) for n in range(len(fields))]
    # 4s B B I Q I H H Q: one character of the format, or a count and a character, for each field
    assert len(fields) == len(re.findall(r"\d*[a-zA-Z]", framing.PREFIX.format))
    assert sum(size for _, size in fields) == framing.PREFIX.size


def test_the_protocol_has_the_statuses_codecs_and_limits_as_they_are() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    statuses = set(re.findall(r"^\| (\d+) \| `([A-Z_]+)` \| ", text, re.MULTILINE))
    assert statuses == {(str(int(code)), code.name) for code in messages.StatusCode}
    codecs = set(re.findall(r"^\| `([\w-]+)` \| (\d+) \| (?:numbers|masks|positions) \|", text, re.MULTILINE))
    assert codecs == {(codec.name, str(codec.id)) for codec in tensor_codecs.CODECS.values()}
    assert f"Version **{framing.VERSION}**" in text
    assert f"version: {framing.VERSION}" in text
    assert service.METHOD in text
    assert service.OLD_METHOD in text
    for number in (service.MAX_GRPC_MESSAGE_BYTES, messages.MAX_RANK, messages.MAX_SITES, messages.MAX_TEXT):
        assert f"{number:,}" in text


def test_the_readme_names_every_family_and_codec() -> None:
    text = README.read_text().lower().replace("-", "").replace(" ", "")
    for family in SUPPORTED:
        assert family.removesuffix("_text") in text
    for codec in tensor_codecs.ACTIVATION_CODECS:
        assert f"`{codec.replace('-', '')}`" in text


def _settings_faults(text: str) -> list[str]:
    """Where a table of daemon.toml's settings is not what the code says."""
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*) \|$", text.partition("## daemon.toml")[2].partition("\n## ")[0], re.M
    )
    wanted = {}
    for name, field in DaemonSettings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        is_nothing = default is None or default in ([], {})
        wanted[name] = ("none" if is_nothing else f"`{json.dumps(default).strip(chr(34))}`", field.description)
    found = {name: (default, meaning) for name, default, meaning in rows}
    return sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))


def test_the_daemons_guide_has_every_setting_as_it_is() -> None:
    text = (ROOT / "docs" / "guides" / "daemon.md").read_text()
    assert _settings_faults(text) == []
    assert _settings_faults(text.replace("| `disk_gib` | `20.0` |", "| `disk_gib` | `10.0` |")) == ["disk_gib"]
    assert _settings_faults(text.replace("MiB of one uploaded file", "MB of one file")) == ["upload_mib"]


def test_the_daemons_guide_has_the_rule_of_auto_as_it_is() -> None:
    text = (ROOT / "docs" / "guides" / "daemon.md").read_text()
    for number in (
        f"fewer than {-(-rule.FEWEST // rule.EPOCHS)} examples: {rule.FEWEST} /",
        f"at most {rule.MOST_EPOCHS}. With more than {rule.MOST // rule.EPOCHS:,}: {rule.MOST:,} /",
        *(f"{batch} below {fewer_than:,}" for fewer_than, batch in rule.BATCHES),
        f"then {rule.LARGEST_BATCH}; never",
        f"micro-batches of at most {rule.MICRO_BATCH} examples",
        f"{rule.LONGEST_EXAMPLE:,} tokens",
    ):
        assert number in text


def _stray_paths(text: str) -> list[str]:
    """Files and folders of the tree that a text names between backticks and that are not there.

    Tests may be named from the tree's root or from `tests`; what begins with no folder of the tree is somebody else's.
    """
    tops = {folder.split("/")[0] for folder in FOLDERS.values()} | {"tests", "lock", "deploy", "docs"}
    named = re.findall(r"`([a-z_]+/[a-z_0-9./-]*)(?:::\w+)?`", _BLOCK.sub("", text))
    ours = [path for path in named if path.split("/")[0] in tops]
    return [path for path in ours if not ((ROOT / path).exists() or (ROOT / "tests" / path).exists())]


def _stray_modules(text: str) -> list[str]:
    """Names of `isthmus` that a text has between backticks and that cannot be imported.

    `isthmus.v2` is the package of the protobuf contract, and no module.
    """
    return [name for name in re.findall(r"`(isthmus(?!\.v\d)(?:\.\w+)+)`", _BLOCK.sub("", text)) if not _is_there(name)]


def _is_there(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        try:
            return hasattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError:
            return False
    return True


@by_name
def test_code_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    assert _stray_paths(text) == []
    assert _stray_modules(text) == []


def test_code_that_is_not_there_is_noticed() -> None:
    assert _stray_paths("`cloud/engine/executor.py`, `cloud/engine/missing.py`, `run/adapter`") == [
        "cloud/engine/missing.py"
    ]
    assert _stray_modules("`isthmus.edge.connect`, `isthmus.edge.missing`, `isthmus.missing.name`") == [
        "isthmus.edge.missing",
        "isthmus.missing.name",
    ]


def _architecture_faults(text: str) -> list[str]:
    """What is wrong with the architecture: too long, or a sub-package without its line in the table."""
    lines = text.splitlines()
    faults = [f"{len(lines)} lines; {MOST_LINES} at most"] if len(lines) > MOST_LINES else []
    cells = re.findall(r"^\| (`[\w.]+`(?:, `[\w.]+`)*) \| \S", text, re.MULTILINE)
    rows = {name for cell in cells for name in re.findall(r"[\w.]+", cell)}
    packages = {package.removeprefix("isthmus.") for package in FOLDERS}
    faults += [f"{package} has no row" for package in sorted(packages - rows)]
    return faults + [f"{row} is no package" for row in sorted(rows - packages)]


@pytest.mark.parametrize("name", ["README.md", "docs/guides/choosing-a-mode.md", "docs/guides/daemon.md"])
def test_the_documents_say_what_a_cloud_reads_in_the_same_words(name: str) -> None:
    assert CLOUD_READS in " ".join((ROOT / name).read_text().split())


def test_the_architecture_is_short_and_has_every_package() -> None:
    assert _architecture_faults(ARCHITECTURE.read_text()) == []


def test_a_long_architecture_or_one_without_a_package_is_noticed() -> None:
    text = ARCHITECTURE.read_text()
    assert _architecture_faults(text.replace("| `rpc` |", "| `rcp` |")) == ["rpc has no row", "rcp is no package"]
    assert len(_architecture_faults(text + "\n" * MOST_LINES)) == 1


def _decision_faults(number: int, name: str, text: str) -> list[str]:
    """What is wrong with a decision record: number, headings, or length."""
    faults = []
    if not (name.startswith(f"{number:04}-") and text.startswith(f"# {number}. ")):
        faults.append(f"{name} is not numbered {number}")
    if (headings := re.findall(r"^## (.*)$", text, re.MULTILINE)) != DECISION_HEADINGS:
        faults.append(f"{name} has the headings {headings}")
    if (lines := len(text.splitlines())) > DECISION_LINES:
        faults.append(f"{name} has {lines} lines; {DECISION_LINES} at most")
    return faults


def test_decisions_have_context_decision_and_consequences() -> None:
    assert len(DECISIONS) > 10
    for number, path in enumerate(DECISIONS, start=1):
        assert _decision_faults(number, path.name, path.read_text()) == []


def test_a_decision_without_a_heading_or_with_another_number_is_noticed() -> None:
    text = "# 1. Something\n\n## Context\n\n## Decision\n"
    assert len(_decision_faults(2, "0001-something.md", text)) == 2
    assert _decision_faults(1, "0001-something.md", text + "\n## Consequences\n") == []


def test_the_list_of_decisions_has_them_all() -> None:
    index = (DECISIONS[0].parent / "README.md").read_text()
    listed = re.findall(r"^\| \[(\d+)\]\((.*)\) \| (.*) \|$", index, re.MULTILINE)
    titles = [path.read_text().splitlines()[0].split(". ", 1)[1] for path in DECISIONS]
    assert listed == [(path.name[:4], path.name, title) for path, title in zip(DECISIONS, titles, strict=True)]
