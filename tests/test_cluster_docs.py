"""docs/cluster.md and the files it walks through: what they name exists, show is valid, and run runs."""

from __future__ import annotations

import copy
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate
import pytest
import yaml

from hpsearch.cli import VERBS, group
from hpsearch.fleets import shipping, submission
from tests.processes import process_groups
from tests.test_cluster_yaml import validated

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "cluster.md").read_text(encoding="utf-8")
MANIFESTS = ("cluster.yaml", "docs/cluster-local.yaml", "docs/slurm.sbatch", "docs/rayjob.yaml")

# What is the reader's own.
A_READERS_OWN = {"space.yaml"}


def header(name: str) -> str:
    """The comment at a file's top."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    lines = lines[1:] if lines[0].startswith("#!") else lines
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def blocks(text: str) -> list[str]:
    """The fenced blocks without a language: commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for language, block in found if not language]


def fenced() -> Iterator[str]:
    for block in blocks(PAGE):
        yield from block.splitlines()


def command_lines() -> list[list[str]]:
    """Every command of the page's blocks and of the manifests' headers, as words; settings before it left out."""
    lines = [*fenced(), *(line for name in MANIFESTS for line in header(name).splitlines())]
    words = [
        shlex.split(re.sub(r"^(\w+=\S+ )+|\[.*\]", "", line), comments=True) for line in lines if _is_command(line)
    ]
    return [line for line in words if line]


def _is_command(line: str) -> bool:
    return bool(re.match(r"(\w+=\S+ )*(hpsearch|ray|sbatch|kubectl|pip) [a-z-]", line))


def check_hpsearch(words: list[str]) -> None:
    """The verb and its options exist."""
    assert words[1] in VERBS
    command = group.get_command(click.Context(group), words[1])
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words[2:] if word.startswith("-")} <= known


def test_there_is_something_to_check() -> None:
    programs = [words[0] for words in command_lines()]
    assert programs.count("hpsearch") > 8
    assert {"ray", "sbatch", "kubectl", "pip"} <= set(programs)


@pytest.mark.parametrize("words", [w for w in command_lines() if w[0] == "hpsearch"], ids=" ".join)
def test_command_of_ours_exists_with_its_options(words: list[str]) -> None:
    check_hpsearch(words)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_commands_of_ray_exist_with_their_options() -> None:
    from ray.scripts.scripts import cli

    context = click.Context(cli)
    for words in command_lines():
        if words[0] == "ray":
            command = cli.get_command(context, words[1])
            assert command is not None, words
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word.partition("=")[0] for word in words[2:] if word.startswith("--")} <= known, words


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_file_of_a_command_is_there(words: list[str]) -> None:
    for word in words[1:]:
        if word.endswith((".yaml", ".sbatch", ".txt")) and word not in A_READERS_OWN and not word.startswith("-"):
            assert (ROOT / word).is_file(), word


def test_files_and_anchors_that_the_page_names_are_there() -> None:
    named = re.findall(r"`((?:docs/)?[\w-]+\.(?:yaml|sbatch|md))`", PAGE)
    assert {"cluster.yaml", "docs/cluster-local.yaml", "docs/slurm.sbatch", "docs/rayjob.yaml"} <= set(named)
    assert [name for name in named if not (ROOT / name).is_file()] == []
    anchors = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors


@pytest.mark.parametrize("section", ["Virtual machines", "Machines of your own", "Slurm", "Kubernetes"])
def test_each_way_is_three_commands(section: str) -> None:
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    [block] = blocks(text)
    assert len([line for line in block.splitlines() if _is_command(line)]) == 3


def test_messages_that_the_page_explains_are_ones_that_are_said() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "hpsearch").rglob("*.py"))
    said = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert len(said) == 6
    for message in said:
        for part in re.split(r"…|No module named", message):
            assert part.strip(" ,") in re.sub(r"\{[^}]*\}", "", sources), message


def test_figures_of_the_page_are_those_of_the_code() -> None:
    assert f"**At most {shipping.MAX_BYTES // 2**20} MiB**" in PAGE
    assert submission.BASE in PAGE
    assert submission.RETRY_S == 120
    assert "again for two minutes" in PAGE
    left_out = PAGE.partition("- **Left out**: ")[2].partition("caches")[0]
    for name in re.findall(r"`([^`]+)`", left_out):
        assert any(pattern.strip("/*") == name for pattern in shipping.LEFT_OUT), name


