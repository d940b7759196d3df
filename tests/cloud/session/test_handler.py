"""A tenant's session: what it answers, what it refuses and how it says so, and which files it can ever give away."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.cloud.clouds import served
from support.models.tiny import HIDDEN, tiny_checkpoint
from support.wire import TENANT

from isthmus.backbone.runtime.call_memory import CallShape, Pass
from isthmus.cloud.engine.paused_calls import CallThreads
from isthmus.cloud.session.file_store import FileShelf
from isthmus.cloud.session.handler import Asked, TenantSession, handle_together, kind_of
from isthmus.cloud.session.served_model import Served
from isthmus.common.errors import MessageError
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role, codec_id, decode, encode, encode_mask, encode_positions

MAX_TOKENS = 64
FP32 = codec_id("fp32")
THREADS = CallThreads(1)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("tenant")
    return served(tiny_checkpoint("llama", folder / "model"), folder / "parts", max_tokens=MAX_TOKENS)


@pytest.fixture
def tenant(cloud: Served) -> TenantSession:
    cloud.executor.evict_all()
    return cloud.session(b"s" * 16, TENANT, THREADS)


def hidden(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def span_inputs(
    shape: tuple[int, ...] = (2, 6, HIDDEN),
    mask: tuple[int, ...] | None = None,
    positions: tuple[int, ...] | None = None,
) -> m.SpanInputs:
    return m.SpanInputs(
        encode(hidden(*shape), "fp32", Role.ACTIVATION),
        None if mask is None else encode_mask(torch.ones(mask, dtype=torch.long)),
        None if positions is None else encode_positions(torch.zeros(positions, dtype=torch.long)),
    )


def forward(inputs: m.SpanInputs, *, keep: bool = True, call: int = 1, codec: int = FP32) -> m.Forward:
    return m.Forward(m.CallId(1, call), keep, inputs.hidden, inputs.attention_mask, inputs.position_ids, codec)


def backward(shape: tuple[int, ...], *, call: int = 1, replay: m.SpanInputs | None = None) -> m.Backward:
    return m.Backward(m.CallId(1, call, 3), encode(hidden(*shape), "fp32", Role.GRADIENT), replay, FP32)


def refusal(answer: m.Message | Exception | None, code: m.StatusCode = m.StatusCode.BAD_REQUEST) -> str:
    assert isinstance(answer, m.Status)
    assert answer.code == code
    return answer.message


def test_a_forward_and_its_backward_are_answered_with_their_ids(tenant: TenantSession, cloud: Served) -> None:
    reply = tenant.handle(forward(span_inputs(mask=(2, 6), positions=(1, 6))))
    assert isinstance(reply, m.ForwardReply)
    assert reply.id == m.CallId(1, 1)
    expected = cloud.executor.host.span(
        hidden(2, 6, HIDDEN), torch.ones(2, 6, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long)
    )
    assert torch.equal(decode(reply.hidden), expected)
    back = tenant.handle(backward((2, 6, HIDDEN)))
    assert isinstance(back, m.BackwardReply)
    assert back.id == m.CallId(1, 1, 3)
    assert not back.recomputed


def test_the_answer_uses_the_codec_that_was_asked_for(tenant: TenantSession) -> None:
    reply = tenant.handle(forward(span_inputs(), codec=codec_id("int8")))
    assert isinstance(reply, m.ForwardReply)
    assert reply.hidden.codec == codec_id("int8")


@pytest.mark.parametrize(
    ("inputs", "values"),
    [
        (span_inputs((2, 6, HIDDEN + 1)), ["[2, 6, 33]", "32"]),
        (span_inputs((6, HIDDEN)), ["[6, 32]"]),
        (span_inputs(mask=(2, 5)), ["[2, 5]", "2 x 6"]),
        (span_inputs(mask=(1, 6)), ["[1, 6]", "2 x 6"]),
        (span_inputs(positions=(2, 7)), ["[2, 7]", "2 x 6"]),
        (span_inputs(positions=(3, 6)), ["[3, 6]", "2 x 6"]),
        (span_inputs(positions=(6,)), ["[6]", "2 x 6"]),
        (span_inputs((5, 13, HIDDEN)), ["5 x 13", "64"]),
    ],
    ids=[
        "hidden size",
        "rank",
        "mask length",
        "mask rows",
        "positions length",
        "positions rows",
        "positions rank",
        "tokens",
    ],
)
def test_a_bad_input_is_refused_with_its_values(tenant: TenantSession, inputs: m.SpanInputs, values: list[str]) -> None:
    text = refusal(tenant.handle(forward(inputs)))
    assert all(value in text for value in values), text
    replayed = refusal(tenant.handle(backward((2, 6, HIDDEN), replay=inputs)))
    assert all(value in replayed for value in values), replayed
    assert isinstance(tenant.handle(forward(span_inputs())), m.ForwardReply)  # the session goes on


@pytest.mark.parametrize("replay", [None, span_inputs((2, 5, HIDDEN))], ids=["kept", "replayed"])
def test_a_gradient_of_another_shape_is_refused_and_loses_nothing(
    tenant: TenantSession, replay: m.SpanInputs | None
) -> None:
    if replay is None:
        tenant.handle(forward(span_inputs((2, 5, HIDDEN))))
    text = refusal(tenant.handle(backward((2, 6, HIDDEN), replay=replay)))
    assert "[2, 6, 32]" in text
    assert "[2, 5, 32]" in text
    assert isinstance(tenant.handle(backward((2, 5, HIDDEN), replay=replay)), m.BackwardReply)


def test_a_replay_of_another_shape_than_the_kept_forward_is_harmless(tenant: TenantSession) -> None:
    tenant.handle(forward(span_inputs((2, 5, HIDDEN))))
    text = refusal(tenant.handle(backward((2, 6, HIDDEN), replay=span_inputs((2, 6, HIDDEN)))))
    assert "[2, 5, 32]" in text


def test_a_lost_stash_is_named_and_a_replay_is_as_good(tenant: TenantSession, cloud: Served) -> None:
    tenant.handle(forward(span_inputs()))
    first = tenant.handle(backward((2, 6, HIDDEN)))
    lost = tenant.handle(backward((2, 6, HIDDEN)))
    assert isinstance(lost, m.Status)
    assert (lost.code, lost.id) == (m.StatusCode.STASH_LOST, m.CallId(1, 1, 3))
    again = tenant.handle(backward((2, 6, HIDDEN), replay=span_inputs()))
    assert isinstance(first, m.BackwardReply)
    assert isinstance(again, m.BackwardReply)
    assert again.recomputed
    assert again.gradient == first.gradient


def test_what_torch_raises_becomes_a_status_without_its_text(
    tenant: TenantSession, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("not enough memory near the value 0.123")

    monkeypatch.setattr(type(cloud.executor), "forward", fail)
    text = refusal(tenant.handle(forward(span_inputs())), m.StatusCode.INTERNAL)
    assert "RuntimeError" in text
    assert "0.123" not in text


@pytest.mark.parametrize("message", [m.Attach(b"l" * 16), m.Pong(1, 2)])
def test_a_message_out_of_place_breaks_the_protocol(tenant: TenantSession, message: m.Message) -> None:
    with pytest.raises(MessageError, match=type(message).__name__):
        tenant.handle(message)


def test_ping_and_goodbye(tenant: TenantSession) -> None:
    pong = tenant.handle(m.Ping(7))
    assert isinstance(pong, m.Pong)
    assert pong.nonce == 7
    assert pong.peak_bytes == 0, "what the process has tells of other tenants"
    tenant.handle(forward(span_inputs((2, 6, HIDDEN))))
    own = tenant.handle(m.Ping(8))
    assert isinstance(own, m.Pong)
    assert own.peak_bytes == tenant.executor.memory.of(CallShape(2, 6, Pass.BACKWARD))
    assert tenant.handle(m.Goodbye("done")) is None


def test_close_releases_the_session(tenant: TenantSession, cloud: Served) -> None:
    tenant.handle(forward(span_inputs()))
    assert cloud.executor.used_bytes > 0
    tenant.close()
    assert cloud.executor.used_bytes == 0


def test_the_files_are_those_of_the_folder_and_arrive_whole(
    tenant: TenantSession, cloud: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.protocol.messages.MAX_PIECE", 1000)
    listing = tenant.handle(m.FetchList(m.Shelf.PARTS))
    assert isinstance(listing, m.FileList)
    assert {"config.json", "tokenizer.json", "edge.safetensors"} <= {entry.name for entry in listing.entries}
    for entry in listing.entries:
        data = b""
        while len(data) < entry.size:
            piece = tenant.handle(m.Fetch(m.Shelf.PARTS, entry.name, len(data)))
            assert isinstance(piece, m.Blob)
            assert (piece.name, piece.offset, piece.total, piece.sha256) == (
                entry.name,
                len(data),
                entry.size,
                entry.sha256,
            )
            assert 0 < len(piece.data) <= 1000
            data += bytes(piece.data)
        assert hashlib.sha256(data).digest() == entry.sha256


@pytest.mark.parametrize(
    "name", ["model.safetensors", "worker_key", "../model/model.safetensors", "/etc/passwd", "..", "", "config.json/"]
)
def test_no_other_file_can_be_fetched(tenant: TenantSession, name: str) -> None:
    text = refusal(tenant.handle(m.Fetch(m.Shelf.PARTS, name, 0)))
    assert repr(name) in text
    assert "edge.safetensors" in text


def test_an_offset_behind_the_end_is_refused(tenant: TenantSession) -> None:
    assert "999999999" in refusal(tenant.handle(m.Fetch(m.Shelf.PARTS, "config.json", 999_999_999)))


def test_no_served_file_holds_a_middle_layer(cloud: Served, tmp_path: Path) -> None:
    for entry in cloud.parts.listing().entries:
        piece = cloud.parts.read(entry.name, 0)
        assert isinstance(piece, m.Blob)
        assert len(piece.data) == entry.size  # tiny files fit in one piece
        if not entry.name.endswith(".safetensors"):
            assert entry.size < 100_000
            continue
        (tmp_path / entry.name).write_bytes(piece.data)
        with safe_open(tmp_path / entry.name, framework="pt") as file:
            names = set(file.keys())
        layers = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
        assert layers == {0, 1, 4, 5}
        assert {name for name in names if not name.startswith("model.layers.")} == {
            "model.embed_tokens.weight",
            "model.norm.weight",
            "lm_head.weight",
        }


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("weights")
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "secret")
    (folder / "sub").mkdir()
    assert [entry.name for entry in FileShelf(folder, m.Shelf.PARTS).listing().entries] == ["config.json"]


# Several sessions in one pass -----------------------------------------------------------------------------------------


def test_messages_that_are_handled_together_are_answered_as_alone(cloud: Served) -> None:
    cloud.executor.evict_all()
    sessions = [cloud.session(bytes([number]) * 16, TENANT, THREADS) for number in range(4)]
    good = span_inputs(mask=(2, 6))
    asked = [
        (sessions[0], forward(span_inputs())),
        (sessions[1], forward(span_inputs((2, 6, HIDDEN + 1)))),
        (sessions[2], forward(good, codec=codec_id("int8"))),
        (sessions[3], forward(span_inputs((9, 8, HIDDEN)))),
    ]
    answers = handle_together(asked)
    assert [answer.id for answer in answers if isinstance(answer, m.ForwardReply)] == [m.CallId(1, 1)] * 2
    assert "do not fit" in refusal(answers[1])
    assert "at most 64" in refusal(answers[3])
    for at in (0, 2):
        alone = cloud.session(b"x" * 16, TENANT, THREADS).handle(asked[at][1])
        assert isinstance(alone, m.ForwardReply)
        assert isinstance(answers[at], m.ForwardReply)
        assert torch.equal(decode(answers[at].hidden), decode(alone.hidden))
    backs = handle_together(
        [
            (sessions[0], backward((2, 6, HIDDEN))),
            (sessions[1], backward((2, 6, HIDDEN))),
            (sessions[2], backward((2, 5, HIDDEN))),
        ]
    )
    assert isinstance(backs[0], m.BackwardReply)
    assert "evicted" in refusal(backs[1], m.StatusCode.STASH_LOST)
    assert "does not fit" in refusal(backs[2])
    again = handle_together(
        [(sessions[1], backward((2, 6, HIDDEN), replay=span_inputs())), (sessions[2], backward((2, 6, HIDDEN)))]
    )
    assert [answer.recomputed for answer in again if isinstance(answer, m.BackwardReply)] == [True, False]


def test_a_failure_of_one_message_is_no_other_sessions(cloud: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud.executor.evict_all()
    sessions = [cloud.session(bytes([number]) * 16, TENANT, THREADS) for number in range(3)]
    original = TenantSession._forward_reply

    def failing(self: TenantSession, *args: Any) -> m.ForwardReply:
        if self is sessions[1]:
            raise ZeroDivisionError
        return original(self, *args)

    monkeypatch.setattr(TenantSession, "_forward_reply", failing)
    answers = handle_together([(session, forward(span_inputs())) for session in sessions])
    assert [type(answer) for answer in answers] == [m.ForwardReply, ZeroDivisionError, m.ForwardReply]


SHAPES = ((2, 6, HIDDEN), (5, 8, HIDDEN), (3, 6, HIDDEN))
"""Of three calls, 70 positions together."""


@pytest.fixture
def several(cloud: Served) -> Iterator[list[TenantSession]]:
    cloud.executor.evict_all()
    sessions = [cloud.session(bytes([number]) * 16, TENANT, THREADS) for number in range(len(SHAPES))]
    yield sessions
    for session in sessions:
        session.close()
    assert cloud.executor.used_bytes == 0


def forwards(sessions: Sequence[TenantSession], *, keep: bool = True) -> list[Asked]:
    return [(each, forward(span_inputs(shape), keep=keep)) for each, shape in zip(sessions, SHAPES, strict=True)]


def backwards(sessions: Sequence[TenantSession], *, replay: bool = False) -> list[Asked]:
    pairs = zip(sessions, SHAPES, strict=True)
    return [(each, backward(shape, replay=span_inputs(shape) if replay else None)) for each, shape in pairs]


def numbers(answer: m.Message | Exception | None) -> torch.Tensor:
    if isinstance(answer, m.ForwardReply):
        return decode(answer.hidden)
    assert isinstance(answer, m.BackwardReply)
    assert answer.gradient is not None
    return decode(answer.gradient)


@contextmanager
def memory_for(
    cloud: Served, positions: int, error: type[Exception] = RuntimeError
) -> Iterator[list[weakref.ref[torch.Tensor]]]:
    """Have passes of more positions fail in the second layer; gives what was there of them, weakly."""
    failed: list[weakref.ref[torch.Tensor]] = []

    def allocate(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert not any(each() is not None for each in failed), "a pass that has failed still holds memory"
        if args[0].shape[:2].numel() > positions:
            failed.append(weakref.ref(args[0]))
            raise error("out of memory: 1.2345")

    hook = cloud.executor.host.span.base.layers[1].register_forward_pre_hook(allocate)
    gc.disable()  # whose help is not to be needed
    try:
        yield failed
    finally:
        gc.enable()
        hook.remove()


@pytest.mark.parametrize("keep", [True, False])
def test_a_pass_that_fails_is_computed_call_by_call(cloud: Served, several: list[TenantSession], keep: bool) -> None:
    alone = [numbers(session.handle(message)) for session, message in forwards(several, keep=keep)]
    with memory_for(cloud, 69) as failed:
        answers = handle_together(forwards(several, keep=keep))
    assert len(failed) == 1
    for answer, expected in zip(answers, alone, strict=True):
        assert torch.equal(numbers(answer), expected)
    with memory_for(cloud, 39) as failed:
        small, large, other = handle_together(forwards(several, keep=keep))
    assert len(failed) == 2
    assert "1.2345" not in refusal(large, m.StatusCode.INTERNAL)  # its text could quote values
    assert torch.equal(numbers(small), alone[0])
    assert torch.equal(numbers(other), alone[2])


def test_backwards_of_a_pass_that_fails_want_their_inputs_again(
    cloud: Served, several: list[TenantSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    for session, message in forwards(several):
        session.handle(message)
    alone = [numbers(session.handle(message)) for session, message in backwards(several)]
    handle_together(forwards(several))

    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", exhausted)
        for answer in handle_together(backwards(several)):
            refusal(answer, m.StatusCode.STASH_LOST)
    assert cloud.executor.used_bytes == 0
    with memory_for(cloud, 39) as failed:
        small, large, other = handle_together(backwards(several, replay=True))
    assert len(failed) == 2
    refusal(large, m.StatusCode.INTERNAL)
    assert torch.equal(numbers(small), alone[0])
    assert torch.equal(numbers(other), alone[2])
    for answer, expected in zip(handle_together(backwards(several, replay=True)), alone, strict=True):
        assert torch.equal(numbers(answer), expected)


def test_an_unknown_failure_of_a_pass_ends_one_session_only(cloud: Served, several: list[TenantSession]) -> None:
    with memory_for(cloud, 39, MemoryError) as failed:
        answers = handle_together(forwards(several))
    assert len(failed) == 2
    assert [type(answer) for answer in answers] == [m.ForwardReply, MemoryError, m.ForwardReply]


def test_what_may_share_a_pass() -> None:
    kept, passing = forward(span_inputs()), forward(span_inputs(), keep=False)
    kinds = [kind_of(message) for message in (kept, passing, backward((2, 6, HIDDEN)))]
    assert None not in kinds
    assert len(set(kinds)) == 3
    assert kind_of(dataclasses.replace(kept, sites=1)) is None
    assert kind_of(dataclasses.replace(kept, wanted=False)) is None
    assert kind_of(m.Ping(1)) is None
