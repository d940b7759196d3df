"""A process that joins a cloud's Ray and keeps an object in its store: what a scan of Ray must find.

Whoever has the cluster's token can do so; a cloud does not.
"""

from __future__ import annotations

import os
from pathlib import Path

from isthmus.cloud.control.ray_cluster import ray_environment
from isthmus.experiments.harness.processes import Parent, TaskProcess, serve

PATIENCE = 120.0
COPIES = 1 << 13
"""Of the bytes in the object: a smaller one would be kept outside the store."""


def ray_object(control_store: str, home: Path, content: bytes) -> TaskProcess:
    """The process, which says something once the object is there; a context manager.

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

    ray.init(address=task["address"], configure_logging=False, log_to_driver=False)
    held = ray.put(np.frombuffer(bytes.fromhex(task["content"]) * COPIES, np.uint8))
    parent.say()
    for _ in parent.questions():
        pass
    del held


if __name__ == "__main__":
    serve(_main)
