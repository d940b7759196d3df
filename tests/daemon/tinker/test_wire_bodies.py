"""Our reading and writing of Tinker's protobuf bodies, against the SDK's own."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import zstandard
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from tinker import types
from tinker.proto import request_conv, response_conv, tinker_public_pb2 as theirs

from isthmus.daemon.tinker import tinker_wire_pb2 as ours
from isthmus.daemon.tinker.refusal import RefusalError
from isthmus.daemon.tinker.wire_bodies import (
    MOST_TARGETS,
    BodyError,
    Sampled,
    read_heading,
    read_question,
    unpacked,
    written_output,
    written_samples,
)

ROOTS = ("ForwardBackwardRequest", "ForwardBackwardOutput", "SampleResponse")
LEFT_OUT = {("SampleResponse", 4), ("SampleResponse", 5), ("SampleResponse", 6), ("Datum", 3), ("Datum", 4)}
OPAQUE = {("Chunk", 2), ("Chunk", 3)}  # images and audio, which are refused unread


def _differences(mine: Descriptor, other: Descriptor, seen: set[str]) -> list[str]:
    """Where two messages differ on the wire: numbers, kinds, repetition, presence, alternatives; and below."""
    if other.full_name in seen:
        return []
    seen.add(other.full_name)
    found = []
    for number in sorted({*mine.fields_by_number, *other.fields_by_number}):
        place = (other.name, number)
        left, right = mine.fields_by_number.get(number), other.fields_by_number.get(number)
        if left is None or right is None:
            if place not in LEFT_OUT or right is None:
                found.append(f"{place} is missing")
        elif place not in OPAQUE and _shape(left) != _shape(right):
            found.append(f"{place}: {_shape(left)} and {_shape(right)}")
        elif left.message_type is not None:
            found += _differences(left.message_type, right.message_type, seen)
        elif left.enum_type is not None and list(left.enum_type.values_by_number) != list(
            right.enum_type.values_by_number
        ):
            found.append(f"{place}: other numbers")
    return found


def _shape(field: FieldDescriptor) -> tuple[object, ...]:
    alternatives = field.containing_oneof
    among = None if alternatives is None else sorted(each.number for each in alternatives.fields)
    return field.type, field.is_repeated, field.has_presence, among


@pytest.mark.parametrize("name", ROOTS)
def test_the_numbers_are_the_sdk_s(name: str) -> None:
    assert (
        _differences(ours.DESCRIPTOR.message_types_by_name[name], theirs.DESCRIPTOR.message_types_by_name[name], set())
        == []
    )


def test_another_number_would_be_noticed() -> None:
    assert _differences(ours.Tensor.DESCRIPTOR, theirs.BatchedTensor.DESCRIPTOR, set()) != []


def body(*data: types.Datum, loss: str = "cross_entropy", config: dict[str, float | str] | None = None) -> bytes:
    request = types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(data=list(data), loss_fn=loss, loss_fn_config=config),
        model_id="m",
        seq_id=7,
    )
    return bytes(request_conv.forward_backward_request_to_proto(request).SerializeToString())


def datum(tokens: list[int], **inputs: object) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def test_a_request_of_the_sdk_is_read() -> None:
    sent = body(
        datum([1, 2], target_tokens=[2, 3], logprobs=[-0.5, -0.25], advantages=[1.0, -1.0]),
        loss="ppo",
        config={"clip_low_threshold": 0.8},
    )
    heading = read_heading(sent)
    assert (heading.model, heading.seq, heading.forward_only) == ("m", 7, False)
    assert read_question(sent) == {
        "loss": "ppo",
        "loss_config": {"clip_low_threshold": 0.8},
        "forward_only": False,
        "data": [{"tokens": [1, 2], "targets": [2, 3], "logprobs": [-0.5, -0.25], "advantages": [1.0, -1.0]}],
    }


def sparse(shape: list[int], values: list[int], rows: list[int], columns: list[int]) -> types.TensorData:
    return types.TensorData(
        data=values, dtype="int64", shape=shape, sparse_crow_indices=rows, sparse_col_indices=columns
    )


def test_a_sparse_array_is_read() -> None:
    sent = body(datum([1, 2], target_tokens=sparse([2, 3], [7, 8, 9], [0, 1, 3], [2, 0, 1])))
    assert read_question(sent)["data"][0]["targets"] == [[0, 0, 7], [8, 9, 0]]


@pytest.mark.parametrize(
    ("shape", "values", "rows", "columns"),
    [
        ([2, 3], [7, 8], [0, 1, 3], [2, 0]),
        ([2, 3], [7, 8], [0, 1], [2, 0]),
        ([2, 3], [7, 8], [0, 3, 2], [2, 0]),
        ([2, 3], [7, 8], [0, 1, 2], [2, 3]),
        ([2, 3], [7, 8], [0, 1, 2], [2, -1]),
        ([2, 10**9], [7, 8], [0, 1, 2], [2, 0]),
        ([2, -3], [7, 8], [0, 1, 2], [2, 0]),
        ([2, 2**62], [7, 8], [0, 1, 2], [2, 0]),
    ],
)
def test_a_sparse_array_that_does_not_fit_or_is_huge_is_refused(
    shape: list[int], values: list[int], rows: list[int], columns: list[int]
) -> None:
    message = theirs.ForwardBackwardRequest(loss_fn="cross_entropy")
    added = message.data.add()
    added.model_input.add().encoded_text.tokens = np.asarray([1, 2], np.int32).tobytes()
    tensor = added.loss_fn_inputs["target_tokens"]
    tensor.dtype = theirs.DTYPE_INT64
    tensor.shape.extend(shape)
    tensor.sparse_csr.values = np.asarray(values, np.int64).tobytes()
    tensor.sparse_csr.crow_indices = np.asarray(rows, np.int64).tobytes()
    tensor.sparse_csr.col_indices = np.asarray(columns, np.int64).tobytes()
    with pytest.raises(RefusalError, match="target_tokens"):
        read_question(message.SerializeToString())


def test_the_sparse_arrays_of_a_request_are_bounded_together() -> None:
    def request(*columns: int) -> bytes:
        return body(*(datum([1], target_tokens=sparse([1, count], [7], [0, 1], [0])) for count in columns))

    half = MOST_TARGETS // 2
    read = read_question(request(half, half))
    assert [len(each["targets"][0]) for each in read["data"]] == [half, half]
    tracemalloc.start()
    with pytest.raises(RefusalError, match=f"datum 2: .* more than {MOST_TARGETS} numbers"):
        read_question(request(half, half, 1))
    assert tracemalloc.get_traced_memory()[1] < MOST_TARGETS  # nothing is made before it is refused
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (body(datum([1], target_tokens=[1]), loss="gspo"), "'gspo' is not offered"),
        (body(datum([1], target_tokens=[1]), loss="custom"), "'custom' is not offered"),
        (body(datum([1], target_tokens=[1]), config={"loss_id": "x"}), "loss_id = 'x': a number"),
        (body(datum([1], weights=[1.0])), "target_tokens is missing"),
        (body(datum([], target_tokens=[1])), "model_input is empty"),
        (body(datum([1], target_tokens=[1], weights=[float("inf")])), "not finite"),
        (body(datum([1], target_tokens=types.TensorData(data=[1.5], dtype="float32"))), "numbers of kind"),
        (body(datum([1, 2], target_tokens=[1])), "1 rows"),
        (body(), "data is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a map's bytes have another order in each process
)
def test_what_is_not_offered_is_refused(sent: bytes, said: str) -> None:
    with pytest.raises(RefusalError, match=said):
        read_question(sent)


def test_a_body_is_unpacked_within_its_bound() -> None:
    data = b"\0" * 5000
    packed = zstandard.ZstdCompressor().compress(data)
    assert unpacked(packed, "zstd", 5000) == data
    assert unpacked(data, None, 10) == data
    for sent, encoding, said in [
        (packed, "zstd", "more than 4999"),
        (zstandard.ZstdCompressor().compress(b"\0" * (64 << 20)), "zstd", "more than 4999"),
        (packed + packed, "zstd", "more than 4999"),
        (b"nothing of zstd", "zstd", "no zstandard data"),
        (packed, "gzip", "'gzip' is not read"),
    ]:
        with pytest.raises(BodyError, match=said):
            unpacked(sent, encoding, 4999)
    wide = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    with pytest.raises(BodyError, match="no zstandard data"):
        unpacked(packer.compress(b"\1" * (32 << 20)) + packer.flush(), "zstd", 64 << 20)


def test_no_message_is_an_error() -> None:
    with pytest.raises(BodyError, match="no request of forward_backward"):
        read_heading(b"\xff\xff\xff")


def test_the_sdk_reads_our_results() -> None:
    outputs = [{"logprobs": [-1.0, -2.0]}, {"logprobs": [-3.0]}, {"logprobs": [[-1.0, -2.0, -3.0]]}]
    read = response_conv.deserialize_forward_backward_output(written_output(outputs, {"loss:sum": 2.5}))
    assert read.metrics == {"loss:sum": 2.5}
    assert [output["logprobs"].to_torch().tolist() for output in read.loss_fn_outputs] == [
        [-1.0, -2.0],
        [-3.0],
        [[-1.0, -2.0, -3.0]],
    ]
    samples = [
        Sampled([4, 5], [-0.5, -1.5], [[(4, -0.5), (1, -2.0)], [(5, -1.5)]], True),
        Sampled([6], [-1.0], [[]], False),
    ]
    sampled = response_conv.deserialize_sample_response(
        written_samples(samples, [None, -0.25], [[], [(9, -0.25)]], 2, 1)
    )
    assert [sequence.tokens for sequence in sampled.sequences] == [[4, 5], [6]]
    assert [sequence.stop_reason for sequence in sampled.sequences] == ["stop", "length"]
    assert sampled.sequences[0].logprobs == [-0.5, -1.5]
    assert sampled.sequences[0].topk_logprobs_np.token_ids.tolist() == [[4, 1], [5, 0]]
    assert sampled.prompt_logprobs == [None, -0.25]
    assert sampled.topk_prompt_logprobs_np.token_ids.tolist() == [[0], [9]]
