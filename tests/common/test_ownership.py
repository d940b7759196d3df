"""Another user of the same machine: what they put in the way of caches, runs and locks is refused, not used.

The other user is a process with another uid; this process, as root or as an ordinary user, is the one that is attacked.
"""

from __future__ import annotations

import grp
import os
import pwd
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.models.tiny import tiny_checkpoint
from support.other_user import NOBODY, Attack

from isthmus.backbone.checkpoints import sources
from isthmus.common import files, ownership
from isthmus.common.errors import ConfigError, DiskError, KeyFileError, OwnershipError
from isthmus.common.files import claim, locked, new_folder, write_atomic
from isthmus.common.ownership import check_contents, check_private, fault, intruder, private_folder
from isthmus.edge.span_cache.cache_store import SpanStore
from isthmus.protocol.secure.keys import generate_edge, load_edge

# What this user alone has ---------------------------------------------------------------------------------------------


def test_folders_are_made_for_this_user_alone(place: Path) -> None:
    folder = private_folder(place / "cache", "edge", "pin")
    assert folder == place / "cache" / "edge" / "pin"
    for made in (folder, folder.parent, folder.parent.parent):
        assert made.stat().st_mode & 0o777 == 0o700
    assert private_folder(place / "cache", "edge", "pin") == folder
    (folder / "file").write_text("mine")
    (folder / "file").chmod(0o666)  # nobody else comes so far
    check_contents(folder)


@pytest.mark.parametrize("mode", [0o702, 0o757, 0o777, 0o1777])
def test_a_folder_that_everybody_may_write_to_is_refused(place: Path, mode: int) -> None:
    folder = private_folder(place / "cache")
    folder.chmod(mode)
    with pytest.raises(OwnershipError, match=r"cache can be written by everybody .*chmod go-w"):
        private_folder(place / "cache")
    folder.chmod(0o755)
    private_folder(place / "cache")


def test_a_file_that_others_may_write_to_is_refused_where_they_can_reach_it(place: Path) -> None:
    folder = private_folder(place / "cache")
    (folder / "config.json").write_text("{}")
    (folder / "config.json").chmod(0o646)
    check_contents(folder)
    folder.chmod(0o755)
    with pytest.raises(OwnershipError, match=r"config\.json"):
        check_contents(folder)
    (folder / "config.json").chmod(0o644)
    check_contents(folder)


def test_ones_own_link_to_another_disk_is_taken(place: Path) -> None:
    private_folder(place / "disk")
    (place / "cache").symlink_to(place / "disk")
    assert private_folder(place / "cache", "edge").is_dir()


# Groups ---------------------------------------------------------------------------------------------------------------

USER, GROUP, OTHERS = 64_001, 64_001, 64_002
Group = Callable[..., None]


