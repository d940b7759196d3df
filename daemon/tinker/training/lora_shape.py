"""Which modules of a model get a LoRA, as Tinker's switches say it: attention, MLP, and the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from isthmus.common.errors import ConfigError
from isthmus.edge.config.client_config import ClientConfig
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft

ALPHA = 32.0
"""LoRA's alpha at every rank, so that its product is multiplied by 32 / rank ("LoRA Without Regret", Schulman et al.
2025, by the makers of Tinker). `isthmus edge train --alpha 32` makes the same adapter."""
MOST_RANK = 1024

_ATTENTION: Mapping[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "o_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
_MLP: Mapping[str, tuple[str, ...]] = {
    "phi3": ("gate_up_proj", "down_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2"),
}
_LLAMA_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # the names of all other families
_LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")


class LoraShape(BaseModel):
    """Which LoRA a client asks for.

    Attributes:
        rank, seed: Its rank, and what its start is drawn from.
        attn, mlp: Whether the linears of attention and of the MLP get one.
        unembed: Whether the head gets one.
        layers: "edge", this machine's own layers; "all", also the cloud's, to which the LoRA there is leased.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: int = Field(ge=1, le=MOST_RANK)
    seed: int = Field(ge=0, lt=2**63)
    attn: bool
    mlp: bool
    unembed: bool
    layers: Literal["edge", "all"]

    def targets(self, family: str) -> tuple[str, ...]:
        """The names of the modules inside a layer that get one."""
        attention = _ATTENTION.get(family, _LLAMA_ATTENTION) if self.attn else ()
        return (*attention, *(_MLP.get(family, _LLAMA_MLP) if self.mlp else ()))

    def put_on(self, model: Any, cloud: ClientConfig) -> Any:
        """A `PeftModel` around a split model, with a LoRA as `isthmus edge train` makes it.

        Raises:
            ConfigError: Nothing is asked for, the head is tied to the embedding, or there are no such layers.
        """
        if not (self.attn or self.mlp or self.unembed):
            raise ConfigError("train_attn, train_mlp and train_unembed are all false: there is nothing to train")
        head = (_head_of(model),) if self.unembed else ()
        targets = self.targets(model.config.model_type)
        sites = self.layers if self.layers == "all" and targets else "none"
        config = TrainConfig(
            **cloud.model_dump(),
            data="-",  # the client brings them
            rank=self.rank,
            alpha=ALPHA,
            seed=self.seed,
            target_modules=targets or head,
            sites=sites,
            leased=sites,
        )
        return build_peft(model, config, also=head)


def _head_of(model: Any) -> str:
    """The full name of the head's module."""
    head = model.get_output_embeddings()
    if model.isthmus_origin.tied:
        raise ConfigError(
            f"train_unembed = true: the head of {model.isthmus_origin.checkpoint.name} has the weights of the "
            "embedding, so it cannot be trained by itself: give train_unembed=False"
        )
    return next(str(name) for name, module in model.named_modules() if module is head)
