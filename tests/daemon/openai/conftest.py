"""One daemon for all tests of OpenAI's API, and the official SDK in front of it, with strict validation of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from support.daemon.openai_fakes import OpenAIDaemon


@pytest.fixture(scope="session")
def openai_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIDaemon]:
    """A daemon whose jobs and answers are fakes."""
    made = OpenAIDaemon(tmp_path_factory.mktemp("openai") / "home", upload_mib=6)
    yield made
    made.context.database.close()


@pytest.fixture(scope="session")
def client(openai_daemon: OpenAIDaemon) -> Iterator[OpenAI]:
    """The first owner's."""
    with openai_daemon.served() as url:
        yield OpenAI(base_url=url, api_key=openai_daemon.token, max_retries=0, _strict_response_validation=True)


@pytest.fixture(scope="session")
def other(client: OpenAI, openai_daemon: OpenAIDaemon) -> OpenAI:
    """Another owner's."""
    return client.copy(api_key=openai_daemon.others_token)


def chats(count: int = 10) -> bytes:
    """A file for fine-tuning."""
    messages = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]
    return b"".join(json.dumps({"messages": messages}).encode() + b"\n" for _ in range(count))


@pytest.fixture
def training_file(client: OpenAI, tmp_path: Path) -> str:
    """The id of an uploaded file of ten chats."""
    return client.files.create(file=("chats.jsonl", chats()), purpose="fine-tune").id
