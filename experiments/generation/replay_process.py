"""An edge of the replay, in a process of its own: it answers requests when they come, or trains all the while.

A request's prompt is so many random tokens.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final

import torch

from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.client.link import connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft
from isthmus.experiments.harness.processes import Parent, serve
from isthmus.experiments.harness.single_process import random_batch, stepper

MODULE: Final = "isthmus.experiments.generation.replay_process"
BATCH, SEQUENCE = 2, 32
"""Of those that train."""


class _Moments:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self._prompt = True

    def put(self, _tokens: Any) -> None:
        """The prompt, and then each token."""
        if not self._prompt:
            self.at.append(time.monotonic())
        self._prompt = False

    def end(self) -> None:
        """The text is over."""


def _answered(model: Any, request: dict[str, Any], start: float, vocabulary: int) -> dict[str, Any]:
    """Answer a request that came so many seconds after the start: seconds to its first token, and between tokens."""
    ids = torch.randint(3, vocabulary, (1, request["context"]))
    moments = _Moments()
    model.generate(
        ids,
        max_new_tokens=request["tokens"],
        min_new_tokens=request["tokens"],
        do_sample=False,
        pad_token_id=0,
        streamer=moments,
    )
    came = start + request["at"]
    return {
        "first_s": moments.at[0] - came,
        "between_s": [later - earlier for earlier, later in zip(moments.at, moments.at[1:], strict=False)],
        "ended_s": moments.at[-1] - start,
    }


def _answer_all(parent: Parent, models: list[Any], question: dict[str, Any]) -> None:
    """Answer requests as they come, each session one at a time.

    Raises IsthmusError where a session failed: whatever kind fits.
    """
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for model in models:
        free.put(model)
    start = question["start"]

    def work(request: dict[str, Any]) -> dict[str, Any]:
        model = free.get()
        try:
            return _answered(model, request, start, model.config.vocab_size)
        finally:
            free.put(model)

    with ThreadPoolExecutor(len(models), initializer=set_torch_threads, initargs=(1,)) as pool:
        answers = []
        for request in question["requests"]:
            time.sleep(max(0.0, start + request["at"] - time.monotonic()))
            answers.append(pool.submit(work, request))
    parent.say([answer.result() for answer in answers])


def _train(parent: Parent, model: Any) -> None:
    """Train until the next question comes; the steps that were done."""
    config = TrainConfig(cloud="-", data="-", method="lora")
    step = stepper(build_peft(model, config), random_batch(model.config.vocab_size, BATCH, SEQUENCE))
    step()
    parent.say("ready")
    parent.question()
    over = threading.Event()

    def wait() -> None:
        parent.question()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    steps, begun = 0, time.monotonic()
    while not over.is_set():
        step()
        steps += 1
    parent.say({"positions": steps * BATCH * SEQUENCE, "seconds": time.monotonic() - begun})


def _main(parent: Parent) -> None:
    task = parent.task
    set_torch_threads(1)
    with ExitStack() as stack:
        links = [
            stack.enter_context(connect(task["connection"], key=task["key"], interactive=not task["trains"]))
            for _ in range(task["sessions"])
        ]
        models = [link.load_model() for link in links]
        if task["trains"]:
            _train(parent, models[0])
            return
        parent.say("ready")
        for question in parent.questions():
            _answer_all(parent, models, question)


if __name__ == "__main__":
    serve(_main)
