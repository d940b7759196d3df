"""Has a cluster's control store keep a value: what a scan of the store must find."""

from __future__ import annotations

from isthmus.experiments.harness.processes import Parent, serve

SECONDS = 30
"""For the control store to answer."""


def main(parent: Parent) -> None:
    """Have it kept, and say so. The environment is that of a machine's programs, with Ray's token and TLS."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # it is compiled

    task = parent.task
    store = GcsClient(address=task["address"])
    store.internal_kv_put(b"control", bytes.fromhex(task["value"]), True, b"isthmus bench cluster", timeout=SECONDS)
    parent.say()


if __name__ == "__main__":
    serve(main)
