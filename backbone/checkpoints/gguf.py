"""GGUF files as folders that transformers reads, with fp32 weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from isthmus.backbone.families import SUPPORTED
from isthmus.common.errors import CheckpointError


def convert_gguf(file: Path, folder: Path, console: Console) -> None:
    """Write `file` as fp32 safetensors, tied weights once, with its tokenizer, to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with console.status(f"Converting {file.name} to safetensors"), quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except (ValueError, KeyError, OSError, IndexError, NotImplementedError) as error:
            raise CheckpointError(
                f"cannot convert {file.name}: {error}; supported are {', '.join(SUPPORTED)}"
            ) from error
        # The weights are plain floats by now; left in place, these make transformers refuse to save or load them.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars and notices, which would run across the status line."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
