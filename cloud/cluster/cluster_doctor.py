"""`isthmus cloud doctor`: what of a cluster is as a cloud needs it, what is not, and what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.cloud.cluster.cloud_records import CloudNote, read_note
from isthmus.cloud.cluster.cluster_spec import RESOURCE, ClusterSpec, controller_name
from isthmus.cloud.cluster.issuing import enrolled_nodes
from isthmus.cloud.cluster.joined_cluster import JoinedCluster, Node
from isthmus.cloud.cluster.node_probe import NodeFacts, clock, probe
from isthmus.cloud.cluster.ray_tls import check_trust, uses_tls
from isthmus.cloud.control.ray_cluster import ActorError, MethodError, find_actor
from isthmus.common.errors import ConfigError, IsthmusError
from isthmus.common.readable import date
from isthmus.protocol.secure.keys import Fingerprint, load_issuer

PROBE_SECONDS = 120.0
"""For all nodes to answer: hashing a large model takes a minute."""
ANSWER_SECONDS = 10.0
"""For a node or the controller: a busy machine answers late."""
MOST_SKEW = 5.0
"""Seconds that a node's clock may be off: certificates and the age of adapters go by it, which last for hours. NTP
keeps a clock within a tenth of one."""
SOON_DAYS = 7
"""Before a certificate runs out, to tell its owner: somebody who looks once a week still sees it."""
DAY = 86_400


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: what.
        good: whether it is as it should be.
        text: what was found, and what to do where it is not good.
    """

    about: str
    good: bool
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"about": self.about, "good": self.good, "text": self.text}


def examine(address: str, name: str, home: Path, model: str | None) -> list[Finding]:
    """Look at a cluster from one of its nodes.

    Args:
        address: of the cluster.
        name: of the cloud; there may be none yet.
        home: the owner's folder.
        model: a model to look for on the nodes; None for the cloud's own.

    Raises:
        UnreachableError: this machine is no node of a cluster there.
        IsthmusError: the model cannot be found here.
    """
    cluster = JoinedCluster(address)
    try:
        return list(_findings(cluster, name, home, model))
    finally:
        cluster.leave()


def _findings(cluster: JoinedCluster, name: str, home: Path, model: str | None) -> Iterator[Finding]:
    nodes = cluster.nodes()
    takes = [node for node in nodes if node.workers]
    yield _nodes_finding(nodes, takes)
    yield _trust_finding(nodes, read_note(cluster, name))
    yield from _home_findings(home)
    spec = None
    for found in _cloud_findings(name):
        if isinstance(found, Finding):
            yield found
        else:
            spec = found
    path, digest = "", ""
    if model is not None:
        checkpoint = resolve(model, console=Console(quiet=True))
        path, digest = str(checkpoint.folder), checkpoint.digest()
    elif spec is not None:
        path, digest = spec.worker.worker.checkpoint, spec.worker.digest
    asked = [(node, cluster.run_on(node, probe, path if node.workers else "")) for node in nodes]
    deadline = time.monotonic() + PROBE_SECONDS
    here: NodeFacts = probe("")
    facts: dict[str, NodeFacts] = {}
    for node, answer in asked:
        label = f"node {node.host} ({node.address})"
        try:
            facts[label] = answer.result(max(0.0, deadline - time.monotonic()))
        except MethodError as error:
            yield Finding(label, False, f"it cannot run Isthmus ({type(error.cause).__name__}: {error.cause}): install "
                          f"isthmus {here.versions['isthmus']} there")  # fmt: skip
            continue
        except ActorError as error:
            yield Finding(label, False, f"it does not answer ({error}): check its raylet and its ports")
            continue
        yield from _node_findings(label, node, facts[label], here, home, digest)
        yield from _clock_findings(label, cluster, node)
    if digest and takes and not any(each.digest == digest for each in facts.values()):
        saved = spec is not None and spec.worker.worker.saved_span
        remedy = (
            f"it is a saved span, so put it on a path that all of them have at {path}"
            if saved
            else "they fetch it from the owner's machine, and then from each other"
        )
        yield Finding("the model", not saved, f"no node that takes workers has it at {path}: {remedy}")


def _clock_findings(label: str, cluster: JoinedCluster, node: Node) -> Iterator[Finding]:
    """Whether a node's clock is right. Asked by itself, and last: the first task there starts a process."""
    begun = time.time()
    try:
        there = cluster.run_on(node, clock).result(ANSWER_SECONDS)
    except ActorError as error:
        yield Finding(label, False, f"it does not tell its time ({error}): check its raylet")
        return
    off = max(begun - there, there - time.time(), 0.0)
    if off > MOST_SKEW:
        yield Finding(label, False, f"its clock is off by {off:.0f} s: set it by NTP")


