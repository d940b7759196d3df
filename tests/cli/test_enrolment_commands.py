"""`isthmus cloud enroll` and `revoke`."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from isthmus.cli.main import app
from isthmus.common.errors import ConfigError
from isthmus.protocol.enrolment import EDGES_FILE, REVOKED_FILE, AuthorizedEdges
from isthmus.protocol.secure.keys import Fingerprint, generate_edge, load_edge


def cloud(folder: Path, *arguments: str) -> tuple[int | BaseException | None, str]:
    done = CliRunner().invoke(app, ["cloud", *arguments, "--home", str(folder / "home")])
    failed = done.exception if isinstance(done.exception, ConfigError) else None
    return failed or done.exit_code, done.output if failed is None else str(failed)


def test_a_key_is_enrolled_once_and_revoked_once(tmp_path: Path) -> None:
    generate_edge(tmp_path / "id", "alice")
    pub, key = str(tmp_path / "id.pub"), load_edge(tmp_path / "id").public_key().public_bytes_raw()
    assert cloud(tmp_path, "enroll", pub) == (0, f"enrolled alice {Fingerprint.of(key)}\n")
    lines = (tmp_path / "home" / EDGES_FILE).read_text()
    again, said = cloud(tmp_path, "enroll", pub)
    assert (again, said) == (0, f"alice {Fingerprint.of(key)} is enrolled already: nothing was changed\n")
    again, said = cloud(tmp_path, "enroll", pub, "--weight", "3")
    assert (again, "edit its line" in said) == (0, True)
    assert (tmp_path / "home" / EDGES_FILE).read_text() == lines
    assert cloud(tmp_path, "revoke", "alice") == (0, f"revoked {Fingerprint.of(key)}\n")
    for name in (pub, str(Fingerprint.of(key))):
        assert cloud(tmp_path, "revoke", name) == (0, f"was revoked already: {Fingerprint.of(key)}\n")
    assert AuthorizedEdges.load(tmp_path / "home" / REVOKED_FILE).find(key) is not None
    for command, value in (("enroll", pub), ("revoke", "bob"), ("revoke", "x" * 5000)):
        failed, said = cloud(tmp_path, command, value)
        assert isinstance(failed, ConfigError), said
