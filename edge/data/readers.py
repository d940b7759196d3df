"""From files to examples: JSONL, CSV, TSV and hub data sets, each mistake named by file and line.

A reader yields records (where it stood, its fields); `Columns` says which fields are text, prompt and completion.
Nothing here knows a tokenizer. The forms:

    text                    plain text, all of it trained on; the same as a completion after an empty prompt
    prompt + completion     the prompt is read, the completion is trained on
    messages                [{"role": ..., "content": ...}, ...] for the tokenizer's chat template (JSONL and hub only)

Without named columns the first record decides by its keys, in the order messages, prompt + completion, text. TSV is
read as its registration (IANA text/tab-separated-values) has it: no quoting, so a quotation mark is a character as any
other. CSV follows RFC 4180.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from isthmus.common.bounded_values import brief, check_json
from isthmus.common.errors import ConfigError, DataError
from isthmus.edge.config.data_config import ExamplesConfig

_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}
MOST_NAMES = 20
"""Names of fields in an error."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example: either `completion` or `messages` (role, content) is filled; `where` names its place."""

    prompt: str
    completion: str
    messages: tuple[tuple[str, str], ...] = ()
    where: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of one line and the place it stood at."""

    where: str
    values: Mapping[str, object]


def read_examples(source: str, config: ExamplesConfig) -> list[Example]:
    """Read every example of `source` (a path or `hub:NAME[:SPLIT]`), with the format and columns of `config`.

    Raises:
        DataError: The file is missing, empty or malformed; the message names file and line.
        ConfigError: The format is not known, or the optional package for hub data is missing.
    """
    examples = list(each_example(source, config))
    if not examples:
        raise DataError(f"{source} holds no examples: it is empty, or has nothing but blank lines or column names.")
    return examples


def each_example(source: str, config: ExamplesConfig) -> Iterator[Example]:
    """The examples that `read_examples` reads, one after the other, however few. Raises what it does."""
    columns: Columns | None = None
    for record in _records(source, config):
        columns = columns or Columns.of(config, record)
        yield columns.example(record)


def _records(source: str, config: ExamplesConfig) -> Iterator[Record]:
    kind = config.format
    if source.startswith("hub:"):
        kind = "hub"
    elif kind == "auto":
        kind = _ENDINGS.get(Path(source).suffix.lower(), "auto")  # type: ignore[assignment]  # the table's values are formats
    if kind == "hub":
        return _hub(source.removeprefix("hub:"))
    if kind == "auto":
        raise ConfigError(f"the form of {source!r} is not clear from its ending: give --format jsonl, csv or tsv.")
    if kind == "jsonl":
        return json_lines(source)
    return _table(source, _decode(source), kind, config.header)


def _decode(source: str) -> str:
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise _unreadable(source, error) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _not_utf8(f"{source}, line {line}", error) from error


def _unreadable(source: str, error: OSError) -> DataError:
    return DataError(f"the data file {source} cannot be read ({error.strerror}): check the path.")


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{where}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8.")


def json_lines(source: str, name: str | None = None) -> Iterator[Record]:
    """The records of a file of JSON Lines, of which one line at a time is in memory; blank lines are none.

    Args:
        source: The path.
        name: What the errors call the file; its path by default.

    Raises:
        DataError: It cannot be read, or a line is no JSON object; the message names it.
    """
    try:
        with Path(source).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # noqa: PLW2901  # the same line without its mark
                if line.strip():
                    yield _json_record(line, name or source, number)
    except OSError as error:
        raise _unreadable(name or source, error) from error


def _json_record(line: bytes, source: str, number: int) -> Record:
    where = f"{source}, line {number}"
    try:
        check_json(line)
    except ValueError as error:
        raise DataError(f"{where} {error}: split it.") from error
    try:
        values = json.loads(line.decode("utf-8").rstrip("\r\n"))  # else an error at the end is of the next line
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not JSON ({reason}); every line is one JSON object.") from error
    if not isinstance(values, dict):
        raise DataError(
            f"{where}: a {_kind(values)} where an object {{...}} is expected; every line is one JSON object."
        )
    return Record(where, values)


def _table(source: str, text: str, kind: str, header: bool) -> Iterator[Record]:
    if kind == "tsv":
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    while True:
        line = rows.line_num + 1  # a quoted field may span lines: the record is named by its first
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{source}, line {line}: malformed {kind.upper()} ({error}); check the quotation marks."
            ) from error
        if not row:
            continue
        if names is None:
            names = [name.strip() for name in row] if header else [str(index) for index in range(len(row))]
            if len(set(names)) != len(names):
                raise DataError(f"{source}, line {line}: a column name stands twice in {names}; rename one of them.")
            if header:
                continue
        if len(row) != len(names):
            raise DataError(
                f"{source}, line {line}: {len(row)} columns where {len(names)} are expected ({', '.join(names)}); "
                "quote or remove the separators inside fields."
            )
        yield Record(f"{source}, line {line}", dict(zip(names, row, strict=True)))


def _hub(name: str) -> Iterator[Record]:
    name, _, split = name.partition(":")
    split = split or "train"
    if not name:
        raise ConfigError("data = 'hub:' names no data set: write hub:NAME or hub:NAME:SPLIT.")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"hub:{name} needs the package `datasets`: pip install 'isthmus[datasets]', or give a local file."
        ) from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the hub data set {name!r}, split {split!r}, cannot be loaded ({reason}): "
            "check the name, the split and the connection, or give a local file."
        ) from error
    for index, values in enumerate(rows):
        yield Record(f"hub:{name}:{split}, row {index}", values)


# A template taken apart: literal text, then the column that follows it, or None at the end.
Template = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True, slots=True)
class Columns:
    """Which fields of a record make an example: templates over columns, or the key of a list of messages."""

    prompt: Template = ()
    completion: Template = ()
    messages: str | None = None

    @classmethod
    def of(cls, config: ExamplesConfig, first: Record) -> Columns:
        """From the configuration, or, where it names no column, from the keys of the first record."""
        if config.text_column:
            return cls(completion=_column(config.text_column))
        if config.completion_column or config.completion_template:
            return cls(
                _column(config.prompt_column) if config.prompt_column else _parse(config.prompt_template or ""),
                _column(config.completion_column)
                if config.completion_column
                else _parse(config.completion_template or ""),
            )
        keys = first.values.keys()
        if "messages" in keys:
            return cls(messages="messages")
        if {"prompt", "completion"} <= keys:
            return cls(_column("prompt"), _column("completion"))
        if "text" in keys:
            return cls(completion=_column("text"))
        raise DataError(
            f"{first.where}: none of the keys {_names(keys)} is 'text', 'prompt' with 'completion', "
            "or 'messages'; name the columns with --text-column, or --prompt-column and --completion-column."
        )

    def example(self, record: Record) -> Example:
        """The example that `record` holds.

        Raises:
            DataError: A field is missing, is not a string, or the completion is empty.
        """
        if self.messages is not None:
            return Example("", "", _answered(record, self.messages), record.where)
        if not any(name is not None and _string(record, name).strip() for _, name in self.completion):
            what = "completion" if self.prompt else "text"
            raise DataError(
                f"{record.where}: the {what} is empty, so there is nothing to train on; fill or remove the line."
            )
        return Example(_fill(self.prompt, record), _fill(self.completion, record), where=record.where)


def _column(name: str) -> Template:
    return (("", name),)


def _parse(template: str) -> Template:
    # A shell's quotes leave these two as they are written.
    written_out = template.replace("\\n", "\n").replace("\\t", "\t")
    try:
        parts = list(string.Formatter().parse(written_out))
    except ValueError as error:
        raise ConfigError(
            f"the template {template!r} is malformed ({error}): write {{column}}, and {{{{ for a brace."
        ) from error
    for _, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            raise ConfigError(f"the template {template!r} has a place without a plain column name: write {{column}}.")
    return tuple((literal, name) for literal, name, _, _ in parts)


def _fill(template: Template, record: Record) -> str:
    return "".join(literal + ("" if name is None else _string(record, name)) for literal, name in template)


def _string(record: Record, name: str) -> str:
    if name not in record.values:
        raise DataError(f"{record.where}: no {name!r}; it has {_names(record.values) or 'no fields at all'}.")
    return checked_text(record.values[name], f"{record.where}: {name!r}")


def checked_text(value: object, what: str) -> str:
    """A string of a record, which `what` names.

    Raises:
        DataError: It is no string, or not one that can be written as UTF-8.
    """
    if not isinstance(value, str):
        raise DataError(f"{what} is a {_kind(value)}, not a string; put it in quotation marks.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half of a surrogate pair at character {error.start}; remove it.") from error
    return value


def read_messages(record: Record, key: str) -> tuple[tuple[str, str], ...]:
    """The messages of a chat under a key, each its role and content.

    Raises:
        DataError: They are none.
    """
    value = record.values.get(key)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{record.where}: {key!r} is not a list of messages; write [{{'role': ..., 'content': ...}}, ...]."
        )
    turns = []
    for index, message in enumerate(value):
        what = f"{record.where}: message {index}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"{what} is not an object with 'role' and 'content'.")
        turns.append(
            (checked_text(message["role"], f"{what}: 'role'"), checked_text(message["content"], f"{what}: 'content'"))
        )
    return tuple(turns)


def _answered(record: Record, key: str) -> tuple[tuple[str, str], ...]:
    """The messages up to the last one of the assistant, which answers one before."""
    turns = read_messages(record, key)
    answers = [index for index, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers or answers[0] == 0:
        raise DataError(
            f"{record.where}: no assistant message that answers an earlier one, so there is nothing to train on."
        )
    last = answers[-1]
    if not turns[last][1].strip():
        raise DataError(f"{record.where}: the last assistant message is empty, so there is nothing to train on.")
    return turns[: last + 1]


def _names(names: Collection[str]) -> str:
    """Some names of fields, of which an error shows the first ones."""
    first = [brief(name) for name in islice(names, MOST_NAMES)]
    return ", ".join(first + ["…"] * (len(names) > len(first)))


def _kind(value: object) -> str:
    names = {
        bool: "boolean",
        int: "number",
        float: "number",
        list: "list",
        dict: "object",
        type(None): "null",
        str: "string",
    }
    return names.get(type(value), type(value).__name__)
