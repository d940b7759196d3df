"""Smoothed labels in the gradients that go up (Szegedy et al. 2016).

The loss is taken towards a mixture of the label and the uniform distribution over the vocabulary, so that the gradient
at the logits is p - (1 - a)·onehot(y) - a/V. The loss that a run reports stays that of the labels themselves.

Claims: nothing. The label stays where the gradient is lowest for every a below 1: solving for the gradient at the
logits, as the exact recovery of labels does, finds it.
"""

from __future__ import annotations

from torch import Tensor

from isthmus.privacy.defences.defence import IGNORED, Defence, Pass
from isthmus.privacy.defences.defence_options import Smoothing


class LabelSmoothing(Defence):
    """See the top of the file.

    Attributes:
        share: Of the uniform distribution in each label.
    """

    def __init__(self, options: Smoothing, width: int) -> None:
        super().__init__(options, width)
        self.share = options.share

    def extra_loss(self, logits: Tensor, labels: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        wanted = labels[:, 1:] != IGNORED
        scores = logits[:, :-1][wanted].float().log_softmax(-1)
        own = scores.gather(-1, labels[:, 1:][wanted].unsqueeze(-1)).squeeze(-1)
        return self.share * (own - scores.mean(-1)).mean()
