"""Plans for Kubernetes and what is rendered of them, read back."""

from pathlib import Path
from typing import Any

import yaml

from omni.deployment.backends import remote_backend
from omni.deployment.load import load_plan
from omni.deployment.plan_types import LaunchPlan

from ...samples import content, machine, model_folder, put

Manifest = dict[str, Any]
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
IMAGE = "registry.example/omni:1"


def deployment_file(folder: Path, data: Manifest, name: str = "chat.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def in_cluster(prefill: int = 1, decode: int = 1) -> Manifest:
    """A deployment file's content, for a model that this machine has not."""
    data = put(content(prefill, decode), "services/docker_image", IMAGE)
    return put(data, "backend", "kubernetes")


def on_devices(prefill_hosts: str = "10.0.0.1", decode_hosts: str = "10.0.0.2", devices: str = "0,1,2,3") -> Manifest:
    data = in_cluster()
    for role, hosts in (("prefill", prefill_hosts), ("decode", decode_hosts)):
        put(data, f"deployment/{role}/group1/hosts", hosts)
        put(data, f"deployment/{role}/group1/ascend_rt_visible_devices", devices)
    return data


def with_known_model(folder: Path, data: Manifest) -> Manifest:
    return put(data, "services/model_path", str(model_folder(folder / "model")))


def plan_of(folder: Path, data: Manifest, name: str = "chat.yaml") -> LaunchPlan:
    return load_plan(deployment_file(folder, data, name), machine(cores=4, gib=64))


class Rendered:
    """What a plan became, as `kubectl apply -f` would read it."""

    def __init__(self, folder: Path, plan: LaunchPlan) -> None:
        self.files = remote_backend("kubernetes").render(plan, folder)
        texts = [file.read_text() for file in self.files if file.suffix == ".yaml"]
        self.manifests: list[Manifest] = [part for text in texts for part in yaml.load_all(text, Loader)]

    def of_kind(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def named(self, kind: str, ending: str) -> Manifest:
        (manifest,) = [m for m in self.of_kind(kind) if m["metadata"]["name"].endswith(ending)]
        return manifest

    def pod(self, ending: str) -> Manifest:
        """Of the Deployment with that name."""
        spec: Manifest = self.named("Deployment", ending)["spec"]["template"]["spec"]
        return spec

    def templates(self) -> list[Manifest]:
        """Every pod template, of Deployments and LeaderWorkerSets."""
        sets = [lws["spec"]["leaderWorkerTemplate"] for lws in self.of_kind("LeaderWorkerSet")]
        of_sets = [each[name] for each in sets for name in ("leaderTemplate", "workerTemplate")]
        return [*(m["spec"]["template"] for m in self.of_kind("Deployment")), *of_sets]

    def config(self) -> Manifest:
        """The deployment file that the pods read."""
        data: Manifest = yaml.safe_load(self.config_text())
        return data

    def config_text(self) -> str:
        (config_map,) = self.of_kind("ConfigMap")
        return str(config_map["data"]["deployment.yaml"])


def rendered(folder: Path, data: Manifest, name: str = "chat.yaml") -> Rendered:
    return Rendered(folder / "out", plan_of(folder, data, name))


def engine(pod: Manifest) -> Manifest:
    """The only container that stays."""
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container