@pytest.fixture
def ordinary(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    """This process as an ordinary user with a umask of 002; the call says what the system knows of its group."""

    def known(name: str | None, *members: str) -> None:
        def group(gid: int) -> grp.struct_group:
            if name is None:
                raise KeyError(gid)
            return grp.struct_group((name, "x", gid, list(members)))

        user = pwd.struct_passwd(("ann", "x", USER, GROUP, "", "/", "/bin/sh"))
        monkeypatch.setattr(ownership.grp, "getgrgid", group)
        monkeypatch.setattr(ownership.pwd, "getpwuid", lambda uid: user)

    mask = os.umask(0o002)
    os.setegid(GROUP)
    os.seteuid(USER)
    yield known
    os.seteuid(0)
    os.setegid(0)
    os.umask(mask)


@pytest.mark.root
@pytest.mark.parametrize("known", [("ann",), ("ann", "ann"), (None,)])
def test_a_users_own_group_may_write(place: Path, ordinary: Group, known: tuple[str, ...]) -> None:
    ordinary(*known)
    folder = place / "cache"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert (folder.stat().st_mode & 0o777, (folder / "config.json").stat().st_mode & 0o777) == (0o775, 0o664)
    check_contents(private_folder(folder))
    assert intruder(folder) is None
    with (folder / "config.json").open() as file:
        assert fault(file.fileno(), os.fstat(file.fileno())) is None


@pytest.mark.root
@pytest.mark.parametrize("known", [("staff",), ("ann", "ann", "bob"), ("ann", "bob"), ("nogroup",)])
def test_a_group_that_may_have_other_members_may_not_write(
    place: Path, ordinary: Group, known: tuple[str, ...]
) -> None:
    ordinary(*known)
    folder = place / "cache"
    folder.mkdir()
    with pytest.raises(OwnershipError, match=rf"cache can be written by its group {GROUP}.*0775.*chmod go-w"):
        private_folder(folder)
    assert "can be written by its group" in str(intruder(folder))
    (folder / "home").mkdir(mode=0o700)
    assert str(folder) in str(intruder(folder / "home"))  # they could put another home there
    folder.chmod(0o755)
    private_folder(folder)
    assert intruder(folder / "home") is None


@pytest.mark.root
def test_a_group_that_is_not_ones_primary_one_may_not_write(place: Path, ordinary: Group) -> None:
    ordinary("ann")
    folder = place / "cache"
    folder.mkdir()
    os.seteuid(0)
    os.chown(folder, USER, OTHERS)
    os.seteuid(USER)
    with pytest.raises(OwnershipError, match=f"its group {OTHERS}"):
        private_folder(folder)


@pytest.mark.root
def test_an_access_control_list_ends_the_exception(place: Path, ordinary: Group) -> None:
    ordinary("ann")
    folder = place / "cache"
    folder.mkdir()
    private_folder(folder)
    # The owner, another user, the group, the mask and everybody else: setfacl -m u:64002:rwx
    entries = [(1, 7, 0xFFFFFFFF), (2, 7, OTHERS), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF), (32, 5, 0xFFFFFFFF)]
    raw = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(folder, "system.posix_acl_access", raw)
    except OSError as error:
        pytest.skip(f"this file system has no access control lists ({error.strerror})")
    assert folder.stat().st_mode & 0o777 == 0o775
    with pytest.raises(OwnershipError, match="can be written by its group"):
        private_folder(folder)


