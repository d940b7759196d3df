"""The model's own text: drawn as the model says, in conversations or documents, and kept when stopped."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.models.tiny import BOS, CONFIGS, EOS, VOCAB, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.common.errors import ConfigError, NonFiniteError
from isthmus.emulator.compress.public_text import load_blocks
from isthmus.emulator.distill import sampled_text as sampling
from isthmus.emulator.distill.sampled_text import write_sample

from ..conftest import Checkpoints

QUIET = Console(file=io.StringIO())


class Scripted(torch.nn.Module):
    """Answers the token at each place of a list with certainty, from the first that is not given; keeps what it got."""

    def __init__(self, says: str, real: Any) -> None:
        super().__init__()
        self.config, self.generation_config, self.device = real.config, real.generation_config, torch.device("cpu")
        self.says = [EOS if letter == "$" else 3 + "".join(ALPHABET).index(letter) for letter in says]
        self.seen: list[int] = []

    def forward(self, input_ids: Tensor, cache: Any, **_: Any) -> Any:
        self.seen += input_ids[0].tolist()
        logits = torch.full((input_ids.shape[0], 1, VOCAB), -1e9)
        logits[:, :, self.says[(cache or 0)]] = 0.0
        return type("Output", (), {"logits": logits, "cache": (cache or 0) + 1})


def alphabet() -> list[str]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.convert_ids_to_tokens(token) for token in range(3, VOCAB)]


ALPHABET = alphabet()


@pytest.fixture
def model(checkpoints: Checkpoints) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoints("llama").folder).eval()


def sample_text(model: Any, tokenizer: Any, tokens: int, **options: Any) -> list[str]:
    """The texts that a sample's file has."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.jsonl"
        write_sample(path, model, tokenizer, tokens, **options)
        return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def plain_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def test_a_conversation_starts_after_the_users_header_and_goes_from_turn_to_turn(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    # Between the two turns stand the 12 tokens of "\n<s>assistant\n", which the script answers with x.
    scripted = Scripted("hi$" + "x" * 12 + "ho$" + "x" * 7 + "so", model)
    (text,) = sample_text(scripted, tokenizer, 27, batch=1, length=27, progress=QUIET)
    assert text == "hi\nho\nso"
    assert tokenizer.decode(scripted.seen) == "<s>user\nhi</s>\n<s>assistant\nho</s>\n<s>user\ns"


def test_documents_start_anew_after_the_end_of_one(model: Any) -> None:
    scripted = Scripted("ab$xcd$xe", model)
    texts = sample_text(scripted, plain_tokenizer(), 9, batch=1, length=9, progress=QUIET)
    assert texts == ["ab", "cd", "e"]
    assert scripted.seen[0] == BOS
    assert scripted.seen.count(BOS) == 3


def test_a_template_that_takes_no_conversation_gives_documents(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert sample_text(Scripted("ab", model), tokenizer, 2, batch=1, length=2, progress=QUIET) == ["ab"]


def test_special_tokens_stay_where_they_are_asked_for(model: Any) -> None:
    scripted = Scripted("hi$" + "x" * 12 + "ho$" + "x" * 7 + "so", model)
    options: dict[str, Any] = {"batch": 1, "length": 27, "progress": QUIET, "special_tokens": True}
    (text,) = sample_text(scripted, tiny_tokenizer(), 27, **options)
    assert text == "<s>user\nhi</s>\n<s>assistant\nho</s>\n<s>user\nso"


@pytest.mark.parametrize("temperature", [0.5, 0.9])
def test_tokens_are_drawn_at_the_temperature_over_the_whole_vocabulary(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(sampling._draw(logits.expand(20_000, -1), temperature, generator))
    share = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(share, torch.softmax(logits[0] / temperature, -1), atol=0.02, rtol=0)


def test_the_cache_gives_what_the_whole_text_gives(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(sampling, "_draw", lambda logits, *_: [chosen.append(int(logits[0].argmax())) or chosen[-1]])
    tokenizer = plain_tokenizer()
    sample_text(model, tokenizer, 12, batch=1, length=12, progress=QUIET)
    fed = [BOS]
    for token in chosen:
        assert int(model(torch.tensor([fed])).logits[0, -1].argmax()) == token
        fed.append(token)
        assert token != EOS


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_writes(checkpoints: Checkpoints, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints(family).folder).eval()
    texts = sample_text(model, tiny_tokenizer(), 12, batch=2, length=6, progress=QUIET)
    assert 1 <= len(texts) <= 2


@pytest.mark.parametrize("bos", [True, False])
def test_the_seed_decides(model: Any, bos: bool) -> None:
    tokenizer = plain_tokenizer()
    if not bos:
        tokenizer.bos_token = None
    texts = [sample_text(model, tokenizer, 200, seed=seed, batch=4, length=20, progress=QUIET) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) >= 10


def test_the_file_is_text_for_a_distillation(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "public.jsonl"
    tokenizer = tiny_tokenizer()
    written = write_sample(path, model, tokenizer, 300, batch=4, length=30, progress=QUIET)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == written >= 10
    assert not any("</s>" in line["text"] or "<s>" in line["text"] for line in lines)
    assert load_blocks(path, tokenizer, 16).shape[1] == 16


def test_what_is_written_is_kept_when_it_is_stopped(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, calls = sampling._draw, []

    def stopping(logits: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
        calls.append(1)
        if len(calls) > 25:
            raise KeyboardInterrupt
        return draw(logits, temperature, generator)

    monkeypatch.setattr(sampling, "_draw", stopping)
    path = tmp_path / "public.jsonl"
    with pytest.raises(KeyboardInterrupt, match="texts, which can be used as they are") as caught:
        write_sample(path, model, plain_tokenizer(), 1000, batch=4, length=10, progress=QUIET)
    lines = path.read_text().splitlines()
    assert f"has {len(lines)} texts" in str(caught.value)
    assert len(lines) >= 8
    assert all(json.loads(line)["text"] for line in lines)


def test_senseless_numbers_and_a_broken_model_are_refused(model: Any, tmp_path: Path) -> None:
    tokenizer = plain_tokenizer()
    with pytest.raises(ConfigError, match="batch = 0"):
        sample_text(model, tokenizer, 10, batch=0, progress=QUIET)
    with pytest.raises(ConfigError, match="use a length of 127 or less"):
        sample_text(model, tokenizer, 10, length=128, progress=QUIET)
    for temperature in (0.0, float("nan")):
        with pytest.raises(ConfigError, match=f"temperature = {temperature}"):
            sample_text(model, tokenizer, 10, temperature=temperature, progress=QUIET)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NonFiniteError, match="logits"):
        sample_text(model, tokenizer, 10, length=8, progress=QUIET)
