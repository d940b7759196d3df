"""Files, by the official SDK."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI
from support.daemon.openai_fakes import BASE, OpenAIDaemon

from isthmus.daemon import disk_room
from isthmus.daemon.openai.training_files import LONGEST_LINE
from isthmus.daemon.state.tables import StoredFile


def test_a_file_comes_back_as_it_was(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    data = bytes(range(256)) * 8192  # more than one piece of the body
    made = client.files.create(file=("../weird/näme.bin", data), purpose="user_data")
    assert (made.filename, made.bytes, made.status) == ("näme.bin", len(data), "processed")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == data
    with openai_daemon.context.database.reading() as session:
        assert session.get_one(StoredFile, made.id).sha256 == hashlib.sha256(data).hexdigest()
    assert openai_daemon.context.home.file(made.id).read_bytes() == data
    assert client.files.delete(made.id).deleted
    assert not openai_daemon.context.home.file(made.id).exists()
    with pytest.raises(NotFoundError, match="there is no file"):
        client.files.retrieve(made.id)


def test_lists_come_in_pages_in_both_orders(client: OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.bin", b"1"), purpose="batch").id for n in range(5)]
    assert [file.id for file in client.files.list(purpose="batch", limit=2)] == made[::-1]
    page = client.files.list(purpose="batch", limit=2, order="asc")
    assert ([file.id for file in page.data], page.has_more) == (made[:2], True)
    assert [file.id for file in page] == made
    assert client.files.list(purpose="evals").data == []
    with pytest.raises(BadRequestError, match="after = 'file-0' is no file"):
        client.files.list(after="file-0")
    with pytest.raises(BadRequestError, match="limit = '0'"):
        client.files.list(limit=0)
    for file_id in made:
        client.files.delete(file_id)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'{"text": "one"}\n\n{"text": 3}', "bad.jsonl, line 3: 'text' is a number"),
        (b'{"text": "one"}\n{"text"', "bad.jsonl, line 2: not JSON"),
        (b'{"text": "one"}\n\xff', "bad.jsonl, line 2: byte 0xff is not UTF-8"),
        (b'{"text": "one", "weight": 2}', "bad.jsonl, line 1: 'weight' is not understood"),
        (b"\n", "bad.jsonl holds no examples"),
        (b'{"text": "' + b"x" * 5 * 2**20 + b'"}', "a line has more than 4194304 bytes"),
    ],
)
def test_a_mistake_in_a_training_file_names_its_line(client: OpenAI, data: bytes, error: str) -> None:
    with pytest.raises(BadRequestError, match=error) as caught:
        client.files.create(file=("bad.jsonl", data), purpose="fine-tune")
    assert (caught.value.param, caught.value.code) == ("file", "invalid_file")
    client.files.delete(client.files.create(file=("bad.jsonl", data), purpose="user_data").id)  # not checked


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"purpose": "vision"}, "purpose"),
        ({"purpose": "user_data", "expires_after": {"anchor": "created_at", "seconds": 3600}}, "expires_after"),
        ({"purpose": "user_data", "extra_body": {"colour": "red"}}, "colour"),
    ],
)
def test_what_is_not_done_is_refused_by_name(client: OpenAI, options: dict[str, object], param: str) -> None:
    with pytest.raises(BadRequestError, match=param) as caught:
        client.files.create(file=("a.bin", b"1"), **options)  # type: ignore[arg-type]  # bad on purpose
    assert caught.value.param == param


def test_a_large_file_is_refused_and_nothing_stays(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    before = sorted((openai_daemon.context.home.path / "files").iterdir())
    with pytest.raises(APIStatusError) as caught:
        client.files.create(file=("large.bin", b"0" * (6 * 2**20 + 1)), purpose="user_data")
    assert caught.value.status_code == 413
    assert sorted((openai_daemon.context.home.path / "files").iterdir()) == before
    assert list(openai_daemon.context.home.uploads.iterdir()) == []


def test_a_line_of_training_data_has_a_bound(client: OpenAI) -> None:
    for more in (0, 1):
        line = b'{"text": "' + b"x" * (LONGEST_LINE + more - 12) + b'"}'
        assert len(line) == LONGEST_LINE + more
        data = b'{"text": "short"}\n' + line + b"\n"
        if not more:
            client.files.delete(client.files.create(file=("long.jsonl", data), purpose="fine-tune").id)
            continue
        with pytest.raises(BadRequestError, match=f"a line has more than {LONGEST_LINE} bytes: split it"):
            client.files.create(file=("long.jsonl", data), purpose="fine-tune")


def test_a_file_that_a_waiting_job_needs_stays(client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file, validation_file=training_file)

    def paused() -> None:
        client.fine_tuning.jobs.pause(job.id)
        openai_daemon.jobs.settle()

    states = {"queued": lambda: None, "running": lambda: openai_daemon.jobs.go_on(job.id), "paused": paused}
    for status, change in states.items():
        change()
        assert client.fine_tuning.jobs.retrieve(job.id).to_dict()["isthmus"]["status"] == status  # type: ignore[index]
        with pytest.raises(BadRequestError, match=f"the job {job.id} needs"):
            client.files.delete(training_file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(training_file).deleted


def test_another_owner_sees_none_of_it(client: OpenAI, other: OpenAI, training_file: str) -> None:
    assert other.files.list().data == []
    for ask in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(NotFoundError):
            ask(training_file)
    with pytest.raises(BadRequestError, match="is no file"):
        other.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    assert client.files.retrieve(training_file).id == training_file


def test_a_full_disk_is_told_in_figures_to_the_first_owner_alone(
    client: OpenAI, other: OpenAI, openai_daemon: OpenAIDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_daemon.context.room, "most", 0)
    told = []
    for one in (client, other):
        with pytest.raises(APIStatusError) as full:
            one.with_options(max_retries=0).files.create(file=("a.bin", b"1"), purpose="batch")
        assert full.value.status_code == 507
        told.append(full.value.body["message"])  # type: ignore[index]  # a dictionary
    assert "MiB of the 0.0 MiB that it may" in told[0]
    assert told[1] == "the daemon's disk is full: delete files, models or jobs of yours"


def test_uploads_that_do_not_come_take_no_room_and_those_that_come_do(
    client: OpenAI, openai_daemon: OpenAIDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, uploads = openai_daemon.context.room, openai_daemon.context.home.uploads
    monkeypatch.setattr(room, "most", disk_room.taken(openai_daemon.context.home.path) + (8 << 20))
    at = (client.base_url.host, client.base_url.port)
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=B\r\n"
        f"X-API-Key: {openai_daemon.others_token}\r\nContent-Length: {6 << 20}\r\n\r\n"
        '--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n1'
    ).encode()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(at)) for _ in range(4)]
        for each in slow:
            each.sendall(head)
        _until(lambda: len(list(uploads.iterdir())) == len(slow))
        upload = functools.partial(client.files.create, purpose="batch")
        client.files.delete(upload(file=("a.bin", bytes(3 << 20))).id)
        slow[0].sendall(bytes(5 << 20))
        _until(lambda: sum(path.stat().st_size for path in uploads.iterdir()) > 4 << 20)
        with pytest.raises(APIStatusError) as full:
            upload(file=("a.bin", bytes(4 << 20)))
        assert full.value.status_code == 507
    _until(lambda: not list(uploads.iterdir()))


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_home_is_looked_through_beside_the_event_loop(
    client: OpenAI, openai_daemon: OpenAIDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_loop: list[bool] = []

    def taken(_path: Any) -> int:
        on_the_loop.append(asyncio._get_running_loop() is not None)
        return 0

    monkeypatch.setattr(disk_room, "taken", taken)
    monkeypatch.setattr(openai_daemon.context.room, "_counted_at", float("-inf"))
    client.files.delete(client.files.create(file=("a.bin", b"1"), purpose="batch").id)
    assert set(on_the_loop) == {False}

    async def here() -> None:
        taken(None)

    asyncio.run(here())
    assert on_the_loop[-1]  # the check sees a loop where there is one
