"""Drafts of the next tokens on the edge, so that one round trip to the cloud verifies several.

from isthmus.edge.drafts import NgramDraft, drafting

with drafting(model, NgramDraft()):
    model.generate(**inputs)

- `length_rule` decides how many tokens a draft has, by the acceptance rates of `calibration` and the durations of
  `round_seconds`. These three are pure.
- `ngram_draft`, `model_draft` and `emulator_draft` draft the tokens.
- `tuned_draft` reads and writes an emulator draft's weights after a training run has tuned them.
- `candidates` hands drafted tokens to transformers' assisted generation, which verifies them.

The cloud sees hidden states of drafted tokens, and no tokens.

It imports nothing else of `isthmus.edge`; it may import `isthmus.emulator`, `isthmus.protocol` and `isthmus.backbone`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.edge.drafts.candidates import Draft, DraftStatistics, drafting
    from isthmus.edge.drafts.emulator_draft import EmulatorDraft
    from isthmus.edge.drafts.length_rule import AdaptiveLength, FixedLength
    from isthmus.edge.drafts.model_draft import ModelDraft
    from isthmus.edge.drafts.ngram_draft import NgramDraft

__all__ = [
    "AdaptiveLength",
    "Draft",
    "DraftStatistics",
    "EmulatorDraft",
    "FixedLength",
    "ModelDraft",
    "NgramDraft",
    "drafting",
]

_MODULES = {
    "AdaptiveLength": "length_rule",
    "Draft": "candidates",
    "DraftStatistics": "candidates",
    "EmulatorDraft": "emulator_draft",
    "FixedLength": "length_rule",
    "ModelDraft": "model_draft",
    "NgramDraft": "ngram_draft",
    "drafting": "candidates",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when they are asked for."""
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"isthmus.edge.drafts.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
