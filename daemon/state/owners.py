"""Who may ask: each owner has a token, of which the database knows the hash alone."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import select

from isthmus.common.errors import ConfigError
from isthmus.common.files import disk_errors, write_atomic
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import Owner
from isthmus.daemon.tokens import HUB, hash_of, new_token, read_token

FIRST = "first"
"""The name of the owner whose token is in the home."""
READ_EVERY = 1.0
"""Seconds after which the daemon knows what has changed of tokens."""
_REVOKED = "revoked "
"""What stands before an owner's id in the place of a token's hash, which is hexadecimal."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def first_owner(database: Database, path: Path) -> Owner:
    """The owner whose token is in the file at `path`; both are made where they are missing.

    A file that was removed or changed gives the owner another token, and ends the old one.

    Raises:
        KeyFileError: The file holds something else, or others may read it.
        OwnershipError: The file is another user's, or others may write to it.
        DiskError: It cannot be written.
    """
    with disk_errors(path):
        if not os.path.lexists(path):
            write_atomic(path, f"{new_token()}\n".encode(), 0o600)
    return _put(database, FIRST, read_token(path))


def give_token(database: Database, name: str) -> str:
    """A new token for an owner, who is made where there is none. The owner's old token ends.

    Raises:
        ConfigError: `name` is no name, or that of the first owner, whose token is a file.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no owner's name: give up to 64 letters, digits, dots, dashes or underscores")
    if name == FIRST:
        raise ConfigError(f"the token of {FIRST!r} is in the home's file `token`: remove it and start the daemon anew")
    token = new_token()
    _put(database, name, token)
    return token


def revoke_token(database: Database, name: str) -> None:
    """End an owner's token. What is theirs stays, and their jobs go on; another token makes it theirs again.

    Raises:
        ConfigError: There is no such owner, or it is the first one, whose token is a file.
    """
    if name == FIRST:
        raise ConfigError(f"the token of {FIRST!r} is in the home's file `token`: remove it and start the daemon anew")
    with database.session() as session:
        owner = session.scalar(select(Owner).where(Owner.name == name))
        if owner is None:
            names = ", ".join(session.scalars(select(Owner.name).where(Owner.name != FIRST).order_by(Owner.name)))
            raise ConfigError(f"there is no owner {name!r}: those that there are, are {names or 'none'}")
        owner.token_sha256 = f"{_REVOKED}{owner.id}"


def list_owners(database: Database) -> list[Owner]:
    """All owners, the oldest first."""
    with database.reading() as session:
        return list(session.scalars(select(Owner).order_by(Owner.created_at)))


def is_revoked(owner: Owner) -> bool:
    """Whether an owner has no token."""
    return owner.token_sha256.startswith(_REVOKED)


def _put(database: Database, name: str, token: str) -> Owner:
    with database.session() as session:
        owner = session.scalar(select(Owner).where(Owner.name == name))
        if owner is None:
            owner = Owner(id=f"owner-{secrets.token_hex(12)}", name=name, created_at=time.time())
            session.add(owner)
        owner.token_sha256 = hash_of(token)
    return owner


class Owners:
    """Finds the owner of a token, for one thread. What the database says is read anew once a second at most.

    A token is looked up by its hash: how long that takes tells nothing of the tokens that there are.
    """

    def __init__(self, database: Database, now: Callable[[], float] = time.monotonic) -> None:
        self._database, self._now = database, now
        self._known: dict[str, Owner] = {}
        self._read_at: float | None = None

    def find(self, token: str, *, hub: bool = False) -> Owner | None:
        """Whose token it is; None for nobody's. One for the `hub` counts only there (`isthmus.daemon.tokens.HUB`)."""
        if self._read_at is None or self._now() - self._read_at >= READ_EVERY:
            with self._database.reading() as session:
                owners = session.scalars(select(Owner))
                self._known = {owner.token_sha256: owner for owner in owners if not is_revoked(owner)}
            self._read_at = self._now()
        return self._known.get(token[len(HUB) :] if hub and token.startswith(HUB) else hash_of(token))
