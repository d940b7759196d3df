"""A process that joins a cloud's Ray and keeps an object in its store and values in its control store.

A scan of Ray must find both. Whoever has the cluster's token can do so; a cloud keeps no object.
"""

from __future__ import annotations

import os
from pathlib import Path

from isthmus.cloud.control.ray_cluster import ray_environment
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve

PATIENCE = 120.0
NAMESPACE = b"isthmus bench secrets"
COPIES = 1 << 13
"""Of the bytes in the object: a smaller one would be kept outside the store."""


def ray_object(control_store: str, home: Path, content: bytes) -> TaskProcess:
    """The process, which says something once the object is there; a context manager.

    Asked with the hex of a value, it has the control store keep that. The value is not in its command line, which the
    control store keeps as well.

    Args:
        control_store: Host and port of Ray's.
        home: The cloud's folder, with the token.
        content: Bytes that the object is made of.
    """
    task = {"address": control_store, "home": str(home), "content": content.hex()}
    return TaskProcess("the object in Ray", "isthmus.experiments.rigs.secrets.ray_object", task, patience=PATIENCE)


def _main(parent: Parent) -> None:
    task = parent.task
    os.environ.update(ray_environment(Path(task["home"])))
    import numpy as np
    import ray
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    ray.init(address=task["address"], configure_logging=False, log_to_driver=False)
    held = ray.put(np.frombuffer(bytes.fromhex(task["content"]) * COPIES, np.uint8))
    parent.say()
    for value in parent.questions():
        internal_kv_get_gcs_client().internal_kv_put(b"control", bytes.fromhex(value), True, NAMESPACE)
        parent.say()
    del held


if __name__ == "__main__":
    serve(_main)
