"""The Kubernetes manifests against schemas, and the rules of the house. No cluster is asked."""

import copy
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.files import manifests, of_kind
from tests.cluster.kuberay_v1_6 import SCHEMAS, pod_templates

VERSION = ".".join(kubernetes_validate.latest_version().split(".")[:2])
RAY = of_kind("RayCluster", "RayJob")
TEMPLATES = [(f"{name}-{place}", template) for name, each in RAY for place, template in pod_templates(each)]
CLUSTERS = [(name, each["spec"].get("rayClusterSpec", each["spec"])) for name, each in RAY]
JOBS = of_kind("RayJob")


def names(found: list[Any]) -> list[str]:
    return [each[0] for each in found]


def check_pod(template: dict[str, Any]) -> None:
    """Raise where Kubernetes would not take a pod of this template, or would drop a key in silence."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | template.get("metadata", {})}
    kubernetes_validate.validate(pod | {"spec": template["spec"]}, VERSION, strict=True)


def test_every_kind_has_a_schema() -> None:
    for name, each in manifests():
        if each["kind"] in SCHEMAS:
            jsonschema.validate(each, SCHEMAS[each["kind"]])
        else:
            kubernetes_validate.validate(each, VERSION, strict=True)
            assert each["kind"] in ("Namespace", "PersistentVolumeClaim", "NetworkPolicy"), name


@pytest.mark.parametrize(("_", "template"), TEMPLATES, ids=names(TEMPLATES))
def test_kubernetes_takes_the_pods(_: str, template: dict[str, Any]) -> None:
    check_pod(template)


@pytest.mark.parametrize(
    "path",
    [
        "spec.workerGroupSpec",
        "spec.authOptions.secretname",
        "spec.autoscalerOptions.idleTimeoutSecond",
        "spec.headGroupSpec.rayStartParam",
        "spec.workerGroupSpecs.0.minReplica",
    ],
)
def test_a_misspelt_key_of_kuberay_is_found(path: str) -> None:
    manifest = copy.deepcopy(of_kind("RayCluster")[0][1])
    *way, last = path.split(".")
    place = manifest
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[last] = "1"
    with pytest.raises(jsonschema.ValidationError, match=last):
        jsonschema.validate(manifest, SCHEMAS["RayCluster"])


def test_a_misspelt_key_of_a_job_and_of_a_pod_is_found() -> None:
    job = copy.deepcopy(JOBS[0][1])
    job["spec"]["shutdownAfterJobFinish"] = True
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
        jsonschema.validate(job, SCHEMAS["RayJob"])
    template = copy.deepcopy(TEMPLATES[0][1])
    template["spec"]["nodeSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectors"):
        check_pod(template)


@pytest.mark.parametrize(("_", "cluster"), CLUSTERS, ids=names(CLUSTERS))
def test_a_cluster_keeps_to_the_rules(_: str, cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token", "secretName": "finetune-token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["serviceType"] == "ClusterIP"
    assert "spot" not in str(head["template"]["spec"].get("nodeSelector", {}))
    assert "tolerations" not in head["template"]["spec"]
    if cluster["enableInTreeAutoscaling"]:
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] > 600
        assert all(group["minReplicas"] == group["replicas"] == 0 for group in cluster["workerGroupSpecs"])


def test_ray_in_the_manifests_is_the_one_of_the_constraints() -> None:
    from tests.conftest import ROOT

    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert all(f"ray=={cluster['rayVersion']}" in pins for _, cluster in CLUSTERS)


@pytest.mark.parametrize(("place", "template"), TEMPLATES, ids=names(TEMPLATES))
def test_a_pod_keeps_to_the_rules(place: str, template: dict[str, Any]) -> None:
    spec = template["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
    for variable in container.get("env", []):
        if variable["name"].endswith(("TOKEN", "KEY")):
            assert "value" not in variable and variable["valueFrom"]["secretKeyRef"]["name"]
    if place.endswith("submitter"):
        return
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert env["LAUNCHER_RUN_ROOT"] == "/shared/runs"
    assert env["LAUNCHER_DEVICE"] == "gpu", (
        "while no GPU node is there, nothing else tells a run to wait for one"
    )
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in spec["volumes"]}
    assert volumes[mounts["/shared"]]["persistentVolumeClaim"] == {"claimName": "finetune-shared"}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert volumes[mounts["/local_nvme"]]["emptyDir"]["sizeLimit"]
    assert set(mounts.values()) == set(volumes)
    if "nvidia.com/gpu" in container["resources"]["limits"]:
        assert any(each["key"] == "nvidia.com/gpu" for each in spec["tolerations"])


@pytest.mark.parametrize(("_", "job"), JOBS, ids=names(JOBS))
def test_a_job_goes_away_and_can_be_tried_again(_: str, job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] <= 600
    assert spec["backoffLimit"] > 0 and spec["activeDeadlineSeconds"] > 0
    assert f"--name {job['metadata']['name']} " in spec["entrypoint"], "another try would be another run"
    assert "--ds ds_configs/zero3.json" in spec["entrypoint"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}, "and no secret"
    assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3


def test_the_job_makes_the_cluster_that_stays() -> None:
    (cluster,) = (each for _, each in of_kind("RayCluster"))
    job = next(each for name, each in JOBS if name == "rayjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_kueue_gets_a_job_of_fixed_size_within_its_quota() -> None:
    job = next(each for name, each in JOBS if name == "kueue.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    assert (
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        == of_kind("LocalQueue")[0][1]["metadata"]["name"]
    )
    assert job["spec"]["suspend"] and cluster["enableInTreeAutoscaling"] is False
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0
    queue = of_kind("ClusterQueue")[0][1]["spec"]
    (resources,) = queue["resourceGroups"]
    flavors = {each["metadata"]["name"] for _, each in of_kind("ResourceFlavor")}
    assert {each["name"] for each in resources["flavors"]} == flavors
    gpus = sum(
        group["replicas"] * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        for group in cluster["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    )
    for flavor in resources["flavors"]:
        assert [each["name"] for each in flavor["resources"]] == resources["coveredResources"]
        quota = {each["name"]: each["nominalQuota"] for each in flavor["resources"]}
        assert flavor["name"] == "finetune-cpu" or int(quota["nvidia.com/gpu"]) >= gpus


def test_nobody_but_the_cluster_its_submitter_and_kuberay_gets_in() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for _, each in of_kind("NetworkPolicy")}
    assert policies["finetune-deny"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule["from"], f"{name}: a rule without `from` lets everyone in"
            assert all("ipBlock" not in each and each["podSelector"] for each in rule["from"])
    (jobs,) = policies["finetune-jobs"]["ingress"]
    assert [each["port"] for each in jobs["ports"]] == [8265]
    parts = {each["metadata"]["labels"]["app.kubernetes.io/component"] for _, each in TEMPLATES}
    assert parts == {"head", "worker", "submitter"}
