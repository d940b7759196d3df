"""Metric noise on embeddings, as Split-and-Denoise has it (Mai et al. 2024, ICML; Feyisetan et al. 2020, WSDM).

Noise with a density proportional to exp(-η‖z‖) is added to each token's embedding: a direction uniform on the sphere,
and a length of the Gamma distribution with shape h and scale 1/η. It is drawn once for each token of an example and is
the same in every pass, a function of the example's tokens and the key.

Claims: d_χ-privacy of each token. For any two tokens x and x', whatever is computed forward from the noisy embedding
is at most exp(η·‖E(x) - E(x')‖) times likelier under one than under the other. All passes share the noise, so they do
not add up, given the adapters. For a whole sequence the losses of its tokens do add up.

Not claimed: anything about gradients. The labels of a language model are its tokens, and the gradient at the span's
output carries them. Other examples' messages, through the adapters, are not covered either.

With `denoise` the edge takes out of the span's output what the noise did to it, as it knows the noise: a network of two
layers, told the output and the noise of a token, learns a correction along with the adapters. (Split-and-Denoise trains
a transformer for it beforehand, on public texts.) It computes on the edge alone, and the claim stays what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from isthmus.privacy.defences.defence import Defence, Pass
from isthmus.privacy.defences.defence_options import EmbeddingNoise
from isthmus.privacy.defences.secret_noise import SecretNoise


class MetricNoise(Defence):
    """See the top of the file."""

    def __init__(self, options: EmbeddingNoise, width: int) -> None:
        super().__init__(options, width)
        self._eta = options.eta
        self._denoiser = _denoiser(width) if options.denoise else None

    def embedded(self, embedded: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        return embedded + self._drawn(embedded, now)

    def output(self, output: Tensor, now: Pass) -> Tensor:
        """See `Defence`."""
        if self._denoiser is None:
            return output
        scale = self._eta / self.width  # brings the noise to a length of about 1
        noise = (self._drawn(output, now) * scale).float()
        correction: Tensor = self._denoiser(torch.cat([layer_norm(output.float(), output.shape[-1:]), noise], -1))
        return output + correction.to(output)

    def module(self) -> nn.Module | None:
        """See `Defence`."""
        return self._denoiser

    def _drawn(self, like: Tensor, now: Pass) -> Tensor:
        """The noise of a pass, `[B, S, h]`."""
        lengths = now.real.sum(-1).tolist()
        rows = [
            metric_noise(now.noise, length, self.width, self._eta, content)
            for length, content in zip(lengths, now.contents(), strict=True)
        ]
        return now.spread(rows).to(like)


def _denoiser(width: int) -> nn.Module:
    """From an output and a noise, `[…, 2h]`, to what is added to the output, `[…, h]`; at the start nothing."""
    with torch.random.fork_rng(devices=[]):  # the run's random state has other uses, which this must not move
        torch.manual_seed(0)
        last = nn.Linear(width, width)
        denoiser = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), last)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return denoiser


def metric_noise(noise: SecretNoise, count: int, width: int, eta: float, content: bytes) -> Tensor:
    """Vectors of density exp(-η‖z‖), `[count, width]` fp32."""
    direction = noise.normal((count, width), "embedding/direction", content)
    # A Gamma number of whole shape is a sum of exponential ones.
    length = -noise.uniform(count * width, "embedding/length", content).log().view(count, width).sum(-1) / eta
    scale: Tensor = length.float().unsqueeze(-1) / direction.norm(dim=-1, keepdim=True)
    return direction * scale
