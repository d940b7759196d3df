"""Folders for models and private data. What another user of the machine could have put there is refused, not used.

A folder for models, keys or private data is made with mode 0700. One that is there is taken where it belongs to this
process's user (or to root, who can do anything anyway), and nobody else may write to it. The same goes for the files in
it. A symbolic link is as good as whoever made it and what it leads to. The folders above are the user's to keep: who
may rename them can put another folder in the place of this one, and that one has another owner.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from isthmus.backbone.errors import OwnershipError


def private_folder(folder: Path, *below: str) -> Path:
    """Make `folder`, and in it the chain of folders `below`, and see to it that nobody else may write there.

    Args:
        folder: The outermost folder. Those above it are made where they are missing, with the usual mode.
        below: Names of folders in each other.

    Returns:
        The innermost folder.

    Raises:
        OSError: One cannot be made.
        OwnershipError: One is another user's, or others may write to it.
    """
    path = folder
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ("", *below):
        path = path / name
        path.mkdir(mode=0o700, exist_ok=True)
        check_private(path)
    return path


def check_contents(folder: Path) -> None:
    """See to it that nobody else may write to `folder` or to what lies in it, one level deep.

    In a folder that nobody else may enter, modes of files say nothing, and their owners count alone.

    Raises:
        OSError: It cannot be read.
        OwnershipError: Something is another user's, or others may write to it.
    """
    check_private(folder)
    is_open = folder.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    for path in folder.iterdir():
        if is_open:
            check_private(path)
        else:
            check_owner(path, path.lstat())


def check_private(path: Path) -> None:
    """See to it that a file or a folder is this user's or root's, and that nobody else may write to it.

    Raises:
        OSError: There is none, or it cannot be looked at.
        OwnershipError: It is another user's, or others may write to it.
    """
    check_owner(path, path.lstat())
    found = path.stat()
    check_owner(path, found)
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OwnershipError(
            f"others may write to {path} (mode {stat.S_IMODE(found.st_mode):04o}), so what is in it cannot be trusted: "
            f"run `chmod go-w {path}` if nobody else has used it, or remove it"
        )


def check_owner(path: Path, found: os.stat_result) -> None:
    """See to it that what was found at `path` is this user's or root's.

    Raises:
        OwnershipError: It is another user's.
    """
    # Root has another number in a user namespace: that of the owner of `/`.
    if found.st_uid not in (os.geteuid(), 0, Path("/").stat().st_uid):
        raise OwnershipError(
            f"{path} belongs to another user (uid {found.st_uid}, this process is {os.geteuid()}), so it is not used: "
            "remove it, or choose another place (the cache's is ISTHMUS_CACHE)"
        )
