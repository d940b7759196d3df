"""What a job's spec may say, and the configuration that it becomes.

A spec has the fields of its kind's configuration (`isthmus.edge.config`). Files in it are ids of uploaded files, or
absolute paths; adapters are names or ids of models, or absolute paths; `package` is an absolute path, or the name of
one that the cloud offers. What is uploaded is linked into the job's folder, so that a job does not change, or fail,
when a file or a model is deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from isthmus.common.bounded_values import brief
from isthmus.common.errors import ConfigError, UnknownModelError
from isthmus.common.files import disk_errors
from isthmus.common.readable import did_you_mean
from isthmus.daemon.adapter_places import HERE, LEASED, SEEN, Cut, acts_in_cloud
from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.kinds import KINDS, PACKAGE, TRAINING
from isthmus.daemon.state.tables import BaseModel, Model, StoredFile
from isthmus.edge.config.client_config import ClientConfig, FitConfig
from isthmus.edge.config.config_text import check_name, one_line
from isthmus.edge.config.data_config import ExamplesConfig
from isthmus.edge.config.settings import Settings, field_names
from isthmus.protocol.file_messages import PACKAGE_NAME, PACKAGE_NAME_NEEDS

MOST_SPEC = 1 << 16
"""Bytes of a spec, as JSON."""
INPUTS = "inputs"
"""Folder of the linked files, in a job's."""

# What a kind takes besides its configuration's fields.
_FIT = {"public": "text", "public_tokens": "tokens", "leave_out_shared": "leave_out_shared"}  # and the FitConfig's
_MORE: Mapping[str, tuple[str, ...]] = {
    "tune": tuple(_FIT),
    "evaluate": ("adapter",),
    "generate": ("adapter", "prompts"),
}
FILES = ("data", "validation", "prompts", "public")
"""Fields of a spec that name files."""
_ADAPTERS = ("adapter", "start_from")
_FOLDERS = ("package", "draft")
_ENDINGS = (".jsonl", ".csv", ".tsv")
# Numbers that make no sense beyond a number of the model (`BaseModel.facts`).
_AT_MOST = {
    "rank": "hidden_size",
    "tap_width": "hidden_size",
    "reduction": "hidden_size",
    "taps": "n_layers",
    "max_length": "longest",
    "virtual_tokens": "longest",
    "max_new_tokens": "longest",
}
# What the daemon decides, or what makes no sense in a job.
_DECIDED = {*ClientConfig.model_fields, "out", "resume", "report_to", "keep_checkpoints", "log_every", "deadline"} - {
    "codec"
}
_ELSEWHERE = {
    "draft": "tune a draft",
    "draft_learning_rate": "tune a draft",
    "defence": "defend a run",
    "defence_key": "defend a run",
    "secrets": "look for secrets",
}


def prepare(
    kind: str, model: str, spec: Mapping[str, Any], owner: str, session: Session, home: Home, settings: DaemonSettings
) -> dict[str, Path]:
    """Check a spec, as far as that takes neither torch nor a cloud.

    Returns:
        What is to be linked into the job's folder: the place there, and the file or folder.

    Raises:
        ConfigError: It does not make sense; the message is one line.
        UnknownModelError: No cloud serves the model.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind = {kind!r} is no kind of job: give {', '.join(KINDS)}")
    if len(json.dumps(dict(spec))) > MOST_SPEC:
        raise ConfigError(f"the spec has more than {MOST_SPEC} bytes: give long texts as files")
    names = [*(name for name in field_names(KINDS[kind]) if name not in _DECIDED), *_MORE.get(kind, ())]
    for name in spec:
        if name in _DECIDED or (name == "signer" and not _has_package(spec)):
            raise ConfigError(f"{name!r} is the daemon's to decide: set what daemon.toml offers, and leave it out here")
        if kind in TRAINING and name in names and name in _ELSEWHERE:
            command = "emulator tune" if kind == "tune" else "edge train"
            raise ConfigError(f"{name!r} is not offered in jobs: {_ELSEWHERE[name]} with `isthmus {command}`")
        if kind == "tune" and name not in names and name in KINDS["train"].model_fields:
            raise ConfigError(f"{name!r} is of split training alone, as tuning sends nothing: leave it out, or train")
        check_name(name, None, names)
    if kind == "generate" and "prompts" not in spec:
        raise ConfigError("'prompts' is missing: give a file of JSON Lines, each with `prompt` or `messages`")
    cloud = cloud_for(kind, model, spec, session, settings)
    links = dict(_links(spec, owner, session, home))
    placed = with_links(spec, links, Path("/"))
    config, _ = configuration(kind, placed, cloud, settings, Path("/"))
    if kind == "tune":
        fit_of(config, placed, cloud)
    base = session.get(BaseModel, model)
    _check_fits(config, spec, {} if base is None else base.facts)
    return links


def _check_fits(config: Settings, spec: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse numbers of a spec that are beyond the model's own. Raises ConfigError."""
    for name, fact in _AT_MOST.items():
        most, given = facts.get(fact), getattr(config, name, None)
        if name in spec and most is not None and given is not None and given > most:
            raise ConfigError(f"{name} = {given}: the model's {fact} is {most}, give {most} at most")


