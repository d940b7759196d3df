"""The scripts of `lock/`, and a small project with packages of its own for them to install, without any index."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]

_PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "lockproof"
version = "1"
dependencies = ["torch>=2", "plain>=1"]
"""
# A build needs a backend, and there is no index to have setuptools from.
_BACKEND = """
import zipfile

def build_wheel(folder, settings=None, metadata_folder=None):
    name = "lockproof-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        info = "lockproof-1.dist-info"
        requires = "Requires-Dist: torch>=2\\nRequires-Dist: plain>=1\\n"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: lockproof\\nVersion: 1\\n" + requires)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name

build_editable = build_wheel
"""


def script(name: str) -> ModuleType:
    """A script of `lock/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "lock" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_TOOLS = ("pip", "setuptools", "packaging")  # which are there before the lock is read


class Proof:
    """A project with the scripts of `lock/`, a folder of packages in place of an index, and an environment.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.wheels, self._environment = folder / "project", folder / "wheels", folder / "environment"
        shutil.copytree(ROOT / "lock", self.root / "lock", ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "pyproject.toml").write_text(_PROJECT)
        (self.root / "backend.py").write_text(_BACKEND)
        self.wheels.mkdir()
        venv.create(self._environment, symlinks=True)
        for name in _TOOLS:
            files = metadata.files(name)
            assert files is not None
            for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
                (self._packages() / top).symlink_to(Path(sysconfig.get_path("purelib")) / top)

    def wheel(self, name: str, version: str, requires: Sequence[str] = (), *, content: str = "") -> Path:
        """Publish a package with nothing in it but a file of this content."""
        path = self.wheels / f"{name}-{version}-py3-none-any.whl"
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as file:
            lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
            file.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *lines, ""]))
            file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{name}.txt", content)
            file.writestr(f"{info}/RECORD", "")
        return path

    def lock(self, **paths: Sequence[Path]) -> None:
        """Write the lock: a package's name and the files whose hashes it has; the version is the first one's."""
        lines = []
        for name, files in paths.items():
            version = files[0].name.split("-")[1].partition("+")[0]
            hashes = [f"--hash=sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
            lines.append(" ".join([f"{name}=={version}", *hashes]))
        for name in _TOOLS:
            lines.append(f"{name}=={metadata.version(name)} --hash=sha256:{'0' * 64}")
        (self.root / "lock" / "requirements.txt").write_text("\n".join(lines) + "\n")

    def install(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `lock/install.py` with an environment's Python and no index but the folder."""
        settings = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONPATH"))}
        empty = (self.root / "no-index").as_uri()
        settings |= {"PIP_INDEX_URL": empty, "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        command = [str(self._environment / "bin" / "python"), str(self.root / "lock" / "install.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=settings)

    def installed(self) -> dict[str, str]:
        """The versions of what was installed."""
        found = metadata.distributions(path=[str(self._packages())])
        return {one.name: one.version for one in found if one.name not in _TOOLS}

    def _packages(self) -> Path:
        (folder,) = (self._environment / "lib").glob("python*/site-packages")
        return folder
