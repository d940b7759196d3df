"""An edge that generates over a link with drafts, in a process of its own: it is asked for texts with this draft or
that one, and says what they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from isthmus.common.torch_threads import use_threads
from isthmus.edge.client.adapted_model import load_adapted
from isthmus.edge.client.link import connect
from isthmus.edge.drafts.candidates import Draft, drafting
from isthmus.edge.drafts.emulator_draft import EmulatorDraft
from isthmus.edge.drafts.ngram_draft import NgramDraft
from isthmus.edge.drafts.tuned_draft import tuned_beside
from isthmus.experiments.harness.processes import Parent, serve

MODULE: Final = "isthmus.experiments.generation.links_process"
SEQUENTIAL: Final = "none"
NGRAM: Final = "ngram"
SMALL: Final = "small draft"
TUNED: Final = "tuned draft"


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
            The new `tokens`, the `seconds` that they took, prompt and all, and of the draft `rounds`, and the tokens
            that were `drafted` and `accepted` in these; all 0 without one.
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


def _counts(draft: Draft | None) -> dict[str, int]:
    if draft is None:
        return {"rounds": 0, "drafted": 0, "accepted": 0}
    statistics = draft.statistics
    return {"rounds": statistics.rounds, "drafted": statistics.drafted, "accepted": statistics.accepted}


def _maker(name: str, model: Any, task: Mapping[str, Any]) -> Callable[[], Draft]:
    """What makes the draft of a name; one of a package is loaded once, and learns anew each time."""
    if name == NGRAM:
        return NgramDraft
    tuned = tuned_beside(Path(task["adapter"])) if name == TUNED else None
    found = EmulatorDraft.open(Path(task["draft"]), model, tuned=tuned, dtype=torch.bfloat16)  # as `edge generate`
    return partial(EmulatorDraft, found.model)


def _main(parent: Parent) -> None:
    task = parent.task
    use_threads(task["threads"])
    adapter = None if task["adapter"] is None else Path(task["adapter"])
    with connect(task["connection"], key=task["key"], interactive=True) as link:
        model = load_adapted(link, adapter, plugged=False).eval()
        texts = DraftedTexts(model, {name: _maker(name, model, task) for name in task["drafts"]})
        parent.say("ready")
        for question in parent.questions():
            if question["begin"]:
                texts.begin()
            parent.say(texts.text_of(question["ids"], question["tokens"], question["draft"]))


if __name__ == "__main__":
    serve(_main)
