"""A model's owner, and a package of its emulator."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.emulator.emulator_owner import Owner


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    return Owner(tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def package(owner: Owner) -> Path:
    owner.build(owner.folder / "package")
    return owner.folder / "package"
