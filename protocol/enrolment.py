"""Enrolment: which edges a cloud serves, and where an edge finds its cloud.

Rules
    1. `authorized_edges` is a text file as in SSH: one line per edge, `#` begins a comment, an unknown option is an
       error. A malformed line stops the whole file: a cloud must not run with a quota that nobody meant.
    2. A key and a name stand for one edge each; neither may come twice.
    3. The option `stage`, before all others, is for the key of a pipeline's stage, which may attach for other tenants.
       Only `serve` writes it.

Theory of operation
    max-sessions=2,max-bytes-in-flight=64MiB ssh-ed25519 AAAAC3... hospital-a
    isthmus://cloud.example:7443#SHA256:...       (isthmus+tls:// where the stream also runs inside TLS)
    isthmus://a.example:7443,b.example:7443#SHA256:...                     a cloud that can be reached at several places
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import urlsplit

from isthmus.common.errors import ConfigError, KeyFileError, NotEnrolledError
from isthmus.common.readable import bracketed
from isthmus.protocol.limits import GIB, KIB, MIB
from isthmus.protocol.secure.keyfiles import locked_folder, make_folder, read_text, replace_file
from isthmus.protocol.secure.keys import Fingerprint, format_public_key, parse_public_key

TENANT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]{0,63}")
_SIZE = re.compile(r"([0-9]{1,18})(B|KiB|MiB|GiB|)")
_UNITS = {"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}
_STAGE = "stage"
WORKERS_QUOTA_SESSIONS, WORKERS_QUOTA_BYTES = 10_000, 1 << 40
"""What another worker of the cloud may use: it passes on what edges send it, within their own quotas."""
EDGES_FILE = "authorized_edges"
REVOKED_FILE = "revoked_edges"
"""Keys that are let in no more, whatever `authorized_edges` says, beside it and in its form."""
WORKERS_FILE = "authorized_workers"
"""The cloud's other workers, beside `authorized_edges` and in its form."""
STAGE_OPTIONS = f"{_STAGE},max-sessions={WORKERS_QUOTA_SESSIONS},max-bytes-in-flight={WORKERS_QUOTA_BYTES >> 30}GiB"
"""The options of another worker of the cloud."""
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
MAX_PLACES = 16
"""Of a connection string, at most."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one edge may use.

    Attributes:
        max_sessions: Sessions at a time.
        max_inflight_bytes: Bytes of messages that are being served at a time; as many again for each session may be
            held of what the cloud makes for its sites.
        weight: Its share of the computing against the other tenants', where all want more than there is.
        max_tokens_per_second: Token positions, on average; None for no limit.
        max_tokens: Token positions in all, of one model at one split; None for no limit.
    """

    max_sessions: int = 4
    max_inflight_bytes: int = GIB
    weight: int = 1
    max_tokens_per_second: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"a quota of {entry.name} = {getattr(self, entry.name)} serves nothing: at least 1 is needed"
                )

    @classmethod
    def parse(cls, text: str) -> Quota:
        """Read `max-sessions=2,max-bytes-in-flight=64MiB`; what is not named has its default.

        Raises:
            ConfigError: an option is unknown, doubled, or malformed.
        """
        found: dict[str, int] = {}
        for option in text.split(","):
            name, _, value = option.partition("=")
            entry = _OPTIONS.get(name)
            if entry is None:
                raise ConfigError(f"unknown option {name!r}: {', '.join(_OPTIONS)} are known")
            key, read = entry
            if key in found:
                raise ConfigError(f"option {name} is given twice")
            found[key] = read(value)
        return cls(**found)

    def format(self) -> str:
        """Write the options that differ from the defaults; an empty text if none does."""
        values = {name: getattr(self, entry) for name, (entry, _) in _OPTIONS.items()}
        usual = {name: getattr(Quota(), entry) for name, (entry, _) in _OPTIONS.items()}
        return ",".join(f"{name}={value}" for name, value in values.items() if value != usual[name])


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(f"{text!r} is not a number")
    return int(text)


def parse_size(text: str) -> int:
    """Read a number of bytes: `65536`, `64KiB`, `64MiB`, `1GiB`.

    Raises:
        ConfigError: it is malformed.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size: a whole number with KiB, MiB or GiB is needed")
    return int(match[1]) * _UNITS[match[2]]


_OPTIONS: dict[str, tuple[str, Callable[[str], int]]] = {
    "max-sessions": ("max_sessions", _count),
    "max-bytes-in-flight": ("max_inflight_bytes", parse_size),
    "weight": ("weight", _count),
    "max-tokens-per-second": ("max_tokens_per_second", _count),
    "max-tokens": ("max_tokens", _count),
}


@dataclass(frozen=True, slots=True)
class Tenant:
    """One enrolled edge, or `stage`, a stage of a pipeline, whose sessions are other tenants'."""

    name: str
    fingerprint: Fingerprint
    quota: Quota = field(default_factory=Quota)
    stage: bool = False


