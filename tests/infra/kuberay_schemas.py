"""Schemas of RayCluster and RayJob, as KubeRay's CRDs come in no package.

They are written from KubeRay's documentation, of the fields that infra/ uses and no others: a misspelt field, which a
cluster would drop in silence, is refused.
"""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def _mapping(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _mapping(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=_mapping("name", name={**_TEXT, "maxLength": 41}, labels=_TEXTS),  # names of pods are made of it
        spec=spec,
    )


_TEMPLATE = _mapping("spec", metadata=_mapping("labels", labels=_TEXTS), spec={"type": "object"})
_HEAD = _mapping("template", serviceType={"enum": ["ClusterIP"]}, rayStartParams=_TEXTS, template=_TEMPLATE)
_WORKERS = _mapping(
    "groupName minReplicas maxReplicas template",
    groupName={**_TEXT, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    numOfHosts={"type": "integer", "minimum": 1},
    rayStartParams=_TEXTS,
    template=_TEMPLATE,
)
_CLUSTER = _mapping(
    "headGroupSpec",
    rayVersion=_TEXT,
    authOptions=_mapping("mode", mode={"enum": ["disabled", "token"]}),
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
)
_JOB = _mapping(
    "entrypoint rayClusterSpec",
    entrypoint=_TEXT,
    rayClusterSpec=_CLUSTER,
    submitterPodTemplate=_TEMPLATE,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=_COUNT,
    backoffLimit=_COUNT,
)
SCHEMAS = {"RayCluster": _resource("RayCluster", _CLUSTER), "RayJob": _resource("RayJob", _JOB)}