def _nodes_finding(nodes: Sequence[Node], takes: Sequence[Node]) -> Finding:
    if not takes:
        return Finding(
            "nodes", False,
            f"{len(nodes)} nodes, and none takes workers: start those that should with `ray start --resources='{{"
            f'"{RESOURCE}": N}}\'`',
        )  # fmt: skip
    room = int(sum(node.workers for node in takes))
    return Finding("nodes", True, f"{len(nodes)} nodes; {len(takes)} of them take {room} workers")


def _trust_finding(nodes: Sequence[Node], note: CloudNote | None) -> Finding:
    about, addresses = "Ray's TLS and token", {node.address for node in nodes}
    grows = note is not None and note.autoscaled and not note.stopped
    try:
        check_trust(addresses, autoscaled=grows)
    except ConfigError as error:
        return Finding(about, False, str(error))
    if not uses_tls():
        return Finding(about, True, "the token is on; turn TLS on before another node joins")
    return Finding(about, True, "on")


def _home_findings(home: Path) -> Iterator[Finding]:
    try:
        issuer = load_issuer(home)
    except IsthmusError as error:
        yield Finding("the issuer", False, str(error))
    else:
        left = issuer.certificate.not_after - time.time()
        until = f"its certificate expires on {date(issuer.certificate.not_after)}"
        soon = left < DAY
        yield Finding("the issuer", not soon, f"{until}: renew it with `isthmus cloud issuer`" if soon else until)
    try:
        count = len(enrolled_nodes(home))
        yield Finding("enrolled nodes", count > 0, f"{count}" if count else "none: run `isthmus cloud enroll-node`")
    except IsthmusError as error:
        yield Finding("enrolled nodes", False, str(error))


def _cloud_findings(name: str) -> Iterator[Finding | ClusterSpec]:
    controller = find_actor(controller_name(name))
    if controller is None:
        yield Finding(f"the cloud {name}", True, "is not running")
        return
    try:
        state = controller.ask("state").result(ANSWER_SECONDS)
    except ActorError as error:
        yield Finding(
            f"the cloud {name}", False,
            f"its controller does not answer ({error}): run `isthmus cloud serve` again, which starts another",
        )  # fmt: skip
        return
    yield state["spec"]
    wrong = state["faults"] or ([] if state["ready"] else state["waits"])
    yield Finding(f"the cloud {name}", not wrong, "; ".join(wrong) or f"serves at {', '.join(state['places'])}")


def _node_findings(
    label: str, node: Node, facts: NodeFacts, here: NodeFacts, home: Path, digest: str
) -> Iterator[Finding]:
    """What is wrong on a node, or one line that nothing is."""
    wrong = [*_differences(facts, here)]
    if node.workers:
        wrong += _key_faults(facts, home)
        if digest and facts.digest and facts.digest != digest:
            wrong.append(f"the model there has the digest {facts.digest[:16]}, not {digest[:16]}: copy it anew")
    if facts.tls_until is not None and facts.tls_until < time.time() + SOON_DAYS * DAY:
        wrong.append(f"Ray's TLS certificate there expires on {date(facts.tls_until)}: renew it, and restart Ray there")
    for each in wrong:
        yield Finding(label, False, each)
    if not wrong:
        has = "; has the model" if digest and facts.digest == digest else ""
        yield Finding(label, True, f"isthmus {facts.versions['isthmus']}{has}")
    if facts.open_ports:
        ports = ", ".join(facts.open_ports)
        yield Finding(label, True, f"other machines can reach {ports}: only the cluster's own should, by a firewall")


def _differences(facts: NodeFacts, here: NodeFacts) -> Iterator[str]:
    for name, version in here.versions.items():
        if facts.versions.get(name) != version:
            yield f"{name} {facts.versions.get(name)} there, {version} here: install the same"
    if facts.tls != here.tls:
        has, own = ("TLS" if each.tls else "no TLS" for each in (facts, here))
        yield f"Ray uses {has} there, and {own} here: set RAY_USE_TLS alike"
    if facts.token != here.token:
        yield "Ray's token authentication is not set as it is here: set RAY_AUTH_MODE alike"


def _key_faults(facts: NodeFacts, home: Path) -> list[str]:
    if not facts.node_key:
        return [facts.key_fault]
    try:
        known = enrolled_nodes(home).find(facts.node_key)
    except IsthmusError:
        return []  # said of the file
    if known is not None:
        return []
    return [f"its key {Fingerprint.of(facts.node_key)} is not enrolled: run `isthmus cloud enroll-node`"]


def view(findings: Sequence[Finding]) -> RenderableType:
    """A table for people."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", ratio=3)
    for finding in findings:
        table.add_row(
            Text("ok" if finding.good else "mend", "green" if finding.good else "red"),
            finding.about,
            Text(finding.text),
        )
    return table
