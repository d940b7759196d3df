"""Tokens, and the file that holds the first owner's."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from isthmus.common.errors import KeyFileError, OwnershipError
from isthmus.common.ownership import check_private

PREFIX = "tml-"
"""Tinker's SDK takes no key without it; OpenAI's takes any."""
HUB = "hub-"
"""What stands before a token's hash where that opens the tokenizers (`/hub`) and nothing else. Programs read it as
`HF_TOKEN`, and those that do not ask the daemon for it (`HF_ENDPOINT`) send it elsewhere, where it is worth nothing."""
CODE_SECONDS = 600.0
"""So long a code to sign in counts."""
_TOKEN = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}", re.ASCII)


def new_token() -> str:
    """A token: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(token: str) -> str:
    """What the database keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


class SignInCode:
    """Gives the first owner's token for a code, once and for `CODE_SECONDS`. A new code ends the one before."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._hash, self._until = "", 0.0

    def make(self) -> str:
        """A code: 256 random bits."""
        code = secrets.token_urlsafe(32)
        self._hash, self._until = hash_of(code), self._now() + CODE_SECONDS
        return code

    def take(self, code: str) -> bool:
        """Whether it is the code, which is used up then; one that is wrong uses up none."""
        is_right = self._now() < self._until and hmac.compare_digest(self._hash, hash_of(code))
        if is_right:
            self._hash = ""
        return is_right


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        KeyFileError: There is none, it is malformed, or others may read the file.
        OwnershipError: The file is another user's, or others may write to it.
    """
    try:
        check_private(path)
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError as error:
        raise KeyFileError(f"{path} is missing: start the daemon once, which makes it") from error
    except OwnershipError:
        raise
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read ({error.strerror}): check its owner and mode") from error
    if mode & 0o077:
        raise KeyFileError(f"{path} can be read by others (mode {mode & 0o777:04o}): run `chmod 600 {path}`")
    if not _TOKEN.fullmatch(text):
        raise KeyFileError(f"{path} holds no token: remove it, and the next start of the daemon makes another one")
    return text
