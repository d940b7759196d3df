"""An edge that generates over a link with drafts, in a process of its own: it is asked for texts with this draft or
that one, and says what they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import torch

from isthmus.common.torch_threads import use_threads
from isthmus.edge.client.adapted_model import load_adapted
from isthmus.edge.client.link import connect
from isthmus.edge.config.client_config import GenerationConfig
from isthmus.edge.drafts import Draft, DraftStatistics, FixedLength, ModelDraft, NgramDraft, drafting
from isthmus.edge.generation.text_generator import draft_of
from isthmus.experiments.harness.processes import Parent, serve

MODULE: Final = "isthmus.experiments.generation.links_process"
SEQUENTIAL: Final = "none"
NGRAM: Final = "ngram"
SMALL: Final = "small draft"
TUNED: Final = "tuned draft"
FIXED: Final = {f"fixed {length}": length for length in (2, 4)}
"""What a package drafts, always so many tokens, tuned where the text is: the adaptive length is compared with it."""
COUNTS: Final = ("rounds", "drafted", "judged", "accepted", "draft_seconds")
"""Of `DraftStatistics`, what is said of each text."""


class DraftedTexts:
    """Generates greedily, with one of several drafts or without.

    Args:
        model: The split model, or a PEFT model around it.
        makers: What makes each draft, by name.
    """

    def __init__(self, model: Any, makers: Mapping[str, Callable[[], Draft]]) -> None:
        self._model, self._makers = model, makers
        self.begin()

    def begin(self) -> None:
        """Forget what the drafts have learned: there is another link."""
        self._drafts = {name: make() for name, make in self._makers.items()}

    def text_of(self, ids: Sequence[int], tokens: int, name: str) -> dict[str, Any]:
        """Generate so many tokens at most.

        Returns:
            The new `tokens`, the `seconds` that they took, prompt and all, and `COUNTS` of the draft; all 0 without
            one.
        """
        draft = None if name == SEQUENTIAL else self._drafts[name]
        before = _counts(draft)
        given = torch.tensor([ids])
        with nullcontext() if draft is None else drafting(self._model, draft):
            begun = time.perf_counter()
            found = self._model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
            seconds = time.perf_counter() - begun
        counts = {count: value - before[count] for count, value in _counts(draft).items()}
        return {"tokens": found[0, len(ids) :].tolist(), "seconds": seconds, **counts}


def _counts(draft: Draft | None) -> dict[str, Any]:
    statistics = DraftStatistics() if draft is None else draft.statistics
    return {name: getattr(statistics, name) for name in COUNTS}


def _makers(names: Sequence[str], package: str, adapter: Path | None, model: Any) -> dict[str, Callable[[], Draft]]:
    """What makes each draft. Those of a package share its weights, and each one that is made learns anew."""

    @cache
    def opened(own: Path | None) -> Any:
        settings = GenerationConfig(draft=package)  # so in the dtype of `edge generate`
        draft: Any = draft_of(settings, model, own, signer=None)
        return draft.model

    makers: dict[str, Callable[[], Draft]] = {}
    for name in names:
        if name == NGRAM:
            makers[name] = NgramDraft
        else:
            rule = FixedLength(FIXED[name]) if name in FIXED else None
            makers[name] = partial(ModelDraft, opened(None if name == SMALL else adapter), rule)
    return makers


def _main(parent: Parent) -> None:
    task = parent.task
    use_threads(task["threads"])
    adapter = None if task["adapter"] is None else Path(task["adapter"])
    with connect(task["connection"], key=task["key"], interactive=True) as link:
        model = load_adapted(link, adapter, plugged=False).eval()
        texts = DraftedTexts(model, _makers(task["drafts"], task["draft"], adapter, model))
        parent.say("ready")
        for question in parent.questions():
            if question["begin"]:
                texts.begin()
            parent.say(texts.text_of(question["ids"], question["tokens"], question["draft"]))


if __name__ == "__main__":
    serve(_main)