def cloud_for(
    kind: str, model: str, spec: Mapping[str, Any], session: Session, settings: DaemonSettings
) -> ClientConfig | None:
    """The cloud that a job asks; None for tuning on a package that is named. Raises what `cloud_of` does."""
    return None if kind == "tune" and _has_package(spec) else cloud_of(model, session, settings)


def _has_package(spec: Mapping[str, Any]) -> bool:
    """Whether a spec has a package of this machine's, and not one that a cloud offers."""
    return "/" in str(spec.get(PACKAGE, ""))


def cloud_of(model: str, session: Session, settings: DaemonSettings) -> ClientConfig:
    """How to reach the cloud that serves a base model.

    Raises:
        UnknownModelError: None does.
    """
    found = session.get(BaseModel, model)
    cloud = None if found is None else settings.clouds.get(found.cloud)
    if cloud is not None:
        return cloud
    served = session.scalars(select(BaseModel.name).where(BaseModel.cloud.in_(settings.clouds))).all()
    known = "no cloud of daemon.toml has answered yet: wait until `isthmus edge daemon status` names its model"
    known = f"the clouds serve {', '.join(sorted(served))}" if served else known
    parts = (f"no cloud serves the model {model!r}: {known}", did_you_mean(model, served))
    raise UnknownModelError("; ".join(part for part in parts if part))


def configuration(
    kind: str, spec: Mapping[str, Any], cloud: ClientConfig | None, settings: DaemonSettings, folder: Path
) -> tuple[Settings, dict[str, str | None]]:
    """The configuration that a spec becomes, and what its kind takes besides (`adapter`, `prompts`).

    Args:
        spec: Its files are paths.
        cloud: None for a job that connects to nothing. Tuning takes its package, which its own key must have signed.
        folder: The job's.

    Raises:
        ConfigError: A value does not make sense.
    """
    cls = KINDS[kind]
    decided: dict[str, Any] = {}
    more = {name: spec.get(name) for name in _MORE.get(kind, ())}
    values: dict[str, Any] = {}
    if cloud is not None and kind == "tune":
        decided = {"package": str(folder / PACKAGE), "signer": cloud.cloud}
    elif cloud is not None:
        values = cloud.model_dump(mode="json", exclude_unset=True)
    values |= {name: value for name, value in spec.items() if name not in more} | decided
    if kind in TRAINING:
        values |= {"out": str(folder / "run"), "resume": True}
        values.setdefault("save_every", settings.save_every)
        if values.get("validation") is not None:
            values.setdefault("eval_every", values["save_every"])
    try:
        return cls.model_validate(values), more
    except ValidationError as error:
        raise ConfigError(one_line(error, cls)) from error


def fit_of(config: Settings, spec: Mapping[str, Any], cloud: ClientConfig | None) -> dict[str, Any] | None:
    """What the fields of the `FitConfig` of a job's bridge are, but for the cloud and the package; None for no bridge.

    Args:
        config: That of the tuning, whose private data no public text may share a run with.
        spec: Its files are paths.

    Raises:
        ConfigError: A value does not make sense.
    """
    given = {field: spec[name] for name, field in _FIT.items() if spec.get(name) is not None}
    if not given:
        return None
    if "text" not in given:
        raise ConfigError("'public' is missing: give the public texts that the cloud may be asked about")
    if cloud is None:
        raise ConfigError(
            "public = … is for a package that the cloud offers: for one of this machine, `isthmus emulator fit` fits a "
            "bridge before the job"
        )
    told = {"validation", *ExamplesConfig.model_fields}
    private = config.model_dump(mode="json", exclude_unset=True, include=told)
    block = FitConfig.model_fields["block"].default
    private["block"] = min(block, getattr(config, "max_length", block))
    try:
        FitConfig.model_validate({"cloud": cloud.cloud, "package": "/", **private, **given})
    except ValidationError as error:
        raise ConfigError(f"public: {one_line(error, FitConfig)}") from error
    return private | given


