"""Recordings of real runs: what the edges sent and got, bit for bit, and nothing where nobody asked for one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.cloud.sessions import hidden, step_together
from support.cloud.train_runs import cloud_for_runs
from support.models.tiny import tiny_checkpoint

from isthmus.cloud.bounds import Bounds, EngineOptions
from isthmus.privacy.recording.recorder import Recorder
from isthmus.privacy.recording.recording_file import MAGIC, Kind, Opened, read_entries
from isthmus.privacy.recording.traffic import Forward, read_traffic
from isthmus.protocol import messages as m
from isthmus.protocol.encoding import pack
from isthmus.protocol.session import Received
from isthmus.rpc.secure_stream import SecureStream

MIB = 1 << 20
COMPUTED = (m.Forward, m.Backward)


def raw(message: m.Message) -> bytes:
    header, body = pack(message)
    return header + b"".join(body)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Kind, bytes]]:
    """What edges of this process send and get for it, as bytes."""
    seen: list[tuple[Kind, bytes]] = []
    ask: Callable[..., Any] = SecureStream.ask

    async def watched(self: SecureStream, question: m.Message, *args: Any, **options: Any) -> Received:
        if isinstance(question, COMPUTED):
            seen.append((Kind.FROM_EDGE, raw(question)))
        received: Received = await ask(self, question, *args, **options)
        if isinstance(question, COMPUTED):
            seen.append((Kind.TO_EDGE, raw(received.message)))
        return received

    monkeypatch.setattr(SecureStream, "ask", watched)
    return seen


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """The same with one bit of one number changed, the least."""
    bits = tensor.clone().view(torch.int32)
    bits.view(-1)[0] ^= 1
    return bits.view(torch.float32)


def test_a_recording_is_what_the_edge_sent_and_got_bit_for_bit(tmp_path: Path, wire: list[tuple[Kind, bytes]]) -> None:
    folder = tmp_path / "recording"
    folder.mkdir()
    outputs: dict[int, torch.Tensor] = {}
    with cloud_for_runs(tmp_path, recorder=Recorder(folder, 64 * MIB)) as runs:
        runs.train(tmp_path / "out", steps=2, accumulate=2)
        span = runs.server.served.executor.host.span
        entries = [entry for entry in read_entries(folder / "recording.bin") if not isinstance(entry.content, Opened)]
        found = [(entry.kind, raw(entry.content)) for entry in entries if not isinstance(entry.content, Opened)]
        assert found == wire
        kind, last = wire[-1]
        assert found != [*wire[:-1], (kind, last[:-1] + bytes([last[-1] ^ 1]))]
        traffic = read_traffic(folder)
        kept = [call for call in traffic.forwards if call.kept]
        assert [call.step for call in kept] == [1, 1, 2, 2]
        assert {call.call for call in kept} == {call.call for call in traffic.backwards}
        assert traffic.model == runs.server.served.info.digest
        assert traffic.plan == "1:1"
        assert traffic.tenants == ("alice",)
        for call in kept:
            with torch.no_grad():
                mask = None if call.mask is None else call.mask.long()
                outputs[call.call] = span(call.hidden, mask, call.positions)
    for call in kept:
        assert call.output is not None
        assert torch.equal(call.output, outputs[call.call])
        assert not torch.equal(flipped(call.output), outputs[call.call])
    assert all(call.returned is not None for call in traffic.backwards)


def test_two_tenants_of_one_pass_are_told_apart(tmp_path: Path) -> None:
    folder, home = tmp_path / "recording", Home(tmp_path / "home")
    folder.mkdir()
    names = ("bob", "carol")
    keys = [home.new_edge(name) for name in names]
    inputs = [hidden(2, 6), hidden(3, 7) + 1]
    got: dict[str, torch.Tensor] = {}
    cloud = served(tiny_checkpoint("llama", tmp_path / "model"), tmp_path / "parts")
    bounds = Bounds(engine=EngineOptions(state_bytes=1 << 30))
    recorder = Recorder(folder, 64 * MIB)
    with ThreadServer(cloud, home, bounds=bounds, recorder=recorder) as server, contextlib.ExitStack() as stack:
        links = [stack.enter_context(server.link(key)) for key in keys]
        for link in links:
            link.open(5)

        def step(number: int) -> None:
            got[names[number]] = links[number].forward_span(inputs[number], None, None, keep=False)[0].clone()

        step_together(server, cloud, step, 2)
        assert server.server.status()["calls_per_pass"] > 1
    traffic = read_traffic(folder)
    assert sorted(traffic.tenants) == ["alice", *names]
    assert len(traffic.sessions) == 3
    calls: dict[str, Forward] = {name: traffic.of(tenant=name).forwards[0] for name in names}
    assert len(traffic.forwards) == 3
    for number, name in enumerate(names):
        call = calls[name]
        assert torch.equal(call.hidden, inputs[number])
        assert call.output is not None
        assert torch.equal(call.output, got[name])
        assert call.session != calls[names[1 - number]].session


@pytest.mark.parametrize("recorded", [False, True])
def test_nothing_is_recorded_unless_it_is_asked_for(recorded: bool, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, MIB) if recorded else None
    cloud = served(tiny_checkpoint("llama", tmp_path / "model"), tmp_path / "parts")
    with ThreadServer(cloud, Home(tmp_path / "home"), recorder=recorder) as server, server.link() as link:
        link.open(5)
        link.forward_span(hidden(), None, None, keep=False)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    sent = hidden().numpy().tobytes()
    assert sum(MAGIC in path.read_bytes() or sent in path.read_bytes() for path in files) == recorded


def test_a_run_goes_on_when_the_recording_has_ended(tmp_path: Path, wire: list[tuple[Kind, bytes]]) -> None:
    folder, size = tmp_path / "recording", 20_000
    folder.mkdir()
    with cloud_for_runs(tmp_path, recorder=Recorder(folder, size)) as runs:
        runs.train(tmp_path / "out", steps=2, accumulate=2)
    found = list(read_entries(folder / "recording.bin"))
    assert (folder / "recording.bin").stat().st_size <= size
    assert 1 < len(found) < len(wire)
    assert {call.kind for call in found} == set(Kind)
    assert read_traffic(folder).forwards


def test_the_calls_of_some_steps_can_be_read_alone(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    folder.mkdir()
    with cloud_for_runs(tmp_path, recorder=Recorder(folder, 64 * MIB)) as runs:
        runs.train(tmp_path / "out", steps=3, accumulate=1)
    everything, last = read_traffic(folder), read_traffic(folder, wanted=lambda step: step == 3)
    assert {call.step for call in everything.forwards} == {0, 1, 2, 3}
    assert {call.step for call in (*last.forwards, *last.backwards)} == {3}
    assert [call.call for call in last.backwards] == [call.call for call in everything.backwards if call.step == 3]
