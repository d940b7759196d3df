"""The loss on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from isthmus.common.errors import NonFiniteError
from isthmus.edge.config.data_config import Precision
from isthmus.edge.data.batches import Batch, Batches, label_count
from isthmus.edge.training import methods
from isthmus.edge.training.precision import computing_in


def evaluate(
    model: Any, batches: Batches, between: Callable[[], None] = lambda: None, *, precision: Precision = "fp32"
) -> float:
    """Mean loss per label over all of `batches`: every token counts the same, whichever batch it is in.

    Args:
        model: A causal LM, plain or PEFT. It is in eval mode meanwhile.
        between: Called after every batch; what it raises ends the evaluation.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
    """
    training = model.training
    scored = methods.scoring_model(model)
    total, labels = 0.0, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches.epoch():
                n = label_count(batch)
                with computing_in(precision, model):
                    loss = scored(**to_device(batch, model), use_cache=False).loss
                total += float(loss) * n
                labels += n
                between()
    finally:
        model.train(training)
    mean = total / labels
    if not math.isfinite(mean):
        raise NonFiniteError(
            f"the validation loss is {mean}: check the model, or use a wider codec or dtype (bf16 or fp32)."
        )
    return mean


def to_device(batch: Batch, model: Any) -> Batch:
    """The batch where the model's first layers are."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
