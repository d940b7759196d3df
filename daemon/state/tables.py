"""The tables of the daemon's database. Times are seconds since 1970, as a number with a fraction.

A row that belongs to somebody has the `owner` that made it; every query of an API names one, so that a token sees
nothing of another's.

A change of the tables needs a migration: `tests/support/new_migration.py` writes one.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Double, ForeignKey, Index, LargeBinary, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Tree = dict[str, Any]
"""Plain values, as JSON has them."""


class Table(DeclarativeBase):
    """The base of all tables."""

    type_annotation_map = {Tree: JSON, bytes: LargeBinary, float: Double}  # noqa: RUF012  # SQLAlchemy's own form


class Owner(Table):
    """Somebody with a token.

    Attributes:
        token_sha256: Hexadecimal SHA-256 of the token, which itself is in a file of its owner's alone.
        adapters: Where their adapters have been, at the most: see `isthmus.daemon.adapter_places.PLACES`.
    """

    __tablename__ = "owners"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    token_sha256: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    adapters: Mapped[str] = mapped_column(default="here", server_default="here")


class StoredFile(Table):
    """A file that was uploaded, or that a job has made; its bytes are in the home, at `files/<id>`.

    Attributes:
        size: Bytes.
        purpose: OpenAI's word: "fine-tune", "fine-tune-results", "batch", "batch_output", "user_data".
        examples, chats: Of one for fine-tuning, how many examples it has, and whether they are conversations, as it was
            checked when it came.
    """

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)  # file-…
    owner: Mapped[str] = mapped_column(ForeignKey("owners.id"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    size: Mapped[int]
    sha256: Mapped[str]
    created_at: Mapped[float]
    examples: Mapped[int | None] = mapped_column(default=None)
    chats: Mapped[bool | None] = mapped_column(default=None)


class Job(Table):
    """Something that a process of its own does, once its turn comes; its folder in the home is `jobs/<id>`.

    Attributes:
        kind: "train", "tune" (on an emulator package), "evaluate" or "generate".
        status: "queued", "running", "paused", "succeeded", "failed" or "cancelled".
        wanted: What a person wants of a running job: "run", "pause" or "cancel".
        priority: Higher ones go first; of equal ones, the oldest.
        model: The name under which clients know the base model.
        spec: The fields of the kind's configuration (`isthmus.edge.config`) that are not by default.
        request: What the client sent, for APIs that have to tell it again.
        step, total: Optimizer steps, or texts, that are done, and all of them; None before it is known.
        speed: Seconds that a step takes, by the last ones.
        error: {"code": exit code, "message": one line}; None without one.
        results: Ids of `StoredFile`s.
        attempts: How often a process has begun it.
        suffix: What stands in the names of its models; may be empty.
        bytes_up, bytes_down: What has crossed for it, over all its attempts: bytes of sealed frames.
        heard: Bytes of its worker's reports (`jobs/<id>/reports.jsonl`) that the other columns, and the tables of
            events, models and traffic, hold already.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)  # ftjob-…
    owner: Mapped[str] = mapped_column(ForeignKey("owners.id"), index=True)
    kind: Mapped[str]
    status: Mapped[str] = mapped_column(index=True)
    wanted: Mapped[str] = mapped_column(default="run")
    priority: Mapped[int] = mapped_column(default=0)
    model: Mapped[str]
    spec: Mapped[Tree]
    request: Mapped[Tree] = mapped_column(default=dict)
    labels: Mapped[Tree] = mapped_column(default=dict)  # OpenAI's `metadata`, a name that SQLAlchemy keeps for itself
    created_at: Mapped[float] = mapped_column(index=True)
    started_at: Mapped[float | None] = mapped_column(default=None)
    finished_at: Mapped[float | None] = mapped_column(default=None)
    step: Mapped[int] = mapped_column(default=0)
    total: Mapped[int | None] = mapped_column(default=None)
    speed: Mapped[float | None] = mapped_column(default=None)
    error: Mapped[Tree | None] = mapped_column(default=None)
    results: Mapped[list[Any]] = mapped_column(JSON, default=list)
    attempts: Mapped[int] = mapped_column(default=0)
    suffix: Mapped[str] = mapped_column(default="")
    bytes_up: Mapped[int] = mapped_column(default=0)
    bytes_down: Mapped[int] = mapped_column(default=0)
    heard: Mapped[int] = mapped_column(default=0)


class Event(Table):
    """Something that a job's owner is told.

    Attributes:
        level: "info", "warn" or "error".
        kind: "message" or "metrics"; the latter have figures in `data`.
    """

    __tablename__ = "events"
    __table_args__ = (Index("events_of_a_job", "job", "number"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[float]
    level: Mapped[str]
    kind: Mapped[str]
    message: Mapped[str]
    data: Mapped[Tree] = mapped_column(default=dict)


class Model(Table):
    """An adapter that can be talked to, under a name: a job's result, or what it was at a checkpoint.

    Attributes:
        name: "ft:BASE::SUFFIX:ID", a checkpoint's with ":ckpt-step-N" behind it.
        base: The name of the base model.
        job: Whose result it is; None for one that was saved through Tinker's API.
        step: Optimizer steps that it has; None for a job's final result.
        metrics: Of a checkpoint: `step`, `train_loss` and so on.
        folder: Its adapter's, relative to the home.
        deleted: Whether it was deleted, or pruned to save disk; the row stays, the folder does not.
    """

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)  # ftckpt-… for a checkpoint
    owner: Mapped[str] = mapped_column(ForeignKey("owners.id"), index=True)
    base: Mapped[str]
    job: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True, default=None)
    step: Mapped[int | None] = mapped_column(default=None)
    metrics: Mapped[Tree] = mapped_column(default=dict)
    folder: Mapped[str]
    created_at: Mapped[float]
    deleted: Mapped[bool] = mapped_column(default=False)


