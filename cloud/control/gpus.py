"""The GPUs of a cloud's workers: one for each worker that computes on one, reserved in the Ray cluster as a group.

A group of several workers has all of its GPUs or none (a placement group of Ray's), so that a pipeline never waits half
started for what another cloud holds. A worker that is started again comes back to its own GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus.common.errors import ConfigError

WAIT_SECONDS = 20.0
_THIS_NODE = 0.001
"""Of the resource that each node has one of, and that is named after it: it keeps a bundle there."""


def no_gpu(device: str) -> ConfigError:
    """The error of a machine without one."""
    return ConfigError(
        f"--device {device} needs a GPU that torch finds, and it finds none: check the driver and that torch is "
        "built with CUDA, or leave the option out"
    )


class Gpus:
    """Reserves GPUs of the node that this process is on, in the cluster that it has joined."""

    def __init__(self) -> None:
        import ray

        self._ray = ray
        self._groups: dict[int, Any] = {}  # worker -> its group
        self._bundles: dict[int, int] = {}  # worker -> its place in there

    def reserve(self, workers: Sequence[int], *, seconds: float = WAIT_SECONDS) -> None:
        """Reserve one for each of these workers, by number.

        Raises:
            ConfigError: The node has not so many that are free, after so many seconds.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        node = f"node:{self._ray.util.get_node_ip_address()}"
        group = placement_group([{"GPU": 1, node: _THIS_NODE}] * len(workers), strategy="STRICT_PACK")
        if not group.wait(seconds):
            remove_placement_group(group)
            free = self._ray.available_resources().get("GPU", 0)
            raise ConfigError(
                f"{len(workers)} workers on GPUs need one each, and Ray has {free:g} to give on this node: give fewer "
                "--workers or --pipeline stages, or --device cpu"
            )
        for bundle, worker in enumerate(workers):
            self._groups[worker], self._bundles[worker] = group, bundle

    def options(self, worker: int) -> dict[str, Any]:
        """Of the worker's actor: where it is placed, and with what; empty where it has no GPU."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if worker not in self._groups:
            return {}
        place = PlacementGroupSchedulingStrategy(
            self._groups[worker], placement_group_bundle_index=self._bundles[worker]
        )
        return {"num_gpus": 1, "scheduling_strategy": place}

    def give_back(self, worker: int) -> None:
        """A worker has ended. Its GPU is free again, if it was not reserved together with others."""
        from ray.util.placement_group import remove_placement_group

        group = self._groups.pop(worker, None)
        self._bundles.pop(worker, None)
        if group is not None and group not in self._groups.values():
            remove_placement_group(group)
