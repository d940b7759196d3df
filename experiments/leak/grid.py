"""The grid: which runs are made, and from which sides each is attacked. A TOML file, or flags.

[[rows]]
name = "cut 2"
edge_layers = "2:2"
views = ["known", "tuned", "tuned+8"]
also_codecs = ["int4"]
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError, PlanError
from isthmus.edge.config.config_text import read_toml
from isthmus.experiments.harness.bench_flags import names_of
from isthmus.experiments.leak.leak_settings import LeakSettings
from isthmus.privacy.defences.defence_options import Decoys, DefenceOptions, Rotation, check_together, read_defence
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

DOCUMENTED = Path(__file__).with_name("grid.toml")
"""The grid that the documents name."""

Mode = Literal["split", "top-only", "emulator"]
_VIEW = re.compile(r"known|tuned(\+[1-9]\d*)?")


class Row(BaseModel):
    """One run of the grid.

    Attributes:
        name: Its name; no other row has the same.
        edge_layers: The split plan; of an emulator, the layers that are tuned.
        mode: `split`: adapters in the edge's first and last layers. `top-only`: in the last ones alone, so that no
            gradient goes up. `emulator`: nothing goes up.
        codec: Of what goes up and down.
        defence: As `edge train --defence` has them; `decoys` without its file, which is generated.
        data: The task.
        steps: Optimizer steps.
        views: From which sides it is attacked. `known`: the attacker has the edge's own layers as they are after
            training. `tuned`: the front is private, and it has the base weights alone; `tuned+8`: and eight texts that
            it knows were sent.
        also_codecs: Codecs in which the attacked texts are sent once more with the trained adapter.
        package: Folder of an emulator's package; None to build one of the preset `fidelity`. One with advice for tuning
            is tuned at its rate and rank, for the row's steps and length, with a bridge fitted to public texts, and
            `edge_layers` is that of the run that it is compared with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    edge_layers: str = "2:2"
    mode: Mode = "split"
    codec: str = "fp32"
    defence: tuple[str, ...] = ()
    data: Literal["e2e", "sst2"] = "e2e"
    steps: int = Field(100, ge=1)
    views: tuple[str, ...] = ("known",)
    also_codecs: tuple[str, ...] = ()
    package: Path | None = None

    @field_validator("defence", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for codec in (self.codec, *self.also_codecs):
            if codec not in ACTIVATION_CODECS:
                raise ValueError(f"codec {codec!r} is not known: choose of {', '.join(ACTIVATION_CODECS)}")
        for view in self.views:
            if not _VIEW.fullmatch(view):
                raise ValueError(f"view {view!r} is not known: write known, tuned, or tuned+8 for eight known texts")
        if not self.views:
            raise ValueError("views is empty: name at least one, known say")
        check_together(self.defences())
        if self.mode == "emulator" and (self.defence or self.also_codecs or self.codec != "fp32"):
            raise ValueError("an emulator sends nothing: leave defence, codec and also_codecs out")
        if any(isinstance(each, Rotation) for each in self.defences()):
            raise ValueError(
                "no attack of the ledger knows a secret rotation, which a linear map from known texts undoes: leave it "
                "out"
            )
        if self.n_decoys and self.data == "sst2":
            raise ValueError("decoys have the texts' prompts, and one of sst2 holds the whole text: take data e2e")
        if self.package is not None and self.mode != "emulator":
            raise ValueError(f"package is an emulator's, and mode is {self.mode}: leave it out")
        if self.also_codecs and self.defence:
            raise ValueError("also_codecs sends without defences: leave it out, or make it a row of its own")
        if self.mode == "top-only" and any(view != "known" for view in self.views):
            raise ValueError("mode top-only does not tune the first layers, so its front is known: give no other view")
        return self

    def defences(self, decoys: str = "-") -> list[DefenceOptions]:
        """The options of each defence.

        Args:
            decoys: The file of decoys.

        Raises:
            ValueError: One does not make sense.
        """
        return [read_defence(_with_file(text, decoys)) for text in self.defence]

    @property
    def n_decoys(self) -> int:
        """Decoys that are sent with each text."""
        return sum(each.count for each in self.defences() if isinstance(each, Decoys))

    @property
    def defence_text(self) -> str:
        """The defences in one text; "none" without."""
        return " + ".join(self.defence) or "none"

    @property
    def n_known(self) -> int:
        """Texts that the best informed view knows to have been sent."""
        return max(known_texts(view) for view in self.views)

    def plan(self, n_layers: int) -> SplitPlan:
        """The split plan.

        Raises:
            PlanError: It does not fit a model of so many layers, or leaves nothing to train on.
        """
        try:
            plan = SplitPlan.parse(self.edge_layers, n_layers)
        except PlanError as error:
            raise PlanError(f"row {self.name!r}: {error}") from error
        if not plan.bottom or not plan.top:
            raise PlanError(
                f"row {self.name!r}: edge_layers {self.edge_layers} leaves an end of the edge without layers, and the "
                "ledger tunes both: give each one at least"
            )
        return plan


def known_texts(view: str) -> int:
    """How many sent texts an attacker with this view knows."""
    return int(view.partition("+")[2] or 0)


def read_grid(settings: LeakSettings) -> list[Row]:
    """The rows that the settings ask for.

    Raises:
        ConfigError: The file cannot be read, a value does not make sense, two rows have one name, or flags are given
            that do not go together.
    """
    flags = {
        name: value
        for name in ("edge_layers", "codec", "defence", "mode", "package", "data")
        if (value := getattr(settings, name)) is not None
    }
    if flags and (settings.grid is not None or settings.row):
        raise ConfigError(f"--{next(iter(flags)).replace('_', '-')} makes rows of its own: leave --grid and --row out")
    rows = _from_flags(flags) if flags else _from_files(settings.grid or [DOCUMENTED])
    if settings.steps is not None:
        rows = [row.model_copy(update={"steps": settings.steps}) for row in rows]
    chosen = settings.row or [row.name for row in rows]
    unknown = sorted(set(chosen) - {row.name for row in rows})
    if unknown:
        raise ConfigError(f"--row {unknown[0]!r} is not in the grid: choose of {', '.join(row.name for row in rows)}")
    return [row for row in rows if row.name in chosen]


def _from_files(paths: Sequence[Path]) -> list[Row]:
    rows = [row for path in paths for row in _from_file(path)]
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{', '.join(map(str, paths))}: two rows are named {twice!r}: rename one")
    return rows


def _from_file(path: Path) -> list[Row]:
    values = read_toml(path)
    entries = values.pop("rows", None)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} has no rows: write each as a table [[rows]] with a name")
    return [_row(entry, f"{path}, row {number}", values) for number, entry in enumerate(entries, 1)]


