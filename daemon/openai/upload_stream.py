"""A multipart body on its way to the disk: the one file in it is written as it comes, and its fields are kept.

Bounds: the file's size is the caller's; a field has 4 KiB, a header of a part has 4 KiB and a part 8 of them, and there
are 16 parts, at most.
"""

from __future__ import annotations

import hashlib
from typing import IO, Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from isthmus.common.bounded_values import shown
from isthmus.daemon.web.api_error import ApiError

_FIELD, _HEADER, _HEADERS, _PARTS = 4096, 4096, 8, 16


class UploadStream:
    """Takes a body's bytes. `write` and `finish` raise `ApiError` for a body that does not fit.

    Args:
        content_type: The request's.
        file: Where the uploaded file's bytes go.
        most: Bytes of it at most.
    """

    def __init__(self, content_type: str, file: IO[bytes], most: int) -> None:
        media_type, options = parse_options_header(content_type)
        if media_type != b"multipart/form-data" or not options.get(b"boundary"):
            raise ApiError(415, f"the content type is {shown(content_type)}: send multipart/form-data")
        self._file, self._most = file, most
        self._hash = hashlib.sha256()
        self._line = 0
        self._parts = 0
        self._header_name, self._header_value = b"", b""
        self._disposition = b""
        self._field: str | None = None  # None while the part is the file
        self._ended = False
        self.size, self.longest_line = 0, 0
        self.filename: str | None = None
        self.fields: dict[str, str] = {}
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": self._add_name,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(
                options[b"boundary"], callbacks, max_header_count=_HEADERS, max_header_size=_HEADER
            )
        except FormParserError as error:
            raise _broken(error) from error

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file's bytes."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _broken(error) from error

    def finish(self) -> None:
        """The body has ended."""
        if not self._ended:
            raise ApiError(400, "the body ends before its last boundary: send it again", code="invalid_multipart")
        if self.filename is None:
            raise ApiError(400, "'file' is missing: give it", param="file", code="missing_required_parameter")

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _PARTS:
            raise ApiError(400, f"the body has more than {_PARTS} parts", code="invalid_multipart")
        self._header_name, self._header_value, self._disposition = b"", b"", b""

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name, self._header_value = b"", b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" in options:
            if name != "file":
                raise ApiError(400, f"unknown file {shown(name)}: leave it out", param=name[:200])
            if self.filename is not None:
                raise ApiError(400, "'file' stands twice: give it once", param="file")
            self._field = None
            self.filename = _plain_name(options[b"filename"].decode("utf-8", "replace"))
            return
        if name == "file":
            raise ApiError(400, "'file' is no file: give it a file name", param="file")
        if name in self.fields:
            raise ApiError(400, f"{shown(name)} stands twice: give it once", param=name[:200])
        self._field = name
        self.fields[name] = ""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._add_to_file(data[start:end])
            return
        if len(self.fields[self._field]) + end - start > _FIELD:
            raise ApiError(400, f"{shown(self._field)} has more than {_FIELD} bytes", param=self._field[:200])
        self.fields[self._field] += data[start:end].decode("utf-8", "replace")

    def _add_to_file(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._most:
            raise ApiError(
                413,
                f"the file has more than {self._most} bytes, the most that is taken (`upload_mib`): send it in parts",
                param="file",
            )
        first, *others = data.split(b"\n")
        self._line += len(first)
        self.longest_line = max(self.longest_line, self._line, *map(len, others), 0)
        if others:
            self._line = len(others[-1])
        self._hash.update(data)
        self._file.write(data)

    def _end(self) -> None:
        self._ended = True


def _broken(error: FormParserError) -> ApiError:
    return ApiError(400, f"the body is no multipart form ({ascii(str(error))[:200]})", code="invalid_multipart")


def _plain_name(name: str) -> str:
    """A file's name without folders, and without what cannot be shown."""
    name = name.replace("\\", "/").rpartition("/")[2]
    return "".join(each if each.isprintable() else "_" for each in name)[:255] or "file"
