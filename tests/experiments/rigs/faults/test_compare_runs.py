"""The comparison of the fault benchmark sees what it has to see."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from isthmus.experiments.rigs.faults.faults import compare_answers, compare_runs


def run(folder: Path, steps: list[int], value: float = 1.0, loss: float = 2.0) -> Path:
    (folder / "adapter").mkdir(parents=True)
    tensors = {"lora_A": torch.ones(2, 3), "lora_B": torch.full((3, 2), value)}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "losses.jsonl").write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step in steps))
    return folder


def test_equal_runs(tmp_path: Path) -> None:
    figures = compare_runs(3, run(tmp_path / "a", [1, 2, 3]), run(tmp_path / "b", [1, 2, 3]))
    assert figures == {
        "steps_lost": 0,
        "steps_doubled": 0,
        "adapter_identical": True,
        "losses_identical": True,
        "lora_b_max_abs": 1.0,
    }


def test_lost_and_doubled_steps_are_counted(tmp_path: Path) -> None:
    figures = compare_runs(4, run(tmp_path / "a", [1, 2, 3, 4]), run(tmp_path / "b", [1, 3, 3, 3]))
    assert (figures["steps_lost"], figures["steps_doubled"]) == (2, 1)
    assert not figures["losses_identical"]


def test_one_bit_of_the_adapter_or_of_a_loss_is_seen(tmp_path: Path) -> None:
    undisturbed = run(tmp_path / "a", [1])
    bit = float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    assert not compare_runs(1, undisturbed, run(tmp_path / "b", [1], value=bit))["adapter_identical"]
    assert not compare_runs(1, undisturbed, run(tmp_path / "c", [1], loss=2.0000000000000004))["losses_identical"]


def test_another_text_or_another_length_of_an_answer_is_seen(tmp_path: Path) -> None:
    def answer(name: str, text: str, tokens: int) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"text": text, "tokens": tokens, "seconds": 1.0, "replayed": len(name)}))
        return path

    one = answer("a", "Hello", 2)
    assert compare_answers(one, answer("bb", "Hello", 2)) == {"answer_identical": True, "answer_replayed": 2}
    assert not compare_answers(one, answer("c", "Hallo", 2))["answer_identical"]
    assert not compare_answers(one, answer("d", "Hello", 3))["answer_identical"]
