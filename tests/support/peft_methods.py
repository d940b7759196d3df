"""A configuration for every method that PEFT has, each valid on the tiny Llama."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft

LAYERS = range(6)


def names(layers: Sequence[int], *parts: str) -> list[str]:
    """Full names of modules in `layers`; PEFT's own `layers_to_transform` is missing from a third of the methods."""
    return [f"model.layers.{layer}.{part}".rstrip(".") for layer in layers for part in parts]


def _linears(kind: str, **options: Any) -> Callable[[Sequence[int]], Any]:
    """A configuration by its class's name, for `q_proj` and `v_proj` of some layers."""

    def make(layers: Sequence[int]) -> Any:
        targets = names(layers, "self_attn.q_proj", "self_attn.v_proj")
        return getattr(peft, kind)(target_modules=targets, task_type="CAUSAL_LM", **options)

    return make


METHODS: dict[str, Callable[[Sequence[int]], Any]] = {
    "LORA": _linears("LoraConfig", r=4),
    "ADALORA": _linears("AdaLoraConfig", init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2),
    "ADAMSS": _linears("AdamssConfig", r=4, num_subspaces=2, subspace_rank=1),
    "BOFT": _linears("BOFTConfig", boft_block_size=4),
    "IA3": _linears("IA3Config", feedforward_modules=[]),
    "BEFT": _linears("BeftConfig"),
    "LILY": _linears("LilyConfig", r=4, stride_A=1, num_B=2),
    "LOHA": _linears("LoHaConfig", r=2),
    "LOKR": _linears("LoKrConfig", r=2),
    "OFT": _linears("OFTConfig", r=0, oft_block_size=4),
    "POLY": _linears("PolyConfig", r=2, n_tasks=2, n_skills=2, n_splits=1),
    "LN_TUNING": lambda layers: peft.LNTuningConfig(
        target_modules=names(layers, "input_layernorm"), task_type="CAUSAL_LM"
    ),
    "VERA": _linears("VeraConfig", r=8),
    "FROD": _linears("FrodConfig"),
    "PVERA": _linears("PveraConfig", r=8),
    "FOURIERFT": _linears("FourierFTConfig", n_frequency=20),
    "GLORA": _linears("GloraConfig", r=4),
    "HRA": _linears("HRAConfig", r=4),
    "VBLORA": _linears("VBLoRAConfig", r=2, num_vectors=8, vector_length=16),
    "UNILORA": _linears("UniLoraConfig", r=2, theta_d_length=64),
    "MISS": _linears("MissConfig", r=4),
    "RANDLORA": _linears("RandLoraConfig", r=4),
    "ROAD": _linears("RoadConfig", group_size=8),
    "HIRA": _linears("HiraConfig", r=4),
    "SHIRA": _linears("ShiraConfig", r=2),
    "C3A": _linears("C3AConfig", block_size=8),
    "WAVEFT": _linears("WaveFTConfig", n_frequency=20),
    "OSF": _linears("OSFConfig"),
    "DELORA": _linears("DeloraConfig", r=4),
    "GRALORA": _linears("GraloraConfig", r=4, gralora_k=2),
    "TINYLORA": _linears("TinyLoraConfig", r=2, u=4),
    "PSOFT": _linears("PsoftConfig", r=4),
    "PEANUT": _linears("PeanutConfig", r=4),
    "SUPERTUNING": _linears("SupertuningConfig"),
    "DEFT": _linears("DeftConfig", r=4),
    "SHADOW": lambda layers: peft.ShadowConfig(
        target_modules=names(layers, "")[:1], shadow_dropout=0.0, task_type="CAUSAL_LM"
    ),
    "ADAPTION_PROMPT": lambda layers: peft.AdaptionPromptConfig(
        adapter_len=3, adapter_layers=2 if len(layers) < 6 else 4, task_type="CAUSAL_LM"
    ),
    "TRAINABLE_TOKENS": lambda layers: peft.TrainableTokensConfig(token_indices=[5, 7], task_type="CAUSAL_LM"),
    "PROMPT_TUNING": lambda layers: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "MULTITASK_PROMPT_TUNING": lambda layers: peft.MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, task_type="CAUSAL_LM"
    ),
    "P_TUNING": lambda layers: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda layers: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "CARTRIDGE": lambda layers: peft.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "CPT": lambda layers: peft.CPTConfig(
        cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], task_type="CAUSAL_LM"
    ),
}
