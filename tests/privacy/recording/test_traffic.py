"""Traffic: which tensors become of the messages of a recording."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.protocol.wire import TENANT, forward, session_info, unchecked
from torch import Tensor

from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import DataError
from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.recording.recording_file import MAGIC
from isthmus.privacy.recording.traffic import Traffic, read_traffic
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Payload, Role, codec_id, encode, encode_mask, encode_positions

A, B = b"a" * 16, b"b" * 16
LINK = b"l" * 16
FP32 = codec_id("fp32")
SITES = (SiteSpec(1, "q_proj"), SiteSpec(1, "v_proj"), SiteSpec(2, "q_proj"))


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sent(value: Tensor, role: Role = Role.ACTIVATION, codec: str = "fp32") -> Payload:
    return encode(value, codec, role)


def reply(id: m.CallId, value: Tensor) -> m.ForwardReply:
    return m.ForwardReply(id, sent(value), 0, 0, 0)


def recording(folder: Path, *sessions: tuple[bytes, str, bytes, list[tuple[m.Message, m.Message | None]]]) -> None:
    """Record sessions: each with its tenant, its link, and its messages with their answers."""
    recorder = Recorder(folder, 1 << 24)
    for session, tenant, link, messages in sessions:
        recorder.opened(session_info(TENANT, session), m.Attach(link, account=m.Account(tenant, 1)))
        for message, answer in messages:
            recorder.received(session, message)
            if answer is not None:
                recorder.sent(session, message, answer)
    recorder.close()


def read(folder: Path, *messages: tuple[m.Message, m.Message | None]) -> Traffic:
    recording(folder, (A, "alice", LINK, list(messages)))
    return read_traffic(folder)


def test_a_forward_has_its_tensors_decoded(tmp_path: Path) -> None:
    hidden, mask, positions = tensor(2, 3, 8), torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.arange(3)[None]
    coded, id = sent(hidden, codec="int8"), m.CallId(4, 7)
    asked = m.Forward(id, True, coded, encode_mask(mask), encode_positions(positions), FP32)
    traffic = read(tmp_path, (asked, reply(id, hidden + 1)))
    (call,) = traffic.forwards
    assert (traffic.model, traffic.plan) == ("00" * 32, "1:1")
    assert (call.call, call.step, call.kept, call.codec, call.tenant) == (7, 4, True, "int8", "alice")
    assert call.session == A.hex()
    assert not torch.equal(call.hidden, hidden)
    assert (call.hidden - hidden).abs().max() < 0.05
    assert call.output is not None
    assert torch.equal(call.output, hidden + 1)
    assert call.mask is not None
    assert torch.equal(call.mask, mask.bool())
    assert call.positions is not None
    assert torch.equal(call.positions, positions)


def test_a_forward_of_a_packages_middle_names_its_plan(tmp_path: Path) -> None:
    parts = [
        (m.Forward(m.CallId(0, call), False, sent(tensor(1, 2, 8)), None, None, FP32, plan=plan), None)
        for call, plan in enumerate((None, "1:2"))
    ]
    assert [each.plan for each in read(tmp_path, *parts).forwards] == [None, "1:2"]


def test_a_call_that_is_repeated_is_there_once_as_it_was_answered(tmp_path: Path) -> None:
    first, again = m.CallId(1, 1, 0), m.CallId(1, 1, 1)

    def asked(id: m.CallId, seed: int) -> m.Forward:
        return m.Forward(id, True, sent(tensor(1, 2, 8, seed=seed)), None, None, FP32)

    # The second session is the same link's, after the first was lost; it repeats one call and makes another.
    lost = [(asked(first, 0), None)]
    found = [(asked(again, 0), reply(again, tensor(1, 2, 8))), (asked(m.CallId(1, 2), 1), None)]
    other = [(asked(m.CallId(1, 1), 2), None)]  # another link counts for itself
    recording(tmp_path, (A, "alice", LINK, lost), (B, "alice", LINK, found), (b"c" * 16, "bob", b"k" * 16, other))
    traffic = read_traffic(tmp_path)
    assert [(each.call, each.session, each.output is None) for each in traffic.forwards] == [
        (1, B.hex(), False),
        (2, B.hex(), True),
        (1, (b"c" * 16).hex(), True),
    ]
    assert traffic.tenants == ("alice", "bob")
    assert [each.tenant for each in traffic.of(tenant="bob").forwards] == ["bob"]
    assert len(traffic.of(session=B.hex()).forwards) == 2
    assert traffic.of(session=A.hex()).forwards == ()


def test_files_are_read_in_the_order_in_which_they_were_begun(tmp_path: Path) -> None:
    for number in range(12):
        session = bytes([number]) * 16
        recording(tmp_path, (session, "alice", session, [(forward((1, 2, 8), call=number), None)]))
    assert [each.call for each in read_traffic(tmp_path).forwards] == list(range(12))


def test_a_backward_has_the_gradients_of_both_ends(tmp_path: Path) -> None:
    gradient, id, silent = tensor(1, 2, 8), m.CallId(3, 5), m.CallId(3, 6)
    wanted = m.Backward(id, sent(gradient, Role.GRADIENT), None, FP32)
    unwanted = m.Backward(silent, sent(gradient, Role.GRADIENT), None, FP32, wanted=False)
    traffic = read(
        tmp_path,
        (wanted, m.BackwardReply(id, sent(gradient * 2, Role.GRADIENT), 0, 0, 0, False)),
        (unwanted, m.BackwardReply(silent, None, 0, 0, 0, False)),
    )
    first, second = traffic.backwards
    assert (first.call, first.step, first.codec) == (5, 3, "fp32")
    assert torch.equal(first.gradient, gradient)
    assert first.returned is not None
    assert torch.equal(first.returned, gradient * 2)
    assert second.returned is None


def test_what_was_asked_at_sites_has_their_names_and_the_answers(tmp_path: Path) -> None:
    id, inputs, given = m.CallId(1, 1), tensor(1, 2, 8), tensor(1, 2, 4)
    call = m.Forward(id, True, sent(inputs), None, None, FP32, sites=3)
    question = m.SiteQuestion(id, m.SitePhase.FORWARD, (1, 2), (sent(inputs),), 0, 0, 0)
    traffic = read(
        tmp_path,
        (m.Sites(3, SITES), m.Status(m.StatusCode.OK, None, "")),
        (call, question),
        (m.SiteAnswer(id, (sent(given), sent(given * 2))), reply(id, inputs)),
    )
    (asked,) = traffic.asked
    assert (asked.call, asked.step, asked.phase, asked.sites) == (1, 1, m.SitePhase.FORWARD, SITES[1:])
    assert torch.equal(*asked.question, inputs)
    assert [torch.equal(*pair) for pair in zip(asked.answer, (given, given * 2), strict=True)] == [True, True]
    assert traffic.forwards[0].output is not None


def test_leased_adapters_and_decode_calls_are_there(tmp_path: Path) -> None:
    down, up, id = tensor(2, 8), tensor(4, 2), m.CallId(1, 1)
    lease = m.Lease(1, 3, (m.LeasedWeights(sent(down), sent(up), 2.0),))
    decode = m.Decode(id, 2, 5, (), (), sent(tensor(1, 1, 8)), None, None, FP32)
    traffic = read(tmp_path, (m.Sites(3, SITES[:1]), None), (lease, None), (decode, reply(id, tensor(1, 1, 8, seed=1))))
    (leased,), (step,) = traffic.leased, traffic.decodes
    ((first, second, scale),) = leased.weights
    assert (leased.sites, scale) == (SITES[:1], 2.0)
    assert torch.equal(first, down)
    assert torch.equal(second, up)
    assert (step.cache, step.start) == (2, 5)
    assert step.output is not None
    assert torch.equal(step.output, tensor(1, 1, 8, seed=1))


def test_a_call_that_is_not_finite_is_no_call(tmp_path: Path) -> None:
    nothing = unchecked(torch.full((1, 2, 8), torch.nan), "fp32", Role.ACTIVATION)
    bad = m.Forward(m.CallId(1, 1), True, nothing, None, None, FP32)
    refused = m.Status(m.StatusCode.NON_FINITE, m.CallId(1, 1), "")
    traffic = read(tmp_path, (bad, refused), (forward((1, 2, 8), call=2), None))
    assert [each.call for each in traffic.forwards] == [2]


def test_a_recording_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no recording"):
        read_traffic(tmp_path)
    read(tmp_path, (forward((1, 2, 8)), None))
    file = tmp_path / "recording.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(MAGIC)])  # the magic, and no session
    with pytest.raises(DataError, match="has no session"):
        read_traffic(tmp_path)
    recorder = Recorder(tmp_path, 1 << 20)
    recorder.received(A, forward((1, 2, 8)))
    with pytest.raises(
        DataError, match=rf"the entry at byte {len(MAGIC)} of .*recording-1.bin is of session {A.hex()}"
    ):
        read_traffic(tmp_path)
    recorder.close()
    (tmp_path / "recording-1.bin").unlink()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"recording\.bin is cut off"):
        read_traffic(tmp_path)
    file.write_bytes(whole)
    other = Recorder(tmp_path, 1 << 20)
    other.opened(dataclasses.replace(session_info(TENANT, B), plan="2:1"), m.Attach(LINK))
    with pytest.raises(DataError, match="several models or split plans"):
        read_traffic(tmp_path)
