"""What a training run is told: one frozen model, filled from a TOML file and from flags of the same names.

`TuningConfig` is what every run needs; `TrainConfig` adds the cloud, `TuneConfig` the package of an emulator. The
command line builds its flags from the fields, so this file imports neither torch nor transformers, and every field
carries the sentence that `--help` shows. A flag wins over the file; a key that does not exist is refused.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from isthmus.backbone.errors import ConfigError

DEFAULT_KEY = Path("~/.isthmus/edge/id_ed25519")

Method = Literal["lora", "dora", "ia3", "vera", "adalora", "prompt", "bottleneck", "bitfit", "full"]
Precision = Literal["fp32", "bf16"]
Schedule = Literal["constant", "linear", "cosine"]

_FINGERPRINT = "SHA256:"
_SCHEMES = ("isthmus://", "isthmus+tls://")

# Two ways to say one thing: a flag that names one of a pair replaces what the file says about the other.
_EXCLUSIVE = ("steps", "epochs")


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
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW.")
    schedule: Schedule = Field("linear", description="How the learning rate falls after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises to its peak.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them as they are."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the adapter's start, of the data's order and of dropout.")

    method: Method = Field(
        "lora",
        description="What is trained; `bitfit` tunes the biases of the edge's own layers, `full` these layers whole.",
    )
    rank: int = Field(
        8,
        ge=1,
        description="Rank of the adapter (lora, dora, vera; the average one that adalora ends with), or width of a "
        "bottleneck.",
    )
    alpha: float = Field(16.0, gt=0, description="Scale of the adapter: its product is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapter.")
    target_modules: tuple[str, ...] | None = Field(
        None, description="Modules that get an adapter, q_proj,v_proj for example; the family's usual ones by default."
    )
    virtual_tokens: int = Field(16, ge=1, description="Length of the learned prompt (method `prompt`).")
    start_from: Path | None = Field(
        None,
        description="Adapter to go on from: another run's, or one tuned on an emulator. Its own rank, scale, modules "
        "and layers count.",
    )
    precision: Precision = Field(
        "fp32",
        description="What the forward computes in; weights, optimizer and the saved adapter stay fp32 under bf16.",
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
        None, ge=1, description="Threads of torch in this process; torch's own choice by default."
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


class TrainConfig(TuningConfig):
    """A run whose middle layers are in the cloud."""

    cloud: str = Field(
        description="Connection string isthmus://host:port#SHA256:…, or the path of a file that holds it."
    )
    key: Path | None = Field(
        None, description="The edge's private key; without it, the default place of `isthmus edge keygen`."
    )
    codec: Literal["fp32", "bf16", "fp16", "int8"] = Field(
        "fp32", description="How activations and gradients cross the strip."
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
    tls_ca: Path | None = Field(None, description="Certificate authority of the outer TLS layer (isthmus+tls://).")
    tls_cert: Path | None = Field(None, description="The edge's own TLS certificate, where the cloud asks for one.")
    tls_key: Path | None = Field(None, description="Private key of --tls-cert.")

    @model_validator(mode="after")
    def _check_cloud_pairs(self) -> Self:
        if self.plugged and self.start_from is not None:
            raise ValueError(f"plugged and start_from = {str(self.start_from)!r} exclude each other: give one of them")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        return self

    def connection_text(self) -> str:
        """The connection string, read from its file where `cloud` is a path.

        Raises:
            ConfigError: `cloud` is neither a connection string nor a readable text file.
        """
        if self.cloud.startswith(_SCHEMES):
            return self.cloud
        return _read_text("cloud", self.cloud, "give isthmus://host:port#SHA256:… as `isthmus cloud serve` prints it.")


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
            text = _read_text("signer", text, "give SHA256:… as `isthmus cloud serve` prints it.")
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
    values = _read_toml(path) if path is not None else {}
    given = {name: value for name, value in overrides.items() if value is not None}
    for name in [*values, *given]:
        _check_name(name, path if name in values else None, cls)
    if any(name in given for name in _EXCLUSIVE):
        for name in _EXCLUSIVE:
            values.pop(name, None)
    try:
        return cls.model_validate({**values, **given})
    except ValidationError as error:
        raise ConfigError(_one_line(error, cls)) from error


def field_names(cls: type[TuningConfig]) -> list[str]:
    """The fields of a kind of run, its own ones first: where the middle layers are is what a user is asked first."""
    return sorted(cls.model_fields, key=lambda name: name in TuningConfig.model_fields)


def _read_text(name: str, path: str, remedy: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        what = "a fingerprint" if name == "signer" else "a connection string"
        raise ConfigError(
            f"{name} = {path!r} is neither {what} nor a readable file ({_why(error)}): {remedy}"
        ) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read ({_why(error)}): check the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the configuration file {path} is not UTF-8 (byte {error.start}): save it as UTF-8."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file {path} is not TOML: {error}. Write `name = value` lines.") from error


def _check_name(name: str, path: Path | None, cls: type[TuningConfig]) -> None:
    known = field_names(cls)
    if name in known:
        return
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"the names are {', '.join(known)}."
    place = f" in {path}" if path is not None else ""
    raise ConfigError(f"unknown setting {name!r}{place}: {remedy}")


def _one_line(error: ValidationError, cls: type[TuningConfig]) -> str:
    """The first of pydantic's complaints as one sentence with the field, its value and what it is for."""
    first = error.errors(include_url=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{reason}."
    name = str(first["loc"][0])
    meaning = cls.model_fields[name].description
    if first["type"] == "missing":
        return f"{name!r} is missing: give --{name.replace('_', '-')} or set it in the file. {meaning}"
    return f"{name} = {first['input']!r}: {reason[:1].lower()}{reason[1:]}. {meaning}"


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
