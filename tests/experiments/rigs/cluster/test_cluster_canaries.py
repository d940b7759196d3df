"""What is looked for of keys and tokens is in their files, and not in public keys and certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from isthmus.cloud.cluster.ray_tls import issue_node, make_ca
from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.cluster.cluster_canaries import secrets_of
from isthmus.experiments.rigs.secrets.memory_scan import Scanner
from isthmus.protocol.secure.keys import generate_edge, generate_root, make_issuer, make_worker_key

SECRET = ("root_key", "issuer_key", "worker_key", "edge.key", "ray_tls_key.pem", "ray_ca_key.pem", "token")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of several clouds: where a secret begins in base64, and where its lines end, differs by chance."""
    root = tmp_path_factory.mktemp("clouds")
    for number in range(8):
        folder = root / str(number)
        generate_root(folder)
        make_issuer(folder)
        make_worker_key(folder)
        generate_edge(folder / "edge.key", "edge" * number)
        make_ca(folder / "ca", 1)
        issue_node(folder / "ca", [f"10.0.0.{number}"], folder / "ray", 1)
        (folder / "token").write_text(f"{number:064x}")
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_each_secret_is_found_in_its_file_and_nowhere_else(files: list[Path]) -> None:
    secret = [path for path in files if path.name in SECRET]
    scanner = Scanner(secrets_of(secret))
    assert {path.name for path in secret} == set(SECRET)
    for path in files:
        found = scanner.count([path.read_bytes()])
        assert set(found) == ({path.name} if path in secret else set()), path


def test_a_secret_that_would_not_be_found_is_refused(files: list[Path], tmp_path: Path) -> None:
    (first, *_) = [path for path in files if path.name == "issuer_key"]
    begin, body, end = first.read_text().split("\n", 2)
    short_lines = "\n".join(body[start : start + 16] for start in range(0, len(body), 16))
    place = tmp_path / "issuer_key"
    place.write_text(f"{begin}\n{short_lines}\n{end}")
    with pytest.raises(IsthmusError, match="its format has changed"):
        secrets_of([place])
