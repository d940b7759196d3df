"""Models that are kept in memory for answers, each with its adapter.

A model serves one answer at a time, for a split model remembers the call that it is in. Answers at the same time get
copies, which share all tensors. Adapters that PEFT keeps beside the base model's weights share these weights, too.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.backbone.adapters.adapter_files import PEFT_INFO, load_adapter
from isthmus.backbone.checkpoints.tensor_reader import read_json
from isthmus.common.errors import UnknownModelError

_BESIDE = frozenset({"LORA", "IA3", "VERA", "ADALORA", "PROMPT_TUNING"})
"""Methods of PEFT that load nothing into the base model's own weights, unless they tune biases or begin otherwise than
at random."""

Key = tuple[str, str | None, int]
"""The base model's digest and plan, the adapter's folder, and when it was written."""


@dataclass
class _Hot:
    """A model in memory, and copies of it that nobody uses."""

    model: Any
    idle: list[Any] = field(default_factory=list)


class HotModels:
    """The models of a process that generates. Its methods may be called by several threads.

    Args:
        most: Adapters in memory, beside a model without one; the one not used for longest gives way. One that still
            answers goes when it is done.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._models: OrderedDict[Key, _Hot] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # one model at a time; answers over hot ones do not wait for it

    @property
    def adapters(self) -> list[str]:
        """The folders of adapters in memory, the one used last at the end."""
        return [folder for _, folder, _ in list(self._models) if folder is not None]

    @contextmanager
    def lend(self, digest: str, base: Callable[[], Any], adapter: Path | None) -> Iterator[Any]:
        """A model in eval mode that nobody else uses meanwhile.

        Args:
            digest: Tells base models apart.
            base: Returns the base model, which is never used itself.
            adapter: The adapter's folder; None for none.

        Raises:
            UnknownModelError: The folder is gone.
            CheckpointError: It does not fit the model, or is damaged.
        """
        key = (digest, None if adapter is None else str(adapter), _written(adapter))
        hot = self._used(key)
        if hot is None:
            with self._loading:
                hot = self._used(key) or self._keep(key, _Hot(_loaded(base(), adapter)))
        with self._lock:
            model = hot.idle.pop() if hot.idle else sharing_copy(hot.model)
        try:
            yield model
        finally:
            with self._lock:
                if self._models.get(key) is hot:
                    hot.idle.append(model)

    def _used(self, key: Key) -> _Hot | None:
        """A model that is hot, as the one used last."""
        with self._lock:
            if key in self._models:
                self._models.move_to_end(key)
            return self._models.get(key)

    def _keep(self, key: Key, hot: _Hot) -> _Hot:
        with self._lock:
            self._models[key] = hot
            while len(self._models) > self._most + 1:
                self._models.popitem(last=False)
        return hot


def sharing_copy(model: Any) -> Any:
    """A copy that shares all parameters and buffers."""
    return copy.deepcopy(model, {id(each): each for each in itertools.chain(model.parameters(), model.buffers())})


def _written(adapter: Path | None) -> int:
    """When an adapter's folder was written, in nanoseconds."""
    if adapter is None:
        return 0
    try:
        return max(path.stat().st_mtime_ns for path in adapter.iterdir())
    except (OSError, ValueError):
        raise UnknownModelError(
            f"the adapter in {adapter} is not there any more: it was deleted, or pruned to save disk; name another one"
        ) from None


def _loaded(base: Any, adapter: Path | None) -> Any:
    if adapter is None:
        return base
    own = sharing_copy(base) if _is_beside(adapter) else copy.deepcopy(base)
    return load_adapter(own, adapter).eval()


def _is_beside(adapter: Path) -> bool:
    """Whether an adapter leaves the base model's own weights as they are."""
    if not (adapter / PEFT_INFO).is_file():
        return False
    settings = read_json(adapter / PEFT_INFO)
    return (
        settings.get("peft_type") in _BESIDE
        and settings.get("bias", "none") == "none"
        and isinstance(settings.get("init_lora_weights", True), bool)
    )
