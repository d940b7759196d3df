"""Tokens, their file, and whose they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from isthmus.common.errors import ConfigError, KeyFileError, OwnershipError
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import Owners, first_owner, give_token, is_revoked, list_owners, revoke_token
from isthmus.daemon.tokens import CODE_SECONDS, HUB, SignInCode, hash_of, read_token

TOKEN = "tml-" + "a" * 43


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "state.db")


def test_the_first_start_makes_a_token_that_its_user_alone_may_read(tmp_path: Path, database: Database) -> None:
    file = tmp_path / "token"
    owner = first_owner(database, file)
    token = read_token(file)
    assert re.fullmatch(r"tml-[A-Za-z0-9_-]{43}", token)
    assert file.stat().st_mode & 0o777 == 0o600
    assert first_owner(database, file).id == owner.id
    found = Owners(database).find(token)
    assert found is not None
    assert (found.id, found.name) == (owner.id, "first")


def test_the_database_has_no_token(tmp_path: Path, database: Database) -> None:
    first_owner(database, tmp_path / "token")
    given = give_token(database, "ci")
    database.close()
    data = b"".join(path.read_bytes() for path in tmp_path.glob("state.db*"))
    assert b"first" in data
    assert not any(token.encode() in data for token in (read_token(tmp_path / "token"), given))


def test_a_file_that_was_removed_ends_the_old_token(tmp_path: Path, database: Database) -> None:
    file = tmp_path / "token"
    owner = first_owner(database, file)
    old = read_token(file)
    file.unlink()
    assert first_owner(database, file).id == owner.id
    owners = Owners(database)
    assert owners.find(old) is None
    assert owners.find(read_token(file)) is not None


def test_a_token_that_is_given_meanwhile_is_known_within_a_second(database: Database) -> None:
    now = [0.0]
    owners = Owners(database, lambda: now[0])
    assert owners.find("x") is None
    token = give_token(database, "ci")
    assert owners.find(token) is None
    now[0] = 1.0
    found = owners.find(token)
    assert found is not None
    assert found.name == "ci"
    again = give_token(database, "ci")
    now[0] = 2.0
    assert owners.find(token) is None
    later = owners.find(again)
    assert later is not None
    assert later.id == found.id


def test_an_owner_without_a_token_gets_another_one(database: Database) -> None:
    tokens = {name: give_token(database, name) for name in ("a", "b")}
    revoke_token(database, "a")
    owners = Owners(database)
    assert [owners.find(token) is None for token in tokens.values()] == [True, False]
    kept = {owner.name: owner for owner in list_owners(database)}
    assert [is_revoked(kept[name]) for name in ("a", "b")] == [True, False]
    assert Owners(database).find(kept["a"].token_sha256) is None  # what stands in its place is no token
    found = Owners(database).find(give_token(database, "a"))
    assert found is not None
    assert found.id == kept["a"].id
    for name, reason in (("c", "no owner 'c'.*are a, b"), ("first", "remove it")):
        with pytest.raises(ConfigError, match=reason):
            revoke_token(database, name)


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, database: Database, mode: int) -> None:
    first_owner(database, tmp_path / "token")
    (tmp_path / "token").chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        first_owner(database, tmp_path / "token")


def test_a_file_that_others_may_write_is_refused(tmp_path: Path, database: Database) -> None:
    first_owner(database, tmp_path / "token")
    (tmp_path / "token").chmod(0o666)
    with pytest.raises(OwnershipError):
        first_owner(database, tmp_path / "token")


@pytest.mark.parametrize("text", ["", "tml-short", f"x{TOKEN}", f"{TOKEN}\n{TOKEN}", "\xff"])
def test_a_file_without_a_token_is_refused(tmp_path: Path, database: Database, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text, encoding="latin-1")
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match="holds no token"):
        first_owner(database, file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="is missing"):
        read_token(tmp_path / "token")


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "../x", "first"])
def test_a_name_that_is_none_gets_no_token(database: Database, name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        give_token(database, name)


def test_a_token_for_the_hub_counts_there_alone_and_ends_with_its_own(database: Database) -> None:
    token = f"{HUB}{hash_of(give_token(database, 'ci'))}"
    (owner,) = list_owners(database)
    found = Owners(database).find(token, hub=True)
    assert found is not None
    assert found.id == owner.id
    assert Owners(database).find(token) is None
    assert Owners(database).find(f"{HUB}{hash_of('tml-another')}", hub=True) is None
    revoke_token(database, "ci")
    (owner,) = list_owners(database)
    for ended in (token, f"{HUB}{owner.token_sha256}"):  # what stands in a hash's place is no token either
        assert Owners(database).find(ended, hub=True) is None


def test_a_code_signs_in_once_for_ten_minutes_and_a_new_one_ends_it() -> None:
    now = 100.0
    codes = SignInCode(lambda: now)
    assert not codes.take("")
    first = codes.make()
    assert not codes.take(first + "x")  # uses up nothing
    assert codes.take(first)
    assert not codes.take(first)
    assert not codes.take("")
    old, new = codes.make(), codes.make()
    assert not codes.take(old)
    now += CODE_SECONDS - 0.5
    assert codes.take(new)
    late = codes.make()
    now += CODE_SECONDS
    assert not codes.take(late)
