"""What a cloud on a cluster is made of: names, labels, and what each worker serves."""

from __future__ import annotations

import dataclasses

import pytest

from isthmus.cloud.cluster.cluster_spec import Claims, ClusterSpec, controller_name, parse_labels, same_cloud
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.nodes.node_worker import NodeSpec
from isthmus.common.errors import ConfigError
from isthmus.protocol.enrolment import TENANT_NAME
from isthmus.protocol.limits import MAX_WORKERS

WORKER = WorkerSpec("/models/tiny", "tiny", "2:2", "fp32", "", "", "node:7443", 1, 1, 1, "")
SPEC = ClusterSpec("cloud", "/home", NodeSpec("cloud", bytes(32), WORKER, "00" * 32, "tiny", "parts"), 2, 4)


def test_workers_differ_in_their_numbers_alone() -> None:
    specs = [SPEC.worker_spec(number) for number in range(3)]
    assert [spec.worker.number for spec in specs] == [0, 1, 2]
    assert len({dataclasses.replace(spec, worker=dataclasses.replace(spec.worker, number=0)) for spec in specs}) == 1
    assert [(spec.inner, spec.last, spec.worker.layers, spec.worker.sites) for spec in specs] == [
        (False, True, "", True)
    ] * 3
    assert not any(SPEC.is_inner(number) for number in range(MAX_WORKERS))


def test_stages_have_layers_and_no_sites_and_edges_talk_to_the_first() -> None:
    pipeline = dataclasses.replace(SPEC, stages=("2:3", "3:5", "5:6"))
    specs = [pipeline.worker_spec(number) for number in range(3)]
    assert [(spec.worker.layers, spec.inner, spec.last) for spec in specs] == [
        ("2:3", False, False),
        ("3:5", True, False),
        ("5:6", True, True),
    ]
    assert not any(spec.worker.sites for spec in specs)
    assert [pipeline.is_inner(number) for number in range(3)] == [False, True, True]


def test_two_clouds_are_the_same_where_only_counts_and_places_differ() -> None:
    spec = SPEC
    beside = dataclasses.replace(spec.worker, worker=dataclasses.replace(spec.worker.worker, beside=9))
    assert same_cloud(spec, dataclasses.replace(spec, least=1, most=9, places=("a:1",), worker=beside))
    for changes in (
        {"cloud": "other"},
        {"stages": ("2:3", "3:5")},
        {"hours": 1.0},
        {"claims": Claims(1)},
        {"worker": dataclasses.replace(spec.worker, digest="11" * 32)},
        {"worker": dataclasses.replace(spec.worker, worker=dataclasses.replace(spec.worker.worker, threads=2))},
        {"environment": {"A": "b"}},
    ):
        assert not same_cloud(spec, dataclasses.replace(spec, **changes))


@pytest.mark.parametrize("name", ["cloud", "a", "0", "llama-70b", "x" * 32])
def test_a_cloud_has_a_small_name(name: str) -> None:
    assert controller_name(name) == f"isthmus-{name}-controller"
    assert controller_name(name) != controller_name(f"{name}0"[-32:])
    assert TENANT_NAME.fullmatch(f"worker-{MAX_WORKERS - 1}@{name}")  # as other workers enrol it


@pytest.mark.parametrize("name", ["", "Cloud", "-a", "a b", "a_b", "x" * 33, "a\n", "é"])
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a cloud"):
        controller_name(name)


def test_labels_are_pairs() -> None:
    assert parse_labels("zone=a") == {"zone": "a"}
    assert parse_labels("ray.io/accelerator-type=H100,isthmus/pool=cloud-1") == {
        "ray.io/accelerator-type": "H100",
        "isthmus/pool": "cloud-1",
    }


@pytest.mark.parametrize("text", ["", "zone", "zone=", "=a", "zone=a,", "zone = a", "zone=a=b", "zone=a;disk=ssd"])
def test_malformed_labels_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no label of a node: KEY=VALUE is needed"):
        parse_labels(text)
