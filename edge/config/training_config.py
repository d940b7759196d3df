"""The configuration of a training run: one frozen model, filled from a TOML file and from flags of the same names.

`TuningConfig` is what every run needs; `TrainConfig` adds the cloud, `TuneConfig` the package of an emulator. The
command line builds its flags from the fields, so this file imports neither torch nor transformers, and every field
carries the sentence that `--help` shows. A flag wins over the file; a key that does not exist is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self, TypeVar, overload

from pydantic import Field, ValidationError, model_validator

from isthmus.common.errors import ConfigError
from isthmus.edge.config.adapter_config import AdapterConfig, EdgeLayers, Method, SitesConfig
from isthmus.edge.config.audit_config import AuditConfig
from isthmus.edge.config.budget_config import BudgetConfig, check_budgeted
from isthmus.edge.config.client_config import SCHEMES, ClientConfig, EvalConfig, GenerateConfig, PluggedConfig
from isthmus.edge.config.config_text import check_name, one_line, read_text, read_toml
from isthmus.edge.config.data_config import ComputationConfig, DataConfig, SentExamplesConfig
from isthmus.edge.config.defence_config import DefenceConfig, check_alone, check_defended
from isthmus.edge.config.settings import MOST_FACTOR, MOST_MIB, MOST_STEPS, MOST_TEXTS, Settings, field_names
from isthmus.training.rate_schedule import Schedule

Optimizer = Literal["adamw", "lora-plus", "lora-fa", "mezo"]

LEARNING_RATE = 1e-3
"""The peak where no other is given: of this command, of jobs on the page and by OpenAI's API, and of the library. The
guide to training has the losses by which it was chosen."""

_FINGERPRINT = "SHA256:"

# Two ways to say one thing: a flag that names one of a pair replaces what the file says about the other.
_EXCLUSIVE = ("steps", "epochs")

_METHODS_OF_OPTIMIZER: dict[str, tuple[Method, ...]] = {
    "lora-plus": ("lora", "dora"),
    "lora-fa": ("lora",),
    # AdaLoRA chooses its ranks by gradients.
    "mezo": ("lora", "dora", "ia3", "vera", "prompt", "bottleneck", "bitfit", "low_rank", "ladder", "full"),
}
_METHODS_WITHOUT_SITES: tuple[Method, ...] = ("prompt", "bitfit", "ladder", "full")


class OptimizationConfig(Settings):
    """How many steps are made, and how each moves what is trained."""

    panel = "Optimization"

    steps: int | None = Field(None, ge=1, le=MOST_STEPS, description="Optimizer steps to make; instead of --epochs.")
    epochs: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="Passes over the data; 1 when --steps is not given either."
    )
    accumulate: int = Field(1, ge=1, le=MOST_TEXTS, description="Micro-batches per optimizer step.")
    optimizer: Optimizer = Field(
        "adamw",
        description="What moves the trained parameters: `adamw`; `lora-plus`, the same with a higher learning rate for "
        "LoRA's B; `lora-fa`, which leaves LoRA's A as it is; `mezo`, which takes two forwards and no backward.",
    )
    lora_plus_ratio: float = Field(
        16.0, ge=1, le=MOST_FACTOR, description="Learning rate of LoRA's B over that of A (optimizer `lora-plus`)."
    )
    mezo_eps: float = Field(
        1e-3,
        gt=0,
        le=MOST_FACTOR,
        description="How far the two forwards of a step lie from the parameters (optimizer `mezo`).",
    )
    learning_rate: float = Field(
        LEARNING_RATE, gt=0, le=MOST_FACTOR, description="Peak learning rate of the optimizer."
    )
    schedule: Schedule = Field("linear", description="How the learning rate falls after the warm-up.")
    warmup_steps: int = Field(
        0, ge=0, le=MOST_STEPS, description="Steps over which the learning rate rises to its peak."
    )
    weight_decay: float = Field(0.0, ge=0, le=MOST_FACTOR, description="Decoupled weight decay.")
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        le=MOST_FACTOR,
        description="Gradients are scaled down to this norm (`mezo`: the slope along its direction); 0 leaves them as "
        "they are.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Seed of the adapter's start, of the data's order, of dropout and of the directions of `mezo`.",
    )

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps = {self.steps} and epochs = {self.epochs} exclude each other: give one of them")
        return self


class OutputConfig(Settings):
    """What is written, and how often."""

    panel = "Output"

    out: Path = Field(
        Path("isthmus-out"), description="Folder for the adapter, the report, the loss log and the checkpoints."
    )
    save_every: int = Field(50, ge=1, le=MOST_STEPS, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, le=MOST_STEPS, description="Checkpoints to keep; older ones are removed.")
    resume: bool = Field(
        False, description="Go on from the newest checkpoint in --out; from the start where there is none."
    )
    report_to: Literal["none", "tensorboard"] = Field(
        "none", description="Where curves are written besides the loss log."
    )
    log_every: int = Field(
        10, ge=1, le=MOST_STEPS, description="Steps between lines of progress when the output is not a terminal."
    )
    eval_every: int | None = Field(
        None, ge=1, le=MOST_STEPS, description="Steps between evaluations; only before and after by default."
    )


class TuningConfig(DataConfig, AdapterConfig, OptimizationConfig, ComputationConfig, OutputConfig):
    """Every setting of a training run, wherever the model's middle layers are.

    `load_config` builds one of its kinds and turns bad values into `ConfigError`.
    """

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        methods = _METHODS_OF_OPTIMIZER.get(self.optimizer, (self.method,))
        if self.method not in methods:
            raise ValueError(
                f"optimizer = {self.optimizer!r} does not work on method {self.method}: "
                f"use optimizer adamw, or method {' or '.join(methods)}"
            )
        if self.optimizer == "mezo" and self.dropout > 0:
            raise ValueError(
                f"dropout = {self.dropout} has no effect under optimizer mezo, whose two forwards must differ in the "
                "parameters alone: give dropout = 0"
            )
        return self


class TrainClientConfig(ClientConfig):
    """How a training run connects, and how it uses its connection."""

    codec_every: int = Field(100, ge=1, le=MOST_STEPS, description="Steps after which `auto` chooses the codecs again.")
    overlap: int = Field(
        1,
        ge=1,
        le=MOST_TEXTS,
        description="Micro-batches in flight at a time, each over a session of its own; at most --accumulate.",
    )
    span_cache_mib: int | None = Field(
        None,
        ge=1,
        le=MOST_MIB,
        description="MiB of the disk, in --out, for the outputs of the cloud's layers, so that from the second epoch "
        "on nothing crosses the wire; only where nothing is trained below them or in them.",
    )


class DraftConfig(Settings):
    """Which draft is tuned beside the model."""

    panel = "Draft"

    draft: str = Field(
        "none",
        description="Emulator package to distil further as a draft during training; its owner must allow it. `none` "
        "and `ngram` distil nothing.",
    )
    draft_learning_rate: float = Field(
        1e-3, gt=0, le=MOST_FACTOR, description="Peak learning rate of the draft; it follows --schedule."
    )

    @property
    def draft_package(self) -> Path | None:
        """The folder of the package whose draft is tuned."""
        return None if self.draft in ("none", "ngram") else Path(self.draft)


class TrainConfig(
    TrainClientConfig,
    DraftConfig,
    DefenceConfig,
    BudgetConfig,
    AuditConfig,
    SitesConfig,
    PluggedConfig,
    SentExamplesConfig,
    TuningConfig,
):
    """A run whose middle layers are in the cloud."""

    @model_validator(mode="after")
    def _check_cloud_pairs(self) -> Self:
        if self.sites != "none" and self.method in _METHODS_WITHOUT_SITES:
            raise ValueError(
                f"sites carry adapters inside the cloud's layers, and method {self.method} has none there: "
                "give sites = none, or another method"
            )
        if self.site_policy != "always" and self.sites == "none":
            raise ValueError(
                f"site_policy = {self.site_policy!r} chooses among sites, and there are none: give --sites all"
            )
        if self.site_policy == "kill-revive" and self.optimizer == "mezo":
            raise ValueError("site_policy = 'kill-revive' goes by gradients, and optimizer mezo has none: use another")
        self._check_leased()
        if self.site_policy != "always" and (self.method == "adalora" or self.optimizer == "lora-fa"):
            who = "method adalora" if self.method == "adalora" else "optimizer lora-fa"
            raise ValueError(
                f"site_policy = {self.site_policy!r} leaves some sites without gradients, and {who} needs them of all: "
                "give site_policy = always, or another method or optimizer"
            )
        if self.span_cache_mib is not None and self.sites != "none":
            raise ValueError(
                f"span_cache_mib = {self.span_cache_mib} keeps what the cloud's layers give, and adapters inside them "
                "change it with every step: give sites = none, or leave the cache out"
            )
        if self.span_cache_mib is not None and self.codec.strip().startswith("auto"):
            raise ValueError(
                f"span_cache_mib = {self.span_cache_mib} keeps what has crossed with one codec, and codec = "
                f"{self.codec!r} tries several: name a codec, or leave the cache out"
            )
        if self.overlap > self.accumulate:
            raise ValueError(
                f"overlap = {self.overlap} is more than the {self.accumulate} micro-batches of a step: "
                "raise --accumulate, or lower --overlap"
            )
        if self.plugged and self.start_from is not None:
            raise ValueError(f"plugged and start_from = {str(self.start_from)!r} exclude each other: give one of them")
        self._check_draft()
        check_defended(self)
        check_budgeted(self)
        return self

    def _check_draft(self) -> None:
        if self.draft_package is None:
            return
        if self.method in ("prompt", "ladder"):
            raise ValueError(
                f"draft = {self.draft!r} is tuned for generation with a cache, which method {self.method} does not "
                "support: give draft = none, or another method"
            )
        if self.optimizer == "mezo":
            raise ValueError(
                f"draft = {self.draft!r} learns from the forward of a step, and mezo's forwards run with perturbed "
                "parameters: give draft = none, or another optimizer"
            )
        if self.sites != "none" and self.method != "lora":
            raise ValueError(
                f"draft = {self.draft!r} is tuned for generation with a cache, and adapters of method {self.method} "
                "inside the cloud's layers do not support it: give draft = none, sites = none, or method lora, which "
                "can be leased"
            )

    def _check_leased(self) -> None:
        if self.leased == "none" and not self.lend_dead:
            return
        if self.method != "lora" or self.dropout > 0:
            raise ValueError(
                f"leased adapters are plain LoRA that the cloud runs, not method {self.method} with dropout "
                f"{self.dropout}: give leased = none and lend_dead = false"
            )
        if self.lend_dead and self.site_policy != "kill-revive":
            raise ValueError(
                f"lend_dead is of sites that kill-revive leaves out, and site_policy is {self.site_policy!r}: "
                "give site_policy = kill-revive, or lend_dead = false"
            )
        if self.leased == "none":
            return
        if self.site_policy != "always":
            raise ValueError(
                f"site_policy = {self.site_policy!r} chooses among sites by their traffic, and leased ones have none: "
                "give leased = none, or site_policy = always"
            )
        if self.sites == "none":
            raise ValueError("leased says which sites the cloud runs, and there are none: give --sites all")
        if self.sites != "all" and self.leased != "all":
            strange = sorted(set(self.leased) - set(self.sites))
            if strange:
                raise ValueError(f"leased has layer {strange[0]}, which is not among the sites: name it there, too")


class TuneConfig(DefenceConfig, TuningConfig):
    """A run on an emulator of the middle layers, which touches no network."""

    panel = "Package"

    package: Path = Field(description="Folder of the package: the edge's layers and the emulator of the others.")
    signer: str | None = Field(
        None,
        description="Who must have signed the package: a fingerprint SHA256:…, a connection string, or the path of a "
        "file that holds either. Without it, any valid signature counts, and whose it is is shown.",
    )
    layers: EdgeLayers = Field(
        None,
        description="The edge's layers that are trained: `all`, `above` for those above the emulator, or numbers and "
        "ranges such as 24-29. By default as the package advises, and `all` where it advises nothing.",
    )
    keep_outputs_gib: float = Field(
        4.0,
        ge=0,
        le=MOST_MIB / 1024,
        description="GiB of the disk, in --out, for the emulator's outputs, so that they are computed once a text; "
        "only where nothing is trained below it. 0 for none.",
    )
    defence: tuple[str, ...] = Field(
        (),
        description="dp-sgd:clip=C,sigma=S[,delta=D]: clip each example's gradient and add noise to their sum, which "
        "bounds what the adapter tells of any example. Other defences are refused: they change what is sent, and "
        "tuning on a package sends nothing.",
    )

    @model_validator(mode="after")
    def _check_defended(self) -> Self:
        check_alone(self)
        return self

    def signer_text(self) -> str | None:
        """The fingerprint that the package must be signed by, as text; None where none was asked for.

        Raises:
            ConfigError: `signer` is neither a fingerprint nor a connection string nor a readable text file.
        """
        if self.signer is None:
            return None
        text = self.signer
        if not text.startswith((_FINGERPRINT, *SCHEMES)):
            remedy = "give SHA256:… as `isthmus cloud serve` prints it."
            text = read_text("signer", text, "a fingerprint", remedy)
        return text.partition("#")[2] if text.startswith(SCHEMES) else text


Config = TypeVar("Config", bound=Settings)


@overload
def load_config(path: Path | None, overrides: Mapping[str, object]) -> TrainConfig: ...


@overload
def load_config(path: Path | None, overrides: Mapping[str, object], cls: type[Config]) -> Config: ...


def load_config(path: Path | None, overrides: Mapping[str, object], cls: type[Settings] = TrainConfig) -> Settings:
    """Read a TOML file, lay the flags over it, and check the whole. Relative paths are of the working directory.

    Args:
        path: The TOML file, flat, with the names of `cls`'s fields; `None` for flags alone. The commands `edge train`,
            `edge eval` and `edge generate` can share a file: each takes its own keys and ignores those of the others.
        overrides: Flags by field name. `None` means that a flag was not given.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value does not make sense. The message is one line.
    """
    values = read_toml(path) if path is not None else {}
    given = {name: value for name, value in overrides.items() if value is not None}
    for name in values:
        check_name(name, path, _names_in_files(cls))
    for name in given:
        check_name(name, None, field_names(cls))
    values = {name: value for name, value in values.items() if name in cls.model_fields}
    if any(name in given for name in _EXCLUSIVE):
        for name in _EXCLUSIVE:
            values.pop(name, None)
    try:
        return cls.model_validate({**values, **given})
    except ValidationError as error:
        raise ConfigError(one_line(error, cls)) from error


def _names_in_files(cls: type[Settings]) -> list[str]:
    """The keys that a file may have: those of `cls`, and where it is an `edge` command's, those of the other ones."""
    sharing: tuple[type[Settings], ...] = (TrainConfig, EvalConfig, GenerateConfig)
    kinds = sharing if cls in sharing else (cls,)
    return list(dict.fromkeys(name for kind in kinds for name in field_names(kind)))
