"""Manifests against what the Kubernetes project publishes for several of its releases."""

from typing import Any

import kubernetes_validate

VERSIONS = ("1.25", "1.32", "1.37")  # the oldest and the newest that the package has, and one between


def check(manifest: dict[str, Any]) -> None:
    """Raises ValidationError: a field is unknown, missing or of the wrong type."""
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    """A pod template, for it has no schema of its own."""
    metadata = {"name": "a-pod", **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
