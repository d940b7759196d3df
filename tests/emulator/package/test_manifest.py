from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from isthmus.common.errors import ConfigError, PackageError, SignerError
from isthmus.emulator.package.manifest import MAX_MANIFEST, Manifest, protection_rows, sign, verify
from isthmus.protocol.secure.keys import DAY, Fingerprint, WorkerIdentity, generate_root, issue_worker, load_worker

CREATED = 2_000_000_000
HASH = "ab" * 32
VALUES: dict[str, Any] = {
    "model": "tiny",
    "digest": HASH,
    "n_layers": 6,
    "plan": "1:1",
    "family": "llama",
    "attn_implementation": "sdpa",
    "dtype": "float32",
    "recipe": "uniform+int8",
    "keep": 0.5,
    "layers": (1, 4),
    "edge_params": 100,
    "emulator_params": 50,
    "middle_params": 200,
    "emulator_bytes": 60,
    "middle_bytes": 800,
    "licence": "for tests only: « nothing else »",
    "files": {"edge.safetensors": {"size": 3, "sha256": HASH}},
    "created": CREATED,
}
ROW = {
    "emulator": HASH,
    "task": "e2e",
    "metric": "perplexity",
    "full_zero_shot": 4.0,
    "plug_in": 2.2,
    "thief": 3,
    "plug_in_recovery": 0.9,
    "thief_recovery": 0.5,
    "seeds": [0, 1, 2],
    "method": "uniform",
}


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> WorkerIdentity:
    return worker(tmp_path_factory.mktemp("keys"))


def worker(home: Path) -> WorkerIdentity:
    generate_root(home)
    issue_worker(home, days=1, now=lambda: CREATED - 10)
    return load_worker(home, now=lambda: CREATED)


def manifest(**changes: Any) -> Manifest:
    return Manifest.model_validate_json(json.dumps(VALUES | changes))


def outer(signer: WorkerIdentity, **changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(sign(manifest(**changes), signer))
    return value


def test_what_is_signed_is_what_is_read(signer: WorkerIdentity) -> None:
    rows = protection_rows([ROW], HASH)
    written = manifest(protection=[row.model_dump() for row in rows])
    read, identity, root = verify(sign(written, signer), signer.pin)
    assert read == written
    assert read.licence == VALUES["licence"]
    assert root.matches(signer.pin)
    assert len(identity) == 64
    assert identity != verify(sign(manifest(), signer), None)[1]
    assert read.share_of_parameters == 0.25
    assert read.share_of_bytes == 0.075


def test_a_changed_character_of_the_payload_is_refused(signer: WorkerIdentity) -> None:
    changed = outer(signer)
    changed["payload"] = changed["payload"].replace('"keep":0.5', '"keep":0.6')
    with pytest.raises(SignerError, match="does not fit its manifest"):
        verify(json.dumps(changed).encode(), None)


def test_the_consent_to_tune_a_draft_is_signed(signer: WorkerIdentity) -> None:
    assert verify(sign(manifest(allow_draft_tuning=True), signer), None)[0].allow_draft_tuning
    changed = outer(signer)
    given = changed["payload"].replace('"allow_draft_tuning":false', '"allow_draft_tuning":true')
    assert given != changed["payload"]
    with pytest.raises(SignerError, match="does not fit its manifest"):
        verify(json.dumps(changed | {"payload": given}).encode(), None)


def test_a_manifest_of_a_time_without_drafts_is_read() -> None:
    distilled = {"steps": 3, "tokens": 192, "text": HASH, "error_before": 0.5, "error_after": 0.25}
    read = Manifest.from_payload(json.dumps(VALUES | {"distilled": distilled}).encode())
    assert not read.allow_draft_tuning
    assert read.distilled is not None
    assert (read.distilled.kl_before, read.distilled.agreement_after) == (None, None)


OF_A_PRESET: dict[str, Any] = {
    "preset": "fidelity",
    "tuning": {"learning_rate": 0.01, "steps": 100, "rank": 8, "warmup_steps": 10, "layers": "all"},
    "quality": {"kl": 0.5, "cosine_above": 0.95, "cosine_below": -0.07, "tokens": 2048},
    "adapters_below": True,
}


def test_what_a_preset_says_is_signed_and_nothing_of_it_without_one(signer: WorkerIdentity) -> None:
    written = manifest(**OF_A_PRESET)
    assert verify(sign(written, signer), signer.pin)[0] == written
    assert json.loads(written.to_payload()).keys() - json.loads(manifest().to_payload()).keys() == OF_A_PRESET.keys()
    before_presets = json.dumps({"format": 1} | VALUES | {"distilled": None, "allow_draft_tuning": False})
    assert Manifest.from_payload(before_presets.encode()) == manifest()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("tuning", {"learning_rate": 0.0}),
        ("tuning", {"learning_rate": 1.5}),
        ("tuning", {"steps": 0}),
        ("tuning", {"steps": (1 << 24) + 1}),
        ("tuning", {"rank": 0}),
        ("tuning", {"rank": (1 << 14) + 1}),
        ("tuning", {"warmup_steps": -1}),
        ("tuning", {"layers": "below"}),
        ("quality", {"kl": -0.1}),
        ("quality", {"kl": float("inf")}),
        ("quality", {"cosine_above": 1.1}),
        ("quality", {"cosine_below": float("nan")}),
        ("quality", {"tokens": -1}),
    ],
)
def test_advice_and_figures_out_of_bounds_are_refused(part: str, change: dict[str, Any]) -> None:
    payload = json.dumps(VALUES | OF_A_PRESET | {part: OF_A_PRESET[part] | change})
    with pytest.raises(PackageError, match=f"malformed at '{part}"):
        Manifest.from_payload(payload.encode())


