"""Multipart bodies, whole, broken and too large, in pieces of every size."""

from __future__ import annotations

import hashlib
import io

import pytest

from isthmus.daemon.openai.upload_stream import UploadStream
from isthmus.daemon.web.api_error import ApiError

TYPE = "multipart/form-data; boundary=B"
FILE = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
FIELD = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
CONTENT = b"one\r\n--Bandit\r\ntwo\n" * 3
WHOLE = FIELD + FILE + CONTENT + b"\r\n--B--\r\n"


def read(body: bytes, piece: int = 1000, most: int = 10_000, content_type: str = TYPE) -> tuple[UploadStream, bytes]:
    """The stream after a body that comes in pieces, and the file's bytes."""
    file = io.BytesIO()
    stream = UploadStream(content_type, file, most)
    for at in range(0, len(body), piece):
        stream.write(body[at : at + piece])
    stream.finish()
    return stream, file.getvalue()


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
def test_a_file_is_the_same_however_it_is_cut(piece: int) -> None:
    stream, data = read(WHOLE, piece)
    assert (data, stream.fields, stream.filename) == (CONTENT, {"purpose": "batch"}, "a.txt")
    assert (stream.size, stream.longest_line) == (len(CONTENT), len("--Bandit\r"))
    assert stream.sha256 == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (WHOLE[:-8], "ends before its last boundary"),
        (b"nonsense", "no multipart form"),
        (FIELD + b"--B--", "'file' is missing"),
        (FIELD * 2 + b"--B--", "'purpose' stands twice"),
        (FILE + b"\r\n" + FILE + b"\r\n--B--", "'file' stands twice"),
        (FILE.replace(b'"file"', b'"other"') + b"\r\n--B--", "unknown file 'other'"),
        (FILE.replace(b'; filename="a.txt"', b"") + b"\r\n--B--", "'file' is no file"),
        (FIELD.replace(b"batch", b"x" * 5000) + b"--B--", "'purpose' has more than 4096 bytes"),
        (FIELD.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 9000 + b"\r\n\r\n"), "header size exceeded"),
        (FIELD.replace(b"\r\n\r\n", b"\r\nX: x" * 8 + b"\r\n\r\n"), "header count exceeded"),
        (b"".join(FIELD.replace(b"purpose", b"p%d" % n) for n in range(17)), "more than 16 parts"),
    ],
)
def test_what_does_not_fit_is_refused(body: bytes, error: str) -> None:
    with pytest.raises(ApiError, match=error) as caught:
        read(body)
    assert caught.value.status == 400


def test_a_file_has_a_bound() -> None:
    read(WHOLE, most=len(CONTENT))
    with pytest.raises(ApiError, match="upload_mib") as caught:
        read(WHOLE, most=len(CONTENT) - 1)
    assert caught.value.status == 413


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data"])
def test_another_content_type_is_refused(content_type: str) -> None:
    with pytest.raises(ApiError, match="multipart/form-data") as caught:
        read(WHOLE, content_type=content_type)
    assert caught.value.status == 415


@pytest.mark.parametrize(
    ("name", "shown"), [("a/b\\c.txt", "c.txt"), ("", "file"), ("x" * 300, "x" * 255), ("a\x00b", "a_b")]
)
def test_a_name_is_plain(name: str, shown: str) -> None:
    stream, _ = read(WHOLE.replace(b"a.txt", name.replace("\\", "\\\\").encode()))
    assert stream.filename == shown
