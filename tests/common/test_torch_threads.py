"""How many threads torch computes with."""

from __future__ import annotations

import pytest
import torch

from isthmus.common import torch_threads


def test_torch_takes_no_more_threads_by_itself_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before, set_to = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    for own, usable, asked in ((8, 2, None), (2, 2, None), (1, 2, None), (2, 2, 5)):
        monkeypatch.setattr(torch, "get_num_threads", lambda own=own: own)
        monkeypatch.setattr(torch_threads, "usable_cores", lambda usable=usable: usable)
        torch_threads.use_threads(asked)
    assert set_to == [2, 5]
    monkeypatch.undo()
    assert torch.get_num_threads() == before
