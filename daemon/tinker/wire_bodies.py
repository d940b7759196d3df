"""Tinker's protobuf bodies: what a request of `forward_backward` asks, and results as bytes.

Whatever comes from outside is bounded: a body by the settings, also when it is unpacked, and all sparse arrays of a
request together by `MOST_TARGETS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from isthmus.daemon.tinker import tinker_wire_pb2 as wire
from isthmus.daemon.tinker.refusal import RefusalError

PROTOBUF = "application/x-protobuf"
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")
MOST_WINDOW = 8 << 20
"""Bytes that zstandard's decoder may hold beside its output."""
MOST_TARGETS = 1 << 20
"""In one request, of all data together; and numbers of all its sparse arrays, once they are dense."""

_NUMBERS: dict[int, np.dtype[Any]] = {
    wire.NUMBER_FLOAT32: np.dtype("<f4"),
    wire.NUMBER_INT64: np.dtype("<i8"),
    wire.NUMBER_INT32: np.dtype("<i4"),
}
_NO_TOKEN = -99999.0  # the API's log probability where fewer tokens are likeliest than asked for


class BodyError(ValueError):
    """A body is no message of the API, or larger than it may be."""


@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """What a request of `forward_backward` names; its data are read later, when its turn comes."""

    model: str
    seq: int
    forward_only: bool


def unpacked(body: bytes, encoding: str | None, most: int) -> bytes:
    """A body without its compression.

    Args:
        body: As it came.
        encoding: The header `Content-Encoding`.
        most: Bytes that it may unpack to.

    Raises:
        BodyError: It is damaged, larger, or compressed in another way than by zstandard.
    """
    if encoding in {None, "", "identity"}:
        return body
    if encoding != "zstd":
        raise BodyError(f"Content-Encoding {encoding!r} is not read here: send zstd, or none")
    decoder = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW)
    try:
        with decoder.stream_reader(body, read_across_frames=True) as reader:
            found = reader.read(most + 1)
            whole = not reader.read(1)
    except zstandard.ZstdError as error:
        raise BodyError(f"the body is no zstandard data ({error})") from error
    if len(found) > most or not whole:
        raise BodyError(f"the body unpacks to more than {most} bytes: send fewer data at a time")
    return found


def read_heading(body: bytes) -> ForwardBackward:
    """What a request of `forward_backward` is for. Raises BodyError."""
    message = _parse(body)
    return ForwardBackward(message.model_id, message.seq_id, message.forward_only)


def read_question(body: bytes) -> dict[str, Any]:
    """What the training process is asked, by a request of `forward_backward`.

    Raises:
        RefusalError: Something of it is not offered, or does not fit together.
        BodyError: It is no message of the API.
    """
    message = _parse(body)
    if message.loss not in LOSSES:
        raise RefusalError(f"loss_fn {message.loss!r} is not offered: choose one of {', '.join(LOSSES)}")
    if not message.data:
        raise RefusalError("data is empty: send at least one datum")
    _check_sparse(message)
    return {
        "loss": message.loss,
        "loss_config": _loss_config(message),
        "forward_only": message.forward_only,
        "data": [_datum(index, datum) for index, datum in enumerate(message.data)],
    }


