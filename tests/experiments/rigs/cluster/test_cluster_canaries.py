"""What is looked for of keys and tokens is in their files, and not in public keys and certificates."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections import Counter
from pathlib import Path

import pytest

from isthmus.cloud.cluster.ray_tls import issue_node, make_ca
from isthmus.common.errors import IsthmusError
from isthmus.experiments.rigs.cluster.cluster_canaries import Sent, _secret_of, secrets_of
from isthmus.experiments.rigs.secrets.text_forms import PIECE, TextScanner
from isthmus.protocol.secure.keys import generate_edge, generate_root, make_issuer, make_worker_key

SECRET = ("root_key", "issuer_key", "worker_key", "edge.key", "ray_tls_key.pem", "ray_ca_key.pem", "token")
KEY = bytes(range(100, 124))
VALUES = [0.1234567, -1.7654321, 0.3456789]


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
    scanner = TextScanner(secrets_of(secret))
    assert {path.name for path in secret} == set(SECRET)
    for path in files:
        found = scanner.count([path.read_bytes()])
        assert set(found) == ({path.name} if path in secret else set()), path


def test_a_secret_is_found_in_other_forms_than_that_of_its_file(files: list[Path]) -> None:
    for path in (path for path in files if path.name in SECRET):
        scanner, secret = TextScanner(secrets_of([path])), _secret_of(path.read_bytes())
        logged = [
            secret.hex(),
            secret.hex().upper(),
            urlsafe_b64encode(b"x" + secret).decode(),
            json.dumps(list(secret)),
        ]
        for text in (*logged, repr(secret), json.dumps({"key": repr(secret)})):
            assert set(scanner.count([text.encode()])) == {path.name}
        assert not scanner.count([secret[: PIECE - 1].hex().encode(), b"key="])


def test_what_an_edge_says_is_looked_for_as_bytes_and_as_numbers() -> None:
    said = json.loads(json.dumps({"canaries": {KEY.hex(): "AES key"}, "runs": [[VALUES, "activations"]]}))
    sent = Sent.of(said)
    scanner = TextScanner(sent.canaries, sent.runs)
    assert scanner.count([KEY, json.dumps(VALUES).encode()]) == Counter({"AES key": 1, "activations": 1})
    assert scanner.count([KEY[::-1], json.dumps(VALUES[::-1]).encode()]) == Counter()


def test_a_secret_that_would_not_be_found_is_refused(files: list[Path], tmp_path: Path) -> None:
    (first, *_) = [path for path in files if path.name == "issuer_key"]
    begin, body, end = first.read_text().split("\n", 2)
    short_lines = "\n".join(body[start : start + 8] for start in range(0, len(body), 8))
    place = tmp_path / "issuer_key"
    place.write_text(f"{begin}\n{short_lines}\n{end}")
    with pytest.raises(IsthmusError, match="its format has changed"):
        secrets_of([place])
