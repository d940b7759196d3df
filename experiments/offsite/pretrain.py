"""A tiny language model of any family, pretrained here on public text, for measurements on a second architecture.

It gets a byte-level BPE tokenizer of its own, trained on the same text, and is written as an ordinary transformers
folder. What it knows is the text; it is for comparing methods with each other and not with other models.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from isthmus.backbone.families import SUPPORTED, family_of
from isthmus.common.errors import ConfigError, DataError, NonFiniteError
from isthmus.common.files import new_folder
from isthmus.common.progress import StepProgress
from isthmus.common.torch_threads import use_threads
from isthmus.emulator.compress.public_text import load_blocks

EOS = "<|endoftext|>"

_HELD_OUT = 20  # one block in so many
_WARM_UP = 0.05  # of the steps
_MAX_NORM = 1.0


@dataclass(frozen=True, slots=True)
class PretrainSettings:
    """What is pretrained.

    Attributes:
        family: `model_type` of a supported family.
        text: Public text, `.txt` or `.jsonl`.
        out: Folder of the model; must not exist.
        steps: Optimizer steps.
        layers: Decoder layers.
        hidden: Width of the hidden states; a multiple of 32.
        vocabulary: Tokens of the tokenizer.
        batch: Blocks of a step.
        length: Tokens of a block.
        learning_rate: Peak of AdamW's; it falls along a line to 0.
        seed: Of the weights and of the blocks' order.
        threads: Threads of torch; None for torch's choice.
    """

    family: str
    text: Path
    out: Path
    steps: int = 600
    layers: int = 10
    hidden: int = 96
    vocabulary: int = 1024
    batch: int = 16
    length: int = 128
    learning_rate: float = 2e-3
    seed: int = 0
    threads: int | None = None


def run_pretrain(settings: PretrainSettings, *, console: Console | None = None) -> dict[str, Any]:
    """Pretrain a model and write it, whole or not at all.

    Returns:
        `parameters`, `steps`, `tokens`, `seconds`, and the held-out loss before and after, in nats a token.

    Raises:
        ConfigError: `out` exists, the family is not supported, or a size does not fit.
        DataError: The text is missing, malformed or too short.
        DiskError: The disk is full or cannot be written.
        NonFiniteError: Training ran away.
    """
    from transformers.utils import logging

    if settings.out.exists():
        raise ConfigError(f"{settings.out} exists and is not overwritten: move it away, or give another --out")
    use_threads(settings.threads)
    model = _model(settings)
    tokenizer = train_tokenizer(settings.text, settings.vocabulary, settings.length)
    blocks = load_blocks(settings.text, tokenizer, settings.length)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(settings.seed))
    n_held_out = max(1, len(blocks) // _HELD_OUT)
    if len(blocks) < 2:
        raise DataError(f"the text {settings.text} has a single block of {settings.length} tokens; give more text")
    held_out, train = blocks[order[:n_held_out]], blocks[order[n_held_out:]]
    started = time.monotonic()
    before = _loss(model, held_out, settings.batch)
    _train(model, train, settings, StepProgress("pretraining: step", settings.steps, console))
    after = _loss(model, held_out, settings.batch)
    logging.disable_progress_bar()
    with new_folder(settings.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {
        "family": settings.family,
        "parameters": model.num_parameters(),
        "layers": settings.layers,
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch * settings.length,
        "seconds": round(time.monotonic() - started, 1),
        "held_out_loss_before": before,
        "held_out_loss_after": after,
    }


def train_tokenizer(text: Path, vocabulary: int, length: int) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2) trained on a text.

    Raises:
        DataError: The text cannot be read.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    try:
        lines = text.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the text {text} cannot be read ({error}): give a UTF-8 file") from error
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, model_max_length=_positions(length)
    )


def _positions(length: int) -> int:
    """Positions that the model has: room for longer examples than its blocks."""
    return max(512, length)


def _model(settings: PretrainSettings) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if settings.family not in SUPPORTED:
        raise ConfigError(f"the family {settings.family!r} is not supported; use {', '.join(SUPPORTED)}")
    if settings.hidden % 32:
        raise ConfigError(f"--hidden {settings.hidden} is not a multiple of 32, the width of a head")
    heads, positions = settings.hidden // 32, _positions(settings.length)
    common: dict[str, Any] = {
        "vocab_size": settings.vocabulary,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    if settings.family == "gpt2":
        sizes = {"n_embd": settings.hidden, "n_layer": settings.layers, "n_head": heads, "n_positions": positions}
    else:
        sizes = {
            "hidden_size": settings.hidden,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": heads,
            "max_position_embeddings": positions,
        }
        if settings.family == "opt":
            sizes |= {"ffn_dim": 4 * settings.hidden, "word_embed_proj_dim": settings.hidden}
        else:
            sizes |= {"intermediate_size": 3 * settings.hidden, "num_key_value_heads": heads, "head_dim": 32}
    config = CONFIG_MAPPING[settings.family](**common, **sizes)
    torch.manual_seed(settings.seed)
    attention = family_of(config).attention(None)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


def _train(model: Any, blocks: torch.Tensor, settings: PretrainSettings, progress: StepProgress) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(settings.seed)
    warm_up = max(1, round(_WARM_UP * settings.steps))
    model.train()
    with progress:
        progress.start(0)
        for step in range(1, settings.steps + 1):
            started = time.perf_counter()
            rows = torch.randint(len(blocks), (settings.batch,), generator=generator)
            ids = blocks[rows]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if not loss.isfinite():
                raise NonFiniteError(f"the loss of step {step} is {loss.item()}: lower the learning rate.")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
            part = min(step / warm_up, 1 - (step - 1 - warm_up) / max(1, settings.steps - warm_up))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * part
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            speed = ids.numel() / (time.perf_counter() - started)
            progress.show(step, f"loss {loss.item():.3f}  {speed:,.0f} tokens/s")
    model.eval()


@torch.no_grad()
def _loss(model: Any, blocks: torch.Tensor, batch: int) -> float:
    """Mean loss per token of the blocks, in nats."""
    model.eval()
    total = 0.0
    for start in range(0, len(blocks), batch):
        ids = blocks[start : start + batch]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / (len(blocks) * (blocks.shape[1] - 1))
