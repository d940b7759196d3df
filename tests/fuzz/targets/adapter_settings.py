"""`adapter_config.json` of a returned adapter: which options of PEFT are taken from a stranger."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fuzz.target import Target

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import AdapterError
from isthmus.emulator.package import peft_rules
from isthmus.emulator.package.peft_rules import peft_config

PLAN, HIDDEN = SplitPlan(6, 2, 2), 32


def _run(data: bytes) -> None:
    try:
        settings = json.loads(data)
    except (ValueError, RecursionError):  # `intake` refuses them as this target does
        return
    if not isinstance(settings, dict):
        return
    try:
        config = peft_config(settings, HIDDEN, PLAN)
    except AdapterError as error:
        str(error).encode(errors="backslashreplace")
        return
    for name in ("r", "init_r", "target_r"):
        if settings.get("peft_type") != "ADALORA" and not 0 < getattr(config, name, 1) <= HIDDEN:
            raise AssertionError(f"{name} = {getattr(config, name)} was taken")
    if not set(getattr(config, "layers_to_transform", None) or []) <= set(PLAN.edge_layers):
        raise AssertionError("an adapter of the cloud's layers was taken")
    if getattr(config, "num_virtual_tokens", 0) > peft_rules._MAX_PROMPT:
        raise AssertionError("a prompt without a bound was taken")


def settings(kind: str, **changes: Any) -> dict[str, Any]:
    """The settings of an adapter as training writes them."""
    layered = {"target_modules": ["q_proj"], "layers_to_transform": [0, 5], "fan_in_fan_out": False}
    lora = layered | {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": True, "use_dora": False}
    kinds: dict[str, dict[str, Any]] = {
        "LORA": lora | {"use_rslora": False},
        "ADALORA": lora
        | {"init_r": 4, "target_r": 2, "beta1": 0.85, "beta2": 0.85, "deltaT": 1, "tinit": 0, "tfinal": 0}
        | {"total_step": 10, "orth_reg_weight": 0.5, "rank_pattern": None},
        "VERA": layered
        | {"r": 4, "vera_dropout": 0.0, "projection_prng_key": 0, "d_initial": 0.1, "save_projection": True}
        | {"init_weights": True},
        "IA3": {
            "target_modules": r".*\.(0|5)\.(.*\.)?(k_proj|down_proj)",
            "feedforward_modules": ["down_proj"],
            "init_ia3_weights": True,
            "fan_in_fan_out": False,
        },
        "PROMPT_TUNING": {"num_virtual_tokens": 4, "token_dim": HIDDEN, "num_transformer_submodules": 1},
    }
    common = {"peft_type": kind, "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": "tiny"}
    return common | kinds.get(kind, {}) | changes


KINDS = ("LORA", "ADALORA", "VERA", "IA3", "PROMPT_TUNING")


def _seeds() -> Iterator[bytes]:
    for kind in KINDS:
        yield json.dumps(settings(kind)).encode()
    for wrong in (
        settings("LOHA"), settings("LORA", r=33), settings("LORA", target_modules=".*"), settings("LORA", more=1),
        settings("LORA", layers_to_transform=[3]), settings("LORA", task_type=None), settings("IA3", more=None),
        settings("LORA", layers_to_transform=None, target_modules=["model.layers.0.self_attn.q_proj"]),
        settings("LORA", lora_dropout=1.0, rank_pattern={}), settings("ADALORA", r=12, total_step=None),
        {"peft_type": "LORA", "task_type": "CAUSAL_LM"},
    ):  # fmt: skip
        yield json.dumps(wrong).encode()


TARGET = Target(
    _run,
    _seeds,
    [peft_rules],
    floor=0.9,
    max_len=2048,
    words=[
        *(f'"{name}": '.encode() for kind in KINDS for name in settings(kind)),
        *(f'"{kind}"'.encode() for kind in KINDS),
        b"null",
        b"true",
        b"1e9",
        b"NaN",
        b"[]",
        b"{}",
        b"-1",
    ],
)
