"""The container file: a linter takes it, its bases are pinned, nothing runs as root, and only sources get in."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.kubernetes_manifests import DEPLOY

ROOT = DEPLOY.parent
FILE = DEPLOY / "Containerfile"
TEXT = FILE.read_text()
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")


def _stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, with their arguments, by the stage's name."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for line in filter(None, map(str.strip, lines)):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            name = rest.split(" AS ")[1]
        found.setdefault(name, []).append((word, rest.strip()))
    return found


def _hadolint(text: str) -> subprocess.CompletedProcess[str]:
    assert HADOLINT is not None
    return subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, check=False)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not on this machine")
def test_hadolint_takes_the_file_and_not_a_worse_one() -> None:
    assert _hadolint(TEXT).stdout == ""
    worse = TEXT.replace("WORKDIR /src", "RUN cd /src").replace("ENTRYPOINT [", "ENTRYPOINTS [")
    assert _hadolint(worse).returncode != 0
    assert "DL3007" in _hadolint(TEXT.replace("FROM ${BASE} AS runtime", "FROM python:latest AS runtime")).stdout


def test_every_stage_comes_from_the_pinned_base_or_from_another_stage() -> None:
    stages = _stages()
    ((_, base),) = stages.pop("")
    assert re.fullmatch(r"BASE=python:3\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    for instructions in stages.values():
        source = instructions[0][1].split(" AS ")[0]
        assert source == "${BASE}" or source in stages


def test_packages_come_by_the_locks_hashes() -> None:
    (run,) = [rest for word, rest in _stages()["install"] if word == "RUN"]
    assert "lock/install.py --hashes required --no-editable " in run
    assert not re.search(r"\bpip (install|wheel|download)\b|index-url", TEXT.replace("--torch-index", ""))


def test_nothing_is_fetched_or_run_as_root_in_what_is_shipped() -> None:
    stages = _stages()
    assert "ADD" not in {word for instructions in stages.values() for word, _ in instructions}
    assert not re.search(r"https?://|curl|wget", TEXT)
    for target in ("cloud", "edge"):
        source = stages[target][0][1].split(" AS ")[0]
        assert source == "runtime"
        assert not {"USER", "RUN", "COPY"} & {word for word, _ in stages[target]}
    words = [word for word, _ in stages["runtime"]]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))


def test_the_entry_point_is_the_command_that_the_package_installs() -> None:
    (entry,) = [rest for word, rest in _stages()["runtime"] if word == "ENTRYPOINT"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(entry) == list(scripts)
    assert (Path(sys.executable).parent / "isthmus").exists()


def test_login_shells_find_both_commands() -> None:
    """Debian's /etc/profile sets PATH anew, to folders that exist in any image."""
    (linked,) = [rest for word, rest in _stages()["runtime"] if word == "RUN" and "ln -s" in rest]
    assert re.search(r"ln -s /opt/isthmus/bin/isthmus /opt/isthmus/bin/ray /usr/local/bin/$", linked)


def test_caches_are_where_the_image_may_write() -> None:
    (env,) = [rest for word, rest in _stages()["runtime"] if word == "ENV"]
    places = dict(pair.split("=", 1) for pair in env.split())
    for name in ("ISTHMUS_CACHE", "HF_HOME", "TRITON_CACHE_DIR"):
        assert places[name].startswith("/var/lib/isthmus/")


def test_only_what_the_wheel_is_built_and_installed_from_gets_in() -> None:
    """`.dockerignore` begins with everything and lets in what it names."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    assert let_in == {"pyproject.toml", "README.md", "LICENSE", "lock", *folders}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sent = [name for name in tracked if name.split("/")[0] in let_in]
    assert sent, "nothing would be built"
    assert [name for name in sent if fnmatch.fnmatch(name, "*_key*") and not name.endswith(".py")] == []
