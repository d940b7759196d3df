"""Another user of this machine."""

from __future__ import annotations

from support.other_user import as_nobody, place

__all__ = ["as_nobody", "place"]