def written_output(outputs: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> bytes:
    """The result of a `forward_backward`.

    Args:
        outputs: For each datum its fields by name, as lists, or lists of equally long lists.
        metrics: By names with one colon, for instance "loss:sum".
    """
    message = wire.ForwardBackwardOutput(kind="ArrayRecord", metrics=dict(metrics))
    run: list[dict[str, NDArray[np.float32]]] = []
    for output in outputs:
        arrays = {name: np.asarray(value, "<f4") for name, value in output.items()}
        if run and any(run[0][name].shape[1:] != array.shape[1:] for name, array in arrays.items()):
            _add_record(message, run)
            run = []
        run.append(arrays)
    if run:
        _add_record(message, run)
    return bytes(message.SerializeToString())


@dataclass(frozen=True, slots=True)
class Sampled:
    """One answer: its tokens, their log probabilities, and the likeliest at each place where they are wanted."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    likeliest: Sequence[Sequence[tuple[int, float]]]
    stopped: bool


def written_samples(
    samples: Sequence[Sampled],
    prompt_logprobs: Sequence[float | None] | None,
    prompt_likeliest: Sequence[Sequence[tuple[int, float]]],
    k_sample: int,
    k_prompt: int,
) -> bytes:
    """The result of an `asample`.

    Args:
        samples: The answers, in order.
        prompt_logprobs: Of the prompt's tokens, None where there is none; None if they are not wanted.
        prompt_likeliest: A row for each token of the prompt; for the first one it is empty.
        k_sample, k_prompt: Likeliest tokens in a row; 0 if they are not wanted.
    """
    message = wire.SampleResponse()
    for sample in samples:
        sequence = message.sequences.add(
            stop_reason=wire.STOP_REASON_STOP if sample.stopped else wire.STOP_REASON_LENGTH,
            tokens=np.asarray(sample.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sample.logprobs, "<f4").tobytes(),
        )
        if k_sample:
            sequence.likeliest.CopyFrom(_likeliest(sample.likeliest, k_sample))
    if prompt_logprobs is not None:
        rows = [np.nan if value is None else value for value in prompt_logprobs]
        message.prompt_logprobs = np.asarray(rows, "<f4").tobytes()
    if k_prompt:
        message.prompt_likeliest.CopyFrom(_likeliest(prompt_likeliest, k_prompt))
    return bytes(message.SerializeToString())


def _parse(body: bytes) -> wire.ForwardBackwardRequest:
    message = wire.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise BodyError(f"the body is no request of forward_backward ({error})") from error
    return message


def _loss_config(message: wire.ForwardBackwardRequest) -> dict[str, float]:
    if not message.loss_settings:
        return dict(message.loss_figures)
    for name, setting in message.loss_settings.items():
        if setting.WhichOneof("value") != "figure":
            raise RefusalError(f"loss_fn_config {name} = {setting.text!r}: a number is expected")
    return {name: setting.figure for name, setting in message.loss_settings.items()}


def _check_sparse(message: wire.ForwardBackwardRequest) -> None:
    """Bound what sparse arrays take as dense ones, before any of them is made. Raises RefusalError."""
    total = 0
    for index, datum in enumerate(message.data):
        for name, tensor in datum.loss_inputs.items():
            if tensor.WhichOneof("layout") != "sparse":
                continue
            shape = list(tensor.shape)
            if len(shape) != 2 or min(shape) < 1:
                raise RefusalError(f"datum {index}: {name} is a sparse array of shape {shape}: give two dimensions")
            total += shape[0] * shape[1]
            if total > MOST_TARGETS:
                raise RefusalError(
                    f"datum {index}: with {name} of shape {shape} the sparse arrays of this request have more than "
                    f"{MOST_TARGETS} numbers: send fewer data at a time"
                )


def _datum(index: int, datum: wire.Datum) -> dict[str, Any]:
    tokens: list[int] = []
    for chunk in datum.input:
        kind = chunk.WhichOneof("chunk")
        if kind != "text":
            raise RefusalError(f"datum {index}: model_input holds {kind or 'nothing known'}; only tokens are offered")
        tokens += _array(index, "model_input", chunk.text.tokens, _NUMBERS[wire.NUMBER_INT32]).tolist()
    if not tokens:
        raise RefusalError(f"datum {index}: model_input is empty")
    values: dict[str, Any] = {"tokens": tokens}
    for name, tensor in datum.loss_inputs.items():
        array = _tensor(index, name, tensor)
        if array.shape[0] != len(tokens):
            raise RefusalError(
                f"datum {index}: {name} has {array.shape[0]} rows, and model_input has {len(tokens)} tokens"
            )
        values["targets" if name == "target_tokens" else name] = array.tolist()
    if "targets" not in values:
        raise RefusalError(f"datum {index}: target_tokens is missing")
    return values


def _tensor(index: int, name: str, tensor: wire.Tensor) -> NDArray[Any]:
    """A tensor of one or two dimensions; what a sparse one does not list is 0."""
    kind = _NUMBERS.get(tensor.number)
    if kind is None or kind.kind != ("i" if name == "target_tokens" else "f"):
        raise RefusalError(f"datum {index}: {name} has numbers of kind {tensor.number}, which it cannot have")
    shape = tuple(tensor.shape)
    if tensor.WhichOneof("layout") == "sparse":
        array = _from_rows(index, name, tensor.sparse, kind, shape)
    else:
        array = _array(index, name, tensor.dense, kind)
        shape = shape or array.shape
        if len(shape) not in {1, 2} or min(shape) < 1 or int(np.prod(shape, dtype=object)) != array.size:
            raise RefusalError(f"datum {index}: {name} has shape {list(shape)} and {array.size} numbers")
        array = array.reshape(shape)
    if kind.kind == "f" and not np.isfinite(array).all():
        raise RefusalError(f"datum {index}: {name} has a number that is not finite")
    return array


def _from_rows(
    index: int, name: str, sparse: wire.SparseRows, kind: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    refused = RefusalError(f"datum {index}: {name} is a sparse array whose parts do not fit its shape {list(shape)}")
    whole = _NUMBERS[wire.NUMBER_INT64]
    values = _array(index, name, sparse.values, kind)
    starts, columns = _array(index, name, sparse.row_starts, whole), _array(index, name, sparse.columns, whole)
    lengths = np.diff(starts)
    if (
        starts.size != shape[0] + 1
        or starts[0] != 0
        or starts[-1] != values.size
        or values.size != columns.size
        or (lengths < 0).any()
        or (columns < 0).any()
        or (columns >= shape[1]).any()
    ):
        raise refused
    found = np.zeros(shape, kind)
    found[np.repeat(np.arange(shape[0]), lengths), columns] = values
    return found


def _array(index: int, name: str, data: bytes, kind: np.dtype[Any]) -> NDArray[Any]:
    if len(data) % kind.itemsize:
        raise RefusalError(f"datum {index}: {name} has {len(data)} bytes, no multiple of {kind.itemsize}")
    return np.frombuffer(data, kind)


def _add_record(message: wire.ForwardBackwardOutput, run: Sequence[Mapping[str, NDArray[np.float32]]]) -> None:
    """Data whose arrays have equal trailing shapes, as one record."""
    record = message.records.add(kind="ArrayRecord", data=len(run))
    for name, first in run[0].items():
        arrays = [datum[name] for datum in run]
        offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype="<i8")
        record.fields[name].CopyFrom(
            wire.Batch(
                data=b"".join(array.tobytes() for array in arrays),
                offsets=offsets.tobytes(),
                number=wire.NUMBER_FLOAT32,
                trailing_shape=first.shape[1:],
            )
        )


def _likeliest(rows: Sequence[Sequence[tuple[int, float]]], k: int) -> wire.Likeliest:
    tokens, logprobs = np.zeros((len(rows), k), "<i4"), np.full((len(rows), k), _NO_TOKEN, "<f4")
    for place, row in enumerate(rows):
        for rank, (token, logprob) in enumerate(row[:k]):
            tokens[place, rank], logprobs[place, rank] = token, logprob
    return wire.Likeliest(tokens=tokens.tobytes(), logprobs=logprobs.tobytes(), k=k, positions=len(rows))
