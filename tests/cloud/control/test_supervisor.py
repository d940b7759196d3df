"""`serve`: what it checks before it starts anything, and how long it goes on."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from support.cloud.clouds import Home
from support.emulator.packages import tiny_package
from support.models.tiny import tiny_checkpoint
from typer.testing import CliRunner

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.cli.cloud_commands import app
from isthmus.cloud.cluster.attached import serve_on_cluster
from isthmus.cloud.control import supervisor, worker_specs
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions
from isthmus.cloud.control.supervisor import _wait
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.control.worker_setup import recorder_of
from isthmus.common.errors import (
    ConfigError,
    KeyFileError,
    PackageError,
    SignerError,
    UnknownModelError,
    UnreachableError,
)
from isthmus.emulator.package.package import Package
from isthmus.protocol.secure.keys import load_worker


class StartedError(Exception):
    """Instead of starting Ray."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[WorkerSpec]:
    """The workers that `serve` would have started; it raises StartedError instead."""
    found: list[WorkerSpec] = []

    def start(specs: list[WorkerSpec], *_: Any, **__: Any) -> None:
        found.extend(specs)
        raise StartedError

    monkeypatch.setattr(supervisor, "Serving", start)
    return found


@pytest.mark.parametrize(
    ("options", "threads", "line"),
    [
        ({}, [8], "the worker computes with 8 threads; this process may use 8 cores"),
        ({"workers": "1:4"}, [2] * 4, "each of at most 4 workers has 2 threads; this process may use 8 cores"),
        ({"workers": "3"}, [2] * 3, "each of at most 3 workers has 2 threads; this process may use 8 cores"),
        ({"pipeline": 2}, [4] * 2, "each of at most 2 workers has 4 threads; this process may use 8 cores"),
        (
            {"workers": "1:9"},
            [1] * 9,
            "9 workers has 1 thread; this process may use 8 cores, so they will",
        ),
        ({"workers": "2", "threads": 8}, [8] * 2, "has 8 threads; this process may use 8 cores, so they will wait"),
    ],
)
def test_workers_share_the_cores_at_their_largest_number_and_the_operator_is_told(
    options: dict[str, Any], threads: list[int], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], started: list[WorkerSpec],
) -> None:  # fmt: skip
    monkeypatch.setattr(supervisor, "usable_cores", lambda: 8)
    home, model = Home(tmp_path).folder, tiny_checkpoint("llama", tmp_path / "model")
    with pytest.raises(StartedError):
        supervisor.serve(ServeOptions(str(model), home, listen="127.0.0.1:0", **options))
    assert [spec.threads for spec in started] == threads
    said = capsys.readouterr().err.splitlines()
    assert line in " ".join(" ".join(said).split())
    at_first = [f"looking for the model {model}", "the model model is there, split 2:2"]
    assert [each for each in said if "the model" in each] == at_first
    logs = [Path(spec.log_file).name for spec in started]
    assert logs == ["worker.log", *(f"worker-{number}.log" for number in range(1, len(started)))]
    assert not (home / "pipeline").exists()


@pytest.mark.parametrize("recorded", [True, False])
def test_a_recording_is_announced_and_made_by_the_worker_that_edges_talk_to(
    recorded: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], started: list[WorkerSpec]
) -> None:
    home, model = Home(tmp_path).folder, tiny_checkpoint("llama", tmp_path / "model")
    folder = tmp_path / "deep" / "recording"
    options = ServeOptions(str(model), home, listen="127.0.0.1:0", pipeline=2, record=folder if recorded else None)
    with pytest.raises(StartedError):
        supervisor.serve(options)
    assert ("is recorded in" in " ".join(capsys.readouterr().err.split())) == recorded
    assert [recorder_of(spec) is not None for spec in started] == [recorded, False]
    assert folder.exists() == recorded
    if recorded:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "recording.bin").touch()
        with pytest.raises(ConfigError, match="holds a recording already"):
            supervisor.serve(options)


def test_a_recording_is_an_option_of_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServeOptions] = []
    monkeypatch.setattr(supervisor, "serve", lambda options, **_: given.append(options) or True)
    for options in ([], ["--record", str(tmp_path), "--record-mib", "7"]):
        result = CliRunner().invoke(app, ["serve", "--model", "tiny", *options])
        assert result.exit_code == 0, result.output
    assert [(options.record, options.record_mib) for options in given] == [(None, 1024), (tmp_path, 7)]


