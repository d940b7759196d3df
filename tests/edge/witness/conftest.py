"""What calls give that nobody notes."""

from __future__ import annotations

import pytest
import torch
from support.cloud.memory_cloud import MemoryCloud, new_link
from support.cloud.span_calls import three_calls

from isthmus.cloud.session.served_model import Served


@pytest.fixture
def undisturbed_calls(shared: Served) -> list[torch.Tensor]:
    return three_calls(new_link(MemoryCloud(shared)))
