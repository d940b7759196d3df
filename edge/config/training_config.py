"""What a training run is told: one frozen model, filled from a TOML file and from flags of the same names.

`TuningConfig` is what every run needs; `TrainConfig` adds the cloud, `TuneConfig` the package of an emulator. The
command line builds its flags from the fields, so this file imports neither torch nor transformers, and every field
carries the sentence that `--help` shows. A flag wins over the file; a key that does not exist is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from isthmus.common.errors import ConfigError
from isthmus.edge.config.config_text import check_name, one_line, read_layers, read_text, read_toml

DEFAULT_KEY = Path("~/.isthmus/edge/id_ed25519")

Method = Literal[
    "lora", "dora", "ia3", "vera", "adalora", "prompt", "bottleneck", "bitfit", "low_rank", "ladder", "full"
]
Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adamw", "lora-plus", "lora-fa", "mezo"]
Schedule = Literal["constant", "linear", "cosine"]
Sites = Literal["none", "all"] | tuple[int, ...]
SitePolicyName = Literal["always", "kill-revive", "random", "even"]

_FINGERPRINT = "SHA256:"
_SCHEMES = ("isthmus://", "isthmus+tls://")

# Two ways to say one thing: a flag that names one of a pair replaces what the file says about the other.
_EXCLUSIVE = ("steps", "epochs")

_METHODS_OF_OPTIMIZER: dict[str, tuple[Method, ...]] = {
    "lora-plus": ("lora", "dora"),
    "lora-fa": ("lora",),
    # AdaLoRA chooses its ranks by gradients.
    "mezo": ("lora", "dora", "ia3", "vera", "prompt", "bottleneck", "bitfit", "low_rank", "ladder", "full"),
}
_METHODS_WITHOUT_SITES: tuple[Method, ...] = ("prompt", "bitfit", "ladder", "full")


class TuningConfig(BaseModel):
    """Everything that a training run can be told, wherever the model's middle layers are.

    `load_config` builds one of its kinds and turns bad values into `ConfigError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = Field(description="Training data: a .jsonl, .csv or .tsv file, or hub:NAME[:SPLIT].")
    validation: str | None = Field(
        None, description="Held-out data in the same form; without it, a part of the training data."
    )
    validation_split: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of the training data held out when no validation data are given; 0 for none.",
    )
    format: Literal["auto", "jsonl", "csv", "tsv", "hub"] = Field(
        "auto", description="Form of the data; `auto` goes by the file's ending."
    )
    header: bool = Field(
        True, description="Whether a CSV or TSV file opens with column names; without them columns are 0, 1, 2, …"
    )
    text_column: str | None = Field(None, description="Column or key of plain text, all of it trained on.")
    prompt_column: str | None = Field(
        None, description="Column or key of the prompt, which is read but not trained on."
    )
    completion_column: str | None = Field(None, description="Column or key of the completion, which is trained on.")
    prompt_template: str | None = Field(
        None, description="The prompt, made of columns: 'Meaning: {mr}\\nText:' (\\n is a line break)."
    )
    completion_template: str | None = Field(None, description="The completion, made of columns: ' {ref}'.")
    max_length: int = Field(512, ge=2, description="Tokens per example at most; what is longer is cut at its end.")

    steps: int | None = Field(None, ge=1, description="Optimizer steps to make; instead of --epochs.")
    epochs: int | None = Field(None, ge=1, description="Passes over the data; 1 when --steps is not given either.")
    batch: int = Field(4, ge=1, description="Examples per micro-batch.")
    accumulate: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    optimizer: Optimizer = Field(
        "adamw",
        description="What moves the trained parameters: `adamw`; `lora-plus`, the same with a higher learning rate for "
        "LoRA's B; `lora-fa`, which leaves LoRA's A as it is; `mezo`, which takes two forwards and no backward.",
    )
    lora_plus_ratio: float = Field(
        16.0, ge=1, description="Learning rate of LoRA's B over that of A (optimizer `lora-plus`)."
    )
    mezo_eps: float = Field(
        1e-3, gt=0, description="How far the two forwards of a step lie from the parameters (optimizer `mezo`)."
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of the optimizer.")
    schedule: Schedule = Field("linear", description="How the learning rate falls after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises to its peak.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        description="Gradients are scaled down to this norm (`mezo`: the slope along its direction); 0 leaves them as "
        "they are.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Seed of the adapter's start, of the data's order, of dropout and of the directions of `mezo`.",
    )

    method: Method = Field(
        "lora",
        description="What is trained; `bitfit` tunes the biases of the edge's own layers, `full` these layers whole; "
        "`low_rank` a small matrix between two frozen ones at each module, `ladder` a network beside the cloud.",
    )
    rank: int = Field(
        8,
        ge=1,
        description="Rank of the adapter (lora, dora, vera, low_rank; the average one that adalora ends with), or "
        "width of a bottleneck.",
    )
    alpha: float = Field(16.0, gt=0, description="Scale of the adapter: its product is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapter.")
    target_modules: tuple[str, ...] | None = Field(
        None, description="Modules that get an adapter, q_proj,v_proj for example; the family's usual ones by default."
    )
    virtual_tokens: int = Field(16, ge=1, description="Length of the learned prompt (method `prompt`).")
    basis: Literal["seeded", "svd"] = Field(
        "seeded",
        description="The frozen matrices of `low_rank`: drawn from --seed, known to both sides; or from the model's "
        "own weights, which only the cloud has.",
    )
    taps: int = Field(4, ge=1, description="Layers of the cloud that a ladder reads, evenly spaced.")
    tap_width: int | None = Field(
        None, ge=1, description="Numbers of a tap for each token, by a random projection; by default all."
    )
    reduction: int = Field(8, ge=1, description="How many times narrower than the model a ladder is.")
    start_from: Path | None = Field(
        None,
        description="Adapter to go on from: another run's, or one tuned on an emulator. Its own rank, scale, modules "
        "and layers count.",
    )
    precision: Precision = Field(
        "fp32",
        description="What the forward computes in; under bf16, frozen linears are held in it, and what is trained, its "
        "optimizer and the saved adapter stay fp32.",
    )

    out: Path = Field(
        Path("isthmus-out"), description="Folder for the adapter, the report, the loss log and the checkpoints."
    )
    save_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints to keep; older ones are removed.")
    resume: bool = Field(
        False, description="Go on from the newest checkpoint in --out; from the start where there is none."
    )
    report_to: Literal["none", "tensorboard"] = Field(
        "none", description="Where curves are written besides the loss log."
    )
    log_every: int = Field(10, ge=1, description="Steps between lines of progress when the output is not a terminal.")
    eval_every: int | None = Field(
        None, ge=1, description="Steps between evaluations; only before and after by default."
    )

    threads: int | None = Field(
        None,
        ge=1,
        description="Threads of torch in this process; by default torch's choice, at most the usable cores.",
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

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps = {self.steps} and epochs = {self.epochs} exclude each other: give one of them")
        has_prompt = bool(self.prompt_column or self.prompt_template)
        has_completion = bool(self.completion_column or self.completion_template)
        if self.text_column and (has_prompt or has_completion):
            raise ValueError("text_column excludes prompt and completion columns: give one or the other")
        if self.prompt_column and self.prompt_template:
            raise ValueError("prompt_column and prompt_template exclude each other: name the column in the template")
        if self.completion_column and self.completion_template:
            raise ValueError(
                "completion_column and completion_template exclude each other: name the column in the template"
            )
        if has_prompt and not has_completion:
            raise ValueError("a prompt needs a completion: give completion_column or completion_template")
        return self

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


class TrainConfig(TuningConfig):
    """A run whose middle layers are in the cloud."""

    cloud: str = Field(
        description="Connection string isthmus://host:port#SHA256:…, or the path of a file that holds it."
    )
    key: Path | None = Field(
        None, description="The edge's private key; without it, the default place of `isthmus edge keygen`."
    )
    codec: str = Field(
        "fp32",
        description="How activations and gradients cross the strip: fp32, bf16, fp16, int8, int4 or int4-outliers; "
        "FORWARD,BACKWARD; one for each of forward_up=, forward_down=, backward_up=, backward_down=; or auto, "
        "auto:0.99, for the narrowest that keep the gradient's cosine.",
    )
    codec_every: int = Field(100, ge=1, description="Steps after which `auto` chooses the codecs again.")
    overlap: int = Field(
        1,
        ge=1,
        description="Micro-batches on their way at a time, each over a session of its own; at most --accumulate.",
    )
    span_cache_mib: int | None = Field(
        None,
        ge=1,
        description="MiB of the disk, in --out, for the outputs of the cloud's layers, so that from the second epoch "
        "on nothing crosses the strip; only where nothing is trained below them or in them.",
    )
    sites: Sites = Field(
        "none",
        description="The cloud's layers that get adapters beside the edge's own: `none`, `all`, or numbers and ranges "
        "such as 4,7,10-12.",
    )
    leased: Sites = Field(
        "none",
        description="Which of --sites are lent to the cloud, which runs their adapters and sees their weights then "
        "(plain LoRA without dropout): `none`, `all`, or layers.",
    )
    summed: bool = Field(
        False,
        description="Answer for all sites with one input by a single gradient of it: fewer bytes, and not the same "
        "bits as in one process.",
    )
    site_policy: SitePolicyName = Field(
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
        description="Whether sites that `kill-revive` leaves out for now act on, lent to the cloud, which sees their "
        "weights then (plain LoRA without dropout); else what they have learned is dropped.",
    )
    plugged: bool = Field(
        False, description="Use the adapter that the cloud has plugged in for this edge; to train is to go on from it."
    )
    connect_timeout: float = Field(10.0, gt=0, description="Seconds to wait for the cloud at the start.")
    give_up_after: float = Field(
        600.0, gt=0, description="Seconds to wait for a cloud that stays away before the run stops."
    )
    call_timeout: float = Field(
        600.0, gt=0, description="Seconds that one call may take before its connection counts as lost."
    )
    max_fetch_gib: float = Field(
        64.0,
        gt=0,
        allow_inf_nan=False,
        description="GiB that are fetched of a model at most; a cloud that offers more is refused.",
    )
    tls_ca: Path | None = Field(None, description="Certificate authority of the outer TLS layer (isthmus+tls://).")
    tls_cert: Path | None = Field(None, description="The edge's own TLS certificate, where the cloud asks for one.")
    tls_key: Path | None = Field(None, description="Private key of --tls-cert.")

    @field_validator("sites", "leased", mode="before")
    @classmethod
    def _read_sites(cls, value: object) -> object:
        return value if isinstance(value, str) and value in {"none", "all"} else read_layers(value)

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
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        return self

    def _check_leased(self) -> None:
        if self.leased == "none" and not self.lend_dead:
            return
        if self.method != "lora" or self.dropout > 0:
            raise ValueError(
                f"adapters that are lent are plain LoRA that the cloud runs, not method {self.method} with dropout "
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
            raise ValueError("leased says which sites are lent to the cloud, and there are none: give --sites all")
        if self.sites != "all" and self.leased != "all":
            strange = sorted(set(self.leased) - set(self.sites))
            if strange:
                raise ValueError(f"leased has layer {strange[0]}, which is not among the sites: name it there, too")

    def connection_text(self) -> str:
        """The connection string, read from its file where `cloud` is a path.

        Raises:
            ConfigError: `cloud` is neither a connection string nor a readable text file.
        """
        if self.cloud.startswith(_SCHEMES):
            return self.cloud
        remedy = "give isthmus://host:port#SHA256:… as `isthmus cloud serve` prints it."
        return read_text("cloud", self.cloud, "a connection string", remedy)


class TuneConfig(TuningConfig):
    """A run on an emulator of the middle layers, which touches no network."""

    package: Path = Field(description="Folder of the package: the edge's layers and the emulator of the others.")
    signer: str | None = Field(
        None,
        description="Who must have signed the package: a fingerprint SHA256:…, a connection string, or the path of a "
        "file that holds either. Without it, any valid signature counts, and whose it is is shown.",
    )

    def signer_text(self) -> str | None:
        """The fingerprint that the package must be signed by, as text; None where none was asked for.

        Raises:
            ConfigError: `signer` is neither a fingerprint nor a connection string nor a readable text file.
        """
        if self.signer is None:
            return None
        text = self.signer
        if not text.startswith((_FINGERPRINT, *_SCHEMES)):
            remedy = "give SHA256:… as `isthmus cloud serve` prints it."
            text = read_text("signer", text, "a fingerprint", remedy)
        return text.partition("#")[2] if text.startswith(_SCHEMES) else text


Config = TypeVar("Config", bound=TuningConfig)


@overload
def load_config(path: Path | None, overrides: Mapping[str, object]) -> TrainConfig: ...


@overload
def load_config(path: Path | None, overrides: Mapping[str, object], cls: type[Config]) -> Config: ...


def load_config(
    path: Path | None, overrides: Mapping[str, object], cls: type[TuningConfig] = TrainConfig
) -> TuningConfig:
    """Read a TOML file, lay the flags over it, and check the whole.

    Args:
        path: The TOML file, flat, with the names of `cls`'s fields; `None` for flags alone.
        overrides: Flags by field name. `None` means that a flag was not given.
        cls: The kind of run.

    Returns:
        The checked configuration. Relative paths stay relative to the working directory, also those of the file.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value does not make sense. The message is one line.
    """
    values = read_toml(path) if path is not None else {}
    given = {name: value for name, value in overrides.items() if value is not None}
    for name in [*values, *given]:
        check_name(name, path if name in values else None, field_names(cls))
    if any(name in given for name in _EXCLUSIVE):
        for name in _EXCLUSIVE:
            values.pop(name, None)
    try:
        return cls.model_validate({**values, **given})
    except ValidationError as error:
        raise ConfigError(one_line(error, cls)) from error


def field_names(cls: type[TuningConfig]) -> list[str]:
    """The fields of a kind of run, its own ones first: where the middle layers are is what a user is asked first."""
    return sorted(cls.model_fields, key=lambda name: name in TuningConfig.model_fields)
