"""Several hosts on one machine: Linux namespaces joined by a bridge, with nothing shared that can be written.

A host has a network, processes and a file system view of its own: /tmp and /dev/shm are empty and its own, everything
else is the machine's and read-only, so that hosts share the Python environment and no folder. The bridge lies in a
namespace too: the machine's own network is never touched. A host lives as long as the pipe to its first process: with
its end, or with ours however we die, the kernel ends all its processes and takes its mounts and links away.

Needs Linux, iproute2, util-linux, and root or namespaces for users; `why_not` tells what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

SUBNET = "10.77.0"
TOOLS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"}
KERNELS_OWN = ("proc", "sysfs", "devtmpfs", "devpts", "mqueue", "cgroup", "cgroup2")  # file systems that hold no files
_KNOCK = """
import errno, socket, sys
sock = socket.socket()
sock.settimeout(float(sys.argv[2]))
sys.exit(sock.connect_ex((sys.argv[1], 9)) != errno.ECONNREFUSED)
"""
ANSWER_S = 60.0  # that a host may take to begin


class NoNamespaces(RuntimeError):
    """This machine, or what is allowed on it, cannot hold such hosts; says why."""


def why_not() -> str:
    """Why no hosts can be made here, "" when they can. Tries it with two that can reach each other."""
    try:
        with Network() as network:
            first, second = network.host(), network.host()
            return "" if first.reaches(second) else "two namespaces that a bridge joins do not reach each other"
    except NoNamespaces as error:
        return str(error)


class Network:
    """A bridge, and the hosts that are plugged into it. A context manager: at its end nothing is left."""

    def __init__(self, *, shown: Sequence[Path] = ()) -> None:
        """
        Args:
            shown: folders below /tmp that hosts see all the same, read-only; Python's own are always seen.

        Raises:
            NoNamespaces: this machine has none for us.
        """
        if sys.platform != "linux":
            raise NoNamespaces(f"namespaces are Linux's, and this is {sys.platform}")
        missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
        if missing:
            raise NoNamespaces(f"not installed: {', '.join(sorted(missing))}")
        own = (Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parents[1])
        self._shown = [path for path in dict.fromkeys((*own, *shown)) if path.is_relative_to("/tmp")]
        self._hosts: list[Host] = []
        self.pipes: list[subprocess.Popen[str]] = []  # of processes on hosts, to be closed with us
        self._n_made = 0
        as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        self._switch = _Holder(["unshare", *as_root, "--net"], [])
        self._enter = ["nsenter", "--target", str(self._switch.pid), "--net"]
        self._enter += ["--user", "--preserve-credentials"] if as_root else []
        try:
            self._ip("link", "add", "switch", "type", "bridge")
            self._ip("link", "set", "switch", "up")
        except BaseException:
            self.close()
            raise

    def host(self) -> Host:
        """One more host, plugged in and reachable from the others.

        Raises:
            NoNamespaces: the kernel refuses.
        """
        self._n_made += 1
        number, port = self._n_made, f"port{self._n_made}"
        unshare = ["unshare", "--net", "--pid", "--mount", "--ipc", "--fork"]
        holder = _Holder([*self._enter, *unshare], ["host", *map(str, self._shown)])
        host = Host(self, holder, f"{SUBNET}.{number}", port)
        self._hosts.append(host)
        self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        self._ip("link", "set", port, "master", "switch", "up")
        host.check("ip", "link", "set", "lo", "up")
        host.check("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.check("ip", "link", "set", "eth0", "up")
        host.check("ip", "route", "add", "default", "dev", "eth0")  # programs ask it which address is theirs
        return host

    def close(self) -> None:
        """End every process of every host; returns when they are gone."""
        for holder in [*(host.holder for host in self._hosts), self._switch]:
            holder.end()
        for process in self.pipes:
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    def set_link(self, port: str, state: str) -> None:
        """A host's cable, `up` or `down`."""
        self._ip("link", "set", port, state)

    def enter(self, host_pid: int) -> list[str]:
        """How a command line begins that is to run on a host."""
        user = ["--user", "--preserve-credentials"] if "--user" in self._enter else []
        return ["nsenter", "--target", str(host_pid), "--net", "--pid", "--mount", "--ipc", *user]

    def _ip(self, *arguments: str) -> None:
        _checked([*self._enter, "ip", *arguments])

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Host:
    """One host: run something there, read and write its files, cut its network, switch it off."""

    def __init__(self, network: Network, holder: _Holder, address: str, port: str) -> None:
        self.address = address
        self.holder = holder
        self._network = network
        self._port = port

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs another one on this host, in its /tmp."""
        return [*self._network.enter(self.holder.pid), "env", "--chdir=/tmp", *arguments]

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """A process on this host; its stdout and stderr come to us. It ends with the host at the latest."""
        process = subprocess.Popen(
            self.command(*arguments),
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is ours to pass on
        )
        self._network.pipes.append(process)
        return process

    def check(self, *arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
        """What a command prints here.

        Raises:
            NoNamespaces: it could not be run, or failed.
        """
        return _checked(self.command(*arguments), env=env, timeout_s=timeout_s)

    def read(self, path: str) -> bytes:
        """A file of this host's; empty where there is none."""
        return subprocess.run(self.command("cat", path), capture_output=True, check=False).stdout

    def write(self, path: str, content: str) -> None:
        """Put a file onto this host, and the folders it lies in."""
        self.check("mkdir", "--parents", str(Path(path).parent))
        subprocess.run(self.command("tee", path), input=content, text=True, stdout=subprocess.DEVNULL, check=True)

    def reaches(self, other: Host, timeout_s: float = 5.0) -> bool:
        """Whether the other host answers, be it that nobody listens there."""
        ask = self.command(sys.executable, "-I", "-c", _KNOCK, other.address, str(timeout_s))
        return subprocess.run(ask, stdin=subprocess.DEVNULL, check=False).returncode == 0

    def unplug(self) -> None:
        """Its network falls silent; its processes go on."""
        self._network.set_link(self._port, "down")

    def plug_in(self) -> None:
        """Its network is back."""
        self._network.set_link(self._port, "up")

    def power_off(self) -> None:
        """Every process of this host is gone, as after a power cut."""
        self.holder.end()


