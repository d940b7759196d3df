"""Tuning on a package: the trainer of a split run over an emulator, and no way to the network."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import tiny_checkpoint
from support.run_folders import adapter, assert_same_run, same
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.cli.emulator_edge_commands import app
from isthmus.common.errors import CheckpointError, ConfigError, SignerError
from isthmus.edge.config.training_config import TuneConfig, load_config
from isthmus.edge.data.batches import load_data
from isthmus.edge.emulator_run import run_tuning
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.run_report import linear_parameters
from isthmus.edge.training import methods
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.trainer import Trainer
from isthmus.emulator.compress.bridges import Bridge
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.package.package import Package, open_package, write_package
from isthmus.protocol.secure.keys import WorkerIdentity, generate_root, issue_worker, load_worker
from isthmus.training.run_checkpoint import load

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("qwen2", tmp_path_factory.mktemp("model")), "tiny-qwen2")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> WorkerIdentity:
    home = tmp_path_factory.mktemp("keys")
    generate_root(home)
    issue_worker(home)
    return load_worker(home)


@pytest.fixture(scope="module")
def build(checkpoint: Checkpoint, signer: WorkerIdentity) -> Callable[..., Package]:
    def package(folder: Path, recipe: str = "uniform", keep: float = 0.5) -> Package:
        plan = SplitPlan.parse("1:1", 6)
        emulator = build_emulator(checkpoint, plan, Recipe.parse(recipe, keep), None)
        return write_package(folder, checkpoint, plan, emulator, signer=signer, licence="for tests")

    return package


@pytest.fixture(scope="module")
def package(build: Callable[..., Package], tmp_path_factory: pytest.TempPathFactory) -> Package:
    return build(tmp_path_factory.mktemp("packages") / "half")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"Ticket {i}:", "completion": f" answer {i * i}"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(package: Package, data: Path, out: Path, **values: Any) -> TuneConfig:
    defaults = {"steps": 4, "batch": 3, "learning_rate": 1e-2, "rank": 2, "threads": 1, "save_every": 2}
    needed = {"package": package.folder, "signer": str(package.signer), "data": str(data), "out": out}
    return load_config(None, {**needed, **defaults, **values}, TuneConfig)


@pytest.mark.parametrize("method", ["lora", "full", "bottleneck", "bitfit"])
def test_what_is_tuned_on_the_emulator_loads_into_the_whole_model(
    package: Package, checkpoint: Checkpoint, data: Path, tmp_path: Path, method: str
) -> None:
    report = run_tuning(config(package, data, tmp_path / "run", method=method))
    assert report.loss_after is not None
    assert report.loss_before is not None
    assert report.loss_after < report.loss_before
    assert (report.codec, report.bytes_up, report.cloud_flops, report.plan) == ("none", 0, 0, "1:1")
    assert report.model == f"tiny-qwen2 emulator {package.id[:16]}"
    folder = tmp_path / "run" / "adapter"
    tuning = json.loads((folder / "isthmus_tuning.json").read_text())
    assert tuning == {"package": package.id, "digest": checkpoint.digest(), "plan": "1:1", "method": method}
    whole = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    before = whole(IDS).logits
    assert not torch.equal(load_adapter(whole, folder, digest=checkpoint.digest())(IDS).logits, before)


def test_the_flops_are_the_edges_and_count_a_shared_layer_each_time(
    package: Package, data: Path, tmp_path: Path
) -> None:
    report = run_tuning(config(package, data, tmp_path / "run"))
    edge = linear_parameters(package.load_model())
    a_layer = sum(weight.numel() for weight in package.load_emulator().parameters() if weight.dim() == 2) // 2
    trained = report.trained_parameters
    assert report.edge_flops == (4 * (edge + trained + 2 * a_layer) + 2 * trained) * report.positions


def test_with_all_layers_kept_it_is_the_run_on_the_whole_model(
    build: Callable[..., Package], checkpoint: Checkpoint, data: Path, tmp_path: Path
) -> None:
    package = build(tmp_path / "package", keep=1.0)
    run_tuning(config(package, data, tmp_path / "tuned"))
    options = config(package, data, tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    adapted = build_peft(whole, options, layers=package.plan.edge_layers)
    Trainer(adapted, load_data(options, package.load_tokenizer()), options, ModelIdentity("m", "", "whole")).fit()
    assert_same_run(tmp_path / "tuned", tmp_path / "whole")


def test_a_run_goes_on_and_only_with_its_own_package(
    build: Callable[..., Package], package: Package, data: Path, tmp_path: Path
) -> None:
    run_tuning(config(package, data, tmp_path / "straight", schedule="constant"))
    run_tuning(config(package, data, tmp_path / "grown", schedule="constant", steps=2))
    other = build(tmp_path / "other", keep=0.75)
    with pytest.raises(CheckpointError, match=r"the model was 'tiny-qwen2 emulator .* and is now 'tiny-qwen2 emulator"):
        run_tuning(config(other, data, tmp_path / "grown", schedule="constant", resume=True))
    copied = open_package(Path(shutil.copytree(package.folder, tmp_path / "elsewhere")))
    run_tuning(config(copied, data, tmp_path / "grown", schedule="constant", resume=True))
    straight, grown = (adapter(tmp_path / name) for name in ("straight", "grown"))
    assert same(straight, grown)
    identity = ModelIdentity(**load(tmp_path / "grown" / "checkpoint-4").entries["model"])
    assert (identity.package, identity.plan) == (package.id, "1:1")


def test_the_signer(package: Package, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pin = str(package.signer)
    wrong = pin[:-2] + ("AE" if not pin.endswith("AE") else "BE")
    with pytest.raises(SignerError):
        run_tuning(config(package, data, tmp_path / "run", signer=wrong))
    with pytest.raises(ConfigError, match=r"'SHA256:short' is not a fingerprint"):
        run_tuning(config(package, data, tmp_path / "run", signer="SHA256:short"))
    assert not (tmp_path / "run").exists()
    run_tuning(config(package, data, tmp_path / "run", signer=f"isthmus://cloud:7443#{pin}", steps=1))
    assert pin not in capsys.readouterr().err
    run_tuning(config(package, data, tmp_path / "again", signer=None, steps=1))
    assert f"signed by {pin}" in capsys.readouterr().err


def test_it_is_said_that_a_bridge_acts(
    package: Package, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = open_package(Path(shutil.copytree(package.folder, tmp_path / "copy")))
    copy.save_bridge(Bridge(copy.checkpoint.config.hidden_size, torch.device("cpu")), {})
    run_tuning(config(copy, data, tmp_path / "run", steps=1))
    assert str(copy.bridge_file) in capsys.readouterr().err


def test_no_core_files_are_written(package: Package, data: Path, tmp_path: Path) -> None:
    run_tuning(config(package, data, tmp_path, steps=1))
    assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)


PROGRAM = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("a socket was asked for")
socket.socket.connect = socket.socket.bind = socket.getaddrinfo = refuse
from isthmus.edge.config.training_config import TuneConfig, load_config
from isthmus.edge.emulator_run import run_tuning
values = dict(item.split("=", 1) for item in sys.argv[1:])
run_tuning(load_config(None, values, TuneConfig))
found = sorted({"grpc", "ray", "isthmus.edge.client.link", "isthmus.rpc.transport", "isthmus.cloud"} & set(sys.modules))
sys.exit(f"loaded {found}" if found else 0)
"""


