"""What is installed: the wheel holds the tree's modules and nothing else, and `isthmus --help` needs nothing heavy."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
TOPS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
RIGS = ROOT / "experiments" / "rigs"
LEFT_OUT = [
    f"isthmus.{path.relative_to(ROOT).as_posix().replace('/', '.')}"
    for path in sorted({file.parent for file in RIGS.rglob("*.py")})
]
"""What breaks things on purpose: in the source tree and in an editable install, and not in the wheel."""
FOLDERS = {name: name.removeprefix("isthmus.").replace(".", "/") for name in (*PACKAGES, *LEFT_OUT)}

# What `isthmus --help` imports; everything else of `dependencies` is loaded by the command that needs it.
LIGHT = ("typer", "pydantic", "rich")
HEAVY = ("torch", "transformers", "peft", "numpy", "grpc", "ray", "cryptography", "safetensors", "huggingface_hub")
BUILD_NEEDS = ("pyproject.toml", "README.md", "LICENSE")


def _folders_with_code() -> set[Path]:
    """Every folder below the root that holds Python files, but for tests, what installs, and hidden folders."""
    found = set()
    for top in ROOT.iterdir():
        if top.is_dir() and not top.name.startswith(".") and top.name not in {"tests", "lock", "build", "dist"}:
            found |= {path.parent.relative_to(ROOT) for path in top.rglob("*.py")}
    return found


def _sources() -> set[str]:
    """The files that a wheel must hold, by their names there."""
    code = (".py", ".pyi", ".proto", ".css", ".js", ".toml")
    packaged = {
        f"{package.replace('.', '/')}/{path.name}"
        for package in PACKAGES
        for path in (ROOT / FOLDERS[package]).iterdir()
        if path.suffix in code or path.name == "py.typed"
    }
    served = ROOT / "daemon" / "page" / "static"
    return packaged | {f"isthmus/daemon/page/static/{path.name}" for path in served.iterdir()}


def _modules() -> list[str]:
    """All modules of the tree, those that the wheel leaves out too."""
    names = {f"{package}.{path.stem}" for package, folder in FOLDERS.items() for path in (ROOT / folder).glob("*.py")}
    return sorted(name.removesuffix(".__init__") for name in names)


def test_every_folder_with_code_is_a_package() -> None:
    listed = {Path(folder) for folder in FOLDERS.values()}
    assert listed == _folders_with_code()
    assert {f"isthmus.{name}": name for name in {folder.parts[0] for folder in listed}} == TOPS


def test_only_the_rigs_are_left_out_of_the_wheel() -> None:
    assert LEFT_OUT[0] == "isthmus.experiments.rigs"
    assert not [name for name in PACKAGES if name.startswith(LEFT_OUT[0])]


def test_every_package_is_typed() -> None:
    # One at the top does for its sub-packages.
    assert [folder for folder in TOPS.values() if not (ROOT / folder / "py.typed").is_file()] == []


def test_the_namespace_and_kernels_have_no_init() -> None:
    # `isthmus` is a namespace package; and `kernels/__init__.py` would shadow Hugging Face's package of that name for
    # whoever runs Python in the root.
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", _modules())
def test_every_module_can_be_imported(module: str) -> None:
    importlib.import_module(module)


def test_the_command_line_imports_nothing_heavy() -> None:
    program = f"import sys, isthmus.cli.main; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree, so that no build folder is left in it."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in BUILD_NEEDS:
        shutil.copy2(ROOT / name, copy / name)
    for folder in {folder.split("/")[0] for folder in FOLDERS.values()}:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(copy))
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.index
def test_the_wheel_holds_the_tree_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == _sources()
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "LICENSE"} <= {name.rsplit("/", 1)[1] for name in info}


@pytest.mark.index
def test_help_works_where_only_the_wheel_and_the_light_dependencies_are_installed(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    _run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile")
    requirements = [line for line in PROJECT["project"]["dependencies"] if line.startswith(LIGHT)]
    assert len(requirements) == len(LIGHT)
    _run(*pip, *requirements)
    _run(*pip, "--no-deps", str(wheel))
    present = _run(str(python), "-c", f"import importlib.util as u; print([n for n in {HEAVY!r} if u.find_spec(n)])")
    assert present.strip() == "[]"
    command = str(environment / "bin" / "isthmus")
    assert _run(command, "--version").split() == ["isthmus", PROJECT["project"]["version"]]
    assert "chaos" in _run(command, "bench", "--help")
    for name in ("faults", "link", "chaos", "abuse"):
        done = subprocess.run((command, "bench", name), capture_output=True, text=True, cwd="/", check=False, env={})
        assert (done.returncode, done.stderr.count("\n")) == (10, 1), done.stderr
        assert "run it in the source tree" in done.stderr
    for group in ((), ("cloud",), ("cloud", "serve"), ("edge",), ("edge", "train"), ("bench",), ("demo",)):
        assert "Usage: isthmus" in _run(command, *group, "--help")


def _run(*command: str) -> str:
    # Away from the tree and from this environment's own paths: only what is installed can be found.
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
