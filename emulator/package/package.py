"""The package: the folder that the model owner gives to a data owner, who tunes on it without any connection.

    config.json, tokenizer files, edge.safetensors, isthmus_parts.json    the edge's parts, as edge_parts.py has it
    emulator.safetensors, emulator.json                                   the emulator
    manifest.json                                                         what it is, every file's hash, the signature

    <folder>.bridge/<package's id>.safetensors      of the data owner's, beside it: their own bridge, see `Package`

It comes as files or over a session, and is trusted only after `open_package`: the signature under the manifest, then
the files against it. A file that the manifest does not name is refused like a changed one, because transformers decides
by the files of a folder what it loads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from isthmus.backbone.checkpoints.assembly import build_on_meta
from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer
from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE, TensorReader
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import export_edge_parts, load_edge_parts
from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.common.files import disk_errors, new_folder, sha256_of, sweep, write_atomic
from isthmus.common.ownership import check_private, private_folder
from isthmus.emulator.compress.bridges import Bridge
from isthmus.emulator.compress.emulator_files import load_emulator, save_emulator
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.compress.recipe import EMULATOR_FILE, EMULATOR_INFO
from isthmus.emulator.package.manifest import (
    MANIFEST_FILE,
    Distilled,
    FileInfo,
    Manifest,
    Quality,
    Tuning,
    protection_rows,
    sign,
)
from isthmus.emulator.package.verification import package_sha256, verified
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity


@dataclass(frozen=True, slots=True)
class Package:
    """A package that `open_package` has verified.

    Attributes:
        folder: Where it lies. It is a `Checkpoint` of an edge's parts as well.
        id: SHA-256 (hex) of the signed bytes. The data owner's own bridge is named after it, a linear map at the
            emulator's end that `isthmus emulator fit` makes; no owner gets it, and a package signed anew has none.
        signer: Fingerprint of the root key that certified its signer.
    """

    folder: Path
    manifest: Manifest
    id: str
    signer: Fingerprint

    @property
    def plan(self) -> SplitPlan:
        """Who holds which layers."""
        return self.manifest.split_plan

    @property
    def model(self) -> str:
        """The model's name."""
        return self.manifest.model

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the whole model."""
        return self.manifest.digest

    @property
    def checkpoint(self) -> Checkpoint:
        """The edge's parts."""
        return Checkpoint(self.folder, self.manifest.model)

    def load_emulator(self) -> Emulator:
        """The emulator, fp32, frozen and in eval mode.

        Raises:
            CheckpointError: Its file does not fit the configuration.
        """
        attention = self.manifest.attn_implementation
        return load_emulator(self.folder, self.checkpoint.config, attn_implementation=attention)

    def load_model(self) -> Any:
        """The edge's model over the emulator, fp32: the family's own class, with the whole model's layer numbers.

        The data owner's own bridge is at the emulator's end, where there is one.

        Raises:
            CheckpointError: A file does not fit the configuration, or the bridge not the package.
        """
        attention = self.manifest.attn_implementation
        emulator, bridge = self.load_emulator(), self.load_bridge()
        if bridge is not None:
            emulator.end_with(bridge)
        return load_edge_parts(self.checkpoint, self.plan, emulator, attn_implementation=attention)

    @property
    def emulator_name(self) -> str:
        """Names what `load_model` has in the cloud's place, so that a run goes on with no other bridge."""
        name = f"{self.model} emulator {self.id[:16]}"
        return f"{name}, bridge {sha256_of(self.bridge_file).hex()[:16]}" if self.bridge_file.exists() else name

    @property
    def bridge_file(self) -> Path:
        """Where the data owner's own bridge is, if there is one."""
        folder = self.folder.resolve()
        return folder.with_name(f"{folder.name}.bridge") / f"{self.id}.safetensors"

    def save_bridge(self, bridge: Bridge, about: Mapping[str, str]) -> None:
        """Keep the data owner's own bridge, and what there is to say about it; it replaces an older one.

        Raises:
            DiskError: It cannot be written; an older one is unchanged.
            OwnershipError: The folder is another user's, or others may write to it.
        """
        with disk_errors(self.bridge_file):
            private_folder(self.bridge_file.parent)
        write_atomic(self.bridge_file, save(dict(bridge.state_dict()), {**about, "package": self.id}), 0o600)

    def load_bridge(self) -> Bridge | None:
        """The data owner's own bridge; None where there is none.

        Raises:
            CheckpointError: It is damaged, or of another package.
            OwnershipError: Its folder is another user's, or others may write to it.
        """
        path = self.bridge_file
        if not path.exists():
            return None
        check_private(path.parent)
        try:
            with safe_open(path, framework="pt") as file:
                named = (file.metadata() or {}).get("package")
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _no_bridge(path, f"damaged ({error})") from error
        bridge = Bridge(self.checkpoint.config.hidden_size, torch.device("cpu"))
        if named != self.id:
            raise _no_bridge(path, f"of the package {str(named)[:16]}, not of {self.id[:16]}")
        if {name: (each.shape, each.dtype) for name, each in held.items()} != {
            name: (each.shape, each.dtype) for name, each in bridge.state_dict().items()
        }:
            raise _no_bridge(path, f"of another shape than the model's width {bridge.in_features}")
        if not all(each.isfinite().all() for each in held.values()):
            raise _no_bridge(path, "not finite")
        bridge.load_state_dict(held)
        return bridge

    def load_tokenizer(self) -> Any:
        """The model's tokenizer, with a padding token.

        Raises:
            CheckpointError: The package has no tokenizer that can be read.
        """
        return load_tokenizer(self.folder)


