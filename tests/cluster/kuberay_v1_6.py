"""The fields of KubeRay 1.6 (ray.io/v1) and of Kueue (v1beta2) as JSON schemas, written from their API references.

Pods, services and the like are left open here: `pod_templates` hands them to Kubernetes' own schemas.
"""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SECONDS: Schema = {"type": "integer", "minimum": 1}
NUMBER: Schema = {"type": "number", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
OBJECT: Schema = {"type": "object"}
OBJECTS: Schema = {"type": "array", "items": OBJECT}


def one_of(*values: str) -> Schema:
    """Return the schema of a word out of these."""
    return {"enum": list(values)}


def fields(required: str = "", **properties: Schema) -> Schema:
    """Return the schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def a_list(items: Schema) -> Schema:
    """Return the schema of a list that is not empty."""
    return {"type": "array", "items": items, "minItems": 1}


QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
METADATA = fields("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
MANAGED_BY = one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
TEMPLATE = fields("spec", metadata=OBJECT, spec=OBJECT)
REDIS = fields(value=TEXT, valueFrom=OBJECT)

AUTOSCALER = fields(
    resources=OBJECT,
    image=TEXT,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    securityContext=OBJECT,
    idleTimeoutSeconds=COUNT,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    env=OBJECTS,
    envFrom=OBJECTS,
    volumeMounts=OBJECTS,
)

HEAD = fields(
    "template rayStartParams",
    template=TEMPLATE,
    headService=OBJECT,
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
)

GROUP = fields(
    "groupName template rayStartParams minReplicas maxReplicas",
    suspend=FLAG,
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=TEMPLATE,
    scaleStrategy=fields(workersToDelete={"type": "array", "items": TEXT}),
    numOfHosts=SECONDS,
)

CLUSTER_SPEC = fields(
    "headGroupSpec rayVersion",
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    authOptions=fields(mode=one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    suspend=FLAG,
    managedBy=MANAGED_BY,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=fields(
        "redisAddress",
        redisUsername=REDIS,
        redisPassword=REDIS,
        externalStorageNamespace=TEXT,
        redisAddress=TEXT,
    ),
    headGroupSpec=HEAD,
    rayVersion=TEXT,
    workerGroupSpecs={"type": "array", "items": GROUP},
)

DELETION = one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")

JOB_SPEC = fields(
    activeDeadlineSeconds=SECONDS,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
    submitterPodTemplate=TEMPLATE,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=fields(backoffLimit=COUNT),
    managedBy=MANAGED_BY,
    deletionStrategy=fields(
        onSuccess=fields(policy=DELETION), onFailure=fields(policy=DELETION), deletionRules=OBJECTS
    ),
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=COUNT,
    preRunningDeadlineSeconds=SECONDS,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)

TAINT = fields(
    "key effect", key=TEXT, value=TEXT, effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute")
)
TOLERATION = fields(
    key=TEXT,
    operator=one_of("Exists", "Equal"),
    value=TEXT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
    tolerationSeconds=COUNT,
)
FLAVOR_SPEC = fields(
    nodeLabels=TEXTS, nodeTaints=a_list(TAINT), tolerations=a_list(TOLERATION), topologyName=TEXT
)
QUOTA = fields(
    "name nominalQuota", name=TEXT, nominalQuota=QUANTITY, borrowingLimit=QUANTITY, lendingLimit=QUANTITY
)
GROUPS = a_list(
    fields(
        "coveredResources flavors",
        coveredResources=a_list(TEXT),
        flavors=a_list(fields("name resources", name=TEXT, resources=a_list(QUOTA))),
    )
)
CLUSTER_QUEUE_SPEC = fields(
    resourceGroups=GROUPS,
    cohortName=TEXT,
    queueingStrategy=one_of("StrictFIFO", "BestEffortFIFO"),
    namespaceSelector=OBJECT,
    flavorFungibility=OBJECT,
    preemption=fields(
        reclaimWithinCohort=one_of("Never", "LowerPriority", "Any"),
        borrowWithinCohort=OBJECT,
        withinClusterQueue=one_of("Never", "LowerPriority", "LowerOrNewerEqualPriority"),
    ),
    admissionChecksStrategy=OBJECT,
    stopPolicy=one_of("None", "Hold", "HoldAndDrain"),
    fairSharing=OBJECT,
    admissionScope=OBJECT,
)


def resource(group: str, kind: str, spec: Schema) -> Schema:
    """Return the schema of a whole object."""
    return fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": group},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


KUEUE = "kueue.x-k8s.io/v1beta2"
SCHEMAS: dict[str, Schema] = {
    "RayCluster": resource("ray.io/v1", "RayCluster", CLUSTER_SPEC),
    "RayJob": resource("ray.io/v1", "RayJob", JOB_SPEC),
    "ResourceFlavor": resource(KUEUE, "ResourceFlavor", FLAVOR_SPEC),
    "ClusterQueue": resource(KUEUE, "ClusterQueue", CLUSTER_QUEUE_SPEC),
    "LocalQueue": resource(
        KUEUE,
        "LocalQueue",
        fields("clusterQueue", clusterQueue=TEXT, stopPolicy=one_of("None", "Hold", "HoldAndDrain")),
    ),
}


def pod_templates(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pod templates of a RayCluster or RayJob, each with its place."""
    spec = manifest["spec"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    cluster = spec.get("rayClusterSpec", spec)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster.get("workerGroupSpecs", []):
        yield group["groupName"], group["template"]
