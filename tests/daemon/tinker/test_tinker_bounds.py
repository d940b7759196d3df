"""What a client can make the daemon keep by Tinker's API: sessions, samplers, prompts, and the database's file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from support.daemon.tinker_server import BASE, FakeAnswers

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import first_owner, give_token
from isthmus.daemon.state.tables import BaseModel
from isthmus.daemon.tinker import tinker_service
from isthmus.daemon.tinker.endpoints import session_routes
from isthmus.daemon.tinker.tinker_routes import router
from isthmus.daemon.tinker.tinker_service import TinkerService
from isthmus.daemon.web.application import application
from isthmus.daemon.web.context import Context

ADDRESS = "127.0.0.1:7465"


class Api:
    """The API in this process, and what is behind it."""

    def __init__(self, home: Home) -> None:
        self.home = home
        clouds = {"main": {"cloud": "isthmus://127.0.0.1:1#SHA256:0"}}
        settings = DaemonSettings.model_validate({"listen": ADDRESS, "clouds": clouds})
        database = Database(home.database)
        first_owner(database, home.token)
        self.tokens = [home.token.read_text().strip(), give_token(database, "second")]
        with database.session() as session:
            session.add(BaseModel(name=BASE, cloud="main", facts={"longest": 1000, "digest": "0"}, seen_at=0.0))
        self.room = DiskRoom(home.path, settings.disk_gib)
        self.context = Context(settings, home, database, None, FakeAnswers(), self.room)  # type: ignore[arg-type]
        self.app = application(self.context, [router()])
        self.client: TestClient

    @property
    def service(self) -> TinkerService:
        found: TinkerService = self.app.state.tinker
        return found

    def post(self, path: str, owner: int = 0, **body: Any) -> Any:
        """What is answered; a refusal as its status and its message."""
        headers = {"X-API-Key": self.tokens[owner]}
        answer = self.client.post(f"/api/v1/{path}", json=body, headers=headers)
        if answer.status_code != 200:
            return answer.status_code, answer.json()["error"]["message"]
        return answer.json() if answer.headers["content-type"] == "application/json" else answer.content

    def begin(self, owner: int = 0) -> Any:
        made = self.post("create_session", owner, tags=[], user_metadata={}, sdk_version="0")
        return made["session_id"] if isinstance(made, dict) else made

    def sampler(self, session: str, number: int = 0) -> Any:
        body = {"session_id": session, "sampling_session_seq_id": number, "base_model": BASE}
        made = self.post("create_sampling_session", **body)
        return made["sampling_session_id"] if isinstance(made, dict) else made

    def sample(self, sampler: str, number: int, tokens: list[int]) -> Any:
        """The result of a sample."""
        prompt = {"chunks": [{"type": "encoded_text", "tokens": tokens}]}
        asked = {"sampling_session_id": sampler, "seq_id": number, "sampling_params": {"max_tokens": 1}}
        promise = self.post("asample", **asked, prompt=prompt)
        return self.post("retrieve_future", request_id=promise["request_id"])

    def database_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.home.path.glob("state.db*"))


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    made = Api(Home.make(tmp_path / "home"))
    with TestClient(made.app, base_url=f"http://{ADDRESS}") as made.client:
        yield made
    made.context.database.close()


def test_sessions_of_an_owner_are_bounded(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_routes, "MOST_SESSIONS", 2)
    first, second = api.begin(), api.begin()
    assert first != second
    assert api.begin() == (400, "there are 2 sessions already; old ones go after keep_days (daemon.toml)")
    assert isinstance(api.begin(owner=1), str)


def test_samplers_of_a_session_are_bounded(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = api.begin(), api.begin()
    monkeypatch.setattr(session_routes, "MOST_SESSIONS", 2)
    made = [api.sampler(first, number) for number in range(2)]
    assert api.sampler(first, 2) == (400, f"session {first} has 2 samplers already: begin another")
    assert api.sampler(first, 1) == made[1]  # a request that comes again makes none
    assert isinstance(api.sampler(second), str)


def test_a_prompt_that_the_disk_has_no_room_for_is_refused_in_its_promise(api: Api) -> None:
    sampler = api.sampler(api.begin())
    assert isinstance(api.sample(sampler, 1, [1] * 1000), bytes)
    api.room.most = api.room.used() + 1500
    assert isinstance(api.sample(sampler, 2, [1]), bytes)
    refusal = api.sample(sampler, 3, [1] * 1000)
    assert "the daemon's disk is full" in refusal["error"]
    assert refusal["category"] == "user"


def test_prompts_and_answers_that_are_kept_no_longer_take_no_room(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = api.sampler(api.begin())
    api.service.sweep()
    before = api.database_bytes()
    for number in range(40):
        assert isinstance(api.sample(sampler, number, [1] * 1000), bytes)
    assert list((api.home.path / "tinker" / "requests").iterdir()) == []
    with api.context.database.session() as session:  # as answers are that have many tokens
        session.connection().exec_driver_sql("UPDATE tinker_promises SET answer = zeroblob(100000)")
    api.service.sweep()
    assert api.database_bytes() > before + 40 * 100_000  # the control: they are kept still
    monkeypatch.setattr(tinker_service, "_DAY", 0.0)
    api.service.sweep()
    assert api.database_bytes() < before + (1 << 16)