class _Holder:
    """The first process of a namespace, which lives as long as our pipe to it."""

    def __init__(self, make: Sequence[str], role: Sequence[str]) -> None:
        """
        Args:
            make: the command that makes the namespaces and runs what follows.
            role: see `_main`.
        """
        self._process = subprocess.Popen(
            [*make, sys.executable, "-I", str(Path(__file__).resolve()), *role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        told = self._process.stdout.readline()
        if not told:
            _, said = self._process.communicate(timeout=ANSWER_S)
            raise NoNamespaces(_last_line(said) or f"{make[0]} failed")
        self.pid = int(told)  # as this process sees it

    def end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)  # closes the pipe
        if self._process.poll() is None:  # it does not listen: with the first process the kernel ends all
            os.kill(self.pid, signal.SIGKILL)
            self._process.communicate()


def _checked(command: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
    done = subprocess.run(
        command,
        env=None if env is None else dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise NoNamespaces(_last_line(done.stderr) or f"{command[0]} failed with {done.returncode}")
    return done.stdout


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


# What follows runs inside, as a namespace's first process


def _main(role: Sequence[str]) -> None:
    """Hold a namespace until stdin ends. `role`: nothing for the bridge's, or "host" and the folders to be shown."""
    pid = os.readlink("/proc/self")  # still the machine's /proc: the number that nsenter is to be told
    if role:
        _own_files([Path(path) for path in role[1:]])
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # process 1 inherits every orphan; nobody asks how it ended
    print(pid, flush=True)
    sys.stdin.read()


def _own_files(shown: Sequence[Path]) -> None:
    """Give this mount namespace its own /proc, /tmp and /dev/shm, and make the rest read-only."""
    _mount("--make-rprivate", "/")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        where, options = before.split()[4].encode().decode("unicode_escape"), before.split()[5].split(",")
        if after.split()[0] not in KERNELS_OWN and "ro" not in options:
            _mount("-o", ",".join(["remount", "bind", "ro", *(o for o in options if o != "rw")]), where)
    new_tmp = Path("/dev/shm")  # a mount point to build it at; it gets its own content afterwards
    _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(new_tmp))
    for path in shown:
        target = new_tmp / path.relative_to("/tmp")
        target.mkdir(parents=True, exist_ok=True)
        _mount("--rbind", str(path), str(target))
    _mount("--move", str(new_tmp), "/tmp")
    _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    _mount("-t", "proc", "proc", "/proc")


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", "--no-mtab", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"mount {' '.join(arguments)}: {_last_line(done.stderr)}")


if __name__ == "__main__":
    _main(sys.argv[1:])