def make_links(folder: Path, links: Mapping[str, Path]) -> None:
    """Link files and folders into a job's folder.

    Raises:
        DiskError: It cannot be written.
    """
    with disk_errors(folder):
        for place, source in links.items():
            target = folder / INPUTS / place
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if source.is_dir():
                shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True)
            else:
                os.link(source, target)


def with_links(spec: Mapping[str, Any], links: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """The spec with the places in a job's folder of what is linked there."""
    places = {Path(place).stem: str(folder / INPUTS / place) for place in links}
    return {**spec, **places}


def links_in(folder: Path) -> dict[str, Path]:
    """What `make_links` has made in a job's folder."""
    inputs = folder / INPUTS
    return {path.name: path for path in inputs.iterdir()} if inputs.is_dir() else {}


def adapters_of(spec: Mapping[str, Any], base: BaseModel | None) -> str:
    """Where the adapters of a job with this spec, whose files are paths, are (`isthmus.daemon.adapter_places`)."""
    if spec.get("leased") not in (None, "none", []) or spec.get("lend_dead") or spec.get("plugged"):
        return LEASED
    cut = None if base is None else Cut.of(base.facts)
    given = spec.get("adapter")
    acts = spec.get("sites") not in (None, "none", []) or (given and cut and acts_in_cloud(Path(given), cut))
    return SEEN if acts else HERE


def names_paths(spec: Mapping[str, Any]) -> bool:
    """Whether a spec names files by their paths, or a hub: what is this machine's and not an owner's."""
    values = [spec[name] for name in (*FILES, *_ADAPTERS, *_FOLDERS) if isinstance(spec.get(name), str)]
    return any(("/" in value and not value.startswith("ft:")) or value.startswith("hub:") for value in values)


def _links(spec: Mapping[str, Any], owner: str, session: Session, home: Home) -> Iterator[tuple[str, Path]]:
    """The place in the job's folder, and the file or folder, of everything in a spec that is the daemon's."""
    for name in (*FILES, *_ADAPTERS, *_FOLDERS):
        value = spec.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ConfigError(f"{name} = {brief(value)} is no text: give a file's id, or an absolute path")
        if name in FILES and value.startswith("file-"):
            stored = session.scalar(select(StoredFile).where(StoredFile.id == value, StoredFile.owner == owner))
            if stored is None:
                raise ConfigError(f"{name} = {brief(value)}: there is no such file; upload one first")
            ending = Path(stored.filename).suffix.lower()
            yield name + (ending if ending in _ENDINGS else _ENDINGS[0]), home.file(stored.id)
        elif name == PACKAGE and "/" not in value:
            if not PACKAGE_NAME.fullmatch(value):
                raise ConfigError(f"{name} = {brief(value)}: {PACKAGE_NAME_NEEDS}; or give a folder's absolute path")
        elif name in _ADAPTERS and not value.startswith("/"):
            yield name, _adapter(name, value, owner, session, home)
        else:
            _check_path(name, value, home)


def _adapter(name: str, value: str, owner: str, session: Session, home: Home) -> Path:
    found = session.scalar(
        select(Model).where(or_(Model.name == value, Model.id == value), Model.owner == owner, Model.deleted.is_(False))
    )
    if found is None:
        raise ConfigError(f"{name} = {brief(value)}: there is no such model; give the name of a tuned one")
    return home.path / found.folder


def _check_path(name: str, value: str, home: Home) -> None:
    if value.startswith("hub:") or (name == "draft" and value in ("none", "ngram")):
        return
    path = Path(value)
    if not path.is_absolute():
        raise ConfigError(
            f"{name} = {brief(value)} is neither an id nor an absolute path: the daemon has its own folder"
        )
    if path.resolve().is_relative_to(home.path.resolve()):
        raise ConfigError(f"{name} = {brief(value)} is inside the daemon's home: give an id instead")
