"""The settings of a connection to a cloud, and of the commands that need nothing else of a cloud."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from isthmus.edge.config.adapter_config import Sites
from isthmus.edge.config.config_text import read_text
from isthmus.edge.config.data_config import ComputationConfig, ExamplesConfig, SentExamplesConfig
from isthmus.edge.config.settings import MOST_FACTOR, MOST_MIB, MOST_SECONDS, MOST_TEXTS, MOST_TOKENS, Settings
from isthmus.protocol.limits import DEFAULT_LIMITS, GIB, KEEPALIVE_SECONDS, LEAST_KEEPALIVE_SECONDS

DEFAULT_KEY = Path("~/.isthmus/edge/id_ed25519")
NO_DATA = "none"
"""What `emulator fit` is given for private data where there are none yet."""
SCHEMES = ("isthmus://", "isthmus+tls://")


class ClientConfig(Settings):
    """How an edge connects to a cloud, and what it takes from there."""

    panel = "Connection"

    cloud: str = Field(
        description="Connection string isthmus://host:port#SHA256:…, or the path of a file that holds it."
    )
    key: Path | None = Field(
        None, description="The edge's private key; without it, the default place of `isthmus edge keygen`."
    )
    codec: str = Field(
        "fp32",
        description="How activations and gradients cross the wire: fp32, bf16, fp16, int8, int4 or int4-outliers; "
        "FORWARD,BACKWARD; one for each of forward_up=, forward_down=, backward_up=, backward_down=; or auto, "
        "auto:0.99, for the narrowest that keep the gradient's cosine (`edge train`; elsewhere fp32).",
    )
    connect_timeout: float = Field(
        10.0,
        gt=0,
        le=MOST_SECONDS,
        description="Seconds to wait for the cloud at the start; the default becomes 5 for each place of a connection "
        "string that names more than two.",
    )
    give_up_after: float = Field(
        600.0, gt=0, le=MOST_SECONDS, description="Seconds to wait for a cloud that stays away before the run stops."
    )
    call_timeout: float = Field(
        600.0, gt=0, le=MOST_SECONDS, description="Seconds that one call may take before its connection counts as lost."
    )
    keepalive: float = Field(
        KEEPALIVE_SECONDS,
        ge=LEAST_KEEPALIVE_SECONDS,
        le=MOST_SECONDS,
        description="Seconds without a sign of the cloud until it is asked for one; after as long again the connection "
        "counts as lost. Shorter finds a machine that died sooner, and mistakes a slow link for one.",
    )
    renew_seconds: float = Field(
        DEFAULT_LIMITS.renew_seconds,
        ge=3 * DEFAULT_LIMITS.least_renew_seconds,
        le=3600,
        description="Seconds after which a session gets fresh keys, before its next message: for so long can somebody "
        "read who has stolen a session's keys and listens. It takes each side less than a millisecond.",
    )
    renew_gib: float = Field(
        DEFAULT_LIMITS.renew_bytes / GIB,
        ge=4 * DEFAULT_LIMITS.least_renew_bytes / GIB,
        le=64,
        description="GiB after which a session gets fresh keys, if they come before --renew-seconds.",
    )
    max_fetch_gib: float = Field(
        64.0,
        gt=0,
        le=MOST_MIB / 1024,
        allow_inf_nan=False,
        description="GiB that are fetched of a model at most; a cloud that offers more is refused.",
    )
    tls_ca: Path | None = Field(None, description="Certificate authority of the outer TLS layer (isthmus+tls://).")
    tls_cert: Path | None = Field(None, description="The edge's own TLS certificate, where the cloud asks for one.")
    tls_key: Path | None = Field(None, description="Private key of --tls-cert.")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        return self

    def connection_text(self) -> str:
        """The connection string, read from its file where `cloud` is a path.

        Raises:
            ConfigError: `cloud` is neither a connection string nor a readable text file.
        """
        if self.cloud.startswith(SCHEMES):
            return self.cloud
        remedy = "give isthmus://host:port#SHA256:… as `isthmus cloud serve` prints it."
        return read_text("cloud", self.cloud, "a connection string", remedy)


class PluggedConfig(Settings):
    """Whether the adapter that the cloud has plugged in is used."""

    panel = "Adapter"

    plugged: bool = Field(
        False, description="Use the adapter that the cloud has plugged in for this edge; to train is to go on from it."
    )


class EvalConfig(ClientConfig, SentExamplesConfig, PluggedConfig, ComputationConfig):
    """What `edge eval` needs."""


class GenerationConfig(Settings):
    """How text is generated."""

    panel = "Generation"

    max_new_tokens: int = Field(64, ge=1, le=MOST_TOKENS, description="Tokens to generate at most, for each text.")
    temperature: float = Field(0.0, ge=0, le=MOST_FACTOR, description="0 for greedy; higher is more random.")
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Sample from the likeliest tokens that have this probability together; by default as the model's "
        "own generation settings say.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Seed of sampling: the same seed gives the same text, except with --draft. By default another one "
        "each time.",
    )
    exact: bool = Field(
        False,
        description="Give each token the same bits whatever is computed at the same time, on both sides; slower.",
    )
    leased: Sites = Field(
        "none",
        description="Adapters inside the cloud's layers that are leased to the cloud, which runs them and sees their "
        "weights then (plain LoRA): `none`, `all`, or layers.",
    )
    cache: bool = Field(
        True,
        description="Keep keys and values of past tokens on both sides; without, every token is computed from the "
        "whole text anew, which works with adapters inside the cloud's layers that are not leased.",
    )
    draft: str = Field(
        "none",
        description="What drafts the next tokens, so that one round trip verifies several: `none`, `ngram` (what "
        "followed the same words before), or the folder of an emulator package. Greedy text is the same up to rounding "
        "(bit for bit with --exact); sampled text keeps its distribution.",
    )
    draft_dtype: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="What a package drafts in. bf16 needs a copy of the edge's weights, and takes half as long as fp32 "
        "where the processor computes in bf16; fp32 shares the weights.",
    )
    batch_size: int = Field(8, ge=1, le=MOST_TEXTS, description="Texts of --batch that are generated at a time.")

    @model_validator(mode="after")
    def _check_exact(self) -> Self:
        if self.exact and not self.cache:
            raise ValueError("exact = true needs the cache: give cache = true, or leave --exact out")
        return self

    @model_validator(mode="after")
    def _check_draft(self) -> Self:
        if self.draft != "none" and not self.cache:
            raise ValueError(f"draft = {self.draft} needs the cache: give cache = true, or leave --draft out")
        return self


class GenerateConfig(ClientConfig, PluggedConfig, GenerationConfig):
    """What `edge generate` needs."""

    deadline: float | None = Field(
        None,
        gt=0,
        le=MOST_SECONDS,
        description="Seconds that a call may wait in the cloud before it is computed; after that the command ends with "
        "an error.",
    )


FIT_TOKENS = 20_000  # some 35 for each input of a map of width 576; the table's "edge bridge" has as many


class FitConfig(ClientConfig, ExamplesConfig):
    """What `emulator fit` needs."""

    panel = "Package"

    package: Path = Field(description="Folder of the package, which the cloud's owner has signed.")
    text: Path = Field(description="Public text (.txt, or .jsonl with `text`). The cloud can read what is sent of it.")
    tokens: int = Field(
        FIT_TOKENS,
        ge=2,
        le=1 << 30,
        description="Tokens of the text that the cloud is asked about, in all commands together.",
    )
    block: int = Field(256, ge=2, le=MOST_TOKENS, description="Tokens of a block, which crosses as one sequence.")
    data: str = Field(
        description="The private data that you will tune on, which stay here: a text that shares 13 tokens in a row "
        "with them is refused. `none` where there are none yet."
    )
    validation: str | None = Field(None, description="Private validation data, which are looked at like --data.")
    leave_out_shared: bool = Field(False, description="Leave such texts out and send the others, instead of refusing.")
    secrets: Path | None = Field(None, description="File with a string in each line that may not be in the text.")
