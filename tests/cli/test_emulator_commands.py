"""`isthmus emulator verify | sign | plug | sample`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulator.emulator_owner import Owner
from support.models.tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.cli.emulator_commands import app
from isthmus.common.errors import (
    AdapterError,
    ConfigError,
    DataError,
    PackageError,
    SignerError,
)
from isthmus.emulator.compress.bridges import Bridge
from isthmus.emulator.package.package import open_package

IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])


# verify and sign ------------------------------------------------------------------------------------------------------


def table(package: Path, folder: Path, **changes: Any) -> Path:
    emulator = open_package(package).manifest.files["emulator.safetensors"].sha256
    scores = {"full_zero_shot": 4.0, "plug_in": 2.2, "thief": 3, "plug_in_recovery": 0.9, "thief_recovery": 0.5}
    row = {"task": "e2e", "metric": "nats", "emulator": emulator, "seeds": [0, 1], **scores, **changes}
    path = folder / "table.json"
    path.write_text(json.dumps({"runs": [row]}))
    return path


def test_figures_are_signed_and_shown(owner: Owner, package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "p"))
    assert "not measured" in owner.run("verify", "--package", copy)
    owner.run("sign", "--package", copy, "--protection", table(copy, tmp_path), "--home", owner.home)
    signed = open_package(copy)
    signed.save_bridge(Bridge(signed.checkpoint.config.hidden_size, torch.device("cpu")), {})
    shown = owner.run("verify", "--package", copy)
    assert f"{signed.id}.safetensors" in shown  # whose bridge acts
    assert "e2e (nats): plug-in 2.2, thief 3" in shown
    assert "recovered 90% by plug-in, 50% by a thief (seeds: 2)" in shown


def test_figures_of_another_emulator_are_not_signed(owner: Owner, package: Path, tmp_path: Path) -> None:
    before = open_package(package).id
    with pytest.raises(PackageError, match="measured with"):
        owner.run(
            "sign",
            "--package",
            package,
            "--protection",
            table(package, tmp_path, emulator="00" * 32),
            "--home",
            owner.home,
        )
    assert open_package(package).id == before


@pytest.mark.parametrize("text", ["", "3", '{"runs": 3}', "[3]"])
def test_a_table_that_is_none_is_named(owner: Owner, package: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(DataError, match=r"table\.json"):
        owner.run("sign", "--package", package, "--protection", tmp_path / "table.json", "--home", owner.home)


def test_a_tampered_package_and_a_wrong_signer_are_refused(owner: Owner, package: Path, tmp_path: Path) -> None:
    with pytest.raises(SignerError):
        owner.run("verify", "--package", package, "--signer", "SHA256:" + "A" * 43)
    with pytest.raises(ConfigError, match="is not a fingerprint"):
        owner.run("verify", "--package", package, "--signer", "nonsense")
    copy = Path(shutil.copytree(package, tmp_path / "p"))
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("32", "33", 1))
    with pytest.raises(PackageError, match=r"config\.json"):
        owner.run("verify", "--package", copy)


def test_a_licence_cannot_move_the_cursor(owner: Owner, tmp_path: Path) -> None:
    owner.run(*owner.build_arguments(tmp_path / "p", "--licence", "free\x1b[2J\nid  forged"))
    shown = owner.run("verify", "--package", tmp_path / "p")
    assert "\x1b" not in shown
    assert [line for line in shown.splitlines() if line.startswith("id ")] == [
        f"id{'':15}{open_package(tmp_path / 'p').id}"
    ]


# plug -----------------------------------------------------------------------------------------------------------------


def test_a_returned_adapter_becomes_a_model(owner: Owner, package: Path, tmp_path: Path) -> None:
    adapter = owner.tune(package, tmp_path / "adapter")
    where = ["--model", owner.model, "--package", package, "--adapter", adapter]
    said = json.loads(owner.run("plug", *where, "--out", tmp_path / "tuned", "--json"))
    assert (said["kind"], said["method"]) == ("model", "lora")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    whole = load_adapter(AutoModelForCausalLM.from_pretrained(owner.model).eval(), adapter)
    with torch.no_grad():
        torch.testing.assert_close(tuned(IDS).logits, whole(IDS).logits, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="is not overwritten"):
        owner.run("plug", *where, "--out", tmp_path / "tuned")


def test_a_bottleneck_stays_an_adapter_and_the_command_says_so(owner: Owner, package: Path, tmp_path: Path) -> None:
    adapter = owner.tune(package, tmp_path / "adapter", "bottleneck")
    where = ["--model", owner.model, "--package", package, "--adapter", adapter]
    said = owner.run("plug", *where, "--out", tmp_path / "tuned")
    assert "bottleneck is no part of the architecture" in said
    assert (tmp_path / "tuned" / "adapter" / "isthmus_adapter.json").is_file()


def test_a_package_of_another_model_is_refused(owner: Owner, package: Path, tmp_path: Path) -> None:
    adapter = owner.tune(package, tmp_path / "adapter")
    other = tiny_checkpoint("llama", tmp_path / "other", seed=1)
    with pytest.raises(PackageError, match="digest"):
        owner.run("plug", "--model", other, "--package", package, "--adapter", adapter, "--out", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_an_adapter_of_another_package_is_refused(owner: Owner, package: Path, tmp_path: Path) -> None:
    owner.build(tmp_path / "other", "--keep", 0.75)
    adapter = owner.tune(tmp_path / "other", tmp_path / "adapter")
    where = ["--model", owner.model, "--package", package, "--adapter", adapter]
    with pytest.raises(AdapterError, match="tuned on the package"):
        owner.run("plug", *where, "--out", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


# sample ---------------------------------------------------------------------------------------------------------------


def test_the_model_writes_text_that_an_emulator_is_built_by(owner: Owner, tmp_path: Path) -> None:
    where = ["--model", owner.model, "--device", "cpu", "--tokens", 300, "--length", 40, "--batch", 4]
    said = json.loads(owner.run("sample", *where, "--out", tmp_path / "text.jsonl", "--json"))
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert len(rows) == said["texts"] > 0
    assert all(row.keys() == {"text"} for row in rows)
    owner.run("sample", *where, "--out", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "text.jsonl").read_bytes()
    built = owner.build(tmp_path / "p", "--method", "importance", "--text", tmp_path / "text.jsonl", "--length", 16)
    assert built["recipe"] == "importance"


def test_an_interrupted_sample_keeps_what_was_written(
    owner: Owner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isthmus.emulator.distill import sampled_text

    write = sampled_text._write
    rounds: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        rounds.append(1)
        if len(rounds) > 1:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(sampled_text, "_write", interrupted)
    where = ["--model", owner.model, "--device", "cpu", "--tokens", 300, "--length", 40, "--batch", 4]
    arguments = ["sample", *where, "--out", tmp_path / "text.jsonl"]
    stopped = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert stopped.exit_code == 130
    n_rows = len((tmp_path / "text.jsonl").read_text().splitlines())
    assert n_rows > 0
    assert f"has {n_rows} texts, which can be used" in stopped.output


@pytest.mark.parametrize(("name", "message"), [("model", "is not overwritten"), ("text.txt", r"ends in \.jsonl")])
def test_text_does_not_replace_anything(owner: Owner, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=message):
        owner.run("sample", "--model", owner.model, "--out", tmp_path / name)
    assert not (tmp_path / "text.txt").exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, isthmus.cli.emulator_commands; print({'torch', 'transformers', 'cryptography'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
