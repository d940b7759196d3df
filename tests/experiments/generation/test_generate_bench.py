"""`isthmus bench generate`: its figures on a tiny model, and that it notices what is wrong."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM

from isthmus.common.errors import IsthmusError
from isthmus.experiments.generation import generate_bench
from isthmus.experiments.generation.generate_bench import (
    AMONG_ROUNDS,
    Text,
    among_others,
    check_counts,
    run_generate,
    text_of,
)
from isthmus.experiments.generation.prompts import PROMPTS
from isthmus.experiments.harness.generation_settings import GenerateSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("bench") / "model", max_position_embeddings=512)


@pytest.mark.long
@pytest.mark.server
@pytest.mark.usefixtures("warm_children")
def test_a_whole_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_bench, "CONTEXTS", (5, 9))
    monkeypatch.setattr(generate_bench, "OTHERS", 2)
    settings = GenerateSettings(str(model), parts="local", prompts=4, tokens=8, rounds=3, turns=1, threads=1)
    result = run_generate(settings, tmp_path)
    assert (result["identical"], result["fast_bits_equal"]) == (1.0, True)
    exact = dict(result["exact_bits_equal"])
    assert exact.pop("calls_per_pass") > 1
    assert exact["calls"] >= exact["shared_calls"] >= 4  # of each prompt at least one
    assert min(exact.pop(name) for name in ("shared_calls", "calls", "accepted", "replayed")) > 0
    assert exact == {"among_eight": True, "drafts": True, "replay": True}
    for name in ("tokens_ratio", "tokens_ratio_exact", "batched_over_serial", "batched_bound"):
        assert result[name] > 0
    assert set(result["span_batched_over_serial"]) == set(result["verify9_ratio"]) == {"fp32", "bf16"}


def test_other_tokens_and_other_bits_are_noticed(model: Path) -> None:
    whole: Any = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = text_of(whole, ids, 8)
    with torch.no_grad():
        whole.lm_head.weight.mul_(1 + 2**-20)
    nearly = text_of(whole, ids, 8)
    assert torch.equal(before.tokens, nearly.tokens)
    assert not torch.equal(before.logits, nearly.logits)
    with torch.no_grad():
        whole.lm_head.weight.neg_()
    assert not torch.equal(before.tokens, text_of(whole, ids, 8).tokens)
    assert isinstance(before, Text)
    assert before.logits.shape == (8, whole.config.vocab_size)


def test_a_comparison_that_shows_nothing_is_an_error() -> None:
    same = {"among_eight": True, "drafts": True}
    check_counts(same, {"shared_calls": 1, "accepted": 2})
    with pytest.raises(IsthmusError, match="accepted is 0"):
        check_counts(same, {"shared_calls": 1, "accepted": 0})
    check_counts({**same, "drafts": False}, {"shared_calls": 1, "accepted": 0})  # other bits are what is to be said


def text(value: float) -> Text:
    return Text(torch.ones(1), torch.full((1, 3), value), 1.0)


def among(shared: list[int], values: list[float]) -> tuple[bool, list[int], int]:
    """Two prompts' texts, given how many calls each run shares and its logits; and how many texts were generated."""
    so_far = 0
    runs = iter(zip(shared, values, strict=True))
    generated = 0

    def generate(_ids: torch.Tensor) -> Text:
        nonlocal so_far, generated
        more, value = next(runs)
        so_far, generated = so_far + more, generated + 1
        return text(value)

    prompts = [torch.tensor([[5]]), torch.tensor([[6]])]
    return *among_others(generate, lambda: so_far, prompts, [text(1.0), text(2.0)]), generated


def test_each_prompt_is_generated_among_others_until_it_has_shared_a_pass() -> None:
    assert among([3, 0, 0, 2], [1.0, 2.0, 2.0, 2.0]) == (True, [3, 2], 4)
    never = AMONG_ROUNDS * [0]
    assert among([3, *never], [1.0, *AMONG_ROUNDS * [2.0]]) == (True, [3, 0], 1 + AMONG_ROUNDS)


def test_other_bits_among_others_end_the_comparison() -> None:
    assert among([0, 0], [1.0, 1.5]) == (False, [0], 2)
    assert among([3, 1], [1.0, 1.0]) == (False, [3, 1], 2)


def test_another_edge_that_fails_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    class Edge:
        texts = 0

        def ask(self, question: Any) -> None:
            self.texts += 1
            if self.texts > 1:  # the first one is before the comparison
                asked.set()
                if question["ids"] == [7]:
                    raise IsthmusError("the process of edge 1 failed")

    monkeypatch.setattr(generate_bench, "_edges", lambda _cloud, count, _stack: iter([Edge() for _ in range(count)]))
    cloud: Any = None
    with generate_bench._others_decoding(cloud, [[5]]):
        assert asked.wait(10)
    asked.clear()
    with pytest.raises(IsthmusError, match="edge 1 failed"), generate_bench._others_decoding(cloud, [[7]]):
        assert asked.wait(10)


def test_the_prompts_differ() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) == 50
