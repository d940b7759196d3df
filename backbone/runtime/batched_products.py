"""Products of frozen linears for several calls at once.

Each call with sites has a thread and a graph of its own; calls share only the reading of the weights. A call that runs
beside others does not compute the products of a group of linears itself: it hands over a `ProductRequest` with its rows
and waits. Whoever drives the calls collects the requests with the same key and computes them as one batch: one product
for each linear, and one grouped product for all LoRAs that are leased there. Each row of a product depends on nothing
but itself, so a call gets the bits that it would get alone, under the condition that
`isthmus.backbone.runtime.sequence_packing` states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.backbone.checkpoints.weight_quantization import weight_of
from isthmus.backbone.runtime.leased_lora import LoraGradients, contributions, lora_gradients
from isthmus.backbone.sites.leasing import LeasedLora


@dataclass(frozen=True, slots=True, eq=False)
class ProductRequest:
    """Rows of one call that wait for the products of a group's linears.

    Attributes:
        group: The group's number, in the span's running order.
        linears: The group's linears, which read one input.
        leased: The LoRA that is leased at each of them; None where there is none.
        x: Their input `[N, in]`; None in a backward pass where nothing is leased.
        gradients: In a backward pass the gradient of each linear's output `[N, out]`; empty in a forward pass.
    """

    group: int
    linears: tuple[nn.Module, ...]
    leased: tuple[LeasedLora | None, ...]
    x: Tensor | None
    gradients: tuple[Tensor, ...] = ()

    @property
    def n_rows(self) -> int:
        """The number of rows `N`."""
        rows = self.gradients[0] if self.x is None else self.x
        return len(rows)

    @property
    def is_backward(self) -> bool:
        """Whether it is of a backward pass."""
        return bool(self.gradients)

    @property
    def key(self) -> tuple[bool, int, tuple[nn.Module, ...]]:
        """Requests with the same key can be computed as one batch."""
        return self.is_backward, self.group, self.linears

    @property
    def order(self) -> tuple[bool, int]:
        """Grows along a pass; a forward that is repeated comes before the backward that needs it."""
        return self.is_backward, -self.group if self.is_backward else self.group


@dataclass(frozen=True, slots=True)
class Product:
    """What one linear gives one request.

    Attributes:
        plain: Its own output `[N, out]`; in a backward pass its input's gradient `[N, in]`.
        leased: What the LoRA leased there adds, `[N, out]`; in a backward pass its gradients. None without a LoRA.
    """

    plain: Tensor
    leased: Tensor | LoraGradients | None = None


Products = Sequence[Product]
"""One for each linear of a group."""


class BatchingPartners:
    """A call's way to products that are computed together with those of its batching partners.

    Args:
        submit: Hands a request to whoever drives the call, waits, and returns the products, or why there are none.

    Attributes:
        present: Whether other calls run beside this one. The driver sets it whenever it resumes the call.
    """

    def __init__(self, submit: Callable[[ProductRequest], Products | RuntimeError]) -> None:
        self.present = False
        self._submit = submit

    def forward(
        self, group: int, linears: tuple[nn.Module, ...], leased: tuple[LeasedLora | None, ...], x: Tensor
    ) -> Products:
        """The outputs of linears, and of the LoRAs leased at them, for `x` `[..., in]`, without a graph.

        Raises:
            RuntimeError: The batch's product failed.
        """
        return self._products(ProductRequest(group, linears, leased, rows_of(x)))

    def backward(
        self,
        group: int,
        linears: tuple[nn.Module, ...],
        leased: tuple[LeasedLora | None, ...],
        x: Tensor | None,
        gradients: Sequence[Tensor],
    ) -> Products:
        """The gradients of linears' input `x`, and of the LoRAs leased at them, for those of the outputs `[..., out]`.

        Raises:
            RuntimeError: As for `forward`.
        """
        rows = None if x is None else rows_of(x)
        return self._products(ProductRequest(group, linears, leased, rows, tuple(map(rows_of, gradients))))

    def _products(self, request: ProductRequest) -> Products:
        found = self._submit(request)
        if isinstance(found, RuntimeError):
            raise found
        return found


class ProductBatches:
    """Computes batches of requests and counts them.

    Attributes:
        batches: How many batches were computed, those of a single request among them.
        requests: How many requests there were in them.
    """

    def __init__(self) -> None:
        self.batches, self.requests = 0, 0

    @property
    def requests_per_batch(self) -> float:
        """The mean size of a batch; 0 before the first."""
        return self.requests / self.batches if self.batches else 0.0

    def compute(self, requests: Sequence[ProductRequest]) -> list[Products]:
        """The products of each request; all have the same key. No result shares memory with another request's."""
        self.batches += 1
        self.requests += len(requests)
        with torch.no_grad():
            by_linear = [_products_of(index, requests) for index in range(len(requests[0].linears))]
        return list(zip(*by_linear, strict=True))


def _products_of(index: int, requests: Sequence[ProductRequest]) -> list[Product]:
    """What the linear number `index` of the group gives each request."""
    linear, backward = requests[0].linears[index], requests[0].is_backward
    rows = [_required(request.gradients[index] if backward else request.x) for request in requests]
    all_rows = torch.cat(rows)[None]
    product = input_gradient(linear, all_rows) if backward else linear(all_rows)
    parts = [part.clone() for part in torch.split(product[0], [len(each) for each in rows])]
    with_lora = {at: lora for at, request in enumerate(requests) if (lora := request.leased[index]) is not None}
    added: Sequence[Tensor | LoraGradients] = []
    if with_lora:
        loras, inputs = list(with_lora.values()), [_required(requests[at].x) for at in with_lora]
        upstream = [rows[at] for at in with_lora]
        added = lora_gradients(loras, inputs, upstream) if backward else contributions(loras, inputs)
    added_to = dict(zip(with_lora, added, strict=True))
    return [Product(part, added_to.get(at)) for at, part in enumerate(parts)]


def input_gradient(linear: nn.Module, gradient: Tensor) -> Tensor:
    """The gradient `[..., in]` of a linear's input, of its output's `[..., out]`: torch's own product."""
    return (rows_of(gradient) @ weight_of(linear)).view(*gradient.shape[:-1], -1)


def rows_of(x: Tensor) -> Tensor:
    """`[..., n]` as `[N, n]`, without a graph."""
    return x.detach().reshape(-1, x.shape[-1])


def _required(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("a request for products came without its rows")
    return tensor
