from __future__ import annotations

import pytest
import torch
from support.models.tiny import VOCAB
from support.privacy.attacked import attacked, tiny_model

from isthmus.common.errors import ConfigError
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.private_front import fit_front
from isthmus.privacy.attacks.vocabulary_matching import VocabularyMatching


def tuned_front(model: object, by: float) -> Front:
    """The model's front with other weights, by a share of their spread."""
    front = Front(model, 2).with_own_layers()
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in front.layers.parameters():
            if weight.dim() == 2:
                weight.add_(by * weight.std() * torch.randn(weight.shape, generator=random))
    return front


def test_a_tuned_front_is_read_with_the_base_weights_and_better_with_known_texts() -> None:
    model = tiny_model("llama")
    edges = tuned_front(model, 0.1)
    case = attacked(model=model, edges_front=edges).knowing(private_front=True, front_steps=100, inverter_steps=10)
    alone = case.accuracy(case.attack(VocabularyMatching()))
    assert alone > 0.5

    random = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, VOCAB, (60,), generator=random) for _ in range(8)]
    known = case.knowing(known=tuple((text, edges.states(text)) for text in texts))
    fitted = known.knowing(front=fit_front(known.knowledge).front)
    assert fitted.accuracy(fitted.attack(VocabularyMatching())) > alone + 0.1

    # The control: known texts that are not what came of them teach nothing.
    mixed = known.knowing(known=tuple((text, edges.states(text.flip(0))) for text in texts))
    spoiled = mixed.knowing(front=fit_front(mixed.knowledge).front)
    assert spoiled.accuracy(spoiled.attack(VocabularyMatching())) < alone


def test_one_known_text_is_too_few() -> None:
    case = attacked().knowing(known=((torch.tensor([5, 6]), torch.zeros(2, 32)),))
    with pytest.raises(ConfigError, match="1 known texts"):
        fit_front(case.knowledge)