class BaseModel(Table):
    """What a cloud serves, as it was last seen; known while the cloud is away, too.

    Attributes:
        name: How clients name it: the cloud's name for the model.
        cloud: The cloud's name in daemon.toml.
        facts: `digest`, `plan` ("2:2"), `n_layers` (of the whole model), `longest` (tokens), `hidden_size`,
            `span_dtype`, `chat_template` (whether it has one).
    """

    __tablename__ = "base_models"

    name: Mapped[str] = mapped_column(primary_key=True)
    cloud: Mapped[str]
    facts: Mapped[Tree]
    seen_at: Mapped[float]


class Traffic(Table):
    """What has crossed between this machine and a cloud, per UTC day. Bytes are of sealed frames."""

    __tablename__ = "traffic"

    cloud: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[str] = mapped_column(primary_key=True)  # YYYY-MM-DD
    bytes_up: Mapped[int] = mapped_column(default=0)
    bytes_down: Mapped[int] = mapped_column(default=0)
    calls: Mapped[int] = mapped_column(default=0)
    retries: Mapped[int] = mapped_column(default=0)


class TinkerSession(Table):
    """A client's session of Tinker's API."""

    __tablename__ = "tinker_sessions"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(ForeignKey("owners.id"), index=True)
    labels: Mapped[Tree] = mapped_column(default=dict)
    created_at: Mapped[float]
    seen_at: Mapped[float]
    ended: Mapped[bool] = mapped_column(default=False)


class TinkerModel(Table):
    """A model that is trained through Tinker's API.

    Attributes:
        id: "{session}:train:{n}".
        settings: Its LoRA configuration, as sent.
        saved: Number of the promise that its newest state on the disk has, a step or a load; gradients after it are
            computed again on a restart.
    """

    __tablename__ = "tinker_models"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(ForeignKey("owners.id"), index=True)
    session: Mapped[str] = mapped_column(ForeignKey("tinker_sessions.id"))
    base: Mapped[str]
    settings: Mapped[Tree]
    created_at: Mapped[float]
    seen_at: Mapped[float]
    saved: Mapped[int] = mapped_column(default=0)


class TinkerPromise(Table):
    """A request of Tinker's API that is answered later; one that is sent again finds its first promise by its key.

    Attributes:
        number: The order in which they came in. None is given twice, since states on the disk go by them.
        scope, key: What a repeated request has in common: `(model_id, seq_id)` and the like.
        kind: The endpoint's name.
        request: Its body, where it is small; one with data or a prompt is in the home, at `tinker/requests/<id>`, and
            this has its `bytes`.
        answer: The result's bytes; None while there is none.
        answer_type: The media type of `answer`.
    """

    __tablename__ = "tinker_promises"
    __table_args__ = (
        UniqueConstraint("scope", "key"),
        Index("promises_of_a_model", "model", "number"),
        Index("promises_of_an_owner", "owner", "number"),
        Index("promises_unanswered", "owner", sqlite_where=text("answer IS NULL")),
        {"sqlite_autoincrement": True},
    )

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str] = mapped_column(ForeignKey("owners.id"))
    model: Mapped[str | None] = mapped_column(default=None)
    scope: Mapped[str]
    key: Mapped[str]
    kind: Mapped[str]
    request: Mapped[Tree] = mapped_column(default=dict)
    answer: Mapped[bytes | None] = mapped_column(default=None)
    answer_type: Mapped[str | None] = mapped_column(default=None)
    created_at: Mapped[float]


class TinkerWeights(Table):
    """Weights that were saved under a `tinker://RUN/KIND/NAME` path.

    Attributes:
        model: The one that they were; its row may be gone.
        kind: "weights" (with the optimizer) or "sampler_weights".
        folder: Relative to the home.
        size: Bytes.
        facts: What is told of them after their model has gone: `base`, `settings` (the model's), `labels` (the
            client's).
        listed: Whether a client has named them; the others belong to samplers alone.
        expires_at: When they are removed; None for never.
    """

    __tablename__ = "tinker_weights"

    path: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(ForeignKey("owners.id"), index=True)
    model: Mapped[str]
    kind: Mapped[str]
    folder: Mapped[str]
    size: Mapped[int]
    facts: Mapped[Tree] = mapped_column(default=dict)
    listed: Mapped[bool] = mapped_column(default=True)
    expires_at: Mapped[float | None] = mapped_column(default=None)
    created_at: Mapped[float]


class TinkerSampler(Table):
    """Something to sample from: a base model, or saved weights."""

    __tablename__ = "tinker_samplers"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(ForeignKey("owners.id"), index=True)
    session: Mapped[str]
    base: Mapped[str]
    weights: Mapped[str | None] = mapped_column(default=None)
    created_at: Mapped[float]
