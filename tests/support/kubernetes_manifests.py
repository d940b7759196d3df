"""Reading the manifests of `deploy/kubernetes`, and checking them as an API server does.

Kubernetes' own kinds are checked against its published schemas (the package kubernetes-validate ships them). A
RayCluster is checked against `RAY_CLUSTER`, which says what KubeRay's definition says of the fields that ours has, as
the definition itself is too long to be here; and its pods' templates against Kubernetes' schemas, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def _list(of: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A list, of which no two have the same values of these keys."""
    return {"type": "array", "items": of, "keys": keys}


_BOOL, _INT, _STR, _ANY = {"type": "boolean"}, {"type": "integer"}, {"type": "string"}, {"type": "object"}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_LIST = {"type": "array"}
# As KubeRay's definition has it. Kubernetes' schemas let any string pass for a quantity.
_NUMBER = r"\d+(\.\d*)?|\.\d+"
_QUANTITY = {
    "type": ["integer", "string"],
    "pattern": rf"^[+-]?({_NUMBER})([KMGTPE]i|[numkMGTPE]|[eE][+-]?({_NUMBER}))?\Z",
}
_QUANTITIES = {"type": "object", "additionalProperties": _QUANTITY}

# What KubeRay's definition of RayCluster in ray.io/v1 says: helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml of
# github.com/ray-project/kuberay, at 017710c. Its own fields are all here, but for one that is no more than proposed,
# with `_ANY` and `_LIST` for Kubernetes' types that our cluster does not use; `rayStartParams` are required as in older
# releases. Of the pods' templates there is what our cluster has: for a further field, look up what the definition says
# of it.

_CONTAINERS = _list(
    _fields(
        "name",
        name=_STR,
        image=_STR,
        command=_list(_STR),
        args=_list(_STR),
        env=_list(
            _fields(
                "name",
                name=_STR,
                value=_STR,
                valueFrom=_fields(
                    secretKeyRef=_fields("key", name=_STR, key=_STR),
                    configMapKeyRef=_fields("key", name=_STR, key=_STR),
                    fieldRef=_fields("fieldPath", fieldPath=_STR),
                ),
            ),
            "name",
        ),
        ports=_list(_fields("containerPort", name=_STR, containerPort=_INT), "containerPort", "protocol"),
        **dict.fromkeys(
            ("startupProbe", "readinessProbe", "livenessProbe"),
            _fields(
                grpc=_fields("port", port=_INT),
                tcpSocket=_fields("port", port={"type": ["integer", "string"]}),
                periodSeconds=_INT,
                timeoutSeconds=_INT,
                failureThreshold=_INT,
            ),
        ),
        resources=_fields(requests=_QUANTITIES, limits=_QUANTITIES),
        securityContext=_fields(
            allowPrivilegeEscalation=_BOOL,
            readOnlyRootFilesystem=_BOOL,
            capabilities=_fields(drop=_list(_STR)),
        ),
        volumeMounts=_list(_fields("mountPath name", name=_STR, mountPath=_STR, readOnly=_BOOL), "mountPath"),
    ),
    "name",
)

_TEMPLATE = _fields(
    metadata=_fields(labels=_STRINGS),
    spec=_fields(
        "containers",
        automountServiceAccountToken=_BOOL,
        terminationGracePeriodSeconds=_INT,
        securityContext=_fields(
            runAsNonRoot=_BOOL,
            runAsUser=_INT,
            runAsGroup=_INT,
            fsGroup=_INT,
            fsGroupChangePolicy=_STR,
            seccompProfile=_fields("type", type=_STR),
        ),
        initContainers=_CONTAINERS,
        containers=_CONTAINERS,
        volumes=_list(
            _fields(
                "name",
                name=_STR,
                emptyDir=_fields(medium=_STR, sizeLimit=_QUANTITY),
                secret=_fields(secretName=_STR, defaultMode=_INT),
                persistentVolumeClaim=_fields("claimName", claimName=_STR, readOnly=_BOOL),
            ),
            "name",
        ),
    ),
)

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
            template=_TEMPLATE,
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
                template=_TEMPLATE,
                rayStartParams=_STRINGS,
                scaleStrategy=_fields(workersToDelete={"type": "array", "items": _STR}),
                resources=_STRINGS,
                labels=_STRINGS,
            ),
        },
    ),
)


def _no_two_alike(_: Any, keys: Sequence[str], things: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    if not keys or not isinstance(things, list):  # which is another's complaint
        return
    seen = [[thing.get(key) for key in keys] for thing in things if isinstance(thing, dict)]
    for number, values in enumerate(seen):
        if values in seen[:number]:
            yield jsonschema.ValidationError(f"two of a list have the same {' and '.join(keys)}: {values}")


_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"keys": _no_two_alike})


def manifests(folder: Path = DEPLOY / "kubernetes" / "base") -> list[dict[str, Any]]:
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
    found = [error.message for error in _Validator(RAY_CLUSTER).iter_errors(thing)]
    if not found:
        for template in templates(thing):
            found += _kubernetes_problems(
                {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
            )
    return found


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
    closed = _strict(schema)
    closed["properties"]["metadata"] = {}  # Kubernetes' own; a definition says nothing of it
    return [f"{error.json_path}: {error.message}" for error in _Validator(closed).iter_errors(thing)]


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
    if isinstance(schema.get("x-kubernetes-list-map-keys"), list):
        closed["keys"] = schema["x-kubernetes-list-map-keys"]
    return closed


def named(kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind, by name."""
    return {thing["metadata"]["name"]: thing for thing in manifests() if thing["kind"] == kind}


def volumes(kind: str) -> list[dict[str, Any]]:
    """The volumes of a kind of all of the cluster's pods."""
    return [v[kind] for template in templates(ray_cluster()) for v in template["spec"]["volumes"] if kind in v]


def group_of(name: str, cluster: dict[str, Any]) -> dict[str, Any]:
    """A group's entry, its pod's specification, and the one container that runs in it."""
    (group,) = (each for each in cluster["spec"]["workerGroupSpecs"] if each["groupName"] == name)
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    return {"group": group, "container": container, "pod": pod}


def cloud_group(cluster: dict[str, Any]) -> dict[str, Any]:
    """The group of the machines that take workers, as `group_of` gives it."""
    return group_of("cloud", cluster)


def owner_group(cluster: dict[str, Any]) -> dict[str, Any]:
    """The group of the owner's machine."""
    return group_of("owner", cluster)


def environments_of(cluster: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The variables of each of Ray's containers, the autoscaler's among them."""
    ours = [template["spec"]["containers"][0]["env"] for template in templates(cluster)]
    return [*ours, cluster["spec"]["autoscalerOptions"]["env"]]


def environment_of(cluster: dict[str, Any]) -> dict[str, str]:
    """What all of Ray's containers have in common."""
    first, *others = environments_of(cluster)
    assert all(other == first for other in others)
    return {entry["name"]: entry.get("value", "") for entry in first}
