"""Looking at a package before anything of it is loaded: signature, names, sizes, hashes, and its model. No torch."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from isthmus.backbone.checkpoints.sources import Checkpoint, is_part
from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE
from isthmus.common.errors import PackageError
from isthmus.common.files import sha256_of
from isthmus.emulator.compress.recipe import EMULATOR_FILE, EMULATOR_INFO
from isthmus.emulator.package.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest, verify
from isthmus.protocol.secure.keys import Fingerprint

_AGAIN = "fetch the package again"


def verified(folder: Path, signer: Fingerprint | None) -> tuple[Manifest, str, Fingerprint]:
    """Verify a package, as `open_package` says.

    Returns:
        The manifest; the package's id; the fingerprint of the root key that certified its signer.

    Raises:
        PackageError: The folder is no package; a file is missing, changed, a link, or not named by the manifest.
        SignerError: The package is not signed, or by somebody else.
    """
    manifest, identity, root = verify(_read_manifest(folder), signer)
    try:
        there = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    except OSError as error:
        raise PackageError(f"{folder} cannot be read ({error.strerror}): check the folder's rights") from error
    for name in sorted(there.keys() - manifest.files.keys() - {MANIFEST_FILE}):
        raise PackageError(f"{folder} holds {name!r}, which does not belong to the package: remove it, or {_AGAIN}")
    for name, info in sorted(manifest.files.items()):
        if not (is_part(name) or name in (EMULATOR_FILE, EMULATOR_INFO)):
            raise PackageError(f"{MANIFEST_FILE} names {name}, which is no file of a package; {_AGAIN}")
        if name not in there:
            raise PackageError(f"{folder} lacks {name}: {_AGAIN}")
        if not stat.S_ISREG(there[name].st_mode):
            raise PackageError(f"{folder / name} is not a plain file; {_AGAIN}")
        if there[name].st_size != info.size:
            raise PackageError(
                f"{folder / name} has {there[name].st_size} bytes, the manifest says {info.size}; {_AGAIN}"
            )
    for name in (EDGE_FILE, EMULATOR_FILE, EMULATOR_INFO):
        if name not in manifest.files:
            raise PackageError(f"{MANIFEST_FILE} names no {name}; {_AGAIN}")
    for name, info in sorted(manifest.files.items()):
        if package_sha256(folder / name) != info.sha256:
            raise PackageError(f"{folder / name} was changed: its SHA-256 is not the manifest's; {_AGAIN}")
    return manifest, identity, root


def check_package_fits(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Make sure that a package was made of this model.

    Raises:
        PackageError: It was made of another one.
    """
    digest = checkpoint.digest()
    if digest != manifest.digest:
        raise PackageError(
            f"the package was made of {manifest.model} with the digest {manifest.digest[:16]}, but {checkpoint.name} "
            f"has {digest[:16]}: name the model that it was made of, or build a package of this one"
        )


def package_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file of a package.

    Raises:
        PackageError: It cannot be read.
    """
    try:
        return sha256_of(path).hex()
    except OSError as error:
        raise PackageError(f"{path} cannot be read ({error.strerror}): check the file's rights") from error


def _read_manifest(folder: Path) -> bytes:
    """The bytes of `manifest.json`, which must be a plain file of a bounded size."""
    path = folder / MANIFEST_FILE
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123  # a descriptor
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PackageError(f"{path} is not a plain file; {_AGAIN}")
            data = file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise PackageError(
            f"{folder} is not a package ({MANIFEST_FILE}: {error.strerror}); name a folder that "
            "`isthmus emulator build` or `fetch` wrote"
        ) from error
    if len(data) > MAX_MANIFEST:
        raise PackageError(f"{path} is larger than {MAX_MANIFEST} bytes; {_AGAIN}")
    return data
