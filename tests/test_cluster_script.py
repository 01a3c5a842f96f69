"""Hosts made of namespaces are apart and end with us; a study on three of them survives what is done to them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespaces import Network, NoNamespaces, why_not

MARK = "CLUSTER_TEST_MARK"  # in the environment of whatever a test starts, to find what is left of it


@pytest.fixture(scope="module")
def allowed() -> None:
    """Skips where the machine has no namespaces for us."""
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def network(allowed: None) -> Iterator[Network]:
    with Network() as network:
        yield network


def script(repository: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`./scripts/cluster-test …` without its set-up: these tests' own Python."""
    return subprocess.Popen(
        [sys.executable, repository / "scripts" / "cluster_test.py", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def marked(mark: str) -> list[int]:
    """Processes of the whole machine that carry a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def gone(mark: str, timeout_s: float = 10.0) -> bool:
    """Whether every process with the mark ends in time."""
    deadline = time.monotonic() + timeout_s
    while marked(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_hosts_reach_each_other_and_share_nothing_that_can_be_written(network: Network, repository: Path) -> None:
    one, other = network.host(), network.host()
    assert one.reaches(other)
    assert other.reaches(one)
    for folder in ("/tmp", "/dev/shm"):
        one.write(f"{folder}/project/task.py", "mine")
        assert one.read(f"{folder}/project/task.py") == b"mine"
        assert other.read(f"{folder}/project/task.py") == b""
        assert not Path(folder, "project").exists()
    with pytest.raises(NoNamespaces, match="Read-only file system"):
        one.check("touch", str(repository / "README.md"))
    assert (repository / "README.md").read_bytes() == other.read(str(repository / "README.md"))


def test_a_host_sees_its_own_processes_alone(network: Network) -> None:
    one, other = network.host(), network.host()
    process = one.start("sleep", "60")
    pids = other.check(sys.executable, "-c", "import os; print(*filter(str.isdigit, os.listdir('/proc')))").split()
    assert len(pids) == 2  # its first process, and the one that looks
    assert process.poll() is None


def test_a_host_without_its_cable_is_out_of_reach_until_it_is_back(network: Network) -> None:
    one, other = network.host(), network.host()
    process = other.start("sleep", "60")
    other.unplug()
    assert not one.reaches(other, timeout_s=0.3)
    assert process.poll() is None
    other.plug_in()
    assert one.reaches(other)


def test_switching_a_host_off_ends_its_processes_also_those_that_left_their_parents(network: Network) -> None:
    mark = secrets.token_hex(8)
    host, other = network.host(), network.host()
    host.check("sh", "-c", "setsid sleep 600 >/dev/null 2>&1 &", env={**os.environ, MARK: mark})
    process = host.start("sleep", "600", env={**os.environ, MARK: mark})
    stays = other.start("sleep", "600")
    assert len(marked(mark)) >= 2
    host.power_off()
    assert process.wait(timeout=10) != 0
    assert gone(mark)
    assert stays.poll() is None


def test_hosts_end_when_who_made_them_is_killed(allowed: None, repository: Path) -> None:
    mark = secrets.token_hex(8)
    source = """if True:
        import time
        from tests.namespaces import Network
        network = Network()
        host = network.host()
        host.start("sleep", "600")
        print("up", flush=True)
        time.sleep(600)
    """
    maker = subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=repository,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout is not None
    assert maker.stdout.readline() == "up\n"
    assert len(marked(mark)) > 3
    maker.kill()
    maker.communicate()
    assert gone(mark)


def test_machine_without_the_tools_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool in ("ip", "nsenter") else f"/bin/{tool}")
    assert why_not() == "not installed: iproute2, util-linux"


def test_script_skips_with_the_reason_unless_it_is_required(repository: Path, tmp_path: Path) -> None:
    skipped = script(repository, PATH=str(tmp_path))
    assert skipped.communicate(timeout=60) == ("skipped: not installed: iproute2, mount, util-linux\n", "")
    assert skipped.returncode == 0
    required = script(repository, "--require", PATH=str(tmp_path))
    assert required.communicate(timeout=60)[0] == "skipped: not installed: iproute2, mount, util-linux\n"
    assert required.returncode == 1


@pytest.mark.slow
@pytest.mark.ray
def test_interrupted_script_leaves_no_process(allowed: None, repository: Path) -> None:
    mark = secrets.token_hex(8)
    process = script(repository, **{MARK: mark})
    assert process.stderr is not None
    assert "the study on one node" in process.stderr.readline()
    time.sleep(2)  # Ray is starting on the first host
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "cluster-test: interrupted; every process and namespace of it has ended"
    assert gone(mark)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_study_on_nodes_that_go_join_and_fall_silent_is_that_of_one_node(allowed: None, repository: Path) -> None:
    mark = secrets.token_hex(8)
    asks = {"period_ms": 1000, "timeout_ms": 3000, "failure_threshold": 3}  # a silent node is dead after 12 s, not 65
    impatient = {f"RAY_health_check_{name}": str(value) for name, value in asks.items()}
    process = script(repository, "--require", **impatient, **{MARK: mark})
    out, err = process.communicate(timeout=850)
    assert process.returncode == 0, out + err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "single", "kill", "cut"]
    assert [line.rpartition("  ")[2] for line in lines[1:]] == ["-", "yes", "yes"]
    assert gone(mark)
