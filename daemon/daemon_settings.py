"""daemon.toml: what the owner of a daemon decides. Every field carries the sentence that the documents show.

    listen = "127.0.0.1:7465"

    [clouds.main]
    cloud = "cloud.txt"

`isthmus.daemon.settings_file` reads it. Without a file, everything is by default, and no cloud is known.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from isthmus.edge.config.client_config import ClientConfig
from isthmus.edge.config.settings import MOST_MIB, MOST_STEPS

DEFAULT_HOME = Path("~/.isthmus/daemon")
FILE = "daemon.toml"
"""Its name in the home."""
EXPORT_NO_PROXY = " ".join(
    ["export", *(f'{name}="127.0.0.1,localhost${{{name}:+,${name}}}"' for name in ("NO_PROXY", "no_proxy"))]
)
"""What a shell runs so that clients reach the daemon without a proxy; what was listed before stays."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_HOST = re.compile(r"[^:/?#@\s\[\]]+|\[[0-9a-fA-F:.]+\]", re.ASCII)


class DaemonSettings(BaseModel):
    """What daemon.toml says."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    listen: str = Field(
        "127.0.0.1:7465",
        description="Address and port of the APIs and the page. Another address than a loopback one needs tls_cert, "
        "tls_key and allow_remote.",
    )
    allow_remote: bool = Field(
        False,
        description="Whether other machines may connect, with a token. Their users' text then crosses the network "
        "between them and the daemon, inside TLS.",
    )
    tls_cert: Path | None = Field(None, description="Certificate that the daemon shows, in PEM; with tls_key.")
    tls_key: Path | None = Field(None, description="Private key of tls_cert.")
    hosts: list[str] = Field(
        default_factory=list,
        description="Names by which clients may call the daemon in the Host header, besides those of loopback.",
    )
    clouds: dict[str, ClientConfig] = Field(
        default_factory=dict,
        description="A table for each cloud, [clouds.NAME], with the connection options of `isthmus edge train` "
        "(`cloud`, `key`, `codec`, …).",
    )
    jobs_at_once: int = Field(1, ge=1, le=16, description="Jobs that run at the same time; the others wait.")
    save_every: int = Field(20, ge=1, le=MOST_STEPS, description="Optimizer steps between a job's checkpoints.")
    checkpoints_per_job: int = Field(
        3, ge=1, le=1000, description="Checkpoints of a job that can be talked to; older ones are removed."
    )
    disk_gib: float = Field(
        20.0,
        gt=0,
        le=MOST_MIB / 1024,
        description="GiB that the home may take; what would take more is refused, with a reason.",
    )
    upload_mib: int = Field(512, ge=1, le=MOST_MIB, description="MiB of one uploaded file at most.")
    requests_at_once: int = Field(
        512,
        ge=8,
        le=1 << 15,
        description="Requests under way at the same time; more are refused (503). One for the status is always "
        "answered.",
    )
    body_mib: int = Field(
        8, ge=1, le=1024, description="MiB of another request's body at most, also when it is unpacked."
    )
    keep_days: float = Field(
        30.0,
        gt=0,
        le=36_600,
        description="Days that promises of Tinker's API, folders of ended jobs, and what is in set-aside are kept.",
    )
    adapters_hot: int = Field(
        4,
        ge=1,
        le=1000,
        description="Adapters that are kept in memory for answers; the one not used for longest gives way.",
    )
    # With SmolLM2-135M on two cores, two at a time give twice the tokens a second of one, and four no more than two.
    answers_at_once: int = Field(
        2,
        ge=1,
        le=64,
        description="Answers that are computed at the same time, each over a session of its own with the cloud, which "
        "allows an edge 4 by default; the others wait.",
    )
    answers_waiting: int = Field(
        64,
        ge=1,
        le=1 << 15,
        description="Requests for answers that may wait; more are refused (429) until some are done.",
    )
    training_layers: str = Field(
        "edge",
        pattern="^(edge|all)$",
        description="Layers that Tinker's train_attn and train_mlp mean: `edge`, this machine's own; `all`, the "
        "cloud's, too, as adapters that are leased to it, whose weights it sees. With `all`, chat and sampling lease "
        "what an adapter has in the cloud's layers, too; with `edge`, this machine computes it.",
    )
    offered_draft: str = Field(
        "none",
        description="What drafts tokens of answers (`--draft` of `isthmus edge generate`): `none`, `ngram` or a "
        "package's folder.",
    )

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        if not (host and colon and port.isdecimal() and int(port) < 2**16):
            raise ValueError("it is no address and port: give for instance 127.0.0.1:7465")
        return value

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, value: list[str]) -> list[str]:
        for host in value:
            if not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no host's name: give it without a scheme and a port")
        return value

    @field_validator("clouds")
    @classmethod
    def _check_clouds(cls, value: dict[str, ClientConfig]) -> dict[str, ClientConfig]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no cloud's name: give up to 64 letters, digits, dots or dashes")
        return value

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on; port 0 is any free one."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)
