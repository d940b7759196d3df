"""SmolLM2-135M across real processes: what the README promises, on the model that it promises it for."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import in_process

from isthmus.backbone.adapters.adapter_files import load_adapter, save_adapter
from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.edge.client.link import Link, connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft
from isthmus.experiments.benchmarks import parity
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import isthmus
from isthmus.experiments.harness.single_process import whole_model

pytestmark = [pytest.mark.real_model, pytest.mark.server, pytest.mark.usefixtures("warm_children")]
OF_ONE_STAGE = ("--edge-layers", "2:2", "--dtype", "fp32", "--threads", "1", "--pipeline", "1")


@pytest.fixture(scope="module")
def cloud(real_model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    with LocalCloud(tmp_path_factory.mktemp("cloud"), BUILT_IN, *OF_ONE_STAGE) as running:
        yield running


@pytest.fixture
def link(cloud: LocalCloud) -> Iterator[Link]:
    with connect(cloud.connection, key=cloud.edge_key) as opened:
        yield opened


@pytest.fixture(scope="module")
def without_a_cloud() -> dict[str, Any]:
    """The runs of the whole model and of the control, which know nothing of stages."""
    return {}


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.long)])
def test_parity_is_bitwise_and_its_control_is_caught(
    cloud: LocalCloud,
    without_a_cloud: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stages: int,
) -> None:
    run, start = parity._run, parity.LocalCloud

    def run_once(mode: str, settings: Any, folder: Path, cloud: LocalCloud | None = None) -> Any:
        if cloud is not None:
            return run(mode, settings, folder, cloud)
        if mode not in without_a_cloud:
            without_a_cloud[mode] = run(mode, settings, folder)
        return without_a_cloud[mode]

    def started(folder: Path, model: str, *options: str) -> AbstractContextManager[LocalCloud]:
        """The cloud of one stage is there already."""
        return nullcontext(cloud) if (model, options) == (BUILT_IN, OF_ONE_STAGE) else start(folder, model, *options)

    monkeypatch.setattr(parity, "_run", run_once)
    monkeypatch.setattr(parity, "LocalCloud", started)
    # The fifth batch is the ragged one.
    options = ("--steps", "5", "--seq", "32", "--pipeline", str(stages), "--json")
    done = in_process(capsys, "bench", "parity", "--model", BUILT_IN, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bitwise_equal"] is True
    assert result["max_abs_loss_diff"] == result["gradient_max_abs_diff"] == result["adapter_max_abs_diff"] == 0.0
    assert result["control_detected"] is True
    assert result["lora_b_max_abs"] > 0
    assert result["tokens_padded"] > 0
    assert result["ragged_batch"] > 0


def test_a_saved_adapter_gives_the_split_models_logits_and_text_on_the_whole_model(link: Link, tmp_path: Path) -> None:
    tokenizer = link.load_tokenizer()
    split = build_peft(link.load_model(), TrainConfig(cloud="-", data="-"))
    inputs = tokenizer(["The strip is narrow", "A ticket came in at night, and"], return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW([p for p in split.parameters() if p.requires_grad], lr=1e-2)
    split.train()
    for _ in range(2):
        split(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(split, tmp_path / "adapter")

    whole, _, _ = whole_model(BUILT_IN, "2:2")
    whole = load_adapter(whole, tmp_path / "adapter").eval()
    split.eval()
    with torch.no_grad():
        assert torch.equal(split(**inputs).logits, whole(**inputs, use_cache=False).logits)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = [model.generate(**prompt, max_new_tokens=12, do_sample=False) for model in (split, whole)]
    assert torch.equal(*generated)


@pytest.mark.long
@pytest.mark.shared_data
def test_the_command_trains_on_real_task_data(cloud: LocalCloud, shared_data: Path, tmp_path: Path) -> None:
    rows = (shared_data / "e2e" / "train.csv").read_text(encoding="utf-8-sig").splitlines()
    data = tmp_path / "e2e.csv"
    data.write_text("\n".join(rows[:41]), encoding="utf-8")
    done = subprocess.run(
        isthmus(
            *(
                "edge",
                "train",
                "--cloud",
                str(cloud.connection_file),
                "--key",
                str(cloud.edge_key),
                "--data",
                str(data),
            ),
            *("--prompt-template", "Meaning: {mr}\nText:", "--completion-template", " {ref}"),
            *("--steps", "6", "--batch", "4", "--learning-rate", "2e-3", "--threads", "1"),
            *("--out", str(tmp_path / "run"), "--json"),
        ),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 6
    assert report["loss_after"] < report["loss_before"]
    hidden_bytes = 2 * 576 * 4  # forward and backward, fp32, each way
    assert hidden_bytes <= report["bytes_per_position_up"] < hidden_bytes * 1.01
    assert hidden_bytes <= report["bytes_per_position_down"] < hidden_bytes * 1.01
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == BUILT_IN