class AuthorizedEdges:
    """The edges that a cloud serves, by public key, and the keys that were revoked."""

    def __init__(self, tenants: dict[bytes, Tenant], revoked: frozenset[bytes] = frozenset()) -> None:
        self._tenants, self._revoked = dict(tenants), revoked
        self._by_fingerprint = {tenant.fingerprint: tenant for tenant in tenants.values()}

    @classmethod
    def parse(cls, text: str, source: str = "authorized_edges") -> AuthorizedEdges:
        """Read the text of an `authorized_edges` file; `source` names it in errors.

        Raises:
            ConfigError: a line is malformed, or repeats a key or a name. The message has the line's number.
        """
        tenants: dict[bytes, Tenant] = {}
        lines: dict[str, int] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                key, tenant = _parse_line(line)
                for what in (f"name {tenant.name!r}", f"key {tenant.fingerprint}"):
                    if what in lines:
                        raise ConfigError(f"the {what} is already on line {lines[what]}")
                    lines[what] = number
            except ConfigError as error:
                raise ConfigError(f"{source}, line {number}: {error}") from error
            tenants[key] = tenant
        return cls(tenants)

    @classmethod
    def load(cls, path: Path) -> AuthorizedEdges:
        """Read an `authorized_edges` file.

        Raises:
            KeyFileError: it is missing or cannot be read.
            ConfigError: a line is malformed.
        """
        return cls.parse(read_text(path, "run `isthmus cloud enroll` with an edge's public key", ours=True), str(path))

    def find(self, public_key: bytes) -> Tenant | None:
        """Find the tenant of a raw public key (32 bytes)."""
        return self._tenants.get(public_key)

    def of(self, fingerprint: Fingerprint) -> Tenant | None:
        """Find the tenant of a key's fingerprint."""
        return self._by_fingerprint.get(fingerprint)

    def require(self, public_key: bytes) -> Tenant:
        """Find the tenant of a raw public key (32 bytes).

        Raises:
            NotEnrolledError: there is none.
        """
        tenant = self.find(public_key)
        if public_key in self._revoked:
            raise NotEnrolledError(
                f"the edge's key {Fingerprint.of(public_key)} was revoked: make another one by `isthmus edge keygen "
                "--out PATH`, and send its .pub file to the cloud's owner"
            )
        if tenant is None:
            raise NotEnrolledError(
                f"the edge's key {Fingerprint.of(public_key)} is not enrolled: send its .pub file to the cloud's "
                "owner, who runs `isthmus cloud enroll`"
            )
        return tenant

    def joined(self, others: AuthorizedEdges) -> AuthorizedEdges:
        """These edges and others; of a key that is in both, what the others say."""
        return AuthorizedEdges({**self._tenants, **others._tenants}, self._revoked)

    def without(self, revoked: AuthorizedEdges) -> AuthorizedEdges:
        """These edges without the revoked ones."""
        kept = {key: tenant for key, tenant in self._tenants.items() if key not in revoked._tenants}
        return AuthorizedEdges(kept, frozenset(revoked._tenants))

    def key_of(self, name: str) -> bytes | None:
        """The raw public key of a tenant's name, or of a fingerprint."""
        return next((key for key, each in self._tenants.items() if name in (each.name, str(each.fingerprint))), None)

    def has_all_of(self, others: AuthorizedEdges) -> bool:
        """Whether all keys of others are among these."""
        return self._tenants.keys() >= others._tenants.keys()

    def __len__(self) -> int:
        return len(self._tenants)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AuthorizedEdges) and self._tenants == other._tenants and self._revoked == other._revoked
        )

    __hash__ = None  # type: ignore[assignment]  # as of every class that says when two are equal