@pytest.mark.parametrize("missing", ["signature", "certificate"])
def test_an_unsigned_package_is_refused(signer: WorkerIdentity, missing: str) -> None:
    changed = outer(signer)
    del changed[missing]
    with pytest.raises(SignerError, match="not signed"):
        verify(json.dumps(changed).encode(), None)


def test_another_root_is_refused_and_both_fingerprints_are_named(signer: WorkerIdentity, tmp_path: Path) -> None:
    other = worker(tmp_path / "other")
    with pytest.raises(SignerError) as caught:
        verify(sign(manifest(), other), signer.pin)
    assert str(other.pin) in str(caught.value)
    assert str(signer.pin) in str(caught.value)


def test_the_pinned_root_in_a_forged_certificate_does_not_help(signer: WorkerIdentity, tmp_path: Path) -> None:
    other = worker(tmp_path / "other")
    forged = json.loads(sign(manifest(), other))
    forged["certificate"]["root"] = base64.b64encode(signer.certificate.root).decode()
    with pytest.raises(SignerError, match="forged"):
        verify(json.dumps(forged).encode(), signer.pin)


def test_a_signature_by_another_key_than_the_certified_one_is_refused(signer: WorkerIdentity) -> None:
    impostor = WorkerIdentity(Ed25519PrivateKey.generate(), signer.certificate)
    with pytest.raises(SignerError, match="signature"):
        verify(sign(manifest(), impostor), signer.pin)


def test_the_certificate_must_have_been_valid_at_the_time_of_signing_only(signer: WorkerIdentity) -> None:
    verify(sign(manifest(created=CREATED - 1000), signer), signer.pin)
    with pytest.raises(SignerError, match="expired"):
        verify(sign(manifest(created=CREATED + 2 * DAY), signer), signer.pin)


