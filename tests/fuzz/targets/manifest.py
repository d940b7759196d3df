"""A package's `manifest.json`: raw, or a payload and a certificate of the peer's choice that are signed properly."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from typing import Any

from fuzz.target import Cursor, Target
from fuzz.targets.messages import safe_name
from support.protocol.wire import NOW, PIN, WORKER, identity

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import PackageError, SignerError
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.package import manifest
from isthmus.emulator.package.manifest import Manifest, verify
from isthmus.protocol.secure.certificates import WorkerCertificate

_RAW, _PAYLOAD, _CERTIFICATE = range(3)


def _run(data: bytes) -> None:
    script = Cursor(data)
    which = script.number() % 3
    try:
        match which:
            case 0:
                checked, _, root = verify(script.rest(), PIN)
            case 1:
                checked, _, root = verify(_signed(script.rest(), identity().certificate.to_json()), PIN)
            case _:
                checked, _, root = verify(_signed(_payload(), script.rest().decode(errors="surrogatepass")), None)
    except (PackageError, SignerError) as error:
        str(error).encode(errors="backslashreplace")  # it can be printed
        return
    except UnicodeDecodeError:
        if which == _CERTIFICATE:  # of this target
            return
        raise
    if which != _CERTIFICATE and not root.matches(PIN):
        raise AssertionError("a manifest of another root key was accepted")
    if Manifest.from_payload(checked.to_payload()) != checked:
        raise AssertionError("a manifest is another one when it is read again")
    for name in checked.files:
        safe_name(name)
    if not all(layer in checked.split_plan.cloud for layer in checked.layers):
        raise AssertionError("a layer of the emulator is none of the middle's")
    if not (math.isfinite(checked.share_of_parameters) and math.isfinite(checked.share_of_bytes)):
        raise AssertionError("a share is not finite")


def _signed(payload: bytes, certificate: str) -> bytes:
    signature = base64.b64encode(WORKER.sign(manifest._LABEL + payload)).decode()
    text = json.dumps(payload.decode(errors="surrogateescape"))
    return f'{{"payload": {text}, "certificate": {certificate}, "signature": "{signature}"}}'.encode(
        errors="surrogatepass"
    )


def _values(**changes: Any) -> dict[str, Any]:
    plain = {
        "format": 1, "model": "tiny", "digest": "00" * 32, "n_layers": 6, "plan": "2:2", "family": "llama",
        "attn_implementation": "sdpa", "dtype": "float32", "recipe": "uniform+lowrank:0.5+int8", "keep": 0.5,
        "layers": [2], "edge_params": 1, "emulator_params": 2, "middle_params": 3, "emulator_bytes": 4,
        "middle_bytes": 5, "licence": "as is", "distilled": None, "protection": [],
        "files": {"edge.safetensors": {"size": 1, "sha256": "00" * 32}}, "created": NOW,
    }  # fmt: skip
    return plain | changes


def _payload(**changes: Any) -> bytes:
    return json.dumps(_values(**changes)).encode()


def _seeds() -> Iterator[bytes]:
    distilled = {"steps": 1, "tokens": 2, "text": "00" * 32, "error_before": 0.5, "error_after": 0.25}
    row = {
        "task": "e2e", "metric": "loss", "plug_in_recovery": 0.5, "thief_recovery": None, "full_zero_shot": 1.0,
        "plug_in": 2.0, "thief": 3.0, "seeds": 1,
    }  # fmt: skip
    yield bytes((_RAW,)) + manifest.sign(Manifest.from_payload(_payload()), identity())
    yield bytes((_RAW,)) + b'{"payload": "{}"}'
    yield bytes((_RAW,)) + b'{"payload": "{}", "certificate": 1, "signature": 1, "more": 1}'
    yield bytes((_RAW,)) + bytes(100)
    for payload in (
        _payload(), _payload(distilled=distilled, protection=[row]), _payload(plan="9:9"), _payload(recipe="?"),
        _payload(layers=[0]), _payload(files={"manifest.json": {"size": 1, "sha256": "00" * 32}}), b"{}",
        _payload(keep=1e400), _payload(model="\n"), _payload(created=NOW + 2000),
    ):  # fmt: skip
        yield bytes((_PAYLOAD,)) + payload
    certificate = identity().certificate
    yield bytes((_CERTIFICATE,)) + certificate.to_json().encode()
    yield bytes((_CERTIFICATE,)) + identity(not_after=NOW).certificate.to_json().encode()
    yield bytes((_CERTIFICATE,)) + identity(root=WORKER).certificate.to_json().encode()
    yield bytes((_CERTIFICATE,)) + b'{"version": 2}'


TARGET = Target(
    _run,
    _seeds,
    [
        verify,
        Manifest,
        WorkerCertificate.from_json,
        WorkerCertificate.verify,
        Recipe.parse,
        Recipe.__post_init__,
        SplitPlan.parse,
    ],
    floor=0.9,
    max_len=8192,
    words=[
        *(f'"{name}": '.encode() for name in _values()),
        b"1e308",
        b"null",
        b"true",
        b"-1",
        b"NaN",
        b"\\u0000",
        b"crash",
        b"+bridged",
        b"+lowrank:0.5",
        b"+int4",
        b'"error_after"',
        b'"version": 1',
        b'"not_after": ',
    ],
)
