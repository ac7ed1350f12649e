"""The files for `ray up`: Ray's own schema and preparation, and the rules of the house. No cloud is asked."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from ray.autoscaler._private.util import validate_config

from tests.cluster.files import CLOUDS, CLUSTER, prepared, ray_up, text_of
from tests.cluster.policy import is_spot, problems

ALL = [*CLOUDS, "machines"]


@pytest.mark.parametrize("name", ALL)
def test_ray_takes_it(name: str) -> None:
    validate_config(prepared(name))


@pytest.mark.parametrize("name", ALL)
def test_ray_refuses_a_misspelt_key(name: str) -> None:
    config = prepared(name)
    config["idle_timeout_minute"] = 5
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(config)


@pytest.mark.parametrize("name", ALL)
def test_it_keeps_to_the_rules(name: str) -> None:
    assert problems(prepared(name), text_of(CLUSTER / f"{name}.yaml")) == []


@pytest.mark.parametrize("name", ALL)
def test_ray_adds_no_commands_of_its_own(name: str) -> None:
    """Ray's defaults would install another version of it, in whatever Python is there."""
    config = prepared(name)
    assert [config[f"{key}setup_commands"] for key in ("", "head_", "worker_")] == [[], [], []]


@pytest.mark.parametrize("name", CLOUDS)
def test_each_gpu_type_is_there_as_spot_and_on_demand(name: str) -> None:
    types = {
        key: kind for key, kind in ray_up(name)["available_node_types"].items() if key not in ("head", "cpu")
    }
    pairs = {key.removesuffix("-spot") for key in types}
    assert set(types) == pairs | {f"{key}-spot" for key in pairs}
    for key in pairs:
        spot, on_demand = types[f"{key}-spot"], types[key]
        assert spot["resources"] == on_demand["resources"]
        assert spot["max_workers"] == on_demand["max_workers"]
        assert spot["priority"] > on_demand["priority"]
        assert (spot["labels"]["market"], on_demand["labels"]["market"]) == ("spot", "on-demand")
    assert {kind["resources"]["GPU"] for kind in types.values()} >= {1, 4, 8}


def start_without(word: str) -> Callable[[dict[str, Any]], None]:
    """Return a change that takes a word out of the workers' start."""

    def change(config: dict[str, Any]) -> None:
        config["worker_start_ray_commands"] = [
            command.replace(word, "") for command in config["worker_start_ray_commands"]
        ]

    return change


def head_market(config: dict[str, Any]) -> None:
    config["available_node_types"]["head"]["node_config"]["InstanceMarketOptions"] = {"MarketType": "spot"}


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("CPUs or GPUs for work", lambda c: c["available_node_types"]["head"]["resources"].update(CPU=2)),
    ("head is a spot machine", head_market),
    ("stays", lambda c: c["available_node_types"]["h100x8"].update(min_workers=1)),
    ("resources are not said", lambda c: c["available_node_types"]["h100x8"].update(resources={})),
    ("name and its market", lambda c: c["available_node_types"]["h100x8"]["node_config"].update(
        InstanceMarketOptions={"MarketType": "spot"})),
    ("idle before", lambda c: c.update(idle_timeout_minutes=5)),
    ("RAY_AUTH_MODE=token is not exported", start_without("RAY_AUTH_MODE=token")),
    ("RAY_AUTH_TOKEN_PATH= is not exported", start_without("RAY_AUTH_TOKEN_PATH=")),
    ("one thread for all", start_without("unset OMP_NUM_THREADS")),
    ("LAUNCHER_RUN_ROOT", start_without("LAUNCHER_RUN_ROOT=/shared/runs")),
    ("/local_nvme is not mounted", lambda c: c["docker"].update(run_options=["--volume /shared:/shared"])),
    ("no token on the nodes", lambda c: c.update(file_mounts={})),
    ("public addresses", lambda c: c["provider"].update(use_internal_ips=False)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "change"), CHANGES, ids=[said for said, _ in CHANGES])
def test_the_rules_find_a_fault(said: str, change: Callable[[dict[str, Any]], Any]) -> None:
    config = copy.deepcopy(prepared("aws"))
    change(config)
    assert any(said in each for each in problems(config, text_of(CLUSTER / "aws.yaml")))


@pytest.mark.parametrize(
    "line",
    [
        "  CidrIp: 0.0.0.0/0",
        "  - export RAY_AUTH_TOKEN=abc",
        "  token: 3f786850e387550fdab836ed7e6dc881de23001b",
        "  HF: hf_abcdefghijklmnopqrstuvwx",
        "  key: AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_the_rules_find_what_must_not_stand_there(line: str) -> None:
    text = text_of(CLUSTER / "aws.yaml")
    assert problems(prepared("aws"), f"{text}\n{line}\n")


def test_spot_is_seen_in_every_cloud() -> None:
    for name in CLOUDS:
        types = ray_up(name)["available_node_types"]
        assert is_spot(types["h100x8-spot"]["node_config"]) and not is_spot(types["h100x8"]["node_config"])


def test_the_heads_role_starts_machines_and_ends_its_own_only() -> None:
    policy = json.loads(text_of(CLUSTER / "nodes" / "aws-head-policy.json"))
    for statement in policy["Statement"]:
        for action in statement["Action"]:
            assert not action.endswith(":*") and action != "*"
            if "Terminate" in action or "Stop" in action:
                tags = statement["Condition"]["StringEquals"]
                assert tags == {"ec2:ResourceTag/ray-cluster-name": ray_up("aws")["cluster_name"]}
