"""Node types against what the clouds' own interfaces take: EC2 by a simulated one, Google's and Azure's field lists."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import googleapiclient
import pytest
import ray.autoscaler._private
from moto import mock_aws

from tests.cluster.files import prepared, ray_up

PRIVATE = Path(ray.autoscaler._private.__file__).parent
DISCOVERY = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Yield aws.yaml as Ray sets it up in a simulated account, with what the README makes there once."""
    from ray.autoscaler._private.aws.config import bootstrap_aws

    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            patch.setenv(name, "simulated")
        patch.setenv("HOME", str(home))  # Ray writes the key pair that it makes into ~/.ssh
        ec2 = boto3.client("ec2", region_name="us-east-1")
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/17", AvailabilityZone="us-east-1a")
        group = ec2.create_security_group(GroupName="finetune", Description="finetune", VpcId=vpc)
        for role in ("finetune-head", "finetune-worker"):
            boto3.client("iam").create_instance_profile(InstanceProfileName=role)
        found = {
            "REPLACE_SUBNET": subnet["Subnet"]["SubnetId"],
            "REPLACE_SECURITY_GROUP": group["GroupId"],
            "REPLACE_AMI": ec2.describe_images()["Images"][0]["ImageId"],
        }
        text = json.dumps(prepared("aws"))
        for word, value in found.items():
            text = text.replace(word, value)
        yield bootstrap_aws(json.loads(text))


def start(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Start one node as Ray would, and return it as EC2 has it."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: name}
    nodes = provider.create_node(config["available_node_types"][name]["node_config"], tags, 1)
    ec2 = boto3.client("ec2", region_name="us-east-1")
    return ec2.describe_instances(InstanceIds=list(nodes))["Reservations"][0]["Instances"][0]


@pytest.mark.parametrize("name", sorted(ray_up("aws")["available_node_types"]))
def test_ray_starts_each_type_at_a_simulated_ec2(aws: dict[str, Any], name: str) -> None:
    node = start(aws, name)
    asked = aws["available_node_types"][name]["node_config"]
    security_group = aws["available_node_types"]["head"]["node_config"]["SecurityGroupIds"][0]
    assert node["InstanceType"] == asked["InstanceType"]
    cards = node["NetworkInterfaces"]
    assert {group["GroupId"] for card in cards for group in card["Groups"]} == {security_group}
    assert (node.get("InstanceLifecycle") == "spot") == name.endswith("-spot")
    # Ray made no group of its own: that one would let SSH in from everywhere.
    groups = boto3.client("ec2", region_name="us-east-1").describe_security_groups()["SecurityGroups"]
    assert {group["GroupName"] for group in groups} == {"default", "finetune"}
    assert not boto3.client("iam").list_roles()["Roles"]


def test_a_misspelt_parameter_of_ec2_is_found(aws: dict[str, Any]) -> None:
    config = copy.deepcopy(aws)
    config["available_node_types"]["h100x8"]["node_config"]["Placement"] = {"GroupNames": "finetune"}
    with pytest.raises(botocore.exceptions.ParamValidationError, match="GroupNames"):
        start(config, "h100x8")


@pytest.mark.parametrize(("name", "cards"), [("h100x8-spot", 32), ("a100x8", 4)])
def test_every_network_card_is_used_once(name: str, cards: int) -> None:
    interfaces = ray_up("aws")["available_node_types"][name]["node_config"]["NetworkInterfaces"]
    assert [each["NetworkCardIndex"] for each in interfaces] == list(range(cards))
    assert [each["DeviceIndex"] for each in interfaces] == [0] + [1] * (cards - 1)


def wrong_fields(value: Any, schema: dict[str, Any], schemas: dict[str, Any], place: str) -> list[str]:
    """Return what of a value Google's description of its interface does not know."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kind = schema["type"]
    if kind == "array":
        if not isinstance(value, list):
            return [f"{place}: no list"]
        return [
            wrong
            for index, each in enumerate(value)
            for wrong in wrong_fields(each, schema["items"], schemas, f"{place}[{index}]")
        ]
    if kind == "object":
        fields = schema.get("properties", {})
        return [
            wrong
            for key, each in value.items()
            for wrong in (
                wrong_fields(each, fields[key], schemas, f"{place}.{key}")
                if key in fields
                else [f"{place}.{key}: unknown"]
            )
        ]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{place}: {value} is none of {schema['enum']}"]
    types = {"boolean": bool, "string": (str, int), "integer": int}
    return [] if isinstance(value, types[kind]) else [f"{place}: {value!r} is no {kind}"]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """Return Google's description of its compute interface, as its own client carries it."""
    return json.loads(DISCOVERY.read_text(encoding="utf-8"))["schemas"]


@pytest.mark.parametrize("name", sorted(ray_up("gcp")["available_node_types"]))
def test_google_knows_every_field(schemas: dict[str, Any], name: str) -> None:
    node = ray_up("gcp")["available_node_types"][name]["node_config"]
    assert wrong_fields(node, schemas["Instance"], schemas, name) == []
    assert all("accessConfigs" not in each for each in node["networkInterfaces"]), "a public address"
    if name not in ("head", "cpu"):
        assert node["scheduling"]["onHostMaintenance"] == "TERMINATE"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("schedulling", {}, "schedulling: unknown"),
        ("scheduling", {"provisioningModel": "SPOTTY"}, "SPOTTY is none of"),
        ("disks", {}, "no list"),
    ],
)
def test_a_wrong_field_of_google_is_found(schemas: dict[str, Any], key: str, value: Any, said: str) -> None:
    node = ray_up("gcp")["available_node_types"]["h100x8"]["node_config"] | {key: value}
    assert [wrong for wrong in wrong_fields(node, schemas["Instance"], schemas, "x") if said in wrong]


def azure_unknown(node: dict[str, Any]) -> set[str]:
    """Return the parameters that Ray's own template does not have. Ray itself takes out availability_zone."""
    template = json.loads((PRIVATE / "_azure" / "azure-vm-template.json").read_text(encoding="utf-8"))
    return set(node["azure_arm_parameters"]) - set(template["parameters"]) - {"availability_zone"}


@pytest.mark.parametrize("name", sorted(ray_up("azure")["available_node_types"]))
def test_rays_template_for_azure_has_every_parameter(name: str) -> None:
    assert azure_unknown(ray_up("azure")["available_node_types"][name]["node_config"]) == set()


def test_a_misspelt_parameter_of_azure_is_found() -> None:
    assert azure_unknown({"azure_arm_parameters": {"vmSizes": "x"}}) == {"vmSizes"}


def test_the_network_made_before_ray_has_the_names_that_ray_will_use() -> None:
    """Ray keeps the rule on the subnet only where it finds network and subnet under its own names."""
    from tests.cluster.files import README

    config = ray_up("azure")
    template = (PRIVATE / "_azure" / "azure-config-template.json").read_text(encoding="utf-8")
    assert "'ray-', parameters('clusterId'), '-vnet'" in template
    assert "'ray-', parameters('clusterId'), '-subnet'" in template
    stem = f"ray-{config['cluster_name']}-{config['provider']['unique_id']}"
    assert f"vnet create --resource-group finetune --name {stem}-vnet" in README
    assert f"--subnet-name {stem}-subnet" in README
    assert config["provider"]["subnet_mask"] in README
