"""A configuration of every method that PEFT has, valid on the tiny Llama, and of the options that name modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft

EDGE, ALL = (0, 1, 4, 5), tuple(range(6))
"""Layers that the edge holds under the plan 2:2, and all of them."""

Make = Callable[[Sequence[int]], Any]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        shown: The configuration in words.
        make: The configuration for some layers.
        layered: Whether it works on layers at all, rather than on the input.
        inputs: What a forward needs besides a batch, by name; a number stands for a tensor like the token ids.
    """

    shown: str
    make: Make
    layered: bool = True
    inputs: dict[str, Any] = field(default_factory=dict)


def names(layers: Sequence[int], *parts: str) -> list[str]:
    """Full names of modules in `layers`; PEFT's own `layers_to_transform` is missing from a third of the methods."""
    return [f"model.layers.{layer}.{part}".rstrip(".") for layer in layers for part in parts]


def _linears(kind: str, *, inputs: dict[str, Any] | None = None, **options: Any) -> Method:
    """A method that works on `q_proj` and `v_proj`, by its configuration's class."""

    def make(layers: Sequence[int]) -> Any:
        targets = names(layers, "self_attn.q_proj", "self_attn.v_proj")
        return getattr(peft, kind)(target_modules=targets, task_type="CAUSAL_LM", **options)

    return Method(_shown(kind, options), make, inputs=inputs or {})


def _whole(kind: str, *, inputs: dict[str, Any] | None = None, **options: Any) -> Method:
    """A method that works on the input, by its configuration's class."""
    return Method(
        _shown(kind, options),
        lambda layers: getattr(peft, kind)(task_type="CAUSAL_LM", **options),
        layered=False,
        inputs=inputs or {},
    )


def _shown(kind: str, options: dict[str, Any]) -> str:
    return f"{kind}({', '.join(f'{name}={value!r}' for name, value in options.items())})"


METHODS: dict[str, Method] = {
    "ADALORA": _linears("AdaLoraConfig", init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2),
    "ADAMSS": _linears("AdamssConfig", r=4, num_subspaces=2, subspace_rank=1),
    "ADAPTION_PROMPT": Method(
        "AdaptionPromptConfig(adapter_len=3), adapter_layers=2 and 6",
        lambda layers: peft.AdaptionPromptConfig(
            adapter_len=3, adapter_layers=2 if layers == EDGE else 6, task_type="CAUSAL_LM"
        ),
    ),
    "BEFT": _linears("BeftConfig"),
    "BOFT": _linears("BOFTConfig", boft_block_size=4),
    "C3A": _linears("C3AConfig", block_size=8),
    "CARTRIDGE": _whole("CartridgeConfig", num_virtual_tokens=3),
    "CPT": _whole(
        "CPTConfig",
        cpt_token_ids=[5, 6, 7],
        cpt_mask=[1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3],
        inputs={"input_type_mask": 1},
    ),
    "DEFT": _linears("DeftConfig", r=4),
    "DELORA": _linears("DeloraConfig", r=4),
    "FOURIERFT": _linears("FourierFTConfig", n_frequency=20),
    "FROD": _linears("FrodConfig", progressbar=False),
    "GLORA": _linears("GloraConfig", r=4),
    "GRALORA": _linears("GraloraConfig", r=4, gralora_k=2),
    "HIRA": _linears("HiraConfig", r=4),
    "HRA": _linears("HRAConfig", r=4),
    "IA3": _linears("IA3Config", feedforward_modules=[]),
    "LILY": _linears("LilyConfig", r=4, stride_A=1, num_B=2),
    "LN_TUNING": Method(
        "LNTuningConfig() on input_layernorm",
        lambda layers: peft.LNTuningConfig(target_modules=names(layers, "input_layernorm"), task_type="CAUSAL_LM"),
    ),
    "LOHA": _linears("LoHaConfig", r=2),
    "LOKR": _linears("LoKrConfig", r=2),
    "LORA": _linears("LoraConfig", r=4),
    "MISS": _linears("MissConfig", r=4),
    "MULTITASK_PROMPT_TUNING": _whole(
        "MultitaskPromptTuningConfig", num_virtual_tokens=3, num_tasks=2, inputs={"task_ids": [0, 1, 0]}
    ),
    "OFT": _linears("OFTConfig", r=0, oft_block_size=4),
    "OSF": _linears("OSFConfig"),
    "PEANUT": _linears("PeanutConfig", r=4),
    "POLY": _linears("PolyConfig", r=2, n_tasks=2, n_skills=2, n_splits=1, inputs={"task_ids": [0, 1, 0]}),
    "PREFIX_TUNING": _whole("PrefixTuningConfig", num_virtual_tokens=3),
    "PROMPT_TUNING": _whole("PromptTuningConfig", num_virtual_tokens=3),
    "PSOFT": _linears("PsoftConfig", r=4),
    "PVERA": _linears("PveraConfig", r=8),
    "P_TUNING": _whole("PromptEncoderConfig", num_virtual_tokens=3),
    "RANDLORA": _linears("RandLoraConfig", r=4),
    "ROAD": _linears("RoadConfig", group_size=8),
    "SHADOW": Method(
        "ShadowConfig(shadow_dropout=0.0) on the first two layers, and on all",
        lambda layers: peft.ShadowConfig(
            target_modules=names(layers[:2] if layers == EDGE else layers, ""),
            shadow_dropout=0.0,
            task_type="CAUSAL_LM",
        ),
    ),
    "SHIRA": _linears("ShiraConfig", r=2),
    "SUPERTUNING": _linears("SupertuningConfig"),
    "TINYLORA": _linears("TinyLoraConfig", r=2, u=4),
    "TRAINABLE_TOKENS": _whole("TrainableTokensConfig", token_indices=[5, 7, 120, 130]),
    "UNILORA": _linears("UniLoraConfig", r=2, theta_d_length=64),
    "VBLORA": _linears("VBLoRAConfig", r=2, num_vectors=8, vector_length=16),
    "VERA": _linears("VeraConfig", r=8),
    "WAVEFT": _linears("WaveFTConfig", n_frequency=20),
}


