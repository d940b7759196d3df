"""Who computes a sampled call again: another cloud, or this process with the model's weights.

Whoever does it sees the activations of the call, and so, in effect, its text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.checkpoints.weight_quantization import quantizer_of
from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.numerics import numerics
from isthmus.backbone.split.span import DTYPES, FrozenSpan, load_span
from isthmus.common.errors import CheckpointError, UnsupportedCallError
from isthmus.edge.client.link import Link
from isthmus.edge.witness.audit_sample import SampledCall
from isthmus.privacy.transcript.chain import Session
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role, codec_by_id, decode, encode


class Replayer(Protocol):
    """Computes sampled calls again."""

    def numerics(self) -> str:
        """What the bits of its newest answer depend on."""

    def answer(self, call: SampledCall) -> m.Message:
        """What it makes of a call.

        Raises:
            UnsupportedCallError: It cannot compute calls of this kind.
        """


def check_same_model(wanted: Session, model: str, plan: str, span_dtype: str, attention: str, who: str) -> None:
    """Refuse to compare answers of different models.

    Raises:
        CheckpointError: What a run was made with is not what `who` has.
    """
    ours = (wanted.model, wanted.plan, wanted.span_dtype, wanted.attention)
    theirs = (model, plan, span_dtype, attention)
    if ours != theirs:
        run, other = (f"{a[0][:16]} split {a[1]} in {a[2]} with {a[3]} attention" for a in (ours, theirs))
        raise CheckpointError(f"the run is of model {run}, and {who} has {other}: replay at one with the former")


class CloudReplayer:
    """Another cloud, or another worker.

    Args:
        link: To it, with a transcript.
        session: What the run was made with.

    Raises:
        CheckpointError: It serves another model, or serves it otherwise.
    """

    def __init__(self, link: Link, session: Session) -> None:
        info = link.info
        what = (info.digest, info.plan, info.span_dtype, info.attn_implementation)
        check_same_model(session, *what, "the other cloud")
        self._link = link

    def numerics(self) -> str:
        """See `Replayer`."""
        return self._link.info.numerics  # another worker may have taken the place of the first

    def answer(self, call: SampledCall) -> m.Message:
        """See `Replayer`."""
        return self._link.ask_again(call.adapters, call.question, call.answer)


class LocalReplayer:
    """This process, with the whole model.

    Args:
        folder: The model's.
        session: What the run was made with.
        threads: torch threads that it computes with, all of them for each call, as a worker does with 1 thread, or
            without batching.

    Raises:
        CheckpointError: It is another model.
    """

    def __init__(self, folder: Path, session: Session, threads: int) -> None:
        checkpoint = Checkpoint(folder, folder.name)
        config = checkpoint.config
        dtype, _, quantize = session.span_dtype.partition("+")
        if dtype not in DTYPES:
            raise CheckpointError(
                f"the run's cloud has computed in {dtype!r}, which this release does not know: replay at another cloud"
            )
        plan = SplitPlan.parse(session.plan, config.num_hidden_layers)
        attention = family_of(config).attention(None)
        check_same_model(session, checkpoint.digest(), str(plan), session.span_dtype, attention, f"{folder}")
        self._dtype = DTYPES[dtype]
        quantizer = quantizer_of(quantize or "none")
        self._span: FrozenSpan = load_span(checkpoint, plan.cloud, dtype=self._dtype, quantizer=quantizer)
        self._numerics = numerics(session.span_dtype, attention, self._span.device, threads)

    def numerics(self) -> str:
        """See `Replayer`."""
        return self._numerics

    def answer(self, call: SampledCall) -> m.Message:
        """See `Replayer`. Calls with sites are for a cloud."""
        question = call.question
        if question.sites:
            raise UnsupportedCallError(
                "calls with adapters inside the cloud's layers are replayed at a cloud: give --cloud"
            )
        codec = codec_by_id(question.reply_codec).name
        if isinstance(question, m.Forward):
            with torch.inference_mode():
                output = self._run(question.inputs, wanted=False)[1]
            return m.ForwardReply(question.id, encode(output, codec, Role.ACTIVATION), 0, 0, 0)
        if question.replay is None:
            raise UnsupportedCallError("a backward call was sampled without its forward's inputs")
        hidden, output = self._run(question.replay, wanted=True)
        upstream = decode(question.gradient).to(output.dtype)
        (gradient,) = torch.autograd.grad(output, hidden, upstream)
        return m.BackwardReply(question.id, encode(gradient, codec, Role.GRADIENT), 0, 0, 0, recomputed=True)

    def _run(self, inputs: m.SpanInputs, *, wanted: bool) -> tuple[Tensor, Tensor]:
        """The span's input and output."""
        mask = None if inputs.attention_mask is None else decode(inputs.attention_mask)
        positions = None if inputs.position_ids is None else decode(inputs.position_ids).long()
        hidden = decode(inputs.hidden).to(self._dtype, copy=True).requires_grad_(wanted)
        return hidden, self._span(hidden, mask, positions)
