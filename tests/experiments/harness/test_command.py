"""Commands of measurements: their flags are the fields of the settings, and what they name exists."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from isthmus.experiments.harness import bench_settings, command, emulator_settings
from isthmus.experiments.harness.command import Measurement, flags_of, load

RUNNER = CliRunner()
MEASUREMENTS = {**bench_settings.MEASUREMENTS, **emulator_settings.MEASUREMENTS}


@dataclass(frozen=True)
class Settings:
    """Measure nothing."""

    size: Annotated[int, typer.Option(min=1, help="How large.")]
    name: Annotated[str, typer.Option("--called", help="How it is called.")] = "it"
    hidden: float = 0.5


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command of a measurement whose function is given."""

    def invoke(run: Any, *arguments: object, **options: Any) -> Any:
        monkeypatch.setattr(command, "load", {"run": run, "show": lambda result: print("shown", result)}.__getitem__)
        app = typer.Typer()
        app.command()(Measurement(Settings, "run", **options).command())
        return RUNNER.invoke(app, [str(argument) for argument in arguments])

    return invoke


def test_a_field_with_an_option_is_a_flag_and_another_one_keeps_its_default(invoke: Any) -> None:
    assert list(flags_of(Settings)) == ["size", "name"]
    seen: list[Any] = []

    def run(settings: Settings) -> dict[str, Any]:
        seen.append(settings)
        return {"a": 1}

    done = invoke(run, "--size", 3, "--called", "x", "--json", folder="none")
    assert (done.exit_code, json.loads(done.stdout), seen) == (0, {"a": 1}, [Settings(3, "x")])
    assert invoke(lambda settings: {}, "--size", 0, folder="none").exit_code == 2
    assert invoke(lambda settings: {}, folder="none").exit_code == 2
    assert invoke(lambda settings: {}, "--size", 3, "--hidden", 1, folder="none").exit_code == 2


def test_the_result_is_printed_as_lines_or_as_the_benchmark_says(invoke: Any) -> None:
    assert invoke(lambda settings: {"some_bytes": 2048}, "--size", 1, folder="none").stdout.split() == [
        "some",
        "2.0",
        "KiB",
    ]
    done = invoke(lambda settings: {"a": 1}, "--size", 1, folder="none", show="show")
    assert done.stdout == "shown {'a': 1}\n"


def test_a_folder_stays_where_it_is_named_and_is_gone_where_it_is_not(invoke: Any, tmp_path: Path) -> None:
    used: list[Path] = []

    def run(_settings: Settings, folder: Path) -> dict[str, Any]:
        (folder / "file").touch()
        used.append(folder)
        return {}

    assert invoke(run, "--size", 1, "--keep", tmp_path / "kept").exit_code == 0
    assert invoke(run, "--size", 1).exit_code == 0
    assert invoke(run, "--size", 1, folder="temporary").exit_code == 0
    assert [folder.exists() for folder in used] == [True, False, False]
    assert invoke(run, "--size", 1, "--keep", tmp_path, folder="temporary").exit_code == 2


def test_a_setting_may_be_called_like_the_folder(invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Settings", emulator_settings.LocalCostSettings)
    seen: list[Any] = []
    done = invoke(lambda settings, _folder: seen.append(settings.keep) or {}, "--keep", 0.25, folder="temporary")
    assert (done.exit_code, seen) == (0, [0.25])


def test_the_exit_code_says_whether_it_passed(invoke: Any) -> None:
    for held, code in ((True, 0), (False, 1)):
        result = {"held": held, "caught": True}
        assert (
            invoke(
                lambda settings, result=result: result, "--size", 1, folder="none", passed=("held", "caught")
            ).exit_code
            == code
        )


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_the_functions_that_a_command_names_exist(name: str) -> None:
    measurement = MEASUREMENTS[name]
    assert callable(load(measurement.run))
    assert measurement.show is None or callable(load(measurement.show))


def test_without_the_rigs_a_command_says_what_it_needs() -> None:
    names = ["faults", "link", "chaos", "abuse"]
    program = (
        "import sys\n"
        "class Installed:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'isthmus.experiments.rigs':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Installed())\n"
        "from isthmus.cli.main import main\n"
        f"for name in {names}:\n"
        "    sys.argv = ['isthmus', 'bench', name]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        print(name, end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} 10" for name in names]
    said = done.stderr.splitlines()
    assert len(said) == len(names)
    for line in said:
        assert line.startswith("isthmus: this command needs isthmus.experiments.rigs, which the installed package")


def test_another_missing_module_is_not_taken_for_the_rigs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "isthmus.experiments.benchmarks.step", raising=False)
    monkeypatch.setitem(sys.modules, "isthmus.experiments.harness.single_process", None)
    with pytest.raises(ModuleNotFoundError, match="single_process"):
        load("benchmarks.step:run_step")