def mixture(adapters: Path) -> Method:
    """X-LoRA over the adapters in the folders `EDGE` and `ALL` of `adapters`, two each."""

    def make(layers: Sequence[int]) -> Any:
        folder = adapters / ("EDGE" if layers == EDGE else "ALL")
        experts = {name: str(folder / name) for name in ("0", "1")}
        return peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=experts)

    return Method("XLoraConfig(xlora_depth=1) of two LoRA", make)


def _lora(targets: Any, **options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)


def _edge(part: str = "self_attn.q_proj") -> list[str]:
    return names(EDGE, part)


# Configuration in words -> the family, and the configuration. `edge` is q_proj in the edge's layers, by full names.
OPTIONS: dict[str, tuple[str, Callable[[], Any]]] = {
    "LN_TUNING, target_modules=['input_layernorm']": (
        "llama",
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    ),
    "LN_TUNING, target_modules=['model.norm']": (
        "llama",
        lambda: peft.LNTuningConfig(target_modules=["model.norm"], task_type="CAUSAL_LM"),
    ),
    "modules_to_save=['input_layernorm']": ("llama", lambda: _lora(["q_proj"], modules_to_save=["input_layernorm"])),
    "modules_to_save=['mlp']": ("llama", lambda: _lora(["q_proj"], modules_to_save=["mlp"])),
    "modules_to_save=['layers.0.mlp']": ("llama", lambda: _lora(["q_proj"], modules_to_save=["layers.0.mlp"])),
    "modules_to_save=['act_fn']": ("llama", lambda: _lora(["q_proj"], modules_to_save=["act_fn"])),
    "modules_to_save=['lm_head']": ("llama", lambda: _lora(["q_proj"], modules_to_save=["lm_head"])),
    "modules_to_save=['lm_head'], tied": ("llama_tied", lambda: _lora(["q_proj"], modules_to_save=["lm_head"])),
    "modules_to_save=['embed_tokens']": ("llama", lambda: _lora(["q_proj"], modules_to_save=["embed_tokens"])),
    "modules_to_save=['model.norm']": ("llama", lambda: _lora(["q_proj"], modules_to_save=["model.norm"])),
    "target_modules=['lm_head', 'q_proj']": ("llama", lambda: _lora(["lm_head", "q_proj"])),
    "target_modules=['embed_tokens', 'q_proj']": ("llama", lambda: _lora(["embed_tokens", "q_proj"])),
    "target_modules=['embed_tokens', 'q_proj'], ensure_weight_tying=True": (
        "llama_tied",
        lambda: _lora(["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
    "target_modules='all-linear'": ("llama", lambda: _lora("all-linear")),
    "target_modules='all-linear', GPT-2": ("gpt2", lambda: _lora("all-linear", fan_in_fan_out=True)),
    "VERA, target_modules=['c_attn'], GPT-2": (
        "gpt2",
        lambda: peft.VeraConfig(target_modules=["c_attn"], r=8, fan_in_fan_out=True, task_type="CAUSAL_LM"),
    ),
    "target_parameters=['self_attn.q_proj.weight']": (
        "llama",
        lambda: _lora([], target_parameters=["self_attn.q_proj.weight"]),
    ),
    "target_parameters=['model.layers.2.self_attn.q_proj.weight']": (
        "llama",
        lambda: _lora(["v_proj"], target_parameters=["model.layers.2.self_attn.q_proj.weight"]),
    ),
    "target_parameters=['model.layers.0.self_attn.q_proj.weight']": (
        "llama",
        lambda: _lora([], target_parameters=["model.layers.0.self_attn.q_proj.weight"]),
    ),
    "trainable_token_indices=[5, 7, 120]": (
        "llama",
        lambda: _lora(["q_proj"], trainable_token_indices=[5, 7, 120]),
    ),
    "trainable_token_indices=[5, 7, 120], tied": (
        "llama_tied",
        lambda: _lora(["q_proj"], trainable_token_indices=[5, 7, 120]),
    ),
    "exclude_modules=['v_proj']": ("llama", lambda: _lora(["q_proj", "v_proj"], exclude_modules=["v_proj"])),
    "layers_pattern='layers' with layers_to_transform": (
        "llama",
        lambda: _lora(["q_proj"], layers_to_transform=list(EDGE), layers_pattern="layers"),
    ),
    "rank_pattern and alpha_pattern": (
        "llama",
        lambda: _lora(
            ["q_proj"],
            rank_pattern={"layers.2.self_attn.q_proj": 7, "layers.0.self_attn.q_proj": 2},
            alpha_pattern={"layers.3.self_attn.q_proj": 3},
        ),
    ),
    "24 full names of the edge's linears": (
        "llama",
        lambda: _lora(
            names(EDGE, *(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("up", "down")))
        ),
    ),
    "layer_replication=[[0, 4], [2, 6]]": ("llama", lambda: _lora(["q_proj"], layer_replication=[[0, 4], [2, 6]])),
    "edge, bias='all', no biases": ("llama", lambda: _lora(_edge(), bias="all")),
    "edge, bias='all', Qwen2": ("qwen2", lambda: _lora(_edge(), bias="all")),
    "edge, bias='lora_only', Qwen2": ("qwen2", lambda: _lora(_edge(), bias="lora_only")),
    "bias='lora_only', Qwen2": ("qwen2", lambda: _lora(["q_proj"], bias="lora_only")),
    "edge, bias='all', GPT-2": (
        "gpt2",
        lambda: _lora([f"h.{layer}.attn.c_attn" for layer in EDGE], bias="all", fan_in_fan_out=True),
    ),
    "edge, use_dora=True": ("llama", lambda: _lora(_edge(), use_dora=True)),
    "use_dora=True": ("llama", lambda: _lora(["q_proj"], use_dora=True)),
    "edge, init_lora_weights='pissa'": ("llama", lambda: _lora(_edge(), init_lora_weights="pissa")),
    "init_lora_weights='pissa'": ("llama", lambda: _lora(["q_proj"], init_lora_weights="pissa")),
    "edge, init_lora_weights='olora'": ("llama", lambda: _lora(_edge(), init_lora_weights="olora")),
    "init_lora_weights='olora'": ("llama", lambda: _lora(["q_proj"], init_lora_weights="olora")),
}
