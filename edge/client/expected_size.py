"""How large the body of an answer may be: what was asked for, in the codec that it was asked in, and no more.

The session refuses anything larger at its first frame, before it allocates (`EdgeSession.expect`). An answer without
tensors and without a piece of a file (a status, a list, a sign of life) has no body at all.

A question about sites stands in the place of a reply. It is about sites that read one input, all of one layer; which of
a layer's sites share an input is the cloud's to know, so the bound is what all sites of a layer together would take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import Placement
from isthmus.protocol.encoding import body_bytes

QUESTIONS_PER_SITE = 2
"""A backward may ask about a site twice: for its contribution once more, where the forward has to be computed again,
and for the input's gradient."""


def tap_widths(sites: SiteCall, hidden_size: int) -> list[int]:
    """Numbers of a token that come out of each tap."""
    return [spec.rank or hidden_size for spec in sites.specs if spec.placement == Placement.TAP]


def forward_bytes(codec: str, shape: Sequence[int], sites: SiteCall | None) -> int:
    """Most bytes of what comes back in a forward: its reply with the taps, or a question with inputs of sites.

    Args:
        codec: the name of the codec of the reply.
        shape: that of the hidden states, `[B, S, h]`.
        sites: what the call visits.
    """
    batch, length, hidden = shape
    widths = [hidden] if sites is None else [hidden, *tap_widths(sites, hidden)]
    reply = sum(body_bytes(codec, (batch, length, width)) for width in widths)
    return max(reply, _question_bytes(codec, shape, sites, given=0))


def backward_bytes(codec: str, shape: Sequence[int], sites: SiteCall | None, *, wanted: bool) -> int:
    """Most bytes of what comes back in a backward: the gradients asked for, or a question with sites' gradients."""
    reply = body_bytes(codec, tuple(shape)) if wanted else 0
    if sites is not None:
        reply += sum(body_bytes("fp32", tuple(matrix.shape)) for matrix in sites.leased_parameters)
    return max(reply, _question_bytes(codec, shape, sites, given=1))


def question_count(sites: SiteCall | None) -> int:
    """Most questions about sites in one call."""
    return 0 if sites is None else QUESTIONS_PER_SITE * sum(site.spec.asks for site in sites.sites)


def _question_bytes(codec: str, shape: Sequence[int], sites: SiteCall | None, given: int) -> int:
    """`given`: 0 where a site is given its input, 1 where it is given the gradient of what it adds."""
    layers: Counter[int] = Counter()
    for site in () if sites is None else sites.sites:
        if site.spec.asks:
            layers[site.layer] += body_bytes(codec, (*shape[:2], site.widths[given]))
    return max(layers.values(), default=0)
