"""The task's score of an edge with a denoiser: that of the edge itself, over the wire as it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.privacy.denoised_edge import KEY, DenoisedEdge
from torch import Tensor

from isthmus.edge.data.batches import Encoded, collate
from isthmus.edge.data.readers import Example
from isthmus.experiments.leak.leak_texts import Text
from isthmus.experiments.leak.rows.trained_edge import score_task
from isthmus.privacy.attacks import known_defences
from isthmus.privacy.attacks.attack import KnownDefence
from isthmus.privacy.attacks.known_defences import KnownDefences
from isthmus.privacy.defences.secret_noise import SecretNoise

LARGE = 16.0  # a denoiser that changes an output by as much as the output is long
TEXTS = [Text(Example("", ""), Encoded(ids, (-100, *ids[1:]))) for ids in ((5, 6, 7, 8, 9, 10), (9, 10, 11))]


class NotDenoised(KnownDefences):
    """As the score was made before: noise on the embeddings, and nothing that takes it out."""

    def output(self, output: Tensor) -> Tensor:
        return output


class ToldOtherNoise(KnownDefences):
    """A denoiser that is told noise of another pass than the one on the embeddings."""

    def output(self, output: Tensor) -> Tensor:
        return KnownDefences(self._defences).output(output)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_the_score_is_that_of_the_defended_edge(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = DenoisedEdge(tmp_path / "model", size=LARGE, codec=codec)
    losses = edge.losses(collate([text.encoded for text in TEXTS], 0)).detach()

    def loss(defence: KnownDefence | None, plan: bool = True, seed: int = 0) -> float:
        sent = {"plan": edge.plan, "codec": codec, "defence": defence, "seed": seed} if plan else {}
        return score_task(edge.whole, TEXTS, 0, **sent).losses.share

    known, whole = KnownDefences(edge.defences), loss(None, plan=False)
    own = loss(known)
    with monkeypatch.context() as patched:
        patched.setattr(known_defences, "_drawn", lambda: SecretNoise(KEY))
        assert loss(known) == pytest.approx(float(losses.mean()), rel=1e-5)
        # The controls: without the denoiser, and with one that is told other noise.
        assert loss(NotDenoised(edge.defences)) != pytest.approx(float(losses.mean()), rel=1e-2)
    assert loss(ToldOtherNoise(edge.defences)) != pytest.approx(own, rel=1e-3)
    # Without the key it is noise of the scorer's own, by the seed.
    assert own == loss(known) != loss(known, seed=1)
    assert own != pytest.approx(float(losses.mean()), rel=1e-4)
    assert loss(None, plan=False) == whole  # nothing is left of the hooks