@pytest.mark.parametrize("field", ["certificate", "signature"])
@pytest.mark.parametrize("value", ["", "!!", 7, [], {"version": 1}])
def test_a_malformed_certificate_or_signature_is_refused(signer: WorkerIdentity, field: str, value: Any) -> None:
    with pytest.raises(SignerError):
        verify(json.dumps(outer(signer) | {field: value}).encode(), None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"payload": 3}',
        b"[" * 60_000,
        b'{"payload": "' + b"a" * MAX_MANIFEST + b'"}',
        b'{"payload": "{}", "certificate": {}, "signature": "", "more": 1}',
    ],
)
def test_something_else_is_no_manifest(data: bytes) -> None:
    with pytest.raises(PackageError, match=r"manifest\.json"):
        verify(data, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"surprise": 1},
        {"digest": "short"},
        {"plan": "9:9"},
        {"plan": "1;1"},
        {"recipe": "magic"},
        {"keep": 7.0},
        {"layers": [0]},
        {"layers": []},
        {"layers": [1.5]},
        {"edge_params": -1},
        {"created": "now"},
        {"licence": "x" * 5000},
        {"files": {}},
        {"files": {"../evil": {"size": 1, "sha256": HASH}}},
        {"files": {".gitkeep": {"size": 1, "sha256": HASH}}},
        {"files": {"manifest.json": {"size": 1, "sha256": HASH}}},
        {"files": {"edge.safetensors": {"size": -1, "sha256": HASH}}},
        {"distilled": {"steps": 1}},
    ],
)
def test_a_signed_manifest_is_still_held_to_its_form(signer: WorkerIdentity, changes: dict[str, Any]) -> None:
    with pytest.raises(PackageError, match=r"manifest\.json"):
        Manifest.from_payload(json.dumps(VALUES | changes).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(number: str) -> None:
    payload = json.dumps(VALUES).replace('"keep": 0.5', f'"keep": {number}')
    assert number in payload
    with pytest.raises(PackageError):
        Manifest.from_payload(payload.encode())


def test_a_manifest_that_would_be_too_large_is_not_signed(signer: WorkerIdentity) -> None:
    names = {f"tokenizer{i}.{'x' * 110}": {"size": 1, "sha256": HASH} for i in range(60)}
    rows = [{**protection_rows([ROW], HASH)[0].model_dump(), "task": "\\" * 256, "metric": "\\" * 256}] * 100
    with pytest.raises(ConfigError, match="shorten"):
        sign(manifest(files=names, protection=rows), signer)


def test_recoveries_are_null_where_the_table_saw_no_clear_gain() -> None:
    with_gain, without = protection_rows(
        [{**ROW, "seeds": 3}, {**ROW, "plug_in_recovery": None, "thief_recovery": None}], HASH
    )
    assert (with_gain.plug_in_recovery, with_gain.thief_recovery, with_gain.seeds) == (0.9, 0.5, 3)
    assert (without.plug_in_recovery, without.thief_recovery, without.seeds) == (None, None, 3)
    (lacking,) = protection_rows([{name: value for name, value in ROW.items() if name != "thief_recovery"}], HASH)
    assert lacking.thief_recovery is None


@pytest.mark.parametrize("measured", ["cd" * 32, None, ""])
def test_figures_of_another_emulator_are_passed_over(measured: str | None) -> None:
    other = {**ROW, "emulator": measured, "task": "other"}
    assert [row.task for row in protection_rows([other, ROW], HASH)] == [ROW["task"]]
    with pytest.raises(PackageError, match="none of the 1 rows"):
        protection_rows([other], HASH)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("plug_in", None),
        ("thief", "3"),
        ("seeds", 0),
        ("seeds", []),
        ("task", "x" * 300),
        ("full_zero_shot", float("nan")),
    ],
)
def test_a_malformed_figure_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        protection_rows([{**ROW, name: value}], HASH)


def test_the_fingerprint_of_the_signer_is_the_one_that_edges_pin(signer: WorkerIdentity) -> None:
    assert verify(sign(manifest(), signer), None)[2] == Fingerprint.of(signer.certificate.root)


@pytest.mark.parametrize("key", ["model", "family", "attn_implementation"])
def test_a_name_that_would_move_the_cursor_is_refused(key: str) -> None:
    payload = json.dumps(VALUES | {key: "tiny\x1b[2J"}).encode()
    with pytest.raises(PackageError, match=f"{key}.*cannot be printed"):
        Manifest.from_payload(payload)


def test_a_key_that_would_move_the_cursor_is_quoted() -> None:
    with pytest.raises(PackageError) as caught:
        Manifest.from_payload(json.dumps(VALUES | {"x\x1b[2J": 1}).encode())
    assert "\x1b" not in str(caught.value)
