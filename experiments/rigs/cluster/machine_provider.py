"""What Ray's autoscaler makes machines with: each that it wants is a file, with its tags. Loaded on the head alone.

Source: Ray's interface `ray.autoscaler.node_provider.NodeProvider`, as its autoscaler v2 calls it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from isthmus.common.files import write_atomic
from isthmus.experiments.rigs.cluster.machine_pool import HEAD_ID, HEAD_TYPE, wanted_machines

_OF_HEAD = {
    TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
    TAG_RAY_USER_NODE_TYPE: HEAD_TYPE,
    TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
}


class MachineProvider(NodeProvider):  # type: ignore[misc]
    """Each machine is a file with its tags, in the folder that the configuration names."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder = Path(provider_config["folder"])
        self._lock = threading.Lock()

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Machines whose tags have these values."""
        names = [HEAD_ID, *sorted(wanted_machines(self._folder))]
        return [name for name in names if tag_filters.items() <= self.node_tags(name).items()]

    def is_running(self, node_id: str) -> bool:
        """Whether it is there."""
        return node_id == HEAD_ID or self._path(node_id).exists()

    def is_terminated(self, node_id: str) -> bool:
        """Whether it is not."""
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Its tags."""
        if node_id == HEAD_ID:
            return _OF_HEAD
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(self._path(node_id).read_text()))
        return {}

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Add tags."""
        if node_id != HEAD_ID:
            with self._lock:
                self._write(node_id, {**self.node_tags(node_id), **tags})

    def internal_ip(self, node_id: str) -> str:
        """Nobody needs it here: machines are not reached by SSH."""
        return node_id

    def external_ip(self, node_id: str) -> str:
        """See `internal_ip`."""
        return node_id

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> dict[str, Any]:
        """Want so many more."""
        made = [f"machine-{time.time_ns()}-{number}" for number in range(count)]
        for name in made:
            self._write(name, {**tags, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE})
        return {name: {} for name in made}

    def create_node(self, node_config: Any, tags: dict[str, str], count: int) -> dict[str, Any]:
        """See `create_node_with_resources_and_labels`."""
        return self.create_node_with_resources_and_labels(node_config, tags, count, {}, {})

    def terminate_node(self, node_id: str) -> None:
        """Want it no more."""
        self._path(node_id).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _write(self, name: str, tags: dict[str, str]) -> None:
        write_atomic(self._path(name), json.dumps(tags).encode(), 0o600)
