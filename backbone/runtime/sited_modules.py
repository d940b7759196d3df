"""A span's linears and layers, made able to take part in a pass with sites.

Which pass goes on is a matter of the thread: within `sites_active(…)` the modules that the thread runs, forward or
backward, turn to that pass. Outside of it they compute what they would without this module.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from isthmus.backbone.runtime.sited_pass import SitedPass

_thread = threading.local()


@contextmanager
def sites_active(active: SitedPass | InputRecorder) -> Iterator[None]:
    """Let the span's modules turn to `active` in what this thread computes inside, forward or backward."""
    before = getattr(_thread, "active", None)
    _thread.active = active
    try:
        yield
    finally:
        _thread.active = before


def current_pass() -> SitedPass:
    """The pass of the call that this thread computes. In a backward it may be another than the forward's."""
    return cast("SitedPass", _thread.active)


class InputRecorder:
    """Records which linears read which input, in the place of a pass.

    Attributes:
        inputs: Each input with its readers. The tensors stay alive, so that no two have the same identity.
    """

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, list[SitedLinear]]] = []

    def linear(self, module: SitedLinear, x: Tensor) -> Tensor:
        """The plain output."""
        for known, readers in self.inputs:
            if known is x and module not in readers:
                readers.append(module)
                break
        else:
            self.inputs.append((x, [module]))
        return module.plain(x)

    def layer(self, _module: nn.Module, output: Any) -> Any:
        """The plain output."""
        return output


class SitedLinear(nn.Module):
    """Mixed into the class of a linear by `mix_in`."""

    def forward(self, x: Tensor) -> Tensor:
        """The linear's output, with what its site adds in a pass with sites."""
        active: SitedPass | InputRecorder | None = getattr(_thread, "active", None)
        return self.plain(x) if active is None else active.linear(self, x)

    def plain(self, x: Tensor) -> Tensor:
        """The output of the linear itself."""
        return cast(Tensor, super().forward(x))  # that of the class behind this one


class SitedLayer(nn.Module):
    """Mixed into the class of a decoder layer by `mix_in`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, with what the site behind it adds in a pass with sites."""
        output = super().forward(*args, **kwargs)  # that of the class behind this one
        active: SitedPass | InputRecorder | None = getattr(_thread, "active", None)
        return output if active is None else active.layer(self, output)


_classes: dict[tuple[type, type], type] = {}


def mix_in(module: nn.Module, mixin: type) -> None:
    """Put `SitedLinear` or `SitedLayer` in front of a module's class."""
    real = type(module)
    if issubclass(real, mixin):
        return
    if (real, mixin) not in _classes:
        _classes[real, mixin] = type(real.__name__, (mixin, real), {"__module__": real.__module__})
    module.__class__ = _classes[real, mixin]
