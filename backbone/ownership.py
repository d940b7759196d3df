"""Who may change what lies at a path: whoever can write a folder puts files and links there in our name.

The rule is that of sshd's StrictModes, but that a group's members are trusted, as whoever chose the group has chosen
them: a folder and those above it belong to this user or to root, and others cannot write them. They may write a folder
above that is sticky, as /tmp is, since there nobody can rename or remove what another user has made.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def intruder(folder: Path) -> str | None:
    """Why another user may change what is in a folder; None if only this user, its group and root may.

    Links on the way are followed, and must be this user's or root's as well.

    Raises:
        OSError: the folder, or one above it, is not there or may not be looked at.
    """
    way = folder.absolute()
    for place in (way, *way.parents):
        if place.is_symlink() and place.lstat().st_uid not in _trusted():
            return f"the link {place} belongs to another user (uid {place.lstat().st_uid})"
    real = way.resolve(strict=True)
    for place in (real, *real.parents):
        status = place.stat()
        if status.st_uid not in _trusted():
            return f"{place} belongs to another user (uid {status.st_uid})"
        sticky = status.st_mode & stat.S_ISVTX and place != real
        if status.st_mode & stat.S_IWOTH and not sticky:
            return f"{place} can be written by everybody (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def writable_by_others(status: os.stat_result) -> str | None:
    """Why another user may change a file; None if only this user, its group and root may."""
    if status.st_uid not in _trusted():
        return f"it belongs to another user (uid {status.st_uid})"
    if status.st_mode & stat.S_IWOTH:
        return f"it can be written by everybody (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _trusted() -> set[int]:
    """This user and root, which in a user namespace has another number: that of the owner of `/`."""
    return {os.geteuid(), 0, Path("/").stat().st_uid}
