"""A tiny language model of any family, pretrained here on public text, for measurements on a second architecture.

It gets a byte-level BPE tokenizer of its own, trained on the same text, and is written as an ordinary transformers
folder. What it knows is the text; it is for comparing methods with each other and not with other models.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from isthmus.backbone.families import SUPPORTED, family_of
from isthmus.common.errors import ConfigError, DataError
from isthmus.common.files import claim, new_folder
from isthmus.common.progress import StepProgress
from isthmus.common.shutdown import StopRequest
from isthmus.common.torch_threads import use_threads
from isthmus.emulator.compress.public_text import fingerprint, load_blocks
from isthmus.experiments.harness.emulator_settings import PretrainSettings
from isthmus.training.gradient_step import GradientStep, require_finite
from isthmus.training.rate_schedule import scheduled_rate
from isthmus.training.run_checkpoint import RunCheckpoint, damaged_entry
from isthmus.training.training_loop import LoopOptions, Task, TrainingLoop

EOS = "<|endoftext|>"
LOG_FILE = "pretrain.jsonl"

_HELD_OUT = 20  # one block in so many
_WARM_UP = 0.05  # of the steps
_MAX_NORM = 1.0
_SAVE_EVERY = 100  # steps
_REMEDY = "lower the learning rate."


def run_pretrain(settings: PretrainSettings, *, console: Console | None = None) -> dict[str, Any]:
    """Pretrain a model and write it, whole or not at all.

    Until it is written, the log and the checkpoints lie in `OUT.part`. Where that folder has a checkpoint of the same
    run, the run goes on there.

    Returns:
        `parameters`, `steps`, `tokens`, `seconds`, and the held-out loss before and after, in nats a token.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the last applied step is saved, and the message says how to go on.
        CheckpointError: The checkpoint in `OUT.part` is damaged, or belongs to another run.
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
    if len(blocks) < 2:
        raise DataError(f"the text {settings.text} has a single block of {settings.length} tokens; give more text")
    stop = StopRequest()
    task = _Pretraining(model, blocks, settings, stop)
    work = settings.out.with_name(f"{settings.out.name}.part")
    options = LoopOptions(
        work,
        LOG_FILE,
        settings.steps,
        _SAVE_EVERY,
        go_on="repeat the command to go on",
        start_anew=f"remove {work} or give another --out",
    )
    loop = TrainingLoop(task, options, StepProgress("pretraining: step", settings.steps, console), stop)
    with claim(work):
        with loop.listening():
            loop.resume()
            loop.run()
        logging.disable_progress_bar()
        with new_folder(settings.out) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        shutil.rmtree(work)
    return {
        "family": settings.family,
        "parameters": model.num_parameters(),
        "layers": settings.layers,
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch * settings.length,
        "seconds": round(task.seconds, 1),
        "held_out_loss_before": task.loss_before,
        "held_out_loss_after": task.loss_after,
    }


def train_tokenizer(text: Path, vocabulary: int, length: int) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016; bytes as in GPT-2) trained on a text.

    Raises DataError where the text cannot be read.
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


class _Pretraining(Task):
    """See `run_pretrain`."""

    rule: GradientStep
    device = torch.device("cpu")

    def __init__(self, model: Any, blocks: Tensor, settings: PretrainSettings, stop: StopRequest) -> None:
        self.loss_before: float | None = None
        self.loss_after = math.nan
        self.seconds = 0.0  # over all restarts, up to the last checkpoint
        self.parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.rule = GradientStep(
            optimizer, self.parameters, peak_rate=settings.learning_rate, max_norm=_MAX_NORM, remedy=_REMEDY
        )
        options = {name: value for name, value in asdict(settings).items() if name not in {"text", "out", "threads"}}
        self.settings = options | {"the text (fingerprint)": fingerprint(blocks)}
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(settings.seed))
        n_held_out = max(1, len(blocks) // _HELD_OUT)
        self._held_out, self._train = blocks[order[:n_held_out]], blocks[order[n_held_out:]]
        self._model, self._options, self._stop = model, settings, stop
        self._warm_up = max(1, round(_WARM_UP * settings.steps))
        self._rows = torch.Generator().manual_seed(settings.seed)
        self._started = time.monotonic()

    def begin(self) -> None:
        if self.loss_before is None:
            self.loss_before = self._held_out_loss()
        self._model.train()

    def rate(self, step: int) -> float:
        settings = self._options
        return settings.learning_rate * scheduled_rate(1.0, "linear", step, settings.steps, self._warm_up)

    def measure(self, step: int) -> tuple[dict[str, Any], float]:
        ids = self._train[self._draw_rows()]

        def backward() -> float:
            result = self._model(input_ids=ids, labels=ids, use_cache=False).loss
            value = require_finite(f"the loss of step {step} is", result.item(), _REMEDY)
            result.backward()
            return value

        loss, norm = self.rule.gradients(step, backward)
        return {"loss": loss}, norm

    def _draw_rows(self) -> Tensor:
        """Which blocks the next step has, `[batch]`."""
        return torch.randint(len(self._train), (self._options.batch,), generator=self._rows)

    def logged(self, line: Mapping[str, Any], seconds: float) -> str:
        speed = self._options.batch * self._options.length / seconds
        return f"loss {line['loss']:.3f}  {speed:,.0f} tokens/s"

    def end(self) -> None:
        self.loss_after = self._held_out_loss()
        self.seconds += time.monotonic() - self._started

    def entries(self) -> Mapping[str, Any]:
        return {"loss_before": self.loss_before, "seconds": self.seconds + time.monotonic() - self._started}

    def load(self, checkpoint: RunCheckpoint, folder: Path) -> None:
        try:
            before = checkpoint.entries["loss_before"]
            self.loss_before = None if before is None else float(before)
            self.seconds = float(checkpoint.entries["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged_entry(folder, error) from error
        for _ in range(checkpoint.step):  # one draw for each applied step, as an undisturbed run made them
            self._draw_rows()

    def _held_out_loss(self) -> float:
        return _loss(self._model, self._held_out, self._options.batch, self._stop.check)


@torch.no_grad()
def _loss(model: Any, blocks: Tensor, batch: int, between: Callable[[], None]) -> float:
    """Mean loss per token of the blocks, in nats; `between` is called after every batch."""
    model.eval()
    total = 0.0
    for start in range(0, len(blocks), batch):
        ids = blocks[start : start + batch]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        between()
    return total / (len(blocks) * (blocks.shape[1] - 1))
