"""The files of the page: read once, so that no path of a request ever names a file of the disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "require-trusted-types-for 'script'",  # text can become no HTML, not even by mistake
    )
)
"""The content security policy: nothing from elsewhere, no inline script, no frame around the page."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked for again: an update of the daemon is seen at once
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is sent.

    Attributes:
        etag: By its bytes, in quotation marks.
    """

    content: bytes
    media_type: str
    etag: str


def read_static_files(folder: Path = FOLDER) -> dict[str, StaticFile]:
    """The files of a folder, by their names."""
    found = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        found[path.name] = StaticFile(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def is_unchanged(file: StaticFile, if_none_match: str | None) -> bool:
    """Whether a client that sends `If-None-Match` has the file already (RFC 9110, section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return file.etag in tags or "*" in tags
