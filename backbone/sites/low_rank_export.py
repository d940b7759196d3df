"""Low-rank sites as an ordinary LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from isthmus.backbone.checkpoints.weight_quantization import features_of
from isthmus.backbone.sites.low_rank import LOW_RANK, LowRankAdapter, LowRankSite, linear_of
from isthmus.backbone.sites.low_rank_basis import BasisMatrices, low_rank_basis
from isthmus.common.errors import ConfigError
from isthmus.common.files import new_folder


def export_lora(model: Any, folder: Path, *, bases: Mapping[str, BasisMatrices] | None = None) -> None:
    """Write a model's low-rank sites as an ordinary LoRA adapter, which PEFT loads into the whole model.

    `lora_A` is `A` and `lora_B` is `B M`, so PEFT's `alpha / r * lora_B lora_A x` is the same product, but for the
    rounding of `B M`. The adapter is no longer bound to `A` and `B`, and trains on as any LoRA.

    Args:
        model: A model with low-rank sites, whole or split.
        folder: Where to write; an older one is replaced.
        bases: `A` and `B` by site. Needed where they came from an SVD of weights that are not here: the cloud has them.
            The folder then says something of those weights; see `svd_basis`.

    Raises:
        ConfigError: The model has no low-rank sites; or `A` and `B` of one are not known, or have other shapes.
        DiskError: The disk is full or cannot be written.
    """
    import peft

    adapter = getattr(model, "isthmus_adapter", None)
    if not isinstance(adapter, LowRankAdapter):
        raise ConfigError("the model has no low-rank sites to export: add them, or save its adapter as it is.")
    tensors: dict[str, Tensor] = {}
    for name, parameter in zip(adapter.sites, adapter.parameters(model).values(), strict=True):
        down, up = _known_basis(model, name, adapter, bases or {})
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (up @ parameter.detach().cpu().float()).contiguous()
    origin = getattr(model, "isthmus_origin", None)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path if origin is None else origin.checkpoint.name,
        r=adapter.rank,
        lora_alpha=cast(int, adapter.alpha),  # PEFT divides it by r, and takes any number
        target_modules=list(adapter.sites),
        fan_in_fan_out=all(isinstance(linear_of(model, name), Conv1D) for name in adapter.sites),
        inference_mode=True,
    )
    with new_folder(folder) as temporary:
        settings.save_pretrained(str(temporary))
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})


def _known_basis(model: Any, name: str, adapter: LowRankAdapter, given: Mapping[str, BasisMatrices]) -> BasisMatrices:
    linear = linear_of(model, name)
    n_in, n_out = features_of(linear)
    site = cast(LowRankSite, linear.get_submodule(LOW_RANK))
    down, up = given.get(name, (site.down, site.up))
    if (down is None or up is None) and adapter.init == "seeded":
        down, up = low_rank_basis(name, n_in, n_out, adapter.rank, adapter.seed)
    if down is None or up is None:
        raise ConfigError(
            f"A and B of {name} come from the cloud's weights (init svd): ask the cloud for them and give them as bases"
        )
    if down.shape != (adapter.rank, n_in) or up.shape != (n_out, adapter.rank):
        raise ConfigError(
            f"A {list(down.shape)} and B {list(up.shape)} do not fit {name}: "
            f"give [{adapter.rank}, {n_in}] and [{n_out}, {adapter.rank}]"
        )
    return down.detach().cpu().float(), up.detach().cpu().float()
