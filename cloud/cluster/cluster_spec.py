"""What a cloud over several machines is made of. Ray keeps it in its control store: nothing in it is secret."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

from isthmus.cloud.nodes.node_worker import NodeSpec
from isthmus.common.errors import ConfigError

RESOURCE = "isthmus"
"""The custom resource that each worker takes one of: nodes say how many workers they take."""
CLOUD_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_LABEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9._/-]{0,100})=([A-Za-z0-9][A-Za-z0-9._-]{0,62})")


@dataclass(frozen=True, slots=True)
class Claims:
    """What a worker claims of the node that it is placed on.

    Attributes:
        memory: bytes; 0 claims none.
        gpus: how many.
        labels: labels that the node must have; where no node has them, those of the next entry, and so on.
    """

    memory: int = 0
    gpus: int = 0
    labels: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """All that a controller needs to start, and to start again.

    Attributes:
        cloud: the cloud's name.
        home: the owner's folder on the controller's node.
        worker: what each worker serves; see `worker_spec`.
        least: workers that there are at least; edges find the cloud by these.
        most: workers that there are at most.
        stages: layers of each stage of a pipeline, `start:stop`; empty without one.
        claims: of each worker.
        places: addresses where the cloud may be found, for the connection string.
        metrics: host:port of /status and /metrics on the controller's node; "" for none.
        grace: seconds that calls in flight get when a worker is ended.
        hours: until a worker's certificate expires.
        model_port: of the controller's node, where workers fetch the model; 0 for a free one.
        environment: variables of the workers' processes.
    """

    cloud: str
    home: str
    worker: NodeSpec
    least: int
    most: int
    stages: tuple[str, ...] = ()
    claims: Claims = Claims()
    places: tuple[str, ...] = ()
    metrics: str = ""
    grace: float = 30.0
    hours: float = 24.0
    model_port: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    def is_inner(self, number: int) -> bool:
        """Whether a worker is a stage that edges do not talk to."""
        return bool(self.stages) and number > 0

    def worker_spec(self, number: int) -> NodeSpec:
        """What the worker of a number serves."""
        layers = self.stages[number] if self.stages else ""
        worker = dataclasses.replace(
            self.worker.worker, number=number, layers=layers, sites=self.worker.worker.sites and not self.stages
        )
        last = number == len(self.stages) - 1
        return dataclasses.replace(
            self.worker, worker=worker, inner=self.is_inner(number), last=not self.stages or last
        )

    def worker_name(self, number: int) -> str:
        """The name of a worker's actor."""
        return worker_name(self.cloud, number)


def worker_name(cloud: str, number: int) -> str:
    """The name of the actor of a cloud's worker."""
    return f"isthmus-{cloud}-worker-{number}"


def controller_name(cloud: str) -> str:
    """The name of a cloud's controller.

    Raises:
        ConfigError: a cloud cannot have that name.
    """
    if not CLOUD_NAME.fullmatch(cloud):
        raise ConfigError(f"{cloud!r} cannot name a cloud: 1 to 32 small letters, digits and dashes are needed")
    return f"isthmus-{cloud}-controller"


def parse_labels(text: str) -> dict[str, str]:
    """Read `zone=a,disk=ssd`.

    Raises:
        ConfigError: it is malformed.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        match = _LABEL.fullmatch(part)
        if match is None:
            raise ConfigError(f"{part!r} is no label of a node: KEY=VALUE is needed, as in `ray start --labels`")
        found[match[1]] = match[2]
    return found


def same_cloud(one: ClusterSpec, other: ClusterSpec) -> bool:
    """Whether two specifications differ in nothing but the numbers of workers, and where the cloud is looked for."""

    def plain(spec: ClusterSpec) -> ClusterSpec:
        worker = dataclasses.replace(spec.worker.worker, beside=1)  # it follows from the nodes that were alive
        worker_spec = dataclasses.replace(spec.worker, worker=worker)
        return dataclasses.replace(spec, least=1, most=1, places=(), worker=worker_spec)

    return plain(one) == plain(other)
