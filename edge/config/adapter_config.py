"""The settings of what is trained, and of the sites inside the cloud's layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError
from isthmus.edge.config.config_text import read_layers
from isthmus.edge.config.settings import MOST_FACTOR, MOST_TOKENS, MOST_WIDTH, Settings

Method = Literal[
    "lora", "dora", "ia3", "vera", "adalora", "prompt", "bottleneck", "bitfit", "low_rank", "ladder", "full"
]


def _read_sites(value: object) -> object:
    return value if isinstance(value, str) and value in {"none", "all"} else read_layers(value)


Sites = Annotated[Literal["none", "all"] | tuple[int, ...], BeforeValidator(_read_sites)]
"""Some of the cloud's layers."""


def _read_edge_layers(value: object) -> object:
    return value if value is None or value in ("all", "above") else read_layers(value)


EdgeLayers = Annotated[Literal["all", "above"] | tuple[int, ...] | None, BeforeValidator(_read_edge_layers)]
"""Some of the edge's layers; None for what the package advises."""


class AdapterConfig(Settings):
    """What is trained, and how it is shaped."""

    panel = "Adapter"

    method: Method = Field(
        "lora",
        description="What is trained; `bitfit` tunes the biases of the edge's own layers, `full` these layers whole; "
        "`low_rank` a small matrix between two frozen ones at each module, `ladder` a network beside the cloud.",
    )
    rank: int = Field(
        8,
        ge=1,
        le=MOST_WIDTH,
        description="Rank of the adapter (lora, dora, vera, low_rank; the average one that adalora ends with), or "
        "width of a bottleneck.",
    )
    alpha: float = Field(
        16.0, gt=0, le=MOST_FACTOR, description="Scale of the adapter: its product is multiplied by alpha / rank."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapter.")
    target_modules: tuple[str, ...] | None = Field(
        None, description="Modules that get an adapter, q_proj,v_proj for example; the family's usual ones by default."
    )
    virtual_tokens: int = Field(16, ge=1, le=MOST_TOKENS, description="Length of the learned prompt (method `prompt`).")
    basis: Literal["seeded", "svd"] = Field(
        "seeded",
        description="The frozen matrices of `low_rank`: drawn from --seed, known to both sides; or from the model's "
        "own weights, which only the cloud has.",
    )
    taps: int = Field(4, ge=1, le=MOST_WIDTH, description="Layers of the cloud that a ladder reads, evenly spaced.")
    tap_width: int | None = Field(
        None,
        ge=1,
        le=MOST_WIDTH,
        description="Numbers of a tap for each token, by a random projection; by default all.",
    )
    reduction: int = Field(8, ge=1, le=MOST_WIDTH, description="How many times narrower than the model a ladder is.")
    start_from: Path | None = Field(
        None,
        description="Adapter to go on from: another run's, or one tuned on an emulator. Its own rank, scale, modules "
        "and layers count.",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        if isinstance(value, str):
            value = value.split(",")
        if isinstance(value, list | tuple):
            names = [part.strip() if isinstance(part, str) else part for part in value]
            if not names or "" in names:
                raise ValueError("needs at least one name and no empty one")
            return tuple(names)
        return value


class SitesConfig(Settings):
    """Which of the cloud's layers get adapters, and which of these act at a step."""

    panel = "Sites"

    sites: Sites = Field(
        "none",
        description="The cloud's layers that get adapters beside the edge's own: `none`, `all`, or numbers and ranges "
        "such as 4,7,10-12.",
    )
    leased: Sites = Field(
        "none",
        description="Which of --sites are leased to the cloud, which runs their adapters and sees their weights then "
        "(plain LoRA without dropout): `none`, `all`, or layers.",
    )
    summed: bool = Field(
        False,
        description="Answer for all sites with one input by a single gradient of it: fewer bytes, and not the same "
        "bits as in one process.",
    )
    site_policy: Literal["always", "kill-revive", "random", "even"] = Field(
        "always",
        description="Which sites act at a step: `always` all; `kill-revive` those that lower the loss most for their "
        "traffic; `random` and `even` a fixed choice within the same budget.",
    )
    site_traffic: float = Field(
        0.145, gt=0, le=1, description="Share of the traffic of all sites that a choice of them may spend."
    )
    site_computation: float = Field(
        0.195, gt=0, le=1, description="Share of the adapters' computation that a choice of sites may spend."
    )
    lend_dead: bool = Field(
        False,
        description="Whether sites that `kill-revive` leaves out for now act on, leased to the cloud, which sees their "
        "weights then (plain LoRA without dropout); else what they have learned is dropped.",
    )


def sites_at(layers: Sites, path: str, plan: SplitPlan, setting: str) -> Callable[[str], bool]:
    """Whether the site of a name is at one of `layers`.

    Args:
        layers: Which.
        path: Path of the list of layers in the model.
        plan: Who holds which layers.
        setting: The setting's name, for the error.

    Raises:
        ConfigError: A layer is not the cloud's.
    """
    if isinstance(layers, str):
        every = layers == "all"
        return lambda name: every
    strange = [layer for layer in layers if layer not in plan.cloud]
    if strange:
        raise ConfigError(
            f"{setting} has layer {strange[0]}, which is not the cloud's: it holds layers {plan.cloud.start} to "
            f"{plan.cloud.stop - 1}"
        )
    prefixes = tuple(f"{path}.{layer}." for layer in layers)
    return lambda name: name.startswith(prefixes)
