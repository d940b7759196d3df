"""Where the passphrase of a private key comes from: a file, or whoever is at the terminal.

It is never an argument or an environment variable itself: other processes of the user can read those.
"""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.common.errors import KeyFileError
from isthmus.protocol.secure.keyfiles import read_private

LEAST_CHARACTERS = 12
"""Of a new passphrase: a thief of the file can try many a second, as few rounds stand between (docs/security.md)."""
MOST_BYTES = 1023
"""What OpenSSL takes."""


@dataclass(slots=True)
class Passphrase:
    """Says where the passphrase of one kind of key comes from, for new keys and for old ones.

    Attributes:
        whose: root, issuer, worker or edge; each has a file of its own, and no other key's is tried.
        file: A private file that holds it; None for the one that the variable ISTHMUS_…_PASSPHRASE_FILE names. The end
            of its line, LF or CR LF, is no part of it.
        asks: Whether to ask at this process's terminal where there is no file: once for each key.
    """

    whose: str
    file: Path | None = None
    asks: bool = False
    _said: dict[Path, bytes] = field(default_factory=dict, repr=False)  # at the terminal, by the key's file

    @property
    def variable(self) -> str:
        """The environment variable that names the file."""
        return f"ISTHMUS_{self.whose.upper()}_PASSPHRASE_FILE"

    def of(self, path: Path) -> bytes:
        """The passphrase of the key in an encrypted file.

        Raises:
            KeyFileError: There is no file with it and nobody to ask, or the file cannot be used.
        """
        given = self._from_file()
        if given is None and path not in self._said:
            if not self._may_ask():
                here = ", or run this at a terminal" if self.asks else ""
                raise KeyFileError(f"{path} has a passphrase: name a file that holds it in {self.variable}{here}")
            self._said[path] = _asked(f"Passphrase of {path}: ")
        return given if given is not None else self._said[path]

    def for_new(self, path: Path) -> bytes:
        """The passphrase for a key that is being made; asked for twice.

        Raises:
            KeyFileError: As for `of`; or it is too short or too long, or not the same twice.
        """
        given = self._from_file()
        if given is None:
            if not self._may_ask():
                raise KeyFileError(
                    f"{path} is to have a passphrase, and this is no terminal to ask for it: name a file that holds "
                    f"it in {self.variable}, or give --no-passphrase for a key without one"
                )
            given = self._said[path] = _asked(f"New passphrase for {path}: ")
            if _asked("The same again: ") != given:
                raise KeyFileError(f"the two passphrases for {path} differ: run the command again")
        if len(given) > MOST_BYTES or len(given.decode(errors="replace")) < LEAST_CHARACTERS:
            raise KeyFileError(
                f"the passphrase for {path} has to have {LEAST_CHARACTERS} characters at least, and {MOST_BYTES} bytes "
                "at most: take six random words"
            )
        return given

    def wrong(self, path: Path) -> KeyFileError:
        """The error where it does not open the key; one that was typed is forgotten."""
        self._said.pop(path, None)
        return KeyFileError(f"{path} does not open with this passphrase of the {self.whose} key: try another")

    def _from_file(self) -> bytes | None:
        named = self.file or Path(os.environ.get(self.variable, ""))
        if named == Path():
            return None
        held = read_private(named.expanduser(), "it was named as the file of a passphrase")
        return held.removesuffix(b"\r\n" if held.endswith(b"\r\n") else b"\n")

    def _may_ask(self) -> bool:
        return self.asks and sys.stdin is not None and sys.stdin.isatty()


def _asked(prompt: str) -> bytes:
    try:
        return getpass.getpass(prompt).encode(errors="surrogateescape")
    except EOFError as error:
        raise KeyFileError("no passphrase was given: run the command again") from error
