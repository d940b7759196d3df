"""Who may change what lies at a path. What another user of the machine could have put there is refused, not used.

The rules for a file or a folder:

1. It belongs to this process's user, or to root, who can do anything anyway.
2. Not everybody may write to it.
3. Its group may write to it only where that group is the user's own: the one that Debian and Fedora make for each user,
   with the user's name and no other members. Their umask of 002 lets it write to everything that the user makes, and
   Debian's OpenSSH makes the same exception (user-group-modes.patch). Who else has the group as primary one is not
   looked up. An access control list, which may name others, ends the exception.
4. A symbolic link is as good as whoever made it and what it leads to.

For keys, and for what says whom to trust, the folders above keep the rules as well (`intruder`), but for one that is
sticky, as /tmp is, since there nobody can rename or remove what another user has made. For caches and runs they are the
user's to keep: who may rename them can put another folder in the place of this one, and that one has another owner.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from pathlib import Path

from isthmus.common.errors import OwnershipError


def private_folder(folder: Path, *below: str) -> Path:
    """Make `folder`, and in it the chain of folders `below`, with mode 0700, and see to it that nobody else may write.

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
        with contextlib.suppress(FileNotFoundError):  # another process of this user has removed it meanwhile
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
    wrong = _others_write(path, found)
    if wrong is not None:
        raise OwnershipError(
            f"{path} {wrong}, so what is in it cannot be trusted: run `chmod go-w {path}` if nobody else has used it, "
            "or remove it"
        )


def check_owner(path: Path, found: os.stat_result) -> None:
    """See to it that what was found at `path` is this user's or root's.

    Raises:
        OwnershipError: It is another user's.
    """
    wrong = _others_own(found)
    if wrong is not None:
        raise OwnershipError(
            f"{path} {wrong}, so it is not used: remove it, or choose another place (the cache's is ISTHMUS_CACHE)"
        )


def fault(target: Path | int, found: os.stat_result) -> str | None:
    """Why another user may change a file or a folder, as what is said of it; None if only this user and root may.

    Args:
        target: Its path, or a descriptor of it.
        found: What was found there.
    """
    return _others_own(found) or _others_write(target, found)


def intruder(folder: Path) -> str | None:
    """Why another user may change what is in a folder, or put another one in its place; None if none may.

    Links on the way are followed, and must be this user's or root's as well.

    Raises:
        OSError: The folder, or one above it, is not there or may not be looked at.
    """
    way = folder.absolute()
    for place in (way, *way.parents):
        wrong = _others_own(place.lstat()) if place.is_symlink() else None
        if wrong is not None:
            return f"the link {place} {wrong}"
    real = way.resolve(strict=True)
    for place in (real, *real.parents):
        status = place.stat()
        sticky = status.st_mode & stat.S_ISVTX and place != real
        wrong = _others_own(status) if sticky else fault(place, status)
        if wrong is not None:
            return f"{place} {wrong}"
    return None


def _others_own(found: os.stat_result) -> str | None:
    # Root has another number in a user namespace: that of the owner of `/`.
    if found.st_uid in (os.geteuid(), 0, Path("/").stat().st_uid):
        return None
    return f"belongs to another user (uid {found.st_uid}, this process is {os.geteuid()})"


def _others_write(target: Path | int, found: os.stat_result) -> str | None:
    mode = f"(mode {stat.S_IMODE(found.st_mode):04o})"
    if found.st_mode & stat.S_IWOTH:
        return f"can be written by everybody {mode}"
    if found.st_mode & stat.S_IWGRP and (_has_acl(target) or not _is_own_group(found.st_gid)):
        return f"can be written by its group {found.st_gid}, which may have other members {mode}"
    return None


def _is_own_group(gid: int) -> bool:
    """Whether a group is this user's alone; in a container, where it may have no name, by its number."""
    if gid != os.getegid():
        return False
    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return gid == os.geteuid()
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def _has_acl(target: Path | int) -> bool:
    """Whether an access control list names others: the mode's bits of the group are then the most that they may do."""
    try:
        return bool(os.getxattr(target, "system.posix_acl_access"))
    except (OSError, AttributeError):  # there is none, or the system has no such lists
        return False