def add_line(
    path: Path, pub_line: str, name: str | None = None, quota: Quota | None = None, *, stage: bool = False
) -> Tenant:
    """Enrol an edge: append a line to `authorized_edges`, atomically. The file is made where there is none.

    Args:
        path: the file.
        pub_line: the edge's public key, `ssh-ed25519 AAAA... comment`.
        name: the tenant's name; by default the key's comment.
        quota: what it may use.
        stage: whether it is a stage of a pipeline.

    Raises:
        ConfigError: the key or the name is malformed or enrolled already.
        KeyFileError: the file cannot be read or written.
    """
    key, comment = parse_public_key(pub_line.strip())
    chosen = name or comment
    if not TENANT_NAME.fullmatch(chosen):
        raise ConfigError(f"{chosen!r} cannot name an edge: 1 to 64 letters, digits and ._@+- are needed; give a name")
    options = ",".join(filter(None, (_STAGE if stage else "", (quota or Quota()).format())))
    line = f"{options} {format_public_key(key, chosen)}".strip()
    make_folder(path.parent)
    with locked_folder(path.parent):
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"{path} cannot be read ({error}): check its owner, mode and content") from error
        if text and not text.endswith("\n"):
            text += "\n"
        text += line + "\n"
        tenant = AuthorizedEdges.parse(text, str(path)).require(key)
        replace_file(path, text.encode(), mode=0o644)
    return tenant


def revoke(home: Path, public_key: bytes) -> bool:
    """Add a key to `revoked_edges`; False where it is there already.

    Raises:
        ConfigError: the file is malformed.
        KeyFileError: it cannot be read or written.
    """
    path = home / REVOKED_FILE
    if path.exists() and AuthorizedEdges.load(path).find(public_key) is not None:
        return False
    name = Fingerprint.of(public_key).digest.hex()[:32]  # a tenant's name may come again, with another key
    add_line(path, format_public_key(public_key, name))
    return True


def _parse_line(line: str) -> tuple[bytes, Tenant]:
    words = line.strip()
    quota, stage = Quota(), False
    if not words.startswith("ssh-"):
        options, _, words = words.partition(" ")
        first, _, rest = options.partition(",")
        stage = first == _STAGE
        quota = Quota() if options == _STAGE else Quota.parse(rest if stage else options)
    key, name = parse_public_key(words)
    if not TENANT_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name an edge: 1 to 64 letters, digits and ._@+- are needed behind the key")
    return key, Tenant(name, Fingerprint.of(key), quota, stage)


@dataclass(frozen=True, slots=True)
class ConnectionString:
    """Where a cloud is and which root key it must show: `isthmus://host:port#SHA256:...`, or `isthmus+tls://...`.

    Attributes:
        host: the first place's host, without brackets.
        port: its port.
        pin: the root key's fingerprint.
        tls: whether the stream also runs inside TLS.
        others: further places where the cloud can be reached, `host:port` each, `MAX_PLACES` with the first at most.
    """

    host: str
    port: int
    pin: Fingerprint
    tls: bool = False
    others: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ConnectionString:
        """Read a connection string.

        Raises:
            ConfigError: it is malformed.
        """
        text = text.strip()
        scheme, separator, rest = text.partition("://")
        places, _, fragment = rest.partition("#")
        try:
            pin = Fingerprint.parse(fragment)
            found = [_place(each) for each in places.split(",")]
        except ValueError as error:  # of the place or the fingerprint (a ConfigError is a ValueError)
            raise ConfigError(f"{text!r} is not a connection string: {error}") from error
        if scheme not in ("isthmus", "isthmus+tls") or not separator:
            raise ConfigError(f"{text!r} is not a connection string: `isthmus://host:port#SHA256:...` is needed")
        if len(found) > MAX_PLACES:
            raise ConfigError(f"{text[:60]!r}... is not a connection string: it names over {MAX_PLACES} places")
        (host, port), *others = found
        return cls(host, port, pin, scheme == "isthmus+tls", tuple(_written(*each) for each in others))

    @property
    def address(self) -> str:
        """`host:port` of the first place, an IPv6 host in brackets."""
        return _written(self.host, self.port)

    @property
    def addresses(self) -> tuple[str, ...]:
        """`host:port` of all places."""
        return (self.address, *self.others)

    def __str__(self) -> str:
        return f"isthmus{'+tls' if self.tls else ''}://{','.join(self.addresses)}#{self.pin}"


def _place(text: str) -> tuple[str, int]:
    """The host, without brackets, and the port of `host:port`. Raises ValueError."""
    parts = urlsplit(f"//{text}")
    host, port = parts.hostname, parts.port
    rest = parts.path or parts.query or parts.fragment or parts.username or parts.password
    if not host or not _HOST.fullmatch(host) or not port or rest:
        raise ValueError(f"`host:port` is needed, not {text!r}")
    return host, port


def _written(host: str, port: int) -> str:
    return f"{bracketed(host)}:{port}"
