"""Tiny random models and a tiny tokenizer: every supported family, a few hundred kilobytes each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

N_LAYERS = 6
HIDDEN = 32
WINDOW = 8
PAD, BOS, EOS = 0, 1, 2
VOCAB = 3 + 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_LLAMA_LIKE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

# name -> (model_type, configuration). Names that are not a family's own are variants worth testing beside it.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "llama_tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen2_sliding": (
        "qwen2",
        {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
    ),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3_text": (
        "gemma3_text",
        {
            **_LLAMA_LIKE,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
        },
    ),
    "phi3": ("phi3", _LLAMA_LIKE),
    "gpt2": (
        "gpt2",
        {**_COMMON, "n_embd": HIDDEN, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128, "initializer_range": 0.2},
    ),
    "gpt2_scaled": (
        "gpt2",
        {
            **_COMMON,
            "n_embd": HIDDEN,
            "n_layer": N_LAYERS,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.2,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
    "opt": (
        "opt",
        {
            **_COMMON,
            "hidden_size": HIDDEN,
            "ffn_dim": 64,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": HIDDEN,
            "init_std": 0.2,
        },
    ),
    "opt_projected": (
        "opt",
        {
            **_COMMON,
            "hidden_size": HIDDEN,
            "ffn_dim": 64,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
            "init_std": 0.2,
        },
    ),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def tiny_config(family: str, **overrides: Any) -> Any:
    """The configuration of a tiny model; `overrides` replace single values, such as `num_hidden_layers=4`."""
    model_type, values = CONFIGS[family]
    return AutoConfig.for_model(model_type, **{**values, **overrides})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a byte, `<pad>` 0, `<s>` 1, `</s>` 2, a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, **{char: 3 + i for i, char in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=128)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_checkpoint(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write a random model of `family` (a key of `CONFIGS`) with a tokenizer to `folder`, and return `folder`.

    The same seed gives the same weights. Biases and norms are random too, so that a dropped one shows.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
