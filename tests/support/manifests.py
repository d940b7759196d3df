"""Reading the manifests of `deploy/kubernetes`, and checking them as an API server does.

Kubernetes' own kinds are checked against its published schemas (the package kubernetes-validate ships them). A
RayCluster is checked in two steps, as KubeRay's own schema is too long to be here: its fields against `RAY_CLUSTER`,
which names them with their types, and what it takes over from Kubernetes (the pods' templates) against Kubernetes'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = "1.34"


def _fields(required: str = "", **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def _words(*words: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(words)}


_BOOL, _INT, _STR, _ANY = {"type": "boolean"}, {"type": "integer"}, {"type": "string"}, {"type": "object"}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_LIST = {"type": "array"}

# The fields of RayCluster in ray.io/v1 with their types, written after KubeRay's definition of it
# (github.com/ray-project/kuberay). `_ANY` and `_LIST` stand for what is Kubernetes' own: `problems` checks the
# templates, and the rest of it is not used here.
RAY_CLUSTER = _fields(
    "apiVersion kind metadata spec",
    apiVersion=_words("ray.io/v1"),
    kind=_words("RayCluster"),
    metadata=_ANY,
    spec=_fields(
        "headGroupSpec",
        rayVersion=_STR,
        suspend=_BOOL,
        managedBy=_words("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        upgradeStrategy=_fields(type=_words("Recreate", "None")),
        enableInTreeAutoscaling=_BOOL,
        headServiceAnnotations=_STRINGS,
        authOptions=_fields(mode=_words("disabled", "token"), enableK8sTokenAuth=_BOOL),
        autoscalerOptions=_fields(
            env=_LIST,
            envFrom=_LIST,
            idleTimeoutSeconds=_INT,
            image=_STR,
            imagePullPolicy=_STR,
            resources=_ANY,
            securityContext=_ANY,
            upscalingMode=_words("Default", "Aggressive", "Conservative"),
            version=_words("v1", "v2"),
            volumeMounts=_LIST,
        ),
        gcsFaultToleranceOptions=_fields(
            "redisAddress",
            redisAddress=_STR,
            redisUsername=_ANY,
            redisPassword=_ANY,
            externalStorageNamespace=_STR,
        ),
        headGroupSpec=_fields(
            "template rayStartParams",
            template=_ANY,
            rayStartParams=_STRINGS,
            serviceType=_STR,
            headService=_ANY,
            enableIngress=_BOOL,
            resources=_STRINGS,
            labels=_STRINGS,
        ),
        workerGroupSpecs={
            "type": "array",
            "items": _fields(
                "groupName minReplicas maxReplicas template rayStartParams",
                groupName=_STR,
                replicas=_INT,
                minReplicas=_INT,
                maxReplicas=_INT,
                numOfHosts=_INT,
                idleTimeoutSeconds=_INT,
                suspend=_BOOL,
                template=_ANY,
                rayStartParams=_STRINGS,
                scaleStrategy=_fields(workersToDelete={"type": "array", "items": _STR}),
                resources=_STRINGS,
                labels=_STRINGS,
            ),
        },
    ),
)


# Kubernetes' schemas call a quantity a string; what it reads is this.
QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")


def manifests(folder: Path = DEPLOY / "kubernetes") -> list[dict[str, Any]]:
    """Every object of the folder's files, but not kustomize's own file."""
    files = [file for file in sorted(folder.glob("*.yaml")) if file.name != "kustomization.yaml"]
    return [thing for file in files for thing in yaml.safe_load_all(file.read_text())]


def ray_cluster() -> dict[str, Any]:
    """The RayCluster."""
    (cluster,) = (thing for thing in manifests() if thing["kind"] == "RayCluster")
    return cluster


def templates(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods' templates of a RayCluster: the head's, then one for each group of workers."""
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])):
        yield group["template"]


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers of a RayCluster, those that run first among them."""
    pods = [template["spec"] for template in templates(cluster)]
    return [one for pod in pods for one in (*pod.get("initContainers", []), *pod["containers"])]


def problems(thing: dict[str, Any]) -> list[str]:
    """What is wrong with an object, unknown fields included; empty where nothing is."""
    if thing["kind"] != "RayCluster":
        return _kubernetes_problems(thing)
    found = [error.message for error in jsonschema.Draft202012Validator(RAY_CLUSTER).iter_errors(thing)]
    if not found:
        for template in templates(thing):
            found += _kubernetes_problems(
                {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
            )
        found += [f"{text!r} is no quantity" for text in _quantities(thing) if not QUANTITY.fullmatch(text)]
    return found


def _quantities(cluster: dict[str, Any]) -> Iterator[str]:
    for container in containers(cluster):
        for amounts in container["resources"].values():
            yield from map(str, amounts.values())
    for template in templates(cluster):
        for volume in template["spec"].get("volumes", []):
            if "sizeLimit" in volume.get("emptyDir", {}):
                yield str(volume["emptyDir"]["sizeLimit"])


def _kubernetes_problems(thing: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def crd_problems(crd: dict[str, Any], thing: dict[str, Any]) -> list[str]:
    """What is wrong with an object by the schema of its CustomResourceDefinition, unknown fields included."""
    version = thing["apiVersion"].rpartition("/")[2]
    (schema,) = (one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"] if one["name"] == version)
    metadata = schema["properties"].pop("metadata", None)  # Kubernetes' own; a CRD says nothing of it
    validator = jsonschema.Draft202012Validator(_strict(schema))
    rest = {name: value for name, value in thing.items() if name != "metadata" or metadata is None}
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(rest)]


def _strict(schema: Any) -> Any:
    """The schema, where an object has no other fields than those named: an API server drops others without a word."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _strict(value) for name, value in schema.items()}
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not open_ended:
        closed["additionalProperties"] = False
    return closed
