"""Exact decoding: a token has the same bits alone, batched with others, verified with a draft, and after a replay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from isthmus.backbone.decoding.exact_layers import exact_layers
from isthmus.edge.client.link import Link


@contextmanager
def exact_decoding(link: Link, model: Any) -> Iterator[None]:
    """Generate exactly inside, on both sides.

    Args:
        link: To the cloud.
        model: The split model, or a PEFT model around it.

    Raises:
        UnsupportedCallError: This machine's products depend on how many rows they have. Where the cloud's do, its first
            call is refused (`RefusedError`).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.isthmus_exact, link.span.caches.exact
    base.isthmus_exact = link.span.caches.exact = True
    try:
        with exact_layers(model):  # measures the model's products, which have to be exact's already
            yield
    finally:
        base.isthmus_exact, link.span.caches.exact = before