def test_a_claimed_folder_is_looked_at_under_its_lock(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it, files of another process come and go in between, which was an error of the disk."""
    looked: list[Path] = []

    def look(folder: Path) -> None:
        looked.append(folder)
        with pytest.raises(ConfigError, match="another process is training"), claim(folder):
            pytest.fail("it was claimed twice")

    monkeypatch.setattr(files, "check_contents", look)
    with claim(place / "run"):
        assert looked == [place / "run"]


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Sets the umask, for the test alone."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_a_model_in_the_cache_is_taken_again_whatever_the_umask(
    place: Path, umask: Callable[[int], int], mask: int
) -> None:
    umask(mask)
    target = place / "cache" / "model"
    found = sources._once(target, lambda folder: tiny_checkpoint("llama", folder))
    assert sources._once(target, lambda folder: pytest.fail("it was filled again")) == found
    assert target.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("mask", "mode"), [(0o000, 0o755), (0o002, 0o755), (0o022, 0o755), (0o077, 0o700)])
def test_a_new_folder_is_not_for_others_to_write(
    place: Path, umask: Callable[[int], int], mask: int, mode: int
) -> None:
    umask(mask)
    with new_folder(place / "checkpoint") as folder:
        (folder / "file").write_text("x")
    assert (place / "checkpoint").stat().st_mode & 0o777 == mode


# What another user has put there --------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_cache_that_another_user_has_made_first_is_refused(place: Path, as_nobody: Attack) -> None:
    as_nobody("mkdir -m 755 -p cache/edge")
    with pytest.raises(OwnershipError, match=rf"cache belongs to another user \(uid {NOBODY}, this process is"):
        private_folder(place / "cache", "edge")
    with pytest.raises(OwnershipError):
        sources._once(place / "cache" / "model", lambda folder: pytest.fail("it was filled"))


@pytest.mark.root
def test_a_link_that_another_user_has_put_in_the_caches_place_is_refused(place: Path, as_nobody: Attack) -> None:
    own = private_folder(place / "documents")
    as_nobody("ln -s documents cache")
    with pytest.raises(OwnershipError, match=f"uid {NOBODY}"):
        private_folder(place / "cache", "edge")
    assert not list(own.iterdir())


@pytest.mark.root
def test_a_file_of_another_user_in_the_cache_is_refused(place: Path, as_nobody: Attack) -> None:
    target = place / "cache" / "model"
    found = sources._once(target, lambda folder: tiny_checkpoint("llama", folder))
    assert sources._once(target, lambda folder: pytest.fail("it was filled again")) == found
    for folder in (place / "cache", target):
        folder.chmod(0o777)  # as an older release, or the user, may have left it
    as_nobody("echo '{{ evil }}' > cache/model/merges.txt")
    for folder in (place / "cache", target):
        folder.chmod(0o700)
    with pytest.raises(OwnershipError, match=r"merges\.txt belongs to another user"):
        sources._once(target, lambda folder: None)


@pytest.mark.root
def test_a_runs_folder_of_another_user_is_refused(place: Path, as_nobody: Attack) -> None:
    as_nobody("mkdir run")
    with pytest.raises(OwnershipError, match="run belongs to another user"), claim(place / "run"):
        pytest.fail("it was claimed")
    with claim(place / "own"):
        assert (place / "own").stat().st_mode & 0o777 == 0o700


@pytest.mark.root
def test_a_span_cache_of_another_user_is_refused(place: Path, as_nobody: Attack) -> None:
    as_nobody("mkdir rows")
    with pytest.raises(OwnershipError, match="rows belongs to another user"):
        SpanStore(place / "rows", bytes(32), max_bytes=1 << 20)
    folder = private_folder(place / "own")
    folder.chmod(0o777)
    as_nobody("echo rows > own/rows.bin")
    folder.chmod(0o700)
    with pytest.raises(OwnershipError, match=r"rows\.bin belongs to another user"):
        SpanStore(folder, bytes(32), max_bytes=1 << 20)


@pytest.mark.root
def test_nothing_is_written_through_a_link_of_another_user(place: Path, as_nobody: Attack) -> None:
    (place / "precious").write_text("mine")
    as_nobody("ln -s precious .out.lock\nln -s precious .isthmus-tmp-report.json")
    with pytest.raises(DiskError), locked(place / "out"):
        pytest.fail("it was locked")
    write_atomic(place / "report.json", b"{}")
    assert (place / "precious").read_text() == "mine"
    assert (place / "report.json").read_text() == "{}"


@pytest.mark.root
def test_a_lock_of_another_user_is_refused(place: Path, as_nobody: Attack) -> None:
    with locked(place / "out"):
        pass
    (place / ".out.lock").unlink()
    as_nobody("echo > .out.lock")
    with pytest.raises((OwnershipError, DiskError)), locked(place / "out"):  # the kernel may refuse it first
        pytest.fail("it was locked")


@pytest.mark.root
def test_a_key_that_another_user_has_put_there_is_not_used(place: Path) -> None:
    """To an ordinary user: a key that only its owner can read cannot be read, and any other one is refused."""
    generate_edge(place / "key", "theirs")
    os.seteuid(NOBODY)
    try:
        with pytest.raises(KeyFileError, match="cannot be read by this user"):
            load_edge(place / "key")
        generate_edge(place / "mine", "mine")
        assert load_edge(place / "mine")
    finally:
        os.seteuid(0)
    (place / "key").chmod(0o644)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(KeyFileError, match="can be read by others"):
            load_edge(place / "key")
    finally:
        os.seteuid(0)


def test_what_is_not_there_is_no_silent_success(place: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        check_private(place / "nothing")
    assert os.geteuid() == place.stat().st_uid
