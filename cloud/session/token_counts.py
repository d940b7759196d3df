"""How many token positions a tenant has had computed, where its enrolment says how many it may have in all.

    <root>/<digest of the model>-<plan>/<tenant's fingerprint>    a number, written before the tokens are computed

Every answer of the cloud's layers helps to copy them, whatever it was asked for: so a count lives as long as the
folder, and never goes down. Workers of the same home share it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.telemetry.logs import log
from isthmus.common.errors import IsthmusError
from isthmus.common.files import locked, write_atomic
from isthmus.common.ownership import private_folder
from isthmus.protocol.enrolment import Tenant


class TokenCounts:
    """The counts of all tenants for one model at one split.

    Args:
        root: the folder; made when it is needed.
        digest: SHA-256 (hex) of the model.
        plan: who holds which layers.
    """

    def __init__(self, root: Path, digest: str, plan: SplitPlan) -> None:
        self._root = root / f"{digest[:16]}-{plan.bottom}-{plan.top}"

    def take(self, tenant: Tenant, positions: int) -> str | None:
        """Count so many more positions of a tenant; why it may not have them, else None. It reads and writes files."""
        allowed = tenant.quota.max_tokens
        if allowed is None or not positions:
            return None
        path = self._root / tenant.fingerprint.digest.hex()
        try:
            private_folder(self._root.parent, self._root.name)
            with locked(path, 0o600):
                had = int(path.read_bytes()) if path.exists() else 0
                if had + positions > allowed:
                    return (
                        f"{tenant.name} may have {allowed} tokens of this model in all (max-tokens), {positions} were "
                        f"asked for and {max(0, allowed - had)} are left: ask for fewer, or the cloud's owner for more"
                    )
                write_atomic(path, b"%d\n" % (had + positions), 0o600)
        except (IsthmusError, OSError, ValueError) as error:  # what cannot be counted is not answered
            log("tokens_not_counted", logging.ERROR, tenant=tenant.name, error=type(error).__name__)
            return f"the cloud cannot read or write its count of the tokens of {tenant.name}: its log says why"
        return None
