"""A package to offer, its cloud's keys, a `serve` that must not start Ray, and another user of this machine."""

from __future__ import annotations

import pytest
from support.cloud.clouds import Home
from support.emulator.packages import tiny_package
from support.models.tiny import tiny_checkpoint
from support.other_user import as_nobody, place

from isthmus.cloud.control import supervisor
from isthmus.emulator.package.package import Package
from isthmus.protocol.secure.keys import load_worker

__all__ = ["as_nobody", "keys", "package", "place", "without_ray"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, keys: Home) -> Package:
    folder = tmp_path_factory.mktemp("package")
    return tiny_package(folder / "package", tiny_checkpoint("llama", folder / "model"), signer=load_worker(keys.folder))


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong is found before Ray is started."""
    monkeypatch.setattr(supervisor, "Serving", lambda *_, **__: pytest.fail("Ray was started"))
