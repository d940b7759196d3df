"""The table of promises: each once, within bounds, and for as long as it must."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.tables import Owner, TinkerModel, TinkerSession
from isthmus.daemon.tinker import promises as promises_module
from isthmus.daemon.tinker.promises import (
    FullError,
    NewPromise,
    Promises,
    Told,
    UnknownPromiseError,
    told_json,
    told_refusal,
)
from isthmus.daemon.tinker.refusal import RefusalError

DONE = told_json({"done": True})
GRADIENTS = Told(b"protobuf", "application/x-protobuf")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.make(tmp_path / "home")


@pytest.fixture
def database(home: Home) -> Database:
    made = Database(home.database)
    with made.session() as session:
        for name in ("a", "b"):
            session.add(Owner(id=name, name=name, token_sha256=name, created_at=0.0))
        session.flush()
        session.add(TinkerSession(id="s", owner="a", created_at=0.0, seen_at=0.0))
        session.flush()
        model = {"owner": "a", "session": "s", "base": "base", "settings": {}, "created_at": 0.0, "seen_at": 0.0}
        session.add(TinkerModel(id="m", **model))
    return made


@pytest.fixture
def promises(database: Database, home: Home) -> Promises:
    made = Promises(database, home)
    made.start()
    return made


def new(key: int, kind: str = "forward_backward", body: bytes | None = b"data", owner: str = "a") -> NewPromise:
    return NewPromise(owner, "model/m", str(key), kind, "m", {} if body else {"adam": {}}, body)


def bodies(home: Home) -> set[str]:
    return {path.name for path in home.tinker_request("x").parent.iterdir()}


def test_a_request_that_comes_again_finds_its_first_promise(promises: Promises, home: Home) -> None:
    first = promises.make(new(1))
    assert promises.make(new(1)).id == first.id
    assert promises.make(new(2)).id != first.id
    assert len(bodies(home)) == 2
    assert promises.body(first) == b"data"


def test_the_same_request_at_once_is_one_promise(promises: Promises, home: Home) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(promises.make(new(1)).id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert bodies(home) == set(found)


def test_a_poll_is_woken_by_the_answer_and_told_it_again(promises: Promises) -> None:
    promise = promises.make(new(1))

    async def ask() -> None:
        assert await promises.wait("a", promise.id, 0.01) is None
        polls = [asyncio.create_task(promises.wait("a", promise.id, 60)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert not any(poll.done() for poll in polls)
        await promises.tell(promise, DONE)
        assert await asyncio.gather(*polls) == [DONE, DONE, DONE]
        await promises.tell(promise, told_json({"done": "again"}))  # a told result never changes
        assert await promises.wait("a", promise.id, 60) == DONE
        with pytest.raises(UnknownPromiseError):
            await promises.wait("b", promise.id, 60)
        assert promises._waiting == {}

    asyncio.run(ask())


def test_bodies_stay_until_a_state_on_the_disk_has_their_gradients(
    promises: Promises, database: Database, home: Home
) -> None:
    gradients = [promises.make(new(key)) for key in (1, 2)]
    forward, refused = promises.make(new(3, "forward")), promises.make(new(4))
    step = promises.make(new(5, "optim_step", None))
    later = promises.make(new(6))

    async def answer() -> None:
        for promise in (*gradients, forward):
            await promises.tell(promise, GRADIENTS)
        await promises.tell(refused, told_refusal(RefusalError("no")))

    asyncio.run(answer())
    assert bodies(home) == {promise.id for promise in (*gradients, later)}
    assert [each.id for each in promises.to_repeat("m", 0, step.number)] == [each.id for each in gradients]
    promises.sweep(time.time() + 1)  # however old they are
    promises.start()
    assert bodies(home) == {promise.id for promise in (*gradients, later)}

    _save(database, step.number)
    promises.forget_bodies("m")
    assert bodies(home) == {later.id}
    assert promises.to_repeat("m", step.number, later.number) == []
    promises.sweep(time.time() + 1)
    assert promises.find(gradients[0].id) is None
    assert promises.find(later.id) is not None


def test_a_body_that_no_promise_needs_any_more_is_removed(promises: Promises, home: Home) -> None:
    promise = promises.make(new(1))
    answered = promises.make(new(2, "forward"))
    asyncio.run(promises.tell(answered, GRADIENTS))
    home.tinker_request(answered.id).write_bytes(b"data")  # as if a kill had come before it was removed
    home.tinker_request("req-of-nobody").write_bytes(b"data")
    promises.start()
    assert bodies(home) == {promise.id, "req-of-nobody"}  # the latter is for `set-aside`


def test_a_body_goes_with_a_promise_that_is_not_written(
    promises: Promises, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promises_module, "_remove_oldest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        promises.make(new(1))
    assert bodies(home) == set()


def test_a_body_goes_with_the_promise_of_a_model_that_is_gone(
    promises: Promises, database: Database, home: Home
) -> None:
    asyncio.run(promises.tell(promises.make(new(1)), GRADIENTS))
    promises.sweep(time.time() + 1)
    assert len(bodies(home)) == 1  # the control: the model's next step needs it
    with database.session() as session:
        session.delete(session.get_one(TinkerModel, "m"))
    promises.sweep(time.time() + 1)
    assert bodies(home) == set()


def test_no_number_is_given_twice(promises: Promises) -> None:
    """States on the disk go by them."""
    first = promises.make(new(1, "optim_step", None))
    asyncio.run(promises.tell(first, DONE))
    promises.sweep(time.time() + 1)
    assert promises.find(first.id) is None
    assert promises.make(new(2)).number > first.number


def test_promises_that_wait_are_bounded(promises: Promises, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises_module, "MOST_WAITING", 2)
    first, _ = promises.make(new(1)), promises.make(new(2))
    with pytest.raises(FullError, match="2 requests wait"):
        promises.make(new(3))
    assert promises.make(new(1)).id == first.id  # a repeated one takes no room
    promises.make(NewPromise("b", "model/other", "1", "optim_step"))  # nor do another owner's
    asyncio.run(promises.tell(first, DONE))
    promises.make(new(3))


def test_data_that_wait_for_a_step_are_bounded(
    promises: Promises, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promises_module, "MOST_HELD_BYTES", 9)
    made = [promises.make(new(key)) for key in (1, 2)]
    for promise in made:
        asyncio.run(promises.tell(promise, GRADIENTS))
    with pytest.raises(FullError, match="8 bytes of data and prompts wait"):
        promises.make(new(3))
    step = promises.make(new(4, "optim_step", None))
    asyncio.run(promises.tell(step, DONE, lambda _: None))
    _save(database, step.number)
    promises.make(new(3))


def test_prompts_that_wait_are_bounded_and_go_with_their_answers(
    promises: Promises, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prompt(key: int, owner: str = "a") -> NewPromise:
        return NewPromise(owner, "sampler/s", f"{owner}{key}", "asample", body=b"text")

    monkeypatch.setattr(promises_module, "MOST_HELD_BYTES", 9)
    first, second = promises.make(prompt(1)), promises.make(prompt(2))
    with pytest.raises(FullError, match="8 bytes of data and prompts wait"):
        promises.make(prompt(3))
    assert promises.make(prompt(1)).id == first.id  # a repeated one takes no room
    other = promises.make(prompt(1, "b"))  # nor do another owner's
    asyncio.run(promises.tell(first, GRADIENTS))
    third = promises.make(prompt(3))
    assert bodies(home) == {second.id, third.id, other.id}


def test_answers_that_are_kept_are_bounded_and_still_count_once(
    promises: Promises, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promises_module, "MOST_ANSWER_BYTES", 2500)
    made = [promises.make(new(key)) for key in range(4)]
    for promise in made:
        asyncio.run(promises.tell(promise, Told(b"x" * 1000, GRADIENTS.media_type)))
    promises.sweep(0.0)

    async def answers() -> list[bytes]:
        return [told.body for promise in made if (told := await promises.wait("a", promise.id, 0)) is not None]

    found = asyncio.run(answers())
    assert [body.startswith(b'{"error"') for body in found] == [True, True, False, False]
    assert promises.make(new(0)).id == made[0].id
    assert len(promises.to_repeat("m", 0, 10**6)) == 4  # their gradients count


def _save(database: Database, number: int) -> None:
    with database.session() as session:
        session.get_one(TinkerModel, "m").saved = number


def test_the_oldest_that_are_answered_make_room(
    promises: Promises, database: Database, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promises_module, "MOST_KEPT", 3)
    needed = promises.make(new(1))  # its gradients are in no state on the disk
    answered, waiting = promises.make(new(2, "optim_step", None)), promises.make(new(3, "optim_step", None))
    others = promises.make(NewPromise("b", "sampler/x", "1", "asample"))

    async def answer() -> None:
        await promises.tell(needed, GRADIENTS)
        await promises.tell(answered, DONE)
        await promises.tell(others, DONE)

    asyncio.run(answer())
    latest = promises.make(new(4, "optim_step", None))
    there = [promises.find(each.id) is not None for each in (needed, answered, waiting, others, latest)]
    assert there == [True, False, True, True, True]
    with pytest.raises(FullError, match="3 requests are kept"):
        promises.make(new(5))
    assert bodies(home) == {needed.id}
    with database.session() as session:
        session.get_one(TinkerModel, "m").saved = waiting.number
    promises.make(new(5, "optim_step", None))
    assert promises.find(needed.id) is None
