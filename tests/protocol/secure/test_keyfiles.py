"""New key files: whole or not there, with their mode, and never over another one."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.common.errors import DiskError, IsthmusError, KeyFileError
from isthmus.protocol.secure.keyfiles import create_file
from isthmus.protocol.secure.keys import make_worker_key


class PowerCutError(BaseException):
    """Ends what is done, without a clean-up for errors."""


def fails(number: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_a_power_cut_before_the_contents_are_on_the_disk_leaves_no_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(descriptor: int) -> None:
        raise PowerCutError

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(PowerCutError):
        make_worker_key(tmp_path)
    assert not (tmp_path / "worker_key").exists()
    monkeypatch.undo()
    make_worker_key(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["worker_key"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_has_its_mode_and_one_that_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", fails(errno.EPERM))
    path = tmp_path / "key"
    create_file(path, b"one", 0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(KeyFileError, match="key exists and is not overwritten"):
        create_file(path, b"two", 0o600)
    assert path.read_bytes() == b"one"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError, match="link exists and is not overwritten"):
        create_file(tmp_path / "link", b"two", 0o600)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["key", "link"]


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [(errno.ENOSPC, DiskError, "the disk is full"), (errno.EIO, KeyFileError, "Input/output error")],
)
def test_a_file_that_cannot_be_written_is_named_and_nothing_stays_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[IsthmusError], text: str
) -> None:
    monkeypatch.setattr(os, "fsync", fails(number))
    with pytest.raises(error, match=f"{tmp_path}/key cannot be written.*{text}"):
        create_file(tmp_path / "key", b"one", 0o600)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyFileError, match="nowhere/key cannot be written"):
        create_file(tmp_path / "nowhere" / "key", b"one", 0o600)
