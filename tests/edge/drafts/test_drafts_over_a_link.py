"""Drafts over real sockets: one round trip verifies several tokens, and the text is the same."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer
from support.emulator.packages import tiny_package
from support.models.tiny import PAD
from torch import Tensor

from isthmus.cloud.session.served_model import Served
from isthmus.edge.drafts import EmulatorDraft, FixedLength, NgramDraft, drafting
from isthmus.edge.generation.exact import exact_decoding

pytestmark = pytest.mark.usefixtures("cache_folder")
NEW = 24


def text(model: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they were chosen by."""
    found = model.generate(
        torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]]),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("exact", [False, True])
def test_one_round_trip_a_round(tiny_cloud: Served, tiny_model: Path, tmp_path: Path, exact: bool) -> None:
    package = tiny_package(tmp_path / "package", tiny_model, keep=0.75)
    with ThreadServer(tiny_cloud, Home(tmp_path)) as server, server.link() as link, contextlib.ExitStack() as stack:
        link.open(5)
        edge = link.load_model()
        drafts = [NgramDraft(FixedLength(3)), EmulatorDraft.open(package.folder, edge, rule=FixedLength(3))]
        if exact:
            stack.enter_context(exact_decoding(link, edge))
        expected = text(edge)
        for draft in drafts:
            calls = link.traffic.calls
            with drafting(edge, draft):
                found = text(edge)
            assert torch.equal(found[0], expected[0])
            assert torch.allclose(found[1], expected[1], atol=1e-4)
            assert torch.equal(found[1], expected[1]) or not exact
            assert link.traffic.calls - calls == draft.statistics.rounds + exact  # an exact prompt is no round
        assert drafts[1].statistics.accepted > 0
        assert drafts[1].statistics.rounds < NEW
