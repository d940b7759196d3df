"""What public text says of each layer, and which layers it has dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models.tiny import HIDDEN
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.emulator.compress.layer_measures import linear_cka, measure, relative_error
from isthmus.emulator.compress.recipe import Recipe
from isthmus.training.logit_divergence import logit_divergence

from ..conftest import PLAN, Checkpoints, hidden_states, make


def test_importance_drops_the_layer_that_does_nothing(checkpoints: Checkpoints, blocks: Tensor, tmp_path: Path) -> None:
    source = checkpoints("llama")
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    with torch.no_grad():
        for layer, share in ((2, 0.0), (4, 1e-3)):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(share)
            model.model.layers[layer].mlp.down_proj.weight.mul_(share)
    model.save_pretrained(tmp_path)
    emulator = make(Checkpoint(tmp_path, "idle"), "importance", 0.5, blocks)
    assert emulator.layers == (1, 3)
    measures = emulator.measures
    assert measures is not None
    assert measures.removed == (1, 3)
    assert measures.removal_errors[0] < 1e-9 < measures.removal_errors[1] < 1e-2
    assert measures.influence[1] < 1e-6 < min(measures.influence[0], measures.influence[2])


def test_a_removal_order_goes_on_from_what_is_known(checkpoints: Checkpoints, blocks: Tensor) -> None:
    checkpoint = checkpoints("llama")
    at_once = measure(checkpoint, PLAN, Recipe("importance", 0.25), blocks)
    half = measure(checkpoint, PLAN, Recipe("importance", 0.5), blocks)
    assert measure(checkpoint, PLAN, Recipe("importance", 0.25), blocks, known=half) == at_once
    assert at_once.removed[: len(half.removed)] == half.removed
    assert len(at_once.removed) > len(half.removed)
    both = measure(checkpoint, PLAN, Recipe("crash", 0.5), blocks, known=half)
    assert both == replace(half, similarity=measure(checkpoint, PLAN, Recipe("crash", 0.5), blocks).similarity)


def test_the_order_by_kl_is_that_of_the_emulators_kl_and_goes_on(checkpoints: Checkpoints, blocks: Tensor) -> None:
    checkpoint, used = checkpoints("gemma3_text"), blocks[:8]
    half = measure(checkpoint, PLAN, Recipe("kl", 0.5), used)
    at_once = measure(checkpoint, PLAN, Recipe("kl", 0.25), used)
    assert measure(checkpoint, PLAN, Recipe("kl", 0.25), used, known=half) == at_once
    assert (len(half.removed_by_kl), half.removed) == (2, ())

    @torch.no_grad()
    def kl(removed: tuple[int, ...]) -> float:
        keep = 1 - len(removed) / 4
        emulator = make(checkpoint, "kl", keep, measures=replace(at_once, removed_by_kl=removed))
        ours, theirs = (
            load_edge_parts(checkpoint, PLAN, span)(input_ids=used, use_cache=False).logits.flatten(0, 1)
            for span in (emulator, load_span(checkpoint, PLAN))
        )
        return logit_divergence(ours, theirs).item()

    trials = [kl((layer,)) for layer in range(4)]
    assert at_once.removed_by_kl[0] == trials.index(min(trials))
    assert at_once.removal_kl[-1] == pytest.approx(kl(at_once.removed_by_kl), rel=1e-4)


def test_the_measured_error_is_that_of_the_emulator(checkpoints: Checkpoints, blocks: Tensor) -> None:
    checkpoint = checkpoints("gemma3_text")
    emulator = make(checkpoint, "importance", 0.5, blocks)
    seen: list[Tensor] = []
    edge = load_edge_parts(checkpoint, PLAN, lambda hidden, *_: seen.append(hidden) or hidden)  # type: ignore[func-returns-value]  # the list's answer is None
    with torch.no_grad():
        edge(input_ids=blocks, use_cache=False)
        error = relative_error(emulator(seen[0]), load_span(checkpoint, PLAN)(seen[0])).item()
    assert emulator.measures is not None
    assert emulator.measures.removal_errors[-1] == pytest.approx(error, rel=1e-4)


def test_cka_is_one_for_a_turned_and_scaled_copy_and_low_for_noise() -> None:
    x = hidden_states(1, 400)
    turn, _ = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2)))
    table = linear_cka([x, 3 * x @ turn + 1, hidden_states(3, 400)])
    assert table[0][1] == pytest.approx(1.0, abs=1e-4)
    assert table[0][2] == table[2][0] < 0.2
