"""The products of an output layer with the few rows that verify a draft, in fp32 on a CPU.

torch hands `x Wᵀ` of 2 to 8 rows to a kernel that is made for many: with 49,152 × 576 weights and two threads on an AMD
EPYC, 2 rows took 15 ms and 3 took 22, where one took 7. `(W xᵀ)ᵀ` is the same sum and took 2.4 and 3.1. From 12 rows on
neither is faster, and in bf16 torch's way is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

MOST_ROWS = 8
"""Up to which `(W xᵀ)ᵀ` is faster by half or more on the processor above. Others were not measured; there it may gain
less, and logits differ by rounding all the same."""


@contextmanager
def few_rows_at_the_head(model: Any) -> Iterator[None]:
    """Compute logits of 2 to `MOST_ROWS` rows as `(W xᵀ)ᵀ` inside; all others as before.

    Logits differ by rounding. Output layers that are no plain fp32 linear on a CPU, and exact decoding, stay as they
    are.

    Args:
        model: The split model.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):  # the latter where this is done already
        yield
        return

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        weight, rows = self.weight, x.shape[:-1].numel()
        on_cpu = weight.dtype == torch.float32 and weight.device.type == "cpu"
        if model.isthmus_exact or not on_cpu or not 1 < rows <= MOST_ROWS:
            return nn.Linear.forward(self, x)
        logits = torch.mm(weight, x.reshape(rows, -1).T).T
        return (logits if self.bias is None else logits + self.bias).reshape(*x.shape[:-1], -1)

    patched: Any = head
    patched.forward = MethodType(forward, head)  # a copy of the model has a copy of it, with its own weights
    try:
        yield
    finally:
        del patched.forward