def _from_flags(flags: Mapping[str, Any]) -> list[Row]:
    plans = names_of(flags.get("edge_layers") or "2:2", "edge-layers")
    codecs = names_of(flags.get("codec") or "fp32", "codec")
    shared = {name: flags[name] for name in ("defence", "mode", "package", "data") if name in flags}
    said = [
        each.name if isinstance(each, Path) else each if isinstance(each, str) else " ".join(each)
        for each in shared.values()
    ]
    return [
        _row({"name": " ".join([plan, codec, *said]), "edge_layers": plan, "codec": codec, **shared}, "the flags", {})
        for plan in plans
        for codec in codecs
    ]


def _row(entry: Any, where: str, defaults: Mapping[str, Any]) -> Row:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is no table: write it as [[rows]] with a name")
    try:
        return Row.model_validate({**defaults, **entry})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{said}") from None


def _with_file(text: str, decoys: str) -> str:
    name, _, rest = text.strip().partition(":")
    if name != Decoys.name or "file=" in rest:
        return text
    return f"{name}:{','.join(filter(None, (rest, f'file={decoys}')))}"


def file_names(rows: Sequence[Row]) -> list[str]:
    """The names of the rows' files: no two rows have one."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-") for row in rows]
    digests = [hashlib.sha256(row.name.encode()).hexdigest()[:6] for row in rows]
    return [f"{slug}-{digest}.json" for slug, digest in zip(slugs, digests, strict=True)]
