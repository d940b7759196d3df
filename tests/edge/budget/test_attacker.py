"""What the attacker of a leak budget knows of an edge with a denoiser."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models.tiny import VOCAB, tiny_tokenizer
from support.privacy.denoised_edge import KEY, DenoisedEdge

from isthmus.edge.budget.attacker import knowledge_of
from isthmus.edge.data.batches import Encoded
from isthmus.privacy.attacks import known_defences
from isthmus.privacy.attacks.attack import Knowledge
from isthmus.privacy.attacks.known_defences import KnownDefences
from isthmus.privacy.attacks.labels.gradient_labels import ExactLabels
from isthmus.privacy.attacks.labels.labelled_rows import labelled_row
from isthmus.privacy.defences.secret_noise import SecretNoise

LENGTH, START = 12, 5
TOKENS = torch.randint(3, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))
PUBLIC = [Encoded(tuple(tokens.tolist()), tuple(tokens.tolist())) for tokens in TOKENS[:2]]


def knowledge(edge: DenoisedEdge) -> Knowledge:
    """During the run, whose defences stand between the edge's model and its span."""
    run: Any = SimpleNamespace(defences=edge.defences)
    with edge.defended():
        return knowledge_of(edge.model, tiny_tokenizer(), run, PUBLIC, "fp32", edge.span)


def test_public_texts_go_through_the_clouds_layers_as_the_edge_would_send_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge, tokens = DenoisedEdge(tmp_path / "model", size=16.0), TOKENS[0]
    traffic, _ = edge.learning([tokens], START)
    known = knowledge(edge)
    own = labelled_row(known, tokens, START)
    sent, _ = edge.crossed[-1]
    exact = edge.whole(input_ids=tokens[None], output_hidden_states=True).hidden_states[edge.plan.bottom]
    assert not torch.allclose(sent, exact, rtol=0.1)  # nothing crosses without noise
    monkeypatch.setattr(known_defences, "_drawn", lambda: SecretNoise(KEY))  # no attacker has it
    before = len(edge.crossed)
    same = labelled_row(known, tokens, START)
    assert len(edge.crossed) == before + 1
    torch.testing.assert_close(edge.crossed[-1][0], traffic.forwards[0].hidden)
    torch.testing.assert_close(same.row.gradient, traffic.backwards[0].gradient)
    # The control: with noise of its own it has another gradient.
    assert not torch.allclose(own.row.gradient, same.row.gradient, rtol=0.1)


def test_labels_behind_a_denoiser_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = DenoisedEdge(tmp_path / "model", size=16.0)
    traffic, labels = edge.learning(list(TOKENS[2:]), START)

    def found() -> float:
        attack = ExactLabels()
        attack.prepare(knowledge(edge))
        guess = attack.run(traffic).labels
        assert guess is not None
        true = torch.cat(labels)
        return float((torch.cat(guess) == true)[true >= 0].double().mean())

    assert found() == 1
    monkeypatch.setattr(KnownDefences, "expect_output", lambda _, output: output)
    assert found() < 0.9
