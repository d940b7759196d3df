"""Plugging in: a tuned adapter on the full middle, to serve it, or as a model of its own.

Nothing here checks the adapter: `check_adapter` of `isthmus.emulator.package.intake` must have accepted it before.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from isthmus.backbone.adapters.adapter_files import adapter_method, load_adapter, without_known_warnings
from isthmus.backbone.checkpoints.gguf import quiet_transformers
from isthmus.backbone.checkpoints.sources import Checkpoint, files_beside_the_weights
from isthmus.backbone.checkpoints.tensor_reader import write_json
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_model import SpanFn
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.common.errors import AdapterError, CheckpointError, ConfigError, UnsupportedCallError
from isthmus.common.files import disk_errors, new_folder
from isthmus.emulator.package.intake import ADAPTER_FILES

PLUGGED_FILE = "isthmus_plugged.json"
_BESIDE_THE_WEIGHTS = ("bottleneck", "prompt")
_IN_PLACE = ("full", "bitfit")
_PROBE_TOKENS = 4


def plug_in(
    adapter: Path,
    parts: Path | Checkpoint,
    plan: SplitPlan,
    span: SpanFn,
    *,
    attn_implementation: str | None = None,
) -> Any:
    """The edge's model with a checked adapter over the full middle, once it has computed something finite.

    Args:
        adapter: An adapter that `check_adapter` accepted.
        attn_implementation: Attention implementation of the span; None for the family's default.

    Returns:
        A transformers causal LM, or a `PeftModel` around it, frozen and in eval mode.

    Raises:
        AdapterError: It does not load, the model cannot run with it, or its logits over a few tokens are not finite.
        CheckpointError: The edge's parts are damaged.
    """
    base = load_edge_parts(parts, plan, span, attn_implementation=attn_implementation)
    model = _with_adapter(base, adapter)
    model.eval()
    tokens = torch.arange(_PROBE_TOKENS).remainder(base.config.vocab_size).unsqueeze(0)
    try:
        with torch.no_grad(), without_known_warnings():
            logits = model(input_ids=tokens).logits
    except (UnsupportedCallError, ConfigError, LookupError) as error:  # of a layer that the edge has not, say
        raise AdapterError(f"the model cannot run with this adapter: {error}") from error
    if not bool(torch.isfinite(logits).all()):
        raise AdapterError(
            "the model with this adapter computes NaN or infinity: tune again with a lower learning rate"
        )
    return model


def export_plugged(adapter: Path, checkpoint: Checkpoint, plan: SplitPlan, out: Path) -> Literal["model", "adapter"]:
    """Write the full model with a checked adapter, for its owner; whole or not at all.

    Tuned layers and biases are put into the weights, and PEFT's adapters are merged; the result is an ordinary
    checkpoint at fp32, with the tokenizer's files. Bottlenecks and learned prompts are no weights of the architecture,
    so they stay what they are: the folder gets the adapter, and `isthmus_plugged.json`, which names the model that it
    belongs on.

    Args:
        adapter: An adapter that `check_adapter` accepted.
        out: Where to write; an older folder is replaced.

    Returns:
        `"model"` for a whole checkpoint, `"adapter"` for an adapter with a reference to the model.

    Raises:
        AdapterError: It does not load into the model.
        CheckpointError: The checkpoint is damaged.
        DiskError: The disk is full or cannot be written.
    """
    method = adapter_method(adapter)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    if method in _BESIDE_THE_WEIGHTS:
        reference = {"model": checkpoint.name, "digest": checkpoint.digest(), "plan": str(plan), "method": method}
        with new_folder(out) as new:
            (new / "adapter").mkdir()
            for file in sorted(adapter.iterdir()):
                if file.name in ADAPTER_FILES:
                    shutil.copyfile(file, new / "adapter" / file.name)
            write_json(new / PLUGGED_FILE, reference)
        return "adapter"
    model = _with_adapter(load_whole(checkpoint), adapter, digest=checkpoint.digest())
    if method not in _IN_PLACE:
        with without_known_warnings():
            model = model.merge_and_unload()
    with new_folder(out) as new, quiet_transformers():
        model.save_pretrained(new)
        for file in files_beside_the_weights(checkpoint.folder):
            if not (new / file.name).exists():
                shutil.copyfile(file, new / file.name)
    return "model"


def load_whole(checkpoint: Checkpoint) -> Any:
    """The whole model at fp32, in eval mode.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, dtype=torch.float32, trust_remote_code=False
            )
            return model.eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.name} cannot be loaded ({reason[:200]}); fetch the model again") from error


def _with_adapter(model: Any, adapter: Path, *, digest: str | None = None) -> Any:
    try:
        return load_adapter(model, adapter, digest=digest)
    except CheckpointError as error:
        raise AdapterError(str(error).replace(str(adapter), "the adapter")) from error
