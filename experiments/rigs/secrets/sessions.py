"""Sessions of this process with a cloud, two for each codec, in which everything is sent that a cloud gets to hold."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from isthmus.common.errors import UnreachableError
from isthmus.edge.client.link import Link, connect
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.training.methods import build_peft
from isthmus.experiments.harness.single_process import random_batch, stepper
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

SMALL: Final = 8
"""Tokens of the calls whose states the cloud keeps."""
PATIENCE: Final = 120.0
_LEASED = {"method": "lora", "rank": 2, "sites": "all", "leased": "all"}


class Sessions:
    """The links; a context manager, which ends them with a goodbye.

    Args:
        address: The cloud's connection string.
        key: Of an edge that may have two sessions for each codec.
        tokens: Of the calls that are under way while the cloud is looked at.
    """

    def __init__(self, address: str, key: Path, tokens: int) -> None:
        self._address, self._key, self._tokens = address, key, tokens
        self._stack = contextlib.ExitStack()
        self._links: list[Link] = []

    def __enter__(self) -> Sessions:
        try:
            for codec in (*ACTIVATION_CODECS, *ACTIVATION_CODECS):
                link = self._stack.enter_context(connect(self._address, key=self._key, codec=codec))
                self._links.append(link)
            self._lease(self._links[0])
            for link in self._links:  # the states stay, as their backwards never come
                link.forward_span(self._hidden(link, SMALL), None, None, keep=True)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """With a forward and a backward in each codec sent, and as a rule not answered yet. Raises UnreachableError."""
        sent = threading.Semaphore(0)

        def observe(question: str, phase: str) -> None:
            if question in ("forward", "backward") and phase == "waiting":
                sent.release()

        half = len(self._links) // 2
        asked = [*map(self._forward, self._links[:half]), *map(self._backward, self._links[half:])]
        with ThreadPoolExecutor(len(self._links)) as pool:
            for link in self._links:
                link.observer = observe
            calls = [pool.submit(ask) for ask in asked]
            deadline = time.monotonic() + PATIENCE
            for _ in self._links:
                if not sent.acquire(timeout=max(0.0, deadline - time.monotonic())):
                    raise UnreachableError("the cloud does not take a call: see its log")
            yield
            for each in calls:
                each.result()

    def _forward(self, link: Link) -> Callable[[], object]:
        return partial(link.forward_span, self._hidden(link, self._tokens), None, None, keep=False)

    def _backward(self, link: Link) -> Callable[[], object]:
        """A backward, whose forward has been answered."""
        hidden = self._hidden(link, self._tokens)
        _, kept = link.forward_span(hidden, None, None, keep=True)
        return partial(link.backward_span, kept, self._hidden(link, self._tokens), hidden, None, None)

    @staticmethod
    def _hidden(link: Link, tokens: int) -> Tensor:
        return torch.randn(1, tokens, link.info.hidden_size)

    @staticmethod
    def _lease(link: Link) -> None:
        """A step of a training whose adapters in the cloud's layers are leased."""
        model = link.load_model(leased=lambda name: True)
        config = TrainConfig.model_validate({"cloud": "-", "data": "-", **_LEASED})
        adapted = build_peft(model, config, layers=tuple(link.plan.cloud))
        stepper(adapted, random_batch(model.config.vocab_size, 1, SMALL))()
