"""Fixtures of the tests of the daemon's door."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from support.daemon.web.access_parts import client_of, context_in

from isthmus.daemon.web.context import Context


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    made = context_in(tmp_path_factory.mktemp("access"), body_mib=1, upload_mib=2, hosts=["box.lan"])
    yield made
    made.database.close()


@pytest.fixture
def client(context: Context) -> TestClient:
    return client_of(context)
