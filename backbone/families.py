"""What differs between the architectures that can be cut: one entry each. Pure, no torch.

Everything else is common to them: a causal language model from transformers has a base model that embeds the tokens,
adds learned positions or computes rotary ones, builds the masks, runs a list of decoder layers and normalises; a head
follows. A new architecture is one more entry, and one more in the tests' list of tiny models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isthmus.common.errors import ConfigError, UnsupportedFamilyError


@dataclass(frozen=True, slots=True)
class Family:
    """Where an architecture keeps its parts.

    Attributes:
        name: `model_type` of the configuration.
        base: Path of the base model (the module whose forward loops over the layers) inside the language model.
        layers: Name of the list of decoder layers in the base model.
        embedding: Name of the token embedding in the base model.
        norm: Name of the final norm in the base model.
        positions: Name of the learned position embedding, whose output is added to the token embedding; None with
            rotary ones.
        projections: Names of further modules around the layers that may be None (OPT's `project_in` and `project_out`).
        count: Name of the number of decoder layers in `config.json`.
        attentions: Attention implementations that the architecture computes exactly; the first is what both sides use
            unless the caller names another.
    """

    name: str
    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    positions: str | None = None
    projections: tuple[str, ...] = ()
    count: str = "num_hidden_layers"
    attentions: tuple[str, ...] = ("sdpa", "eager")

    @property
    def layers_path(self) -> str:
        """Path of the list of decoder layers inside the language model, such as `model.layers`."""
        return f"{self.base}.{self.layers}"

    def attention(self, wanted: str | None) -> str:
        """The attention implementation to use: `wanted`, or this family's default for None.

        Raises:
            ConfigError: the architecture does not compute exactly with `wanted`.
        """
        if wanted is None:
            return self.attentions[0]
        if wanted not in self.attentions:
            raise ConfigError(f"attention {wanted!r} does not fit {self.name}; use {' or '.join(self.attentions)}")
        return wanted


_FAMILIES = {
    family.name: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3"),
        Family("phi3"),
        Family("gemma2", attentions=("eager",)),  # its attention soft-caps the scores, which sdpa cannot
        Family("gemma3_text"),
        Family("gpt2", base="transformer", layers="h", embedding="wte", norm="ln_f", positions="wpe", count="n_layer"),
        Family(
            "opt",
            base="model.decoder",
            norm="final_layer_norm",
            positions="embed_positions",
            projections=("project_in", "project_out"),
        ),
    )
}

SUPPORTED: tuple[str, ...] = tuple(sorted(_FAMILIES))


def family_named(model_type: object) -> Family:
    """The family of a `model_type`.

    Raises:
        UnsupportedFamilyError: it is not one of `SUPPORTED`.
    """
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedFamilyError(
            f"models of type {model_type!r} cannot be cut; supported are {', '.join(SUPPORTED)}"
        )
    return family


def family_of(config: Any) -> Family:
    """The family of a transformers configuration.

    Args:
        config: A `PreTrainedConfig`.

    Raises:
        UnsupportedFamilyError: the architecture is not one of `SUPPORTED`, or the configuration turns on a part of it
            whose result would depend on more than the span's input.
    """
    family = family_named(getattr(config, "model_type", None))
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedFamilyError(
            f"{family.name} with cross-attention cannot be cut; use a decoder-only configuration"
        )
    if getattr(config, "layerdrop", 0.0):
        # The base model would skip the whole cloud at random.
        raise UnsupportedFamilyError(
            f"layerdrop={config.layerdrop} skips layers at random; set it to 0.0 in config.json"
        )
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":
        # Its frequencies depend on the lengths of earlier calls, and the two sides see different calls.
        raise UnsupportedFamilyError(
            "rotary embeddings of type 'dynamic' cannot be cut; use 'yarn', 'linear' or 'default'"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedFamilyError(
            "a quantized checkpoint cannot be cut; convert it to plain float safetensors first"
        )
    return family


def longest_sequence(config: Any) -> int:
    """Token positions of a sequence at most, by the configuration of a model that can be cut.

    Learned positions end there. Rotary ones go on, but the model was not trained for them. Where a scaling of rotary
    embeddings (`linear` or `yarn`) makes the model longer than `max_position_embeddings` says, its length counts.
    """
    longest = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if not any(isinstance(value, dict) for value in rope.values()) and rope.get("rope_type") in ("linear", "yarn"):
        original = rope.get("original_max_position_embeddings") or longest
        return max(longest, int(original * rope.get("factor", 1.0)))
    return longest  # with parameters for each kind of layer (Gemma 3), a scaled length is what the configuration says
