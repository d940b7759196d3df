"""The edge as a run has left it: the model with its adapter, its defences with what they learned, its task's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import CheckpointError
from isthmus.edge.data.batches import IGNORED, collate
from isthmus.experiments.harness.single_process import whole
from isthmus.experiments.leak.leak_texts import Text
from isthmus.privacy.attacks.attack import KnownDefence
from isthmus.privacy.attacks.known_defences import KnownDefences, defended
from isthmus.privacy.defences.defence_options import DefenceOptions
from isthmus.privacy.defences.defended_span import build_defences
from isthmus.privacy.measures.token_accuracy import Hits
from isthmus.protocol.tensor_codecs import Role, decode, encode
from isthmus.training import run_checkpoint

_BATCH = 8  # texts of a forward


@dataclass(frozen=True, slots=True)
class TaskScore:
    """The loss and the accuracy on held-out texts, by text.

    Attributes:
        losses: Sum of the labels' losses in nats, and labels.
        hits: Labels that the model finds likeliest, and labels.
    """

    losses: Hits
    hits: Hits


def with_adapter(checkpoint: Checkpoint, adapter: Path) -> Any:
    """The whole model with an adapter in its layers, frozen."""
    loaded = load_adapter(whole(checkpoint), adapter, digest=checkpoint.digest())
    base: Any = loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded
    return base.requires_grad_(False).eval()


def trained_defence(
    options: Sequence[DefenceOptions], folder: Path, width: int, others: Callable[[], Sequence[Tensor]]
) -> KnownDefence | None:
    """The defences of a run as they are after it; None where none changes what is sent.

    Args:
        folder: A checkpoint, which has a bottleneck's weights.
        width: Of the hidden states.
        others: Hidden states at the cut of public texts, `[n, h]` each, for mixing.

    Raises:
        CheckpointError: The checkpoint is damaged or of another run.
        ConfigError: A defence cannot be known.
    """
    defences = build_defences(options, width)
    if not defences:
        return None
    modules = [module for module in (each.module() for each in defences) if module is not None]
    if modules:
        parameters = run_checkpoint.load(folder).parameters
        for number, module in enumerate(modules):
            own = f"defence.{number}."
            weights = {name.removeprefix(own): value for name, value in parameters.items() if name.startswith(own)}
            try:
                module.load_state_dict(weights)
            except RuntimeError as error:
                raise CheckpointError(f"{folder} has other weights of a defence than the run's: {error}") from error
            module.requires_grad_(False)
    return KnownDefences(defences, lambda: [states for states in others() if len(states) > 1])


@torch.no_grad()
def score_task(
    model: Any,
    texts: Sequence[Text],
    pad_id: int,
    *,
    plan: SplitPlan | None = None,
    codec: str = "fp32",
    defence: KnownDefence | None = None,
    seed: int = 0,
) -> TaskScore:
    """Score on held-out texts, as an edge would that sends them through the codec and the defence.

    The edge has noise of its own here, drawn by the seed, and its denoiser is told that noise.

    Args:
        model: The whole model, with the adapter.
        plan: Where it is cut; None where nothing is sent.
    """
    sums: list[tuple[float, int, int]] = []

    def through(hidden: Tensor) -> Tensor:
        return decode(encode(hidden, codec, Role.ACTIVATION))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(texts), _BATCH):
            batch = collate([text.encoded for text in texts[start : start + _BATCH]], pad_id)
            labels = batch["labels"][:, 1:]
            ids, mask = batch["input_ids"], batch["attention_mask"]
            with ExitStack() as sent:
                if plan is not None:
                    now = (defence or KnownDefence()).of_pass(ids, mask.bool())
                    sent.enter_context(defended(model, plan, now, through))
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            right = (logits.argmax(-1) == labels).sum(1)
            counts = (labels != IGNORED).sum(1)
            sums += zip(losses.view_as(labels).sum(1).tolist(), right.tolist(), counts.tolist(), strict=True)
    found, right, counts = (torch.tensor(column, dtype=torch.float64) for column in zip(*sums, strict=True))
    return TaskScore(Hits(found, counts), Hits(right, counts))
