"""Distilling a draft while its model is tuned: the draft learns what the tuned model says on the owner's own data.

The teacher is the forward of the training step: its logits at the labels are there already, so nothing more is asked of
the cloud. The student is the same edge model, in eval mode, over the emulator in the cloud's place. It shares the
memory of all weights and trains the emulator's alone, so its forward keeps no graph below the emulator. A step's loss
is the mean KL divergence over the step's labels (`logit_divergence`), and AdamW moves the emulator when the training
step is applied.

The student draws no random numbers and adds to no gradient of the trained parameters, so the adapter has the bits of a
run without a draft. Under dropout the teacher has it too; the mean that the student learns is over its masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.common.errors import ConsentError
from isthmus.edge.config.data_config import Precision
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Batch, label_mask
from isthmus.edge.drafts.emulator_draft import around_emulator, open_package_for
from isthmus.edge.drafts.tuned_draft import load_tuned, save_tuned, tuned_beside
from isthmus.edge.run_files.run_identity import DRAFT_PACKAGE
from isthmus.edge.run_report import linear_parameters
from isthmus.edge.training.evaluation import to_device
from isthmus.edge.training.precision import computing_in
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.protocol.secure.keys import Fingerprint
from isthmus.training.gradient_step import GradientStep, require_finite
from isthmus.training.logit_divergence import agreement, logit_divergence
from isthmus.training.run_checkpoint import RunCheckpoint, restore_parameters

_REMEDY = "lower --draft-learning-rate, or leave --draft out."
_MAX_NORM = 1.0  # that of the distillation
_WEIGHTS, _OPTIMIZER = "draft", "draft_optimizer"  # files of a checkpoint


@dataclass(frozen=True, slots=True)
class DraftFit:
    """How near the draft is to the model, over the labels of one step and before the step moves it.

    Attributes:
        kl: Mean `KL(model || draft)` in nats.
        agreement: Top-1 agreement, the share of the labels' positions where both have the same likeliest token.
    """

    kl: float = 0.0
    agreement: float = 0.0


class DraftTuning:
    """A draft that is distilled beside a training run.

    Args:
        model: The edge's model with its adapters, whose trained parameters are those of the run.
        emulator: In the cloud's place in the draft; it is trained in place.
        package: Id of the package that it is of.
        learning_rate: Of AdamW, at the peak of the run's schedule.

    Attributes:
        fit: Of the newest step.
        settings: What a resumed run must have as well, by its name in messages.
        n_linear: Weights of linear layers that the student computes with, for the FLOPs of the report.
        n_trained: Weights of the emulator.
    """

    def __init__(
        self, model: Any, emulator: Emulator, package: str, *, learning_rate: float, precision: Precision = "fp32"
    ) -> None:
        self.settings: Mapping[str, Any] = {DRAFT_PACKAGE: package, "draft_learning_rate": learning_rate}
        self.fit = DraftFit()
        self._precision: Precision = precision
        self._learning_rate = learning_rate
        self._package = package
        self._emulator = emulator.trainable(True)
        self._student = around_emulator(model, emulator, frozen=True)
        self._weights = emulator.weights()
        self.n_linear = linear_parameters(self._student) + linear_parameters(emulator)
        self.n_trained = emulator.n_params
        self._keeps_columns: bool = self._student._supports_logits_to_keep()
        optimizer = torch.optim.AdamW(self._weights.values(), lr=learning_rate, weight_decay=0.0, foreach=False)
        self._rule = GradientStep(optimizer, self._weights, peak_rate=learning_rate, max_norm=_MAX_NORM, remedy=_REMEDY)

    def begin_step(self) -> None:
        """A step begins, or is made again."""
        self._rule.clear()
        self.fit = DraftFit()

    def learn(self, batch: Batch, logits: Tensor, weight: float) -> None:
        """Add what a micro-batch teaches to the gradients of the step.

        Args:
            logits: The model's at the micro-batch's labels, `[N, V]`, detached.
            weight: The micro-batch's share of the step's labels.
        """
        with torch.enable_grad(), computing_in(self._precision, self._student):
            own = self._logits(batch)
        loss = logit_divergence(own, logits)
        torch.autograd.backward(loss * weight)
        self.fit = DraftFit(self.fit.kl + weight * loss.item(), self.fit.agreement + weight * agreement(own, logits))

    def end_step(self, step: int) -> None:
        """All micro-batches of step number `step` have been learned; the weights are as before.

        Raises:
            NonFiniteError: The KL divergence or a gradient is NaN or infinite.
        """
        require_finite(f"the draft's KL divergence in step {step} is", self.fit.kl, _REMEDY)
        self._rule.clip(step)

    def apply(self, share: float) -> None:
        """Move the emulator, by this share of the peak learning rate."""
        self._rule.apply(self._learning_rate * share)

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What the next step depends on, by file of the checkpoint."""
        return {_WEIGHTS: self._weights, _OPTIMIZER: self._rule.state()}

    def load(self, checkpoint: RunCheckpoint, folder: Path) -> None:
        """The inverse of `tensors`.

        Raises:
            CheckpointError: The weights are not those of this draft.
            KeyError: The checkpoint has none.
        """
        restore_parameters(folder, checkpoint.tensors[_WEIGHTS], self._weights)
        self._rule.load_state(dict(checkpoint.tensors[_OPTIMIZER]))

    def save(self, path: Path) -> None:
        """Write the draft as it is now; see `isthmus.edge.drafts.tuned_draft`."""
        save_tuned(path, self._emulator, self._package)

    def _logits(self, batch: Batch) -> Tensor:
        """The student's logits at the labels, `[N, V]`; the head works at columns that have one and at no others."""
        mask = label_mask(batch)
        columns = mask.any(0).nonzero()[:, 0]
        inputs = to_device({name: batch[name] for name in ("input_ids", "attention_mask")}, self._student)
        if not self._keeps_columns:
            everywhere: Tensor = self._student(**inputs, use_cache=False).logits
            return everywhere[mask]
        kept: Tensor = self._student(**inputs, use_cache=False, logits_to_keep=columns.to(self._student.device)).logits
        return kept[mask[:, columns]]


def draft_tuning(model: Any, config: TrainConfig, signer: Fingerprint | None) -> DraftTuning | None:
    """What `--draft` asks for; None where it asks for nothing that can be tuned.

    A run that goes on from an adapter goes on from the tuned draft beside it, if there is one.

    Args:
        model: The edge's model, already with the run's adapters, and cast as the run has it.
        signer: Fingerprint of the root key that must have certified the package's signer; None for any.

    Raises:
        CheckpointError: A file of the package, or a tuned draft, is damaged.
        ConsentError: The package's owner does not allow it.
        PackageError: It is no package, was changed, or was made of another model or for another plan.
        SignerError: It is not signed, or by somebody else.
    """
    folder = config.draft_package
    if folder is None:
        return None
    package = open_package_for(model, folder, signer=signer)
    if not package.manifest.allow_draft_tuning:
        raise ConsentError(
            f"the owner of the package {str(folder)!r} does not allow its emulator to be tuned as a draft: ask for one "
            "that was built with `isthmus emulator build --allow-draft-tuning`, or give --draft none"
        )
    emulator = package.load_emulator()
    before = tuned_beside(config.start_from)
    if before is not None:
        load_tuned(before, emulator, package.id)
    rate, precision = config.draft_learning_rate, config.precision
    return DraftTuning(model, emulator, package.id, learning_rate=rate, precision=precision)