# cluster-local.yaml


@pytest.fixture(scope="module")
def local() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCS / "cluster-local.yaml").read_text())
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_cluster_of_ones_own_hosts_is_valid_by_rays_schema(local: dict[str, Any]) -> None:
    [node] = validated(local)["available_node_types"].values()
    n_hosts = len(local["provider"]["worker_ips"])
    assert local["min_workers"] == local["max_workers"] == node["min_workers"] == node["max_workers"] == n_hosts


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.parametrize(
    ("path", "value"),
    [(("auth", "user"), "you"), (("provider", "worker_ips"), "192.0.2.11"), (("max_worker",), 2)],
    ids=["unknown nested key", "wrong type", "unknown key"],
)
def test_fault_planted_in_it_is_refused(local: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    broken = copy.deepcopy(local)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, ValueError, TypeError, AttributeError)):
        validated(broken)


def test_every_host_asks_for_the_token_and_the_dashboard_stays_on_loopback(local: dict[str, Any]) -> None:
    heads, workers = local["head_start_ray_commands"], local["worker_start_ray_commands"]
    for commands in (heads, workers):
        [start] = [command for command in commands if "ray start" in command]
        assert "export RAY_AUTH_MODE=token" in start
    assert any("--dashboard-host=127.0.0.1" in command for command in heads)
    assert any(remote.endswith("/.ray/auth_token") for remote in local["file_mounts"])
    assert all(remote.startswith("/") for remote in local["file_mounts"])  # ray does not fill in a remote ~
    assert any("constraints.txt" in command for command in local["setup_commands"])


# slurm.sbatch


SBATCH = DOCS / "slurm.sbatch"
SHELL = [SBATCH, ROOT / ".ci/run", *(p for p in sorted((ROOT / "scripts").iterdir()) if p.suffix != ".py")]


def test_batch_script_is_bash() -> None:
    checked = subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_script_pleases_shellcheck(script: Path) -> None:
    command = [str(Path(sys.executable).with_name("shellcheck")), str(script)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


# Each program of the allocation writes down how it was called; `srun` runs what it is given, Ray stays until its end.
FAKES = {
    "srun": 'echo "srun $*" >> "$CALLS"; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": 'echo "ray token=${#RAY_AUTH_TOKEN}" >> "$CALLS"; trap "echo ray-ended >> $CALLS; exit 0" TERM\n'
    "while :; do sleep 0.1; done",
    "scontrol": "printf '%s\\n' node1 node2 node3",
    "hostname": 'case "$1" in -I) echo "10.0.0.1 192.168.0.1";; *) echo node1;; esac',
    "timeout": 'shift; exec "$@"',
    "python": 'case "$1" in -c) printf %064d 0;; *) cat > /dev/null; echo "await $3" >> "$CALLS"\n'
    'while [ "$(grep -c "^ray token" "$CALLS")" -lt "$3" ]; do sleep 0.05; done;; esac',
    "hpsearch": 'echo "hpsearch $*" >> "$CALLS"; trap "echo hpsearch-interrupted >> $CALLS; exit 130" TERM\n'
    'i=0; while [ $i -lt "${STUDY_TENTHS:-3}" ]; do sleep 0.1; i=$((i+1)); done; exit "${STUDY_CODE:-0}"',
}


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on the first of three nodes."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "98765",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURMD_NODENAME": "node1",
    }


Batch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def batch(allocation: Mapping[str, str]) -> Iterator[Batch]:
    """Runs the script with arguments and further environment; nothing of it outlives the test."""
    with process_groups() as start:
        yield lambda *arguments, **env: start(["bash", SBATCH, *arguments], env={**allocation, **env})


def calls(allocation: Mapping[str, str]) -> list[str]:
    path = Path(allocation["CALLS"])
    return path.read_text().splitlines() if path.exists() else []


