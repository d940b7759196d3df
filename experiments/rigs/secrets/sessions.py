"""Sessions of this process with a cloud, one for each codec, in which everything is sent that a cloud gets to hold."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch

from isthmus.common.errors import UnreachableError
from isthmus.edge.client.link import Link, connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft
from isthmus.experiments.harness.single_process import random_batch, stepper
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

SMALL: Final = 8
"""Tokens of the calls that are answered before the cloud is looked at."""
PATIENCE: Final = 120.0
_LEASED = {"method": "lora", "rank": 2, "sites": "all", "leased": "all"}


class Sessions:
    """The links; a context manager, which ends them with a goodbye.

    Args:
        address: The cloud's connection string.
        key: Of an edge that may have a session for each codec.
        tokens: Of the calls that are under way while the cloud is looked at.
    """

    def __init__(self, address: str, key: Path, tokens: int) -> None:
        self._address, self._key, self._tokens = address, key, tokens
        self._stack = contextlib.ExitStack()
        self._links: list[Link] = []

    def __enter__(self) -> Sessions:
        try:
            for codec in ACTIVATION_CODECS:
                link = self._stack.enter_context(connect(self._address, key=self._key, codec=codec))
                self._links.append(link)
            self._lease(self._links[0])
            for link in self._links:
                hidden, gradient = (torch.randn(1, SMALL, link.info.hidden_size) for _ in range(2))
                link.forward_span(hidden, None, None, keep=True)  # its state stays, as its backward never comes
                _, kept = link.forward_span(hidden, None, None, keep=True)
                link.backward_span(kept, gradient, hidden, None, None)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """With a call of each session sent, and as a rule not answered yet. Raises UnreachableError."""
        sent = threading.Semaphore(0)

        def observe(question: str, phase: str) -> None:
            if (question, phase) == ("forward", "waiting"):
                sent.release()

        def call(link: Link) -> None:
            link.observer = observe
            link.forward_span(torch.randn(1, self._tokens, link.info.hidden_size), None, None, keep=True)

        with ThreadPoolExecutor(len(self._links)) as pool:
            calls = [pool.submit(call, link) for link in self._links]
            deadline = time.monotonic() + PATIENCE
            for _ in self._links:
                if not sent.acquire(timeout=max(0.0, deadline - time.monotonic())):
                    raise UnreachableError("the cloud does not take a call: see its log")
            yield
            for each in calls:
                each.result()

    @staticmethod
    def _lease(link: Link) -> None:
        """A step of a training whose adapters in the cloud's layers are leased."""
        model = link.load_model(leased=lambda name: True)
        config = TrainConfig.model_validate({"cloud": "-", "data": "-", **_LEASED})
        adapted = build_peft(model, config, layers=tuple(link.plan.cloud))
        stepper(adapted, random_batch(model.config.vocab_size, 1, SMALL))()
