"""A cloud that the edge has pinned and that attacks it: what it may send is bounded by what was asked for.

Each attack is an answer in the place of the honest one; the same calls with honest answers pass.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.memory_cloud import FaultyTransport, MemoryCloud, MemoryTransport, messages, new_link
from support.models.tiny import HIDDEN
from support.protocol.wire import EDGE, PIN

from isthmus.backbone.checkpoints.sources import Checkpoint, default_cache, load_tokenizer
from isthmus.backbone.checkpoints.tensor_reader import TensorReader
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts, weigh_parts
from isthmus.cloud.session.file_store import FileStore
from isthmus.common.errors import CheckpointError, DiskError, LimitError, RefusedError, RemoteProtocolError
from isthmus.edge.client import offers, session_keeper
from isthmus.edge.client.link import Link
from isthmus.protocol import messages as m
from isthmus.protocol.limits import MIB
from isthmus.protocol.tensor_codecs import Role, encode
from isthmus.rpc.transport import run

LARGE = m.Blob("config.json", 0, 8 * MIB, bytes(32), bytes(8 * MIB))
Answer = Callable[[m.Message], m.Message | None]
pytestmark = pytest.mark.usefixtures("no_waiting", "cache_folder")


def hidden(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 6, HIDDEN, generator=torch.Generator().manual_seed(0))


def forward(link: Link) -> None:
    link.forward_span(hidden(), None, None, keep=False)


def backward(link: Link) -> None:
    _, kept = link.forward_span(hidden(), None, None, keep=True)
    link.backward_span(kept, hidden(), hidden(), None, None)


def adapted(link: Link) -> Any:
    model = link.load_model()
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config)


IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])


def train(link: Link) -> None:
    adapted(link)(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


def instead_of(kind: type[m.Message], answer: m.Message | Callable[[Any], m.Message]) -> Answer:
    return lambda message: (answer(message) if callable(answer) else answer) if isinstance(message, kind) else None


# What comes back ------------------------------------------------------------------------------------------------------


QUESTIONS: dict[str, tuple[type[m.Message], Callable[[Link], object]]] = {
    "forward": (m.Forward, forward),
    "backward": (m.Backward, backward),
    "sites": (m.Sites, train),
    "site answer": (m.SiteAnswer, train),
    "list": (m.FetchList, lambda link: link._parts()),
    "piece": (m.Fetch, lambda link: link._parts()),
    "ping": (m.Ping, lambda link: link._keeper.ask(m.Pong, m.Ping(1))),
    "attach": (m.Attach, lambda link: (link._keeper.drop(), forward(link))),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_no_question_is_answered_by_more_than_was_asked_for(cloud: MemoryCloud, name: str) -> None:
    kind, ask = QUESTIONS[name]
    ask(new_link(cloud))  # the honest answers pass
    link = new_link(cloud)
    cloud.answer = instead_of(kind, LARGE)
    if default_cache().exists() and name in ("list", "piece"):
        shutil.rmtree(default_cache())
    before = link.traffic.bytes_down
    with pytest.raises(LimitError, match=r"body of 8388608 bytes is refused: at most \d+ were asked for"):
        ask(link)
    # Of each of the five attempts no more than the first frame of the large answer was taken.
    assert link.traffic.bytes_down - before < 1.2 * MIB * session_keeper.PROTOCOL_FAULTS


def test_a_reply_with_more_than_the_hidden_states_is_refused(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    payload = encode(hidden(), "fp32", Role.ACTIVATION)
    cloud.answer = instead_of(m.Forward, lambda asked: m.ForwardReply(asked.id, payload, 0, 0, 0))
    forward(link)
    cloud.answer = instead_of(m.Forward, lambda asked: m.ForwardReply(asked.id, payload, 0, 0, 0, (payload,)))
    with pytest.raises(LimitError, match=f"body of {2 * payload.nbytes} bytes is refused: at most {payload.nbytes}"):
        forward(link)


def test_an_answer_in_a_coarser_codec_than_was_asked_for_is_refused(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    payload = encode(hidden(), "int4", Role.ACTIVATION)
    cloud.answer = instead_of(m.Forward, lambda asked: m.ForwardReply(asked.id, payload, 0, 0, 0))
    with pytest.raises(RemoteProtocolError, match="in the codec int4 instead of fp32"):
        forward(link)


def test_a_cloud_that_asks_about_sites_for_ever_is_stopped(cloud: MemoryCloud) -> None:
    train(new_link(cloud))
    cloud.seen.clear()
    last: list[m.SiteQuestion] = []

    def again(message: m.Message) -> m.Message | None:
        if isinstance(message, m.Forward) and message.sites:
            payload = encode(torch.randn(*message.hidden.shape), "fp32", Role.ACTIVATION)
            last[:] = [m.SiteQuestion(message.id, m.SitePhase.FORWARD, (0,), (payload,), 0, 0, 0)]
            return last[0]
        return last[0] if isinstance(message, m.SiteAnswer) else None

    cloud.answer = again
    with pytest.raises(RemoteProtocolError, match=r"asks about sites more than 8 times in one call"):
        train(new_link(cloud))  # two modules of two layers of the cloud's: four sites
    assert len(messages(cloud, m.SiteAnswer)) == 8 * session_keeper.PROTOCOL_FAULTS


def test_a_refusal_cannot_speak_to_the_terminal(cloud: MemoryCloud) -> None:
    link = new_link(cloud)
    cloud.answer = instead_of(m.Forward, m.Status(m.StatusCode.BAD_REQUEST, None, "no\x1b]52;c;ZXZpbA==\x07\r\u202e"))
    with pytest.raises(RefusedError) as caught:
        forward(link)
    assert str(caught.value).isprintable()
    link._keeper.drop()
    link._keeper._info = None
    cloud.answer = instead_of(m.Attach, m.Status(m.StatusCode.BAD_REQUEST, None, "no\x1b[2J"))
    with pytest.raises(RefusedError) as caught:
        link.open(5)
    assert str(caught.value) == "no?[2J"


# Files ----------------------------------------------------------------------------------------------------------------


def offering(cloud: MemoryCloud, *extra: m.FileEntry, without: str = "") -> Link:
    """A cloud that offers files besides its own, of which it has nothing."""
    honest = cloud.served.parts.listing().entries
    replaced = {entry.name for entry in extra} | {without}
    listing = m.FileList((*(entry for entry in honest if entry.name not in replaced), *extra))
    cloud.answer = instead_of(m.FetchList, listing)
    return new_link(cloud)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("config.json", MIB),
        ("generation_config.json", MIB),
        ("isthmus_parts.json", MIB),
        ("tokenizer.json", 64 * MIB),
        ("chat_template.jinja", 64 * MIB),
    ],
)
def test_a_file_of_an_absurd_size_is_refused_before_anything_is_fetched(
    cloud: MemoryCloud, name: str, most: int
) -> None:
    with pytest.raises(LimitError, match=rf"offers {name} of {most + 1} bytes: at most {most}"):
        offering(cloud, m.FileEntry(name, most + 1, bytes(32)))._parts()
    assert not messages(cloud, m.Fetch)
    with pytest.raises(RemoteProtocolError, match="another chunk"):  # as large as it may be, it is asked for
        offering(cloud, m.FileEntry(name, most, bytes(32)))._parts()


def test_weights_are_as_large_as_the_configuration_says(cloud: MemoryCloud) -> None:
    (honest,) = (entry for entry in cloud.served.parts.listing().entries if entry.name == "edge.safetensors")
    plan = SplitPlan.parse(cloud.served.info.plan, cloud.served.info.n_layers)
    edge = weigh_parts(Checkpoint(parts_of(cloud), "tiny"), plan).edge
    assert edge <= honest.size <= edge + offers.WEIGHTS_HEADER
    most = edge + offers.WEIGHTS_HEADER
    with pytest.raises(LimitError, match=rf"offers edge\.safetensors of {most + 1} bytes: at most {most}"):
        offering(cloud, dataclasses.replace(honest, size=most + 1))._parts()
    assert "edge.safetensors" not in {asked.name for asked in messages(cloud, m.Fetch)}


def test_there_are_not_too_many_files_nor_too_many_bytes(cloud: MemoryCloud) -> None:
    many = [m.FileEntry(f"vocab.{number}", 1, bytes(32)) for number in range(offers.MAX_FILES)]
    with pytest.raises(LimitError, match=r"offers \d+ files: at most 64"):
        offering(cloud, *many)._parts()
    total = sum(entry.size for entry in cloud.served.parts.listing().entries)
    cloud.answer = lambda message: None
    with pytest.raises(LimitError, match=rf"offers {total} bytes .*: at most {total - 1} .*--max-fetch-gib"):
        new_link(cloud, max_fetch_bytes=total - 1)._parts()
    assert not messages(cloud, m.Fetch)
    assert new_link(cloud, max_fetch_bytes=total)._parts().is_dir()


def test_the_disk_must_have_room_before_anything_is_fetched(
    cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    total = sum(entry.size for entry in cloud.served.parts.listing().entries)
    free = total + offers.RESERVE - 1
    monkeypatch.setattr(offers.shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(
        DiskError, match=rf"room for {free} bytes; {total} are to be fetched, and 1073741824 are to stay"
    ):
        new_link(cloud)._parts()
    assert not messages(cloud, m.Fetch)
    free += 1
    new_link(cloud)._parts()
    free = 0  # what is there needs no room
    new_link(cloud)._parts()


def parts_of(cloud: MemoryCloud) -> Path:
    return cloud.served.parts._files["config.json"].path.parent


def with_config(cloud: MemoryCloud, folder: Path, text: str) -> Link:
    """A cloud whose configuration is `text`."""
    theirs = Path(shutil.copytree(parts_of(cloud), folder / "theirs"))
    (theirs / "config.json").write_text(text)
    cloud.served = dataclasses.replace(cloud.served, parts=FileStore(theirs, m.FileSet.PARTS))
    return new_link(cloud)


BOMBS = {
    "depth": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "layers": {"num_hidden_layers": 10**9},
    "heads": {"num_attention_heads": 0},
    "negative": {"hidden_size": -32},
    "text": {"vocab_size": "many"},
    "digits": '{"model_type": "llama", "vocab_size": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_configuration_that_explodes_is_one_clear_error(cloud: MemoryCloud, tmp_path: Path, name: str) -> None:
    bomb = BOMBS[name]
    honest = json.loads((parts_of(cloud) / "config.json").read_text())
    text = bomb if isinstance(bomb, str) else json.dumps({**honest, **bomb})
    link = with_config(cloud, tmp_path, text)
    with pytest.raises(CheckpointError):
        link._parts()
    assert "edge.safetensors" not in {asked.name for asked in messages(cloud, m.Fetch)}


def test_vocabularies_without_end_are_bounded_by_the_data_owners_word(cloud: MemoryCloud, tmp_path: Path) -> None:
    honest = json.loads((parts_of(cloud) / "config.json").read_text())
    link = with_config(cloud, tmp_path, json.dumps({**honest, "vocab_size": 10**12}))
    entries = link._keeper.ask(m.FileList, m.FetchList(m.FileSet.PARTS)).entries
    large = [dataclasses.replace(e, size=10**14) if e.name == "edge.safetensors" else e for e in entries]
    cloud.answer = instead_of(m.FetchList, m.FileList(tuple(large)))
    with pytest.raises(LimitError, match="--max-fetch-gib"):
        link._parts()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_without_a_bottom_is_one_clear_error(cloud: MemoryCloud, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(parts_of(cloud), tmp_path / "parts"))
    plan = SplitPlan.parse(cloud.served.info.plan, cloud.served.info.n_layers)
    assert load_edge_parts(folder, plan, lambda x, *_: x) is not None
    assert load_tokenizer(folder) is not None
    (folder / name).write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    model_first = name == "generation_config.json"
    with pytest.raises(CheckpointError):
        _ = load_edge_parts(folder, plan, lambda x, *_: x) if model_first else load_tokenizer(folder)


def test_generation_settings_that_multiply_the_batch_are_refused(cloud: MemoryCloud, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(parts_of(cloud), tmp_path / "parts"))
    plan = SplitPlan.parse(cloud.served.info.plan, cloud.served.info.n_layers)
    for beams in (4, 64):
        (folder / "generation_config.json").write_text(json.dumps({"num_beams": beams}))
        assert load_edge_parts(folder, plan, lambda x, *_: x).generation_config.num_beams == beams
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 100_000}))
    with pytest.raises(CheckpointError, match="num_beams = 100000, more than 64"):
        load_edge_parts(folder, plan, lambda x, *_: x)


@pytest.mark.parametrize("header", [1 << 63, 10**9, 200 << 20])
def test_weights_that_announce_an_absurd_header_are_one_clear_error(tmp_path: Path, header: int) -> None:
    (tmp_path / "edge.safetensors").write_bytes(header.to_bytes(8, "little") + b'{"a":1}')
    with pytest.raises(CheckpointError, match="damaged"):
        TensorReader(tmp_path)


# The cache ------------------------------------------------------------------------------------------------------------


def test_counting_frames_sees_what_an_unbounded_edge_takes(cloud: MemoryCloud) -> None:
    """The control of the tests above: with no bound, the same answer is taken whole."""
    transport = FaultyTransport(MemoryTransport(cloud), {})
    link = Link(transport, PIN, EDGE, name="cloud:1")
    link.open(5)
    cloud.answer = instead_of(m.Ping, LARGE)
    before = transport.counts["receive"]
    assert link._keeper._stream is not None
    assert run(link._keeper._stream.ask(m.Ping(1), 5, answer_bytes=None)).message == LARGE
    assert transport.counts["receive"] - before == 8
