"""A tiny edge behind embedding noise with a denoiser, the whole model with the same weights, and what goes up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.models.tiny import HIDDEN, N_LAYERS, tiny_checkpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span
from isthmus.privacy.attacks.attack import UNKNOWN
from isthmus.privacy.defences.defence import IGNORED
from isthmus.privacy.defences.defence_options import read_defence
from isthmus.privacy.defences.defended_span import DefendedSpan, build_defences
from isthmus.privacy.defences.secret_noise import SecretNoise
from isthmus.privacy.recording.traffic import Backward, Forward, Traffic
from isthmus.protocol.tensor_codecs import Role, decode, encode

KEY = bytes(range(32))


class DenoisedEdge:
    """Nothing is trained here: the denoiser's last matrix is random, as large as asked for.

    Attributes:
        whole: The whole model.
        model: The edge's.
        span: The cloud's layers, as a `SpanFn` without a graph through them.
        defences: The edge's.
        noise: By its key.

    Args:
        size: Of the denoiser's last matrix, relative to what keeps the size of what it is given; 0 for one that
            changes nothing, as at the start of a run.
        codec: Of the activations, both ways.
    """

    def __init__(self, folder: Path, family: str = "llama", size: float = 0.5, codec: str = "fp32") -> None:
        torch.set_num_threads(1)
        tiny_checkpoint(family, folder)
        self.plan = SplitPlan.parse("2:2", N_LAYERS)
        self.whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        layers = load_span(folder, self.plan)
        self._calls: list[tuple[Tensor, Tensor]] = []

        def crossing(hidden: Tensor) -> Tensor:
            return decode(encode(hidden, codec, Role.ACTIVATION))

        def span(hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
            with torch.no_grad():
                sent = crossing(hidden)
                output = crossing(layers(sent, mask, positions))
            self._calls.append((sent, output.requires_grad_()))
            return output

        self.span = span
        self.model: Any = load_edge_parts(folder, self.plan, span).eval().requires_grad_(False)
        # As long as a typical embedding.
        eta = HIDDEN / float(self.whole.get_input_embeddings().weight.norm(dim=-1).median())
        self.defences = build_defences([read_defence(f"embedding-noise:eta={eta:.3g},denoise=true")], HIDDEN)
        denoiser: Any = self.defences[0].module()
        denoiser.requires_grad_(False)
        random = torch.Generator().manual_seed(5)
        denoiser[2].weight.copy_(size * HIDDEN**-0.5 * torch.randn(HIDDEN, HIDDEN, generator=random))
        self.noise = SecretNoise(KEY)

    @contextmanager
    def defended(self) -> Iterator[None]:
        """While the block runs, the edge's model sends through its defences."""
        with DefendedSpan(self.model, self.defences, self.noise).in_place():
            yield

    @property
    def crossed(self) -> list[tuple[Tensor, Tensor]]:
        """What has gone up and come down so far, `[B, S, h]` each."""
        return [(sent, output.detach()) for sent, output in self._calls]

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """The losses of a micro-batch's labels by the defended edge, `[labels]`."""
        labels = batch["labels"][:, 1:]
        with self.defended():
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        losses = cross_entropy(logits.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none")
        return losses[labels.flatten() != IGNORED]

    def learning(self, texts: Sequence[Tensor], start: int) -> tuple[Traffic, list[Tensor]]:
        """The gradients of texts `[n]`, each a call of its own, whose tokens from `start` on are labels; and these.

        Labels are given as `isthmus.privacy.attacks.attack.Guess` has them.
        """
        forwards, backwards, labels = [], [], []
        for call, tokens in enumerate(texts):
            wanted = tokens.clone()
            wanted[:start] = IGNORED
            mask = torch.ones_like(tokens)[None]
            losses = self.losses({"input_ids": tokens[None], "attention_mask": mask, "labels": wanted[None]})
            sent, output = self._calls[-1]
            (gradient,) = torch.autograd.grad(losses.mean(), output)
            forwards.append(Forward(call, 0, sent, mask.bool(), None, "fp32", output.detach(), True))
            backwards.append(Backward(call, 0, gradient, "fp32", None))
            labels.append(torch.full_like(tokens, UNKNOWN))
            labels[-1][start - 1 : -1] = tokens[start:]
        return Traffic("", str(self.plan), tuple(forwards), tuple(backwards)), labels