def write_package(
    folder: Path,
    checkpoint: Checkpoint,
    plan: SplitPlan,
    emulator: Emulator,
    *,
    signer: WorkerIdentity,
    licence: str,
    distilled: Mapping[str, Any] | None = None,
    allow_draft_tuning: bool = False,
    preset: str | None = None,
    tuning: Tuning | None = None,
    quality: Quality | None = None,
    adapters_below: bool = False,
    now: Callable[[], float] = time.time,
) -> Package:
    """Write and sign a package, whole or not at all; it replaces an older one.

    Args:
        distilled: The fields of `Distilled`; None without distillation.
        allow_draft_tuning: See `Manifest`, for this and the four after it.

    Raises:
        CheckpointError: The checkpoint is damaged or incomplete.
        ConfigError: The licence note is too long.
        DiskError: The disk is full or cannot be written; an older package is unchanged.
        FingerprintError: The signer's certificate has expired.
        PackageError: The emulator is of another middle.
        PlanError: The plan is for another number of layers.
    """
    family = family_of(checkpoint.config)
    middle_params, middle_bytes = _middle(checkpoint, plan)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as new:
        export_edge_parts(checkpoint, plan, new)
        save_emulator(emulator, new)
        files = {
            file.name: FileInfo(size=file.stat().st_size, sha256=package_sha256(file)) for file in sorted(new.iterdir())
        }
        try:
            manifest = Manifest(
                model=checkpoint.name,
                digest=checkpoint.digest(),
                n_layers=plan.n_layers,
                plan=str(plan),
                family=family.name,
                attn_implementation=emulator.attn_implementation,
                dtype=str(torch.float32).removeprefix("torch."),
                recipe=str(emulator.recipe),
                keep=emulator.recipe.keep,
                layers=tuple(emulator.layers),
                edge_params=_params_in(new / EDGE_FILE),
                emulator_params=emulator.n_params,
                middle_params=middle_params,
                emulator_bytes=files[EMULATOR_FILE].size,
                middle_bytes=middle_bytes,
                licence=licence,
                distilled=None if distilled is None else Distilled.model_validate(dict(distilled)),
                allow_draft_tuning=allow_draft_tuning,
                preset=preset,
                tuning=tuning,
                quality=quality,
                adapters_below=adapters_below,
                files=files,
                created=int(now()),
            )
        except ValidationError as error:
            fault = error.errors()[0]
            name = ".".join(map(str, fault["loc"]))
            raise ConfigError(f"the package's {name} cannot be written ({fault['msg']}): change it") from error
        manifest = Manifest.from_payload(manifest.to_payload())  # what a reader would refuse is refused here
        signer.certificate.verify(manifest.created)
        (new / MANIFEST_FILE).write_bytes(sign(manifest, signer))
    return open_package(folder, signer=signer.pin)


def open_package(folder: Path, *, signer: Fingerprint | None = None) -> Package:
    """Verify a package: the signature first, then the names, sizes and hashes of all files.

    Args:
        signer: Fingerprint of the root key that must have certified its signer; None for any. The result's `signer`
            says which it was.

    Raises:
        PackageError: The folder is no package; a file is missing, changed, a link, or not named by the manifest.
        SignerError: The package is not signed, or by somebody else.
    """
    return Package(folder, *verified(folder, signer))


def is_package(folder: Path) -> bool:
    """Whether the folder looks like a package, verified or not."""
    return (folder / MANIFEST_FILE).is_file() and (folder / EMULATOR_INFO).is_file()


def sign_package(
    folder: Path,
    signer: WorkerIdentity,
    protection: Sequence[Mapping[str, Any]] | None = None,
    *,
    now: Callable[[], float] = time.time,
) -> Package:
    """Sign a package anew, with figures that were measured with it; the weights stay as they are.

    The package's id changes, so adapters that were tuned on it before no longer name it: sign before handing it out.

    Args:
        protection: Rows of scores; see `protection_rows`. None keeps those that are there.

    Raises:
        ConfigError: A figure is missing or malformed, or there are too many.
        DiskError: The disk is full or cannot be written; the package is unchanged.
        FingerprintError: The signer's certificate has expired.
        PackageError: The package is damaged, or a row was measured with another emulator.
        SignerError: The package was signed under another root key.
    """
    sweep(folder)  # what a crash in here left would be a strange file
    package = open_package(folder, signer=signer.pin)
    manifest = package.manifest
    rows = manifest.protection
    if protection is not None:
        rows = protection_rows(protection, manifest.files[EMULATOR_FILE].sha256, manifest.tuning)
    try:
        renewed = Manifest.model_validate(dict(manifest) | {"protection": rows, "created": int(now())})
    except ValidationError as error:
        raise ConfigError(f"the figures do not fit into a manifest ({error.errors()[0]['msg']}): give fewer") from error
    signer.certificate.verify(renewed.created)
    write_atomic(folder / MANIFEST_FILE, sign(renewed, signer))
    return open_package(folder, signer=signer.pin)


def _no_bridge(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"the bridge {path} is {why}: remove it, or make it anew by `isthmus emulator fit`")


def _middle(checkpoint: Checkpoint, plan: SplitPlan) -> tuple[int, int]:
    """Number of weights of the plan's middle, and their bytes in the checkpoint."""
    config = checkpoint.config
    family = family_of(config)
    model = build_on_meta(config, family, torch.float32, None)
    reader = TensorReader(checkpoint.folder, prefix=model.base_model_prefix + ".")
    layers = model.get_submodule(family.layers_path)
    views = [
        reader.view(f"{family.layers_path}.{layer}.{name}")
        for layer in plan.cloud
        for name, _ in layers[layer].named_parameters()
    ]
    return sum(view.numel() for view in views), sum(view.nbytes for view in views)


def _params_in(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write the package again") from error