def test_batch_script_starts_ray_on_every_node_launches_and_ends_it(allocation: dict[str, str], batch: Batch) -> None:
    process = batch("space.yaml", "--set", "search.trials=8", STUDY_CODE="3")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3, err  # the study's own
    told = calls(allocation)
    starts = [line for line in told if line.startswith("srun")]
    starts.sort(key=lambda line: re.findall(r"--nodelist=(\S+)", line))
    assert [re.findall(r"--nodelist=(\S+)", line) for line in starts] == [["node1"], ["node2"], ["node3"]]
    port = 20000 + 98765 % 20000
    assert f"--head --node-ip-address=10.0.0.1 --port={port}" in starts[0]
    assert "--include-dashboard=false" in starts[0]
    assert all(f"--address=10.0.0.1:{port}" in line for line in starts[1:])
    assert all("--num-cpus=8 --num-gpus=2" in line for line in starts)
    assert told.count("ray token=64") == 3
    assert not any("0" * 64 in line for line in told)  # the token is on nobody's command line
    launch = f"hpsearch launch space.yaml --set search.trials=8 --address 10.0.0.1:{port} --resume"
    assert told.index("await 1") < min(told.index(start) for start in starts[1:])
    assert told.index("await 3") < told.index(launch)
    assert told.count("ray-ended") == 3
    check_hpsearch(shlex.split(launch))


def test_signal_before_the_time_limit_reaches_the_study_which_keeps_what_is_finished(
    allocation: dict[str, str], batch: Batch
) -> None:
    process = batch("space.yaml", STUDY_TENTHS="200")
    deadline = time.monotonic() + 30
    while not any(line.startswith("hpsearch") for line in calls(allocation)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "hpsearch-interrupted" in calls(allocation)
    assert calls(allocation).count("ray-ended") == 3


def test_batch_script_without_a_space_says_how_to_call_it(allocation: dict[str, str], batch: Batch) -> None:
    process = batch()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "usage: sbatch docs/slurm.sbatch space.yaml" in err
    assert calls(allocation) == []


# rayjob.yaml


# The fields of KubeRay's API above the pod templates (its API reference, ray.io/v1), as far as a study needs any; an
# unknown one would be dropped by Kubernetes without a word.
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
POD_TEMPLATE = {
    "type": "object",
    "required": ["spec"],
    "additionalProperties": False,
    "properties": {
        "metadata": {"type": "object"},
        "spec": {"type": "object", "required": ["containers"]},
    },
}
COUNT = {"type": "integer", "minimum": 0}


def _object(required: tuple[str, ...] = (), **properties: object) -> dict[str, object]:
    return {
        "type": "object", "additionalProperties": False, "required": list(required), "properties": properties,
    }  # fmt: skip


RAY_CLUSTER_SPEC = _object(
    ("headGroupSpec",),
    rayVersion={"type": "string"},
    authOptions=_object(("mode",), mode={"enum": ["token", "disabled"]}, secretName={"type": "string"}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_object(
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
    ),
    headGroupSpec=_object(("template",), rayStartParams=WORDS, template=POD_TEMPLATE, serviceType={"type": "string"}),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            ("groupName", "template"),
            groupName={"type": "string"},
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            rayStartParams=WORDS,
            template=POD_TEMPLATE,
        ),
    },
)
RAY_JOB = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata={"type": "object", "required": ["name"]},
    spec=_object(
        ("entrypoint", "rayClusterSpec"),
        entrypoint={"type": "string"},
        runtimeEnvYAML={"type": "string"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig=_object(backoffLimit=COUNT),
        backoffLimit=COUNT,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        metadata=WORDS,
        rayClusterSpec=RAY_CLUSTER_SPEC,
    ),
)


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    told = yaml.safe_load_all((DOCS / "rayjob.yaml").read_text())
    return {document["kind"]: document for document in told}


@pytest.fixture(scope="module")
def ray_job(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return documents["RayJob"]


def test_manifest_has_the_fields_of_a_ray_job(ray_job: dict[str, Any]) -> None:
    jsonschema.validate(ray_job, RAY_JOB)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entryPoint"), "hpsearch"),
        (("spec", "rayClusterSpec", "workerGroupSpec"), []),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "rayVersion"), 2.60),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "container"), {}),
        (("apiVersion",), "ray.io/v1beta1"),
    ],
)
def test_fault_planted_in_the_manifest_is_found(ray_job: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    broken = copy.deepcopy(ray_job)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, RAY_JOB)