def start(program: str, package: Package, data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [f"package={package.folder}", f"data={data}", f"out={out}", "threads=1", "batch=3", *more]
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_nothing_that_could_connect_is_loaded_or_called(package: Package, data: Path, tmp_path: Path) -> None:
    process = start(PROGRAM, package, data, tmp_path / "run", "steps=2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_the_command_prints_a_report_and_ctrl_c_says_how_to_go_on(
    package: Package, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = ["--package", package.folder, "--data", data, "--out", tmp_path / "run", "--batch", 3, "--threads", 1]
    arguments = ["tune", *(str(item) for item in needed)]
    after_step = methods.after_step

    def interrupt(model: Any, step: int) -> None:
        after_step(model, step)
        if step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(methods, "after_step", interrupt)
        stopped = CliRunner().invoke(app, [*arguments, "--steps", "4"])
    assert stopped.exit_code == 130
    assert "Stopped after step 1 of 4" in stopped.stderr
    assert "--resume" in stopped.stderr
    done = CliRunner().invoke(app, [*arguments, "--steps", "4", "--resume", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["steps"] == 4
    again = CliRunner().invoke(app, [*arguments, "--steps", "4", "--resume"])
    assert "held-out loss" in again.stdout
    assert "traffic" not in again.stdout


def test_the_cloud_s_options_are_unknown_here(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'codec'"):
        load_config(None, {"package": "p", "data": str(data), "codec": "int8"}, TuneConfig)
    with pytest.raises(ConfigError, match=r"'package' is missing: give --package"):
        load_config(None, {"data": str(data)}, TuneConfig)


@pytest.mark.parametrize("options", [{"data": "hub:a/b"}, {"validation": "hub:a/b"}, {"format": "hub"}], ids=str)
def test_data_on_a_hub_are_refused_as_nothing_connects(tmp_path: Path, options: dict[str, str]) -> None:
    values = {"package": tmp_path / "package", "data": "x.jsonl", "out": tmp_path / "out", "steps": 1, **options}
    with pytest.raises(ConfigError, match="connects to nothing"):
        run_tuning(TuneConfig.model_validate(values))
