"""The data owner's side: an ordinary transformers model whose middle layers run in the cloud.

from isthmus.edge import connect

with connect("isthmus://host:7443#SHA256:…") as link:
    model = link.load_model()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.edge.client.link import Link, connect

__all__ = ["Link", "connect"]


def __getattr__(name: str) -> Any:
    """Import torch and grpc only when they are asked for, so that `isthmus --help` answers at once."""
    if name in __all__:
        from isthmus.edge.client import link

        return getattr(link, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