def pod_templates(ray_job: Mapping[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def validate_as_kubernetes_does(kind: str, **document: object) -> None:
    """By the schemas of Kubernetes' own API, in which a field that is not known is a fault."""
    document = {"apiVersion": "v1", "kind": kind, "metadata": {"name": "x"}, **document}
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_pods_and_volume_are_valid_by_the_schemas_of_kubernetes(
    documents: dict[str, dict[str, Any]], ray_job: dict[str, Any]
) -> None:
    validate_as_kubernetes_does(**documents["PersistentVolumeClaim"])
    templates = pod_templates(ray_job)
    assert len(templates) == 2
    for template in templates:
        validate_as_kubernetes_does("PodTemplate", template=template)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "containers", 0, "imagePullpolicy"), "Always"),
        (("spec", "containers", 0, "resources", "limits"), ["cpu"]),
        (("spec", "containers", 0, "volumeMounts", 0, "path"), "/x"),
        (("spec", "securityContext", "fsGroup"), "1000"),
    ],
)
def test_fault_planted_in_a_pod_is_found(ray_job: dict[str, Any], path: tuple[Any, ...], value: object) -> None:
    template = copy.deepcopy(pod_templates(ray_job)[0])
    place: Any = template
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        validate_as_kubernetes_does("PodTemplate", template=template)


def crd_faults(manifest: object, schema: Mapping[str, Any], path: str = "") -> list[str]:
    """Fields that a structural schema of a CRD does not know, which Kubernetes would drop."""
    found = []
    if isinstance(manifest, Mapping):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        free = schema.get("x-kubernetes-preserve-unknown-fields") or (not known and others is None)
        for key, value in manifest.items():
            if key in known:
                found += crd_faults(value, known[key], f"{path}.{key}")
            elif isinstance(others, Mapping):
                found += crd_faults(value, others, f"{path}.{key}")
            elif not free and not others:
                found.append(f"{path}.{key}")
    elif isinstance(manifest, list):
        for i, value in enumerate(manifest):
            found += crd_faults(value, schema.get("items", {}), f"{path}[{i}]")
    return found


CRD = os.environ.get("HPSEARCH_RAYJOB_CRD", "")


@pytest.mark.skipif(not CRD, reason="HPSEARCH_RAYJOB_CRD does not name KubeRay's ray.io_rayjobs.yaml")
def test_manifest_is_valid_by_the_whole_crd(ray_job: dict[str, Any]) -> None:
    definition = yaml.load(Path(CRD).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [schema] = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    jsonschema.validate(ray_job, schema)
    assert crd_faults(ray_job["spec"], schema["properties"]["spec"]) == []


def test_field_that_a_crd_does_not_know_is_found() -> None:
    schema = {
        "properties": {
            "entrypoint": {"type": "string"},
            "labels": {"additionalProperties": {"type": "string"}},
            "groups": {"items": {"properties": {"name": {"type": "string"}}}},
            "any": {"x-kubernetes-preserve-unknown-fields": True},
        }
    }
    manifest = {
        "entrypoint": "x", "entryPoint": "", "labels": {"a": "b"}, "any": {"c": 1}, "groups": [{"name": "", "size": 1}],
    }  # fmt: skip
    assert crd_faults(manifest, schema, "spec") == ["spec.entryPoint", "spec.groups[0].size"]


def test_entrypoint_is_a_launch_that_can_be_tried_again(ray_job: dict[str, Any]) -> None:
    words = shlex.split(ray_job["spec"]["entrypoint"])
    check_hpsearch(words)
    assert words[:2] == ["hpsearch", "launch"]
    assert "--resume" in words
    groups = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert int(words[words.index("--workers") + 1]) == sum(group["maxReplicas"] for group in groups)


def test_parts_of_the_manifest_fit_together(documents: dict[str, dict[str, Any]], ray_job: dict[str, Any]) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], *(g["template"]["spec"] for g in cluster["workerGroupSpecs"])]
    containers = [container for pod in pods for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1  # ray wants one version everywhere
    pin = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert cluster["rayVersion"] == pin[1]
    assert f"FROM rayproject/ray:{pin[1]}-py311-gpu" in PAGE
    assert cluster["authOptions"] == {"mode": "token"}
    head = pods[0]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in head["volumes"]}
    words = shlex.split(ray_job["spec"]["entrypoint"])
    assert words[2].startswith(mounts["study"] + "/")
    assert words[words.index("--run-dir") + 1].startswith(mounts["runs"] + "/")
    claims = [v["persistentVolumeClaim"]["claimName"] for v in head["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [documents["PersistentVolumeClaim"]["metadata"]["name"]]
    [config_map] = [v["configMap"]["name"] for v in head["volumes"] if "configMap" in v]
    assert f"kubectl create configmap {config_map} --from-file=" in PAGE
    assert f"--selector=job-name={ray_job['metadata']['name']}" in PAGE
