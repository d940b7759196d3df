"""The folder of a cloud's owner."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster.owners_folder import OwnersFolder


@pytest.fixture
def owner(tmp_path: Path) -> OwnersFolder:
    return OwnersFolder(tmp_path)
