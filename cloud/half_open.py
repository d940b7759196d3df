"""Handshakes that are half open: which one gives way to another where there are too many.

Rules
    1. Who has said nothing valid gives way first: a stream costs a stranger nothing, a hello a little.
    2. They never have less than half of the places, so that those who go further do not keep newcomers from speaking:
       where they have less, anybody may have to give way.
    3. The peer with the most gives way, with its oldest. So a flood from one address displaces itself alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv6Address
from urllib.parse import unquote


def gives_way(waiting: Sequence[tuple[str, bool]]) -> int:
    """The index of the handshake that gives way.

    Args:
        waiting: of each, in the order in which they began, whose it is and whether it has had a valid hello; not empty.
    """
    silent = [index for index, (_, greeted) in enumerate(waiting) if not greeted]
    among = silent if 2 * len(silent) >= len(waiting) else range(len(waiting))
    held = Counter(peer for peer, _ in waiting)
    return max(among, key=lambda index: held[waiting[index][0]])  # of equals the first, so the oldest


def host_of(peer: str) -> str:
    """Whose connection it is, from what gRPC calls the peer, such as `ipv4:10.0.0.1:5000`.

    The address without the port. Of an IPv6 address the first 64 bits, as one host has all the others.
    """
    host = unquote(peer).rpartition(":")[0]
    if not host.startswith("ipv6:["):
        return host
    return f"ipv6:{IPv6Address(host[len('ipv6:[') : -1]).packed[:8].hex()}"
