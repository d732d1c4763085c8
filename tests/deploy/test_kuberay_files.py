"""deploy/kuberay is what KubeRay's `ray.io/v1` describes, as far as it is used here. An unknown field is an
error: an API server may drop it in silence.

Source: KubeRay, ray-operator/apis/ray/v1/raycluster_types.go and rayjob_types.go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

KUBERAY = Path(__file__).parents[2] / "deploy/kuberay"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    name: str


class Container(Strict):
    name: str
    image: str
    resources: dict[Literal["requests", "limits"], dict[str, str]]
    ports: list[dict[str, str | int]] = []
    volume_mounts: list[dict[str, str]] = []


class PodSpec(Strict):
    containers: list[Container]
    security_context: dict[str, int] = {}
    affinity: dict[str, Any] = {}
    volumes: list[dict[str, Any]] = []


class PodTemplate(Strict):
    metadata: dict[Literal["labels"], dict[str, str]] = {}
    spec: PodSpec


class HeadGroupSpec(Strict):
    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroupSpec(Strict):
    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    template: PodTemplate


class FaultTolerance(Strict):
    redis_address: str
    redis_password: dict[Literal["valueFrom"], dict[Literal["secretKeyRef"], dict[str, str]]]


class RayClusterSpec(Strict):
    ray_version: str
    enable_in_tree_autoscaling: bool
    auth_options: dict[Literal["mode"], Literal["token", "disabled"]]
    gcs_fault_tolerance_options: FaultTolerance
    head_group_spec: HeadGroupSpec
    worker_group_specs: list[WorkerGroupSpec]


class RayCluster(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJobSpec(Strict):
    cluster_selector: dict[str, str]
    entrypoint: str
    shutdown_after_job_finishes: bool
    backoff_limit: int


class RayJob(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / "raycluster.yaml").read_text()))


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [each for each in documents() if each["kind"] == kind]


def ray_cluster() -> RayCluster:
    (found,) = of_kind("RayCluster")
    return RayCluster.model_validate(found)


def test_each_broker_has_a_claim_that_stays_its_own() -> None:
    groups = ray_cluster().spec.worker_group_specs
    assert len(groups) == 3
    assert len({group.group_name for group in groups}) == len(groups)
    used = []
    for group in groups:
        assert (group.replicas, group.min_replicas, group.max_replicas) == (1, 1, 1), (
            "two pods would share a claim"
        )
        spec = group.template.spec
        (volume,) = spec.volumes
        used.append(volume["persistentVolumeClaim"]["claimName"])
        (container,) = spec.containers
        assert container.volume_mounts == [{"name": volume["name"], "mountPath": "/data"}]
        assert spec.security_context["fsGroup"] == 100
        (rule,) = spec.affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["labelSelector"]["matchLabels"].items() <= group.template.metadata["labels"].items()
    assert sorted(used) == sorted(each["metadata"]["name"] for each in of_kind("PersistentVolumeClaim"))
    assert len(set(used)) == len(used)


def test_the_head_holds_no_data_and_its_state_outlives_it() -> None:
    spec = ray_cluster().spec
    assert spec.head_group_spec.ray_start_params["num-cpus"] == "0"
    assert not spec.enable_in_tree_autoscaling
    host, port = spec.gcs_fault_tolerance_options.redis_address.split(":")
    (service,) = of_kind("Service")
    assert (service["metadata"]["name"], service["spec"]["ports"][0]["port"]) == (host, int(port))
    (redis,) = of_kind("StatefulSet")
    assert service["spec"]["selector"] == redis["spec"]["template"]["metadata"]["labels"]
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    secret = spec.gcs_fault_tolerance_options.redis_password["valueFrom"]["secretKeyRef"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == secret
    assert f"secret generic {secret['name']} " in (KUBERAY / "raycluster.yaml").read_text()
    assert "--appendonly" in container["args"]


def test_all_pods_have_the_image_with_raftlog() -> None:
    spec = ray_cluster().spec
    templates = [spec.head_group_spec.template, *(group.template for group in spec.worker_group_specs)]
    (image,) = {container.image for template in templates for container in template.spec.containers}
    dockerfile = (KUBERAY / "Dockerfile").read_text()
    assert f"-t {image} " in dockerfile
    assert "pip install --no-cache-dir ./raftlog-src" in dockerfile
    assert f"FROM rayproject/ray:{spec.ray_version}-py311" in dockerfile


def test_the_image_is_made_of_files_that_are_there() -> None:
    root = KUBERAY.parents[1]
    for line in (KUBERAY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
            assert all((root / source).exists() for source in sources), line


def test_the_job_runs_on_that_cluster_and_leaves_it() -> None:
    job = RayJob.model_validate(yaml.safe_load((KUBERAY / "rayjob.yaml").read_text()))
    assert job.spec.cluster_selector == {"ray.io/cluster": ray_cluster().metadata.name}
    assert not job.spec.shutdown_after_job_finishes
    assert job.spec.backoff_limit == 0, "with another number KubeRay refuses a clusterSelector"


def test_an_unknown_field_is_refused() -> None:
    (found,) = of_kind("RayCluster")
    found["spec"]["workerGroupSpecs"][0]["replica"] = 1
    with pytest.raises(ValidationError, match="replica"):
        RayCluster.model_validate(found)
