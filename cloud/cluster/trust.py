"""Whether Ray's own traffic may cross the network as it is: its token does so in the clear without Ray's TLS."""

from __future__ import annotations

import os
from collections.abc import Sequence

from isthmus.cloud.cluster.joined_cluster import Node
from isthmus.cloud.cluster.ray_tls import NODE_FILES
from isthmus.common.errors import ConfigError


def uses_tls() -> bool:
    """Whether Ray uses TLS, as this process's environment says; all processes of a cluster must have it alike."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def check_trust(nodes: Sequence[Node]) -> None:
    """Check that a cluster of several nodes uses Ray's TLS, and asks for a token.

    Raises:
        ConfigError: it does not.
    """
    if len({node.address for node in nodes}) < 2:
        return
    if not uses_tls():
        raise ConfigError(
            f"the cluster has {len(nodes)} nodes, and Ray's token crosses the network between them in the clear: set "
            f"RAY_USE_TLS=1 and {', '.join(NODE_FILES)} for `ray start` on every node and for this command "
            "(`isthmus cloud ray-certificate` makes the files)"
        )
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise ConfigError(
            "the cluster has several nodes and asks for no token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH for "
            "`ray start` on every node and for this command"
        )
