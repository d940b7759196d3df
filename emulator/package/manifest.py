"""The manifest of a package: what it says about itself, and the model owner's signature under it.

    manifest.json   {"payload": <the manifest's own JSON, as one string>,
                     "certificate": <the worker's certificate, as protocol/secure/keys.py writes it>,
                     "signature": <base64>}

The worker's key signs a label and the exact bytes of the payload; the root's key, whose fingerprint edges pin,
certifies the worker's. So a package needs the root's private key no more than a session does, and a data owner checks
it by the pin in the connection string. The certificate must have been valid when the package was `created`: a package
stays good after its signer's certificate has run out. That moment is the signer's own word, so whoever steals a
worker's key can date packages back into the certificate's lifetime; a pin on a new root ends that.

Everything is bounded and strict, because the file comes from the network: at most 64 KiB, known keys only, no number
that is not finite, no name that cannot be printed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import ConfigError, FingerprintError, PackageError, PlanError, SignerError
from isthmus.emulator.compress.recipe import Recipe
from isthmus.protocol.secure.certificates import WorkerCertificate
from isthmus.protocol.secure.keys import Fingerprint, WorkerIdentity

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST = 64 << 10
MAX_LICENCE = 4096
FORMAT = 1
_LABEL = b"isthmus v1 emulator package\0"
_AGAIN = "fetch the package again"
_OF_PRESETS = ("preset", "tuning", "quality", "adapters_below")


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


Text = Annotated[str, Field(max_length=256), AfterValidator(_printable)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileInfo(_Part):
    """Size in bytes and SHA-256 (hex) of one file of the package."""

    size: Count
    sha256: Digest


class Distilled(_Part):
    """How an emulator was distilled.

    Attributes:
        text: Fingerprint of the public text, SHA-256 (hex) of its tokens.
        error_before: Relative error of the emulator's output on held-out blocks before the first step; bridges may
            have been fitted to some of them, if they were fitted to the same text.
        kl_before: Mean KL divergence in nats between the full model's next-token distribution and the one with the
            emulator, on the same blocks; None where the distillation did not use it, as in the other three.
        agreement_before: Top-1 agreement, the share of the positions where both have the same likeliest token.
    """

    steps: Count
    tokens: Count
    text: Digest
    error_before: float
    error_after: float
    kl_before: float | None = None
    kl_after: float | None = None
    agreement_before: float | None = None
    agreement_after: float | None = None


class Protection(_Part):
    """What was measured on one task with exactly this emulator: what the data owner gains, and what a thief does.

    A recovery is a share of the gain that the same edge layers have when they are tuned with the full middle; a thief
    keeps the package and tunes all of it on the same data.

    Attributes:
        metric: What `full_zero_shot`, `plug_in` and `thief` are in.
        plug_in_recovery: Recovery of the tuned adapter on the full middle; None where there is no gain to recover.
        thief_recovery: Recovery of the thief; None likewise.
        full_zero_shot: Score of the full model before any tuning.
        plug_in: Score of the tuned adapter on the full middle.
        thief: Score of the thief's whole package.
        seeds: Over how many seeds the scores are means.
    """

    task: Text
    metric: Text
    plug_in_recovery: float | None = None
    thief_recovery: float | None = None
    full_zero_shot: float
    plug_in: float
    thief: float
    seeds: Annotated[int, Field(ge=1, le=1000)]


class Tuning(_Part):
    """How the owner would have adapters tuned over the emulator, where nothing tells the data owner what is best.

    Attributes:
        layers: Which of the edge's layers: those above the emulator, or all.
    """

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1, le=1 << 24)]
    rank: Annotated[int, Field(ge=1, le=1 << 14)]
    warmup_steps: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    layers: Literal["above", "all"] = "above"


class Quality(_Part):
    """How the emulator does in the middle's place, on text that it was not made with.

    Attributes:
        kl: Mean KL divergence of the next-token distribution with the emulator from the whole model's, in nats a token.
        cosine_above: Cosine between LoRA's first gradient over the emulator and that over the true middle, for the
            edge's layers above the middle.
        cosine_below: The same for the edge's layers below.
        tokens: How many tokens it was measured on.
    """

    kl: Annotated[float, Field(ge=0)]
    cosine_above: Annotated[float, Field(ge=-1, le=1)]
    cosine_below: Annotated[float, Field(ge=-1, le=1)]
    tokens: Count


class Manifest(_Part):
    """What a package says about itself.

    Attributes:
        digest: SHA-256 (hex) of the whole model's configuration and weights.
        plan: Split plan, `BOTTOM:TOP`.
        attn_implementation: Attention implementation that the edge and the full middle use.
        dtype: Floating point dtype of the edge's weights, such as `float32`.
        recipe: How the emulator was made, as `Recipe` writes it.
        layers: The emulator's layers in running order, by their indices in the whole model; repeats are shared.
        edge_params: Weights of the edge's parts.
        emulator_params: Distinct weights of the emulator.
        middle_params: Weights of the full middle.
        emulator_bytes: Size of the emulator's file.
        middle_bytes: Size of the full middle in the model's own checkpoint.
        licence: The owner's note about what may be done with the package.
        allow_draft_tuning: The owner's consent that a data owner who drafts with the emulator goes on distilling it
            while tuning, from the outputs of the full middle that the edge gets anyway.
        preset: Name of the preset that it was built by; None for none.
        tuning: The owner's advice for tuning; None for none.
        quality: What the owner measured; None for "not measured".
        adapters_below: Whether the owner allows adapters below the emulator, which learn from its gradient, although
            the advice names the layers above alone; see `refuses_below`.
        protection: What was measured; empty for "not measured".
        files: Every other file of the package.
        created: When the manifest was signed, Unix seconds.
    """

    format: Literal[1] = 1
    model: Text
    digest: Digest
    n_layers: Annotated[int, Field(ge=1, le=10_000)]
    plan: Text
    family: Text
    attn_implementation: Text
    dtype: Text
    recipe: Text
    keep: float
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=10_000)]
    edge_params: Count
    emulator_params: Count
    middle_params: Count
    emulator_bytes: Count
    middle_bytes: Count
    licence: Annotated[str, Field(max_length=MAX_LICENCE)]
    distilled: Distilled | None = None
    allow_draft_tuning: bool = False
    preset: Text | None = None
    tuning: Tuning | None = None
    quality: Quality | None = None
    adapters_below: bool = False
    protection: Annotated[tuple[Protection, ...], Field(max_length=100)] = ()
    files: Annotated[dict[FileName, FileInfo], Field(min_length=1, max_length=64)]
    created: Count

    @field_validator("files")
    @classmethod
    def _no_manifest(cls, files: dict[str, FileInfo]) -> dict[str, FileInfo]:
        if MANIFEST_FILE in files:
            raise ValueError(f"{MANIFEST_FILE} cannot hold its own hash")
        return files

    @property
    def split_plan(self) -> SplitPlan:
        """The split plan."""
        return SplitPlan.parse(self.plan, self.n_layers)

    @property
    def share_of_parameters(self) -> float:
        """Weights of the emulator over those of the full middle: how much of it is given away."""
        return self.emulator_params / max(self.middle_params, 1)

    @property
    def share_of_bytes(self) -> float:
        """Size of the emulator's file over the full middle's in the model's checkpoint."""
        return self.emulator_bytes / max(self.middle_bytes, 1)

    @property
    def refuses_below(self) -> bool:
        """Whether adapters below the emulator are refused: neither the advice nor the owner allows them."""
        return self.tuning is not None and self.tuning.layers == "above" and not self.adapters_below

    def to_payload(self) -> bytes:
        """The bytes that are signed: JSON. Without a preset, older releases read them too."""
        unused = {name for name in _OF_PRESETS if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump_json(exclude=unused).encode()

    @classmethod
    def from_payload(cls, payload: bytes) -> Manifest:
        """Read what `to_payload` wrote.

        Raises:
            PackageError: It is malformed, has an unknown key, or is of another format.
        """
        try:
            manifest = cls.model_validate_json(payload)
            plan = manifest.split_plan
            Recipe.parse(manifest.recipe, manifest.keep)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"]) or "the whole"
            raise PackageError(
                f"{MANIFEST_FILE} is malformed at {where[:100]!r} ({fault['msg'][:200]}); {_AGAIN}, "
                "or use the release that wrote it"
            ) from error
        except (PlanError, ConfigError) as error:
            raise PackageError(f"{MANIFEST_FILE} does not make sense ({error}); {_AGAIN}") from error
        strange = [layer for layer in manifest.layers if layer not in plan.cloud]
        if strange:
            raise PackageError(
                f"{MANIFEST_FILE} puts layer {strange[0]} into the emulator, but the middle is {plan.cloud}; {_AGAIN}"
            )
        return manifest


def sign(manifest: Manifest, signer: WorkerIdentity) -> bytes:
    """The contents of `manifest.json`.

    Args:
        signer: The model owner's worker, whose certificate is valid.

    Raises:
        ConfigError: The manifest is too large: the licence note or the table of figures is too long.
    """
    payload = manifest.to_payload()
    written = json.dumps(
        {
            "payload": payload.decode(),
            "certificate": json.loads(signer.certificate.to_json()),
            "signature": base64.b64encode(signer.key.sign(_LABEL + payload)).decode(),
        },
        ensure_ascii=False,
    ).encode()
    if len(written) > MAX_MANIFEST:
        raise ConfigError(
            f"the manifest would have {len(written)} bytes, more than {MAX_MANIFEST}: "
            "shorten the licence note or the protection figures"
        )
    return written


def verify(data: bytes, pin: Fingerprint | None) -> tuple[Manifest, str, Fingerprint]:
    """Check the signature of a `manifest.json` and read it.

    Args:
        pin: Fingerprint of the root key that must have certified the signer; None for any, which the caller shows.

    Returns:
        The manifest; the package's id, which is the SHA-256 (hex) of the payload; the root's fingerprint.

    Raises:
        PackageError: The file is malformed.
        SignerError: There is no signature, it does not verify, its certificate was not valid, or the root is another.
    """
    try:
        outer = json.loads(data) if len(data) <= MAX_MANIFEST else None
    except (ValueError, RecursionError):
        outer = None
    if not isinstance(outer, dict) or not isinstance(outer.get("payload"), str):
        raise PackageError(f"{MANIFEST_FILE} is not the manifest of a package; {_AGAIN}")
    if outer.get("certificate") is None or outer.get("signature") is None:
        raise SignerError("the package is not signed: ask the model's owner for a signed one")
    if outer.keys() != {"payload", "certificate", "signature"}:
        raise PackageError(f"{MANIFEST_FILE} has keys that do not belong there; {_AGAIN}")
    try:
        payload = outer["payload"].encode()
        signature = base64.b64decode(outer["signature"], validate=True)
        certificate = WorkerCertificate.from_json(json.dumps(outer["certificate"]))
    except (ValueError, TypeError, RecursionError) as error:
        raise SignerError(f"the package's certificate or signature is malformed; {_AGAIN}") from error
    root = Fingerprint.of(certificate.root)
    if pin is not None and not root.matches(pin):
        raise SignerError(
            f"the package is signed under the root key {root}, not under {pin}: do not use it, "
            "and ask the model's owner for the fingerprint"
        )
    try:
        Ed25519PublicKey.from_public_bytes(certificate.worker).verify(signature, _LABEL + payload)
    except (InvalidSignature, ValueError) as error:
        raise SignerError(f"the package's signature does not fit its manifest, which was changed; {_AGAIN}") from error
    manifest = Manifest.from_payload(payload)
    try:
        certificate.verify(manifest.created)
    except FingerprintError as error:
        raise SignerError(
            "the certificate of the package's signer is forged, or had expired when the package was signed: "
            "ask the model's owner to sign it again (`isthmus emulator sign`)"
        ) from error
    return manifest, sha256(payload).hexdigest(), root


def protection_rows(
    table: Sequence[Mapping[str, Any]], emulator: str, advised: Tuning | None = None
) -> tuple[Protection, ...]:
    """The rows of a table of scores as the manifest states them.

    Rows that were measured with other emulators are passed over.

    A row needs `emulator`, the SHA-256 (hex) of the emulator's file that it was measured with, and the fields of
    `Protection`; `seeds` may be a list of them. It may have `tuning`, how the data owner's adapters were tuned. Further
    keys have no place in a manifest.

    Args:
        emulator: SHA-256 (hex) of the package's emulator file.
        advised: The package's advice; None for none.

    Raises:
        PackageError: There are rows, and none was measured with this emulator.
        ConfigError: A row lacks a figure, has one that is not a finite number, or was not tuned as the package advises.
    """
    own = [(number, row) for number, row in enumerate(table, 1) if row.get("emulator") == emulator]
    if table and not own:
        raise PackageError(
            f"none of the {len(table)} rows of the figures was measured with this package's emulator {emulator[:16]}: "
            "measure this package (`isthmus emulator table --preset` takes its folder)"
        )
    rows = []
    for number, row in own:
        if "thief" not in row:
            raise ConfigError(
                f"row {number} of the figures has no thief: make the table with that row (`isthmus emulator table "
                "--rows thief`, or without --rows)"
            )
        if advised is not None and row.get("tuning", advised.model_dump()) != advised.model_dump():
            raise ConfigError(
                f"row {number} of the figures was not tuned as this package advises: make the table without --rate and "
                "--layers"
            )
        values = {name: row[name] for name in Protection.model_fields if name in row}
        if isinstance(values.get("seeds"), list):
            values["seeds"] = len(values["seeds"])
        try:
            rows.append(Protection.model_validate(values))
        except ValidationError as error:
            fault = error.errors()[0]
            raise ConfigError(
                f"row {number} of the figures: {fault['loc'][0]} is {str(fault['input'])[:60]!r} ({fault['msg']}); "
                "give the table as `isthmus emulator table --json` prints it"
            ) from error
    return tuple(rows)
