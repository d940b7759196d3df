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
    """The model's front with adapters of rank 2 in its weights, of a share of their spread."""
    front = Front(model, 2).with_own_layers()
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in front.layers.parameters():
            if weight.dim() == 2:
                up, down = (torch.randn(size, 2, generator=random) for size in weight.shape)
                weight.add_(by * weight.std() * up @ down.T / 2**0.5)
    return front


@pytest.mark.long
def test_a_tuned_front_is_read_with_the_base_weights_and_better_with_known_texts() -> None:
    model = tiny_model("llama")
    edges = tuned_front(model, 0.1)
    case = attacked(model=model, edges_front=edges).knowing(private_front=True, front_steps=100, inverter_steps=20)
    alone = case.accuracy(case.attack(VocabularyMatching()))
    assert alone > 0.7

    random = torch.Generator().manual_seed(5)
    *texts, other = [torch.randint(3, VOCAB, (60,), generator=random) for _ in range(9)]
    known = case.knowing(known=tuple((text, edges.states(text)) for text in texts))
    fitted = known.knowing(front=fit_front(known.knowledge).front)
    assert fitted.accuracy(fitted.attack(VocabularyMatching())) > 0.95

    def far(front: Front) -> float:
        return float((front.states(other) - edges.states(other))[1:].norm())

    # The control: known texts that are not what came of them teach nothing.
    mixed = known.knowing(known=tuple((text, edges.states(text.flip(0))) for text in texts))
    assert far(fitted.knowledge.front) < far(case.knowledge.front) < far(fit_front(mixed.knowledge).front)


def test_one_known_text_is_too_few() -> None:
    case = attacked().knowing(known=((torch.tensor([5, 6]), torch.zeros(2, 32)),))
    with pytest.raises(ConfigError, match="1 known texts"):
        fit_front(case.knowledge)
