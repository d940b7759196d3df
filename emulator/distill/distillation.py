"""Distillation: train the emulator alone, on public text, to do what the whole middle does (Xiao et al. 2023).

The objective of a step is `lm_weight * LM + mse_weight * mean(((T - S) / rms(T))^2) + kl_weight * KL`. T and S are the
outputs of the whole middle and of the emulator for the same hidden states, which the frozen bottom of the model makes
of the text (the rms is explained at `layer_measures.relative_error`); LM is the cross entropy of the frozen top and
head on S; KL is the KL divergence of the next-token distribution that they make of S from that which they make of T
(Hinton et al. 2015), which is what counts for a draft. With a `loss_margin`, the first term is
`lm_weight * (LM - the full model's - loss_margin)^2` instead: the emulator shall be so much worse than it (LLEOT,
Zhong et al. 2026). Everything but the emulator is frozen, nothing drops out, and the order of the blocks follows from
the seed, so a run that was stopped goes on to the same bits.

With KL, a step goes through its blocks in micro-batches of some 512 tokens, because logits take much memory; the rms
and the distance from a margin are then those of each micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import load_span
from isthmus.common.errors import ConfigError, DataError
from isthmus.common.files import claim
from isthmus.common.progress import Progress, StepProgress, bar, watched
from isthmus.common.shutdown import StopRequest
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.compress.layer_measures import relative_error
from isthmus.emulator.compress.outer_layers import OuterLayers
from isthmus.emulator.compress.public_text import fingerprint
from isthmus.training.gradient_step import GradientStep, require_finite
from isthmus.training.logit_divergence import agreement, logit_divergence
from isthmus.training.rate_schedule import scheduled_rate
from isthmus.training.run_checkpoint import RunCheckpoint, damaged_entry
from isthmus.training.training_loop import LoopOptions, Task, TrainingLoop

LOG_FILE = "distill.jsonl"
PRECISIONS = ("fp32", "bf16")

_REMEDY = "lower the learning rate."
_MAX_NORM = 1.0
_LAST_RATE = 0.1  # of the peak
_HELD_OUT = 20  # one block in so many
_HELD_OUT_MOST = 64
_LOGIT_TOKENS = 512  # whose logits are held at a time


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Options of a distillation.

    Attributes:
        learning_rate: Peak of AdamW's learning rate; after the warm-up it falls along a cosine to a tenth.
        mse_weight: Weight of the relative error of the hidden states.
        lm_weight: Weight of the cross entropy; 0, with a `kl_weight` of 0, leaves out the top of the model and is
            much faster.
        kl_weight: Weight of the KL divergence of the emulator's next-token distribution from the full model's.
        loss_margin: By how many nats a token the emulator's cross entropy shall lie above the full model's; None for as
            low as it can.
        seed: Seed of the order of the blocks and of those held out.
        precision: `fp32`, or `bf16` for autocast; the weights stay as they are.

    Raises:
        ConfigError: A value is out of its range.
    """

    steps: int
    batch: int = 8
    learning_rate: float = 3e-4
    warmup_steps: int = 20
    mse_weight: float = 30.0
    lm_weight: float = 1.0
    seed: int = 0
    save_every: int = 100
    precision: str = "fp32"
    kl_weight: float = 0.0
    loss_margin: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("warmup_steps", 0), ("seed", 0), ("save_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)} makes no sense; use {least} or more")
        for name in ("learning_rate", "mse_weight", "lm_weight", "kl_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} = {getattr(self, name)} makes no sense; use a finite number of 0 or more")
        if self.mse_weight == self.lm_weight == self.kl_weight == 0:
            raise ConfigError("mse_weight, lm_weight and kl_weight are all 0, so there is nothing to learn; raise one")
        if self.loss_margin is not None and not (math.isfinite(self.loss_margin) and self.lm_weight > 0):
            raise ConfigError(
                f"loss_margin = {self.loss_margin} with lm_weight = {self.lm_weight} makes no sense; use a finite "
                "number and an lm_weight above 0"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is not known; use {' or '.join(PRECISIONS)}")

    def rate(self, step: int) -> float:
        """Learning rate of the step after `step` applied ones."""
        return scheduled_rate(self.learning_rate, "cosine", step, self.steps, self.warmup_steps, last=_LAST_RATE)

    def stated(self) -> dict[str, Any]:
        """All options by name. What was added later is stated where it is used, so that older runs go on."""
        later: dict[str, Any] = {"kl_weight": 0.0, "loss_margin": None}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What a distillation did.

    Attributes:
        error_before: Relative error of the emulator's output on held-out blocks before the first step. Bridges may
            have been fitted to some of these blocks, if they were fitted to the same text.
        error_after: The same after the last one, before any quantization.
        kl_before: KL divergence of the emulator's next-token distribution from the full model's, in nats, on the same
            blocks and at the same time; None where the distillation did not use it, as in the other three.
        agreement_before: Top-1 agreement, the share of the positions where both have the same likeliest token.
    """

    steps: int
    tokens: int
    text: str
    error_before: float
    error_after: float
    kl_before: float | None = None
    kl_after: float | None = None
    agreement_before: float | None = None
    agreement_after: float | None = None


@dataclass(frozen=True, slots=True)
class _Compared:
    """How an emulator compares with the whole middle on some tokens; what was not asked for is None.

    Attributes:
        error: Relative error of its output. This and the other tensors are scalars with a graph.
        lm: Cross entropy above the emulator.
        raised: The squared distance of that cross entropy from where a `loss_margin` wants it.
        kl: KL divergence of the next-token distribution above the emulator from that above the whole middle, in nats.
        agreement: Top-1 agreement of the two.
    """

    error: Tensor
    lm: Tensor | None = None
    raised: Tensor | None = None
    kl: Tensor | None = None
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """Means over all held-out blocks: relative error, and with KL its divergence and the top-1 agreement."""

    error: float
    kl: float | None = None
    agreement: float | None = None


def distill(
    checkpoint: Checkpoint,
    plan: SplitPlan,
    emulator: Emulator,
    blocks: Tensor,
    config: DistillConfig,
    folder: Path,
    *,
    progress: Console | None = None,
) -> DistillReport:
    """Train an emulator in place, where it lies; it is frozen again afterwards.

    `folder` gets the log `distill.jsonl` and checkpoints. With the same arguments and a folder that has a checkpoint,
    the run goes on where that was taken; one that was finished is only loaded.

    Args:
        blocks: Public text, `[n, length]` tokens; one block in twenty is held out, 64 at most.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the last applied step is saved, and the message says how to go on.
        CheckpointError: The checkpoint in `folder` is damaged, or belongs to another run.
        ConfigError: Another process works in `folder`.
        DataError: There are not two blocks.
        DiskError: The disk is full or cannot be written.
        NonFiniteError: A loss or a gradient is NaN or infinite; the last applied step is saved.
    """
    if len(blocks) < 2:
        raise DataError(
            f"the public text has {len(blocks)} block of {blocks.shape[-1]} tokens; give more text, or shorter blocks."
        )
    stop = StopRequest()
    console = progress or Console(stderr=True, highlight=False)
    shown = StepProgress("distilling: step", config.steps, console)
    with claim(folder):
        task = _Distillation(checkpoint, plan, emulator, blocks, config, stop, partial(bar, console))
        options = LoopOptions(
            folder,
            LOG_FILE,
            config.steps,
            config.save_every,
            go_on="repeat the command to go on",
            start_anew="remove its folder to start anew",
        )
        loop = TrainingLoop(task, options, shown, stop)
        emulator.trainable(True)
        try:
            with loop.listening():
                loop.resume()
                loop.run()
        finally:
            emulator.trainable(False)
    before, after = task.before, task.after
    assert before is not None and after is not None  # noqa: S101, PT018  # the loop has begun and ended
    return DistillReport(
        loop.step,
        loop.step * task.tokens_per_step,
        task.text,
        before.error,
        after.error,
        before.kl,
        after.kl,
        before.agreement,
        after.agreement,
    )


class _Distillation(Task):
    """See `distill`."""

    rule: GradientStep

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: SplitPlan,
        emulator: Emulator,
        blocks: Tensor,
        config: DistillConfig,
        stop: StopRequest,
        progress: Progress,
    ) -> None:
        self._emulator, self._config, self._stop, self._progress = emulator, config, stop, progress
        self.device = emulator.device
        self._teacher = load_span(checkpoint, plan).to(self.device)
        self._with_kl = config.kl_weight > 0
        with_top = self._with_kl or config.lm_weight > 0
        self._ends = OuterLayers(checkpoint, plan, with_top=with_top, device=self.device)
        self._micro_batch = (
            min(config.batch, max(1, _LOGIT_TOKENS // blocks.shape[1])) if self._with_kl else config.batch
        )
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(config.seed))
        n_held_out = min(_HELD_OUT_MOST, max(1, len(blocks) // _HELD_OUT))
        self._held_out, self._train = blocks[order[:n_held_out]], blocks[order[n_held_out:]]
        self.text = fingerprint(blocks)
        self.settings = {
            "the model (digest)": checkpoint.digest(),
            "the split plan": str(plan),
            "the recipe": str(emulator.recipe),
            "the choice of layers": list(emulator.layers),
            "the emulator's dtype": str(emulator.dtype),
            "the text (fingerprint)": self.text,
            **({"the text of the bridges (fingerprint)": emulator.fitted_to} if emulator.bridges else {}),
            **{name: value for name, value in config.stated().items() if name != "save_every"},
        }
        self.parameters: Mapping[str, nn.Parameter] = emulator.weights()
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=0.0, foreach=False
        )
        self.rule = GradientStep(
            optimizer, self.parameters, peak_rate=config.learning_rate, max_norm=_MAX_NORM, remedy=_REMEDY
        )
        self.before: _HeldOut | None = None  # until it is measured
        self.after: _HeldOut | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        return self._config.batch * self._train.shape[1]

    def begin(self) -> None:
        """See `Task`."""
        if self.before is None:
            self.before = self._measure_held_out()

    def rate(self, step: int) -> float:
        """See `Task`."""
        return self._config.rate(step)

    def measure(self, step: int) -> tuple[dict[str, Any], float]:
        """See `Task`."""
        config = self._config
        ids = self._batch(step - 1).to(self.device)
        line: dict[str, Any] = {"loss": 0.0, "error": 0.0, "lm": None, "kl": None}

        def backward() -> float:
            for part in torch.split(ids, self._micro_batch):
                share = len(part) / len(ids)
                found = self._compare(part, with_lm=config.lm_weight > 0)
                loss = config.mse_weight * found.error
                if found.lm is not None:
                    loss = loss + config.lm_weight * (found.lm if found.raised is None else found.raised)
                if found.kl is not None:
                    loss = loss + config.kl_weight * found.kl
                require_finite(f"the loss of step {step} is", loss.item(), _REMEDY)
                torch.autograd.backward(loss * share)
                for name, value in (("loss", loss), ("error", found.error), ("lm", found.lm), ("kl", found.kl)):
                    if value is not None:
                        line[name] = (line[name] or 0.0) + share * value.item()
            return float(line["loss"])

        _, norm = self.rule.gradients(step, backward)
        return line, norm

    def logged(self, line: Mapping[str, Any], seconds: float) -> str:
        """See `Task`."""
        lm = "" if line["lm"] is None else f"  lm {line['lm']:.4f}"
        kl = "" if line["kl"] is None else f"  kl {line['kl']:.4f}"
        speed = self.tokens_per_step / seconds
        return f"loss {line['loss']:.4f}  error {line['error']:.5f}{lm}{kl}  {speed:,.0f} tokens/s"

    def end(self) -> None:
        """See `Task`."""
        self.after = self._measure_held_out()

    def entries(self) -> Mapping[str, Any]:
        """See `Task`."""
        before = self.before
        entries = {"error_before": None if before is None else before.error}
        if before is not None and self._with_kl:
            entries |= {"kl_before": before.kl, "agreement_before": before.agreement}
        return entries

    def load(self, checkpoint: RunCheckpoint, folder: Path) -> None:
        """See `Task`."""
        try:
            entries = checkpoint.entries
            if entries["error_before"] is not None:
                figures = (float(entries[name]) for name in ("kl_before", "agreement_before") if self._with_kl)
                self.before = _HeldOut(float(entries["error_before"]), *figures)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged_entry(folder, error) from error

    def _compare(self, ids: Tensor, *, with_lm: bool = False, with_agreement: bool = False) -> _Compared:
        """What the emulator does in the middle's place with tokens `[B, S]`."""
        with self._autocast():
            hidden = self._ends.entry(ids)
            with torch.no_grad():
                target = self._teacher(hidden)
            output = self._emulator(hidden.float())  # autocast may have made it bf16
            error = relative_error(output, target)
            if not (with_lm or self._with_kl):
                return _Compared(error)
            logits, lm = self._ends.predict(ids, output, with_loss=with_lm)
            margin, raised = self._config.loss_margin, None
            if not self._with_kl and margin is None:
                return _Compared(error, lm)
            with torch.no_grad():
                wanted, best = self._ends.predict(ids, target, with_loss=with_lm)
            if lm is not None and best is not None and margin is not None:
                raised = (lm - best - margin) ** 2
            if not self._with_kl:
                return _Compared(error, lm, raised)
            ours, theirs = logits.flatten(0, 1), wanted.flatten(0, 1)
            same = agreement(ours, theirs) if with_agreement else None
            return _Compared(error, lm, raised, logit_divergence(ours, theirs), same)

    @torch.no_grad()
    def _measure_held_out(self) -> _HeldOut:
        totals = torch.zeros(3, dtype=torch.float64)
        parts = torch.split(self._held_out.to(self.device), self._micro_batch)
        for ids in watched(self._progress, "measuring held-out blocks", parts):
            found = self._compare(ids, with_agreement=True)
            figures = [found.error.item()]
            if found.kl is not None and found.agreement is not None:
                figures += [found.kl.item(), found.agreement]
            totals[: len(figures)] += torch.tensor(figures, dtype=torch.float64) * len(ids)
            self._stop.check()
        means = (totals / len(self._held_out)).tolist()
        for name, value in zip(("error", "KL divergence"), means, strict=False):
            require_finite(f"the emulator's {name} on held-out text is", value, "look at the model and the recipe.")
        return _HeldOut(*means) if self._with_kl else _HeldOut(means[0])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._config.precision == "bf16")

    def _batch(self, step: int) -> Tensor:
        """Blocks `[batch, length]` of the step after `step` applied ones; each epoch has an order of its own."""
        first = step * self._config.batch
        places = [divmod(number, len(self._train)) for number in range(first, first + self._config.batch)]
        orders = {epoch: self._order(epoch) for epoch, _ in places}
        return self._train[[int(orders[epoch][place]) for epoch, place in places]]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * (self._config.seed + 1) + epoch)
        return torch.randperm(len(self._train), generator=generator)
