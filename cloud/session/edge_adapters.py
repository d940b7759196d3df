"""The adapters on the edge: what a pass asks them at a group of sites becomes a question on the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.backbone.runtime.sited_pass import BoundSites
from isthmus.backbone.sites.site_spec import Placement
from isthmus.cloud.engine.executor import Executor
from isthmus.protocol import messages as m
from isthmus.protocol.limits import Limits
from isthmus.protocol.tensor_codecs import Role, codec_by_id, decode, encode


@dataclass(frozen=True, slots=True)
class EdgeAdapters:
    """Asks the edge; a `SiteAdapters` of `isthmus.backbone.runtime.sited_pass`.

    Args:
        executor: the span.
        sites: those of the call.
        message: the call.
        limits: what the session accepts.
        ask: sends a question, and returns the edge's answer.
    """

    executor: Executor
    sites: BoundSites
    message: m.Forward | m.Backward
    limits: Limits
    ask: Callable[[m.SiteQuestion], Any]

    def forward(self, sites: Sequence[int], inputs: Sequence[Tensor] | None) -> list[Tensor]:
        """The contributions `[B, S, out]` to the outputs of sites, of their inputs `[B, S, in]`.

        Sites that share an input share its tensor on the wire. None asks for the answers of before once more.
        """
        phase = m.SitePhase.AGAIN if inputs is None else m.SitePhase.FORWARD
        distinct = list({id(x): x.detach() for x in inputs or ()}.values())
        answers = self._answers(phase, sites, distinct, Role.ACTIVATION)
        if len(answers) != len(sites):
            raise ValueError(f"{len(answers)} contributions for {len(sites)} sites: one for each is needed")
        for site, answer in zip(sites, answers, strict=True):
            self._check(answer, site, self.executor.host.widths(self.sites.specs[site])[1])
        return answers

    def backward(self, sites: Sequence[int], gradients: Sequence[Tensor], *, wanted: bool) -> list[Tensor | None]:
        """The gradients of the inputs of sites, of those of their contributions; none where they are not `wanted`.

        One gradient may stand for all sites that share an input.
        """
        phase = m.SitePhase.BACKWARD if wanted else m.SitePhase.BACKWARD_ONLY
        answers = self._answers(phase, sites, gradients, Role.GRADIENT)
        if not wanted:
            if answers:
                raise ValueError(f"{len(answers)} gradients came that nobody wanted")
            return []
        alike = [site for site in sites if self.sites.specs[site].placement == Placement.EDGE]
        answered = [site for site in sites if site not in alike[1:]] if len(answers) < len(sites) else list(sites)
        if len(answers) != len(answered):
            raise ValueError(f"{len(answers)} gradients for {len(sites)} sites: one for each, or one for an input")
        for site, answer in zip(answered, answers, strict=True):
            self._check(answer, site, self.executor.host.widths(self.sites.specs[site])[0])
        found = dict(zip(answered, answers, strict=True))
        return [found.get(site) for site in sites]

    def _answers(self, phase: m.SitePhase, sites: Sequence[int], tensors: Sequence[Tensor], role: Role) -> list[Tensor]:
        codec = codec_by_id(self.message.reply_codec).name
        named = ", ".join(str(self.sites.specs[site]) for site in sites)
        sent = tuple(encode(tensor, codec, role, f"what goes to sites {named}") for tensor in tensors)
        answer = self.ask(m.SiteQuestion(self.message.id, phase, tuple(sites), sent, 0, 0, 0))
        if answer.id != self.message.id:
            raise ValueError(
                f"an answer of attempt {answer.id.attempt} came to a question of {self.message.id.attempt}"
            )
        if any(payload.role != role for payload in answer.tensors):
            raise ValueError(f"an answer to a question of phase {phase.name} carries tensors of another role")
        # Contributions are rounded to the span's dtype when they are added. These are copies, as the message's own
        # bytes are overwritten when its turn is over.
        dtype = torch.float32 if role == Role.ACTIVATION else self.executor.dtype
        what = f"an answer of sites {named}"
        return [
            decode(each, limits=self.limits, what=what, device=self.executor.device).to(dtype, copy=True)
            for each in answer.tensors
        ]

    def _check(self, answer: Tensor, site: int, width: int) -> None:
        """Check an answer's shape, which only the site and the call can tell. Raises ValueError."""
        sent = self.message.hidden if isinstance(self.message, m.Forward) else self.message.gradient
        needed = [*sent.shape[:2], width]
        if list(answer.shape) != needed:
            raise ValueError(
                f"an answer of shape {list(answer.shape)} does not fit site {self.sites.specs[site]}: "
                f"{needed} is needed"
            )
