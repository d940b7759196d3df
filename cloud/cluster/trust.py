"""Whether Ray's own traffic may cross the network as it is: its token does so in the clear without Ray's TLS."""

from __future__ import annotations

import os
from collections.abc import Iterable

from isthmus.cloud.cluster.ray_tls import NODE_FILES
from isthmus.common.errors import ConfigError


def uses_tls() -> bool:
    """Whether Ray uses TLS, as this process's environment says; all processes of a cluster must have it alike."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def check_trust(addresses: Iterable[str], *, autoscaled: bool = False) -> None:
    """Check that a cluster asks for a token, as `ray start` listens on all of a machine's addresses, and that one of
    several nodes uses Ray's TLS.

    Args:
        addresses: of its nodes.
        autoscaled: whether nodes are added by themselves; there may be one yet.

    Raises:
        ConfigError: it does not.
    """
    several = len(set(addresses)) > 1
    if several or autoscaled:
        check_tls("the cluster has several nodes" if several else "an --autoscaled cluster gets several nodes")
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise ConfigError(
            "Ray asks for no token, so whoever reaches its ports may run code: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH for `ray start` on every node and for this command"
        )


def check_tls(which: str) -> None:
    """Check that Ray uses TLS.

    Args:
        which: says why it has to.

    Raises:
        ConfigError: it does not.
    """
    if not uses_tls():
        raise ConfigError(
            f"{which}, and Ray's token crosses the network between them in the clear: set RAY_USE_TLS=1 and "
            f"{', '.join(NODE_FILES)} for `ray start` on every node and for this command (`isthmus cloud "
            "ray-certificate` makes the files)"
        )
