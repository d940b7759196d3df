"""Stand-ins for a span's linears and layers, in a span of their own that calls with sites go through.

They turn to the pass that the thread is in, forward or backward: the one that `sites_active(…)` names. A call without
sites goes through the plain span, and never comes here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from isthmus.backbone.split.span import LayerStandIn

if TYPE_CHECKING:
    from isthmus.backbone.runtime.sited_pass import SitedPass

_thread = threading.local()


@contextmanager
def sites_active(active: SitedPass | InputRecorder) -> Iterator[None]:
    """Let the stand-ins turn to `active` in what this thread computes inside, forward or backward."""
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
        self.inputs: list[tuple[Tensor, list[nn.Module]]] = []

    def linear(self, linear: nn.Module, x: Tensor) -> Any:
        """The plain output."""
        for known, readers in self.inputs:
            if known is x and linear not in readers:
                readers.append(linear)
                break
        else:
            self.inputs.append((x, [linear]))
        return linear(x)

    def layer(self, _layer: nn.Module, output: Any) -> Any:
        """The plain output."""
        return output


class SitedLinear(nn.Module):
    """Stands for a linear: its output, with what its site adds."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Any:
        """`[..., out]` for `x` `[..., in]`."""
        return current_pass().linear(self.linear, x)


class SitedLayer(LayerStandIn):
    """Stands for a decoder layer: its output, with what the site behind it adds.

    Args:
        layer: The layer.
        inner: A copy of it with stand-ins for its linears.
    """

    def __init__(self, layer: nn.Module, inner: nn.Module) -> None:
        super().__init__(layer)
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer returns."""
        return current_pass().layer(self._stands_for[0], self.inner(*args, **kwargs))
