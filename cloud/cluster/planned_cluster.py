"""From the options of `serve` on a cluster to what the controller is given; what can be checked is checked here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.cloud.cluster.cluster_spec import RESOURCE, Claims, ClusterSpec, controller_name
from isthmus.cloud.cluster.issuing import enrolled_nodes
from isthmus.cloud.cluster.joined_cluster import Node
from isthmus.cloud.control.cluster import WORKER_ENVIRONMENT
from isthmus.cloud.control.ports import parse_address
from isthmus.cloud.control.serve_options import ClusterOptions, ServeOptions
from isthmus.cloud.control.worker import CUDA
from isthmus.cloud.control.worker_specs import Backbone, count_workers, worker_spec
from isthmus.cloud.engine.freed_memory import wiping
from isthmus.cloud.nodes.node_worker import ANY_HOST, NODE_HOST, NodeSpec
from isthmus.common.errors import ConfigError, KeyFileError
from isthmus.common.readable import bracketed
from isthmus.protocol.enrolment import EDGES_FILE, MAX_PLACES, REVOKED_FILE, AuthorizedEdges, ConnectionString
from isthmus.protocol.secure.keyfiles import check_folder
from isthmus.protocol.secure.keys import ROOT_KEY, Issuer, load_issuer


def cluster_options_of(options: ServeOptions) -> ClusterOptions:
    """Those of the cluster. Raises ConfigError where others contradict it."""
    if options.cluster is None:
        raise ValueError("these are options of a cloud on one machine")
    controller_name(options.cluster.name)
    host, port = parse_address(options.listen)
    if host not in (*ANY_HOST, NODE_HOST):
        raise ConfigError(
            f"--listen {options.listen} is one machine's: on a cluster write --listen {NODE_HOST}:{port or 7443}, for "
            f"each node's address in the cluster, or {ANY_HOST[0]}:{port or 7443}, for all of its addresses"
        )
    if not port:
        raise ConfigError("--listen with port 0 cannot be on a cluster: edges look for workers at known ports")
    for name, given in (("--tls-cert", options.tls), ("--record", options.record)):
        if given is not None:
            raise ConfigError(f"{name} is for one machine: leave it out on a cluster (sessions are sealed in any case)")
    return options.cluster


def check_owners_folder(home: Path, console: Console) -> Issuer:
    """Check the owner's folder. Raises KeyFileError, ConfigError."""
    check_folder(home)
    issuer = load_issuer(home)
    if (home / ROOT_KEY).exists():
        console.print(
            f"{home / ROOT_KEY} lies here, and nothing here needs it: keep it on a machine that is not on the network",
            highlight=False,
        )
    for name in (EDGES_FILE, REVOKED_FILE):
        if (home / name).exists():
            AuthorizedEdges.load(home / name)
    if not len(enrolled_nodes(home)):
        raise ConfigError(
            f"no node is enrolled in {home}: run `isthmus cloud node-keygen` on each node, and `isthmus cloud "
            "enroll-node NODE_KEY.pub` here"
        )
    return issuer


def check_place(spec: ClusterSpec) -> None:
    """Check that a controller of a cloud can be started on this machine: the owner's folder is here.

    Raises:
        KeyFileError: there is no issuer of this cloud in it.
    """
    folder = Path(spec.home)
    if load_issuer(folder).pin.digest != spec.worker.root:
        raise KeyFileError(
            f"{folder} on this machine is of another cloud: run `isthmus cloud serve` where the owner's is"
        )


def check_nodes(nodes: Iterable[Node], *, autoscaled: bool) -> None:
    """Check that some node takes workers, or may be added. Raises ConfigError."""
    if not any(node.workers for node in nodes) and not autoscaled:
        raise ConfigError(
            f"no node of the cluster takes workers: start those that should with `ray start --resources='{{"
            f'"{RESOURCE}": N}}\'`, for N workers each, or give --autoscaled '
            "where an autoscaler adds them"
        )


def cluster_spec_of(
    options: ServeOptions, cluster: ClusterOptions, backbone: Backbone, issuer: Issuer, nodes: Iterable[Node]
) -> ClusterSpec:
    """What the controller is given. Raises ConfigError where the options do not suit the model."""
    count = count_workers(options, backbone.plan)
    takes = [node for node in nodes if node.workers]
    # As many as a machine takes, and not as many as there are to be: `scale` may fill it later.
    beside = max([1, *(int(node.workers) for node in takes)])
    template = worker_spec(options, backbone, beside=beside, threads=options.threads or 0)
    environment = dict(WORKER_ENVIRONMENT)
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    if options.wipe_freed:
        environment |= wiping(os.environ)
    parts = "" if backbone.checkpoint.is_edge_parts else backbone.parts.name
    worker = NodeSpec(
        cluster.name,
        issuer.pin.digest,
        dataclasses.replace(template, listen=options.listen),
        backbone.checkpoint.digest(),
        _on_the_hub(options.model, backbone),
        parts,
        bracketed((options.advertise or "").strip("[]")),
    )
    port = parse_address(options.listen)[1]
    stages = tuple(map(str, backbone.plan.cloud.cut(options.pipeline))) if options.pipeline > 1 else ()
    return ClusterSpec(
        cloud=cluster.name,
        home=str(options.home),
        worker=worker,
        least=count.least,
        most=count.most,
        stages=stages,
        claims=Claims(cluster.worker_memory, 1 if options.device == CUDA else 0, cluster.labels),
        places=tuple(f"{bracketed(node.address)}:{port}" for node in takes),
        metrics=options.metrics,
        grace=options.grace,
        hours=cluster.certificate_hours,
        model_port=cluster.model_port,
        environment=environment,
    )


def _on_the_hub(model: str, backbone: Backbone) -> str:
    """The model's name on the hub, with the revision that the owner has; "" where it is not from there."""
    revision = backbone.checkpoint.revision
    local = Path(model).expanduser().exists()
    elsewhere = local or model == BUILT_IN or revision is None or backbone.saved_span
    return "" if elsewhere else f"{backbone.checkpoint.name}@{revision}"


def connection_of(options: ServeOptions, spec: ClusterSpec, issuer: Issuer, serving: Iterable[str]) -> ConnectionString:
    """The connection string: the workers that serve, and the other nodes, where a worker may come back."""
    port = parse_address(options.listen)[1]
    if options.advertise is not None:
        found = [f"{bracketed(options.advertise.strip('[]'))}:{port}"]
    else:
        found = list(dict.fromkeys((*serving, *spec.places)))[:MAX_PLACES]
    host, _, at = found[0].rpartition(":")
    return ConnectionString(host.strip("[]"), int(at), issuer.pin, others=tuple(found[1:]))
