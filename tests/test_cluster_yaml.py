"""cluster.yaml as Ray's own launcher reads it, and what that does not look at."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


@pytest.fixture(scope="module")
def cluster(repository: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((repository / "cluster.yaml").read_text())
    return found


def validated(cluster: dict[str, Any]) -> dict[str, Any]:
    """The config as `ray up` completes it; raises what `ray up` would."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_cluster_is_valid_by_rays_own_schema(cluster: dict[str, Any]) -> None:
    assert validated(cluster)["available_node_types"].keys() == {"head", "gpu"}


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        (("idle_timeout_minute",), 5, jsonschema.ValidationError),
        (("auth", "user"), "ubuntu", jsonschema.ValidationError),
        (("max_workers",), "eight", jsonschema.ValidationError),
        (("head_node_type",), "cpu", ValueError),
        (("available_node_types", "gpu", "min_workers"), 9, ValueError),
    ],
    ids=["unknown key", "unknown nested key", "wrong type", "unknown head type", "min above max"],
)
def test_a_planted_fault_is_refused_by_rays_own_schema(
    cluster: dict[str, Any], path: tuple[str, ...], value: object, error: type[Exception]
) -> None:
    broken = copy.deepcopy(cluster)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(error):
        validated(broken)


def faults(cluster: dict[str, Any], ray_version: str) -> list[str]:
    """What is wrong although Ray's schema accepts it."""
    nodes = cluster["available_node_types"]
    found = []
    if not re.fullmatch(r"[a-z][a-z0-9-]*", cluster.get("cluster_name", "")):
        found.append("cluster_name")
    for name, node in nodes.items():
        is_head = name == cluster["head_node_type"]
        config = node["node_config"]
        if not re.fullmatch(r"[a-z]+\d+[a-z]*\.(\d*x?large|metal)", config.get("InstanceType", "")):
            found.append(f"{name}: InstanceType")
        if not re.fullmatch(r"ami-[0-9a-f]{17}", config.get("ImageId", "")):
            found.append(f"{name}: ImageId")  # Ray's default image is too old for the pinned torch
        if (config.get("InstanceMarketOptions", {}).get("MarketType") == "spot") is is_head:
            found.append(f"{name}: spot")
        if bool(re.match(r"[gp]\d", config.get("InstanceType", ""))) is is_head:
            found.append(f"{name}: GPU")
        if not 0 <= node["min_workers"] <= node["max_workers"] <= cluster["max_workers"]:
            found.append(f"{name}: min and max")
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        if not image.startswith(f"rayproject/ray:{ray_version}-py311"):
            found.append(f"image {image}")
    if not any(option.endswith("RAY_AUTH_MODE=token") for option in cluster["docker"]["run_options"]):
        found.append("token asked for")
    if "/home/ray/.ray/auth_token" not in cluster["file_mounts"]:
        found.append("token copied")
    if not any("pip install" in command and "constraints.txt" in command for command in cluster["setup_commands"]):
        found.append("hpsearch installed")
    return found


@pytest.fixture(scope="module")
def ray_version(repository: Path) -> str:
    pin = re.search(r"^ray==(\S+)$", (repository / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pin is not None
    return pin[1]


def test_cluster_has_a_cpu_head_and_spot_gpu_workers_with_pinned_ray_and_a_token(
    cluster: dict[str, Any], ray_version: str
) -> None:
    assert faults(cluster, ray_version) == []


def test_faults_that_rays_schema_accepts_are_found_here(cluster: dict[str, Any]) -> None:
    broken = copy.deepcopy(cluster)
    del broken["cluster_name"]
    head, gpu = broken["available_node_types"]["head"], broken["available_node_types"]["gpu"]
    head["node_config"]["InstanceType"] = "m5"
    gpu["node_config"] |= {"InstanceType": "m5.2xlarge", "ImageId": "latest"}
    del gpu["node_config"]["InstanceMarketOptions"]
    gpu["max_workers"] = 99
    broken["docker"]["run_options"] = []
    del broken["file_mounts"]["/home/ray/.ray/auth_token"]
    broken["setup_commands"] = ["pip install ray"]
    validated(broken)
    assert faults(broken, "9.9.9") == [
        "cluster_name",
        "head: InstanceType",
        "gpu: ImageId",
        "gpu: spot",
        "gpu: GPU",
        "gpu: min and max",
        f"image {broken['docker']['head_image']}",
        f"image {broken['docker']['worker_image']}",
        "token asked for",
        "token copied",
        "hpsearch installed",
    ]


def test_commands_in_the_header_name_files_that_exist(repository: Path) -> None:
    header = (repository / "cluster.yaml").read_text().split("\n\n", 1)[0]
    named = re.findall(r"\b(?:search_spaces/)?[\w-]+\.(?:yaml|txt)\b", header)
    assert "search_spaces/mnist_cnn.yaml" in named
    assert [name for name in named if not (repository / name).is_file()] == []
