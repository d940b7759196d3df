"""Metric noise on embeddings, as Split-and-Denoise has it (Mai et al. 2024, ICML; Feyisetan et al. 2020, WSDM).

Noise with a density proportional to exp(-η‖z‖) is added to each token's embedding: a direction uniform on the sphere,
and a length of the Gamma distribution with shape h and scale 1/η. It is drawn once for each token of an example and is
the same in every pass, a function of the example's tokens and the key.

Claims: d_χ-privacy of each token. For any two tokens x and x', whatever is computed forward from the noisy embedding
is at most exp(η·‖E(x) - E(x')‖) times likelier under one than under the other. All passes share the noise, so they do
not add up, given the adapters. For a whole sequence the losses of its tokens do add up.

Not claimed: anything about gradients. The labels of a language model are its tokens, and the gradient at the span's
output carries them. Other examples' messages, through the adapters, are not covered either. Split-and-Denoise's
denoiser is left out: the adapters above the cloud's layers learn to do with the noise.
"""

from __future__ import annotations

from torch import Tensor

from isthmus.privacy.defences.defence import Defence, Pass
from isthmus.privacy.defences.defence_options import EmbeddingNoise
from isthmus.privacy.defences.secret_noise import SecretNoise


class MetricNoise(Defence):
    """See the top of the file."""

    def __init__(self, options: EmbeddingNoise, width: int) -> None:
        super().__init__(options, width)
        self._eta = options.eta

    def embedded(self, embedded: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        lengths = now.real.sum(-1).tolist()
        rows = [
            metric_noise(now.noise, length, embedded.shape[-1], self._eta, content)
            for length, content in zip(lengths, now.contents(), strict=True)
        ]
        return embedded + now.spread(rows).to(embedded)


def metric_noise(noise: SecretNoise, count: int, width: int, eta: float, content: bytes) -> Tensor:
    """Vectors of density exp(-η‖z‖), `[count, width]` fp32."""
    direction = noise.normal((count, width), "embedding/direction", content)
    # A Gamma number of whole shape is a sum of exponential ones.
    length = -noise.uniform(count * width, "embedding/length", content).log().view(count, width).sum(-1) / eta
    scale: Tensor = length.float().unsqueeze(-1) / direction.norm(dim=-1, keepdim=True)
    return direction * scale
