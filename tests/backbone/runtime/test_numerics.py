"""What the bits of a computation depend on is said in one line, of which the important end is never cut off."""

from __future__ import annotations

import pytest
import torch

from isthmus.backbone.runtime import numerics as numerics_module
from isthmus.backbone.runtime.numerics import VARYING, numerics


def test_a_long_name_of_a_processor_hides_neither_threads_nor_note(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    plain = numerics("fp32", "sdpa", cpu, 2)
    assert plain.startswith(f"fp32, sdpa, torch {torch.__version__}, ")
    assert plain.endswith(", 2 threads")
    assert plain != numerics("fp32", "sdpa", cpu, 1)
    monkeypatch.setattr(numerics_module, "processor_name", lambda: "x" * 1000)
    long = numerics("fp32", "sdpa", cpu, 2, VARYING)
    assert len(long) == 256
    assert long.endswith(f"x, 2 threads{VARYING}")