def test_wiping_is_an_option_of_serve_that_reaches_the_workers_and_excludes_gpus(
    tmp_path: Path, started: list[WorkerSpec]
) -> None:
    home, model = Home(tmp_path).folder, tiny_checkpoint("llama", tmp_path / "model")
    words = ["serve", "--model", str(model), "--home", str(home), "--listen", "127.0.0.1:0", "--metrics", ""]
    for options in ([], ["--wipe-freed"]):
        assert isinstance(CliRunner().invoke(app, [*words, *options]).exception, StartedError)
    assert [spec.wipe_freed for spec in started] == [False, True]
    refused = CliRunner().invoke(app, [*words, "--wipe-freed", "--device", "cuda"]).exception
    assert isinstance(refused, ConfigError)
    assert "--wipe-freed and --device cuda exclude each other" in str(refused)


def test_serve_ends_when_the_worker_is_gone_for_good() -> None:
    with pytest.raises(UnreachableError, match=r"worker\.log"):
        _wait(threading.Event(), lambda: True, poll=0.001)


def test_serve_goes_on_while_the_worker_is_restarted() -> None:
    stop, answers = threading.Event(), [True, True, False, True, True, False]

    def is_dead() -> bool:
        if len(answers) == 1:
            stop.set()
        return answers.pop(0)

    _wait(stop, is_dead, poll=0.001)
    assert not answers


def test_a_malformed_edges_file_is_told_at_the_start(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with (home.folder / "authorized_edges").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(ConfigError, match="line 2"):
        supervisor.serve(ServeOptions("smollm2-135m", home.folder))


def test_a_model_that_is_none_is_told_before_a_key_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_specs, "resolve", None)  # nothing is fetched
    on_cluster = ClusterOptions("127.0.0.1:6379")
    for serve, where in ((supervisor.serve, {}), (serve_on_cluster, {"listen": "node:7443", "cluster": on_cluster})):
        options = ServeOptions("smollm2-135", tmp_path / "nowhere", **where)
        with pytest.raises(UnknownModelError, match="did you mean 'smollm2-135m'"):
            serve(options)
        with pytest.raises(KeyFileError, match="nowhere"):
            serve(dataclasses.replace(options, model="smollm2-135m"))


def serving(package: Package, keys: Home, **changes: Any) -> None:
    """Call `serve` up to the point where it has looked at everything."""
    options = ServeOptions(
        str(package.folder.parent / "model"),
        keys.folder,
        edge_layers="2:2",
        listen="127.0.0.1:0",
        emulators=(str(package.folder),),
    )
    supervisor.serve(dataclasses.replace(options, **changes))


@pytest.mark.usefixtures("without_ray")
def test_a_package_is_looked_at_before_anything_is_started(
    package: Package, keys: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PackageError, match=r"split plan 2:2, whose middle 2:4 is not inside the layers 3:4"):
        serving(package, keys, edge_layers="3:2")
    other = tiny_checkpoint("llama", tmp_path / "other", seed=3)
    with pytest.raises(PackageError, match=package.digest[:16]):
        serving(package, keys, model=str(other))
    with pytest.raises(SignerError, match="SHA256:"):
        serving(package, Home(tmp_path / "strangers"))
    damaged = shutil.copytree(package.folder, tmp_path / "damaged")
    (damaged / "emulator.json").write_text("{}")
    with pytest.raises(PackageError, match=r"emulator\.json"):
        serving(package, keys, emulators=(str(damaged),))
    with pytest.raises(ConfigError, match=r"has the name 'package' already: give one of them another, as NAME=FOLDER"):
        serving(package, keys, emulators=(str(package.folder), f"package={package.folder}"))
    with pytest.raises(ConfigError, match=r"'a b' is no name of a package: give NAME=FOLDER; a package's name has 1"):
        serving(package, keys, emulators=(f"a b={package.folder}",))
    with pytest.raises(ConfigError, match="9 times: a cloud offers at most 8"):
        serving(package, keys, emulators=(str(package.folder),) * 9)


def test_a_package_has_the_name_that_is_given_or_its_presets_or_its_folders(
    package: Package, keys: Home, tmp_path: Path
) -> None:
    signer, model = load_worker(keys.folder), package.folder.parent / "model"
    preset = tiny_package(tmp_path / "with=sign" / "p", model, signer=signer, preset="guarded").folder
    options = ServeOptions(str(model), keys.folder, emulators=(str(package.folder), str(preset), f"x={preset}"))
    backbone = worker_specs.Backbone(Checkpoint(model, "tiny"), package.plan, "fp32", "none")
    options = worker_specs.check_packages(options, keys.pin, backbone)
    offered = worker_specs.worker_spec(options, backbone, beside=1, threads=1).emulators
    assert offered == (("package", str(package.folder)), ("guarded", str(preset)), ("x", str(preset)))
