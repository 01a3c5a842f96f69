"""A real S3-compatible server on a free loopback port (moto's), behind a relay that can be cut and mended."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Of the server's own making; what the environment of a developer holds is never used.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST", "AWS_SECRET_ACCESS_KEY": "test/secret+0123456789"}
NO_OTHERS = (
    *("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ROLE_ARN"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
)


class S3Server:
    """Forgets everything when it ends. `port` is the relay's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._relay = _Relay()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        return self._relay.port

    def uri(self, bucket: str, prefix: str = "studies") -> str:
        """What `storage:` takes."""
        return f"s3://{bucket}/{prefix}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def start(self, timeout_s: float = 60.0, *, check_credentials_after: int | None = None) -> S3Server:
        """Answering when this returns.

        Args:
            check_credentials_after: from this request on credentials have to be real, which none are.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if check_credentials_after is not None:
            environment["INITIAL_NO_AUTH_ACTION_COUNT"] = str(check_credentials_after)
        with (self._folder / "s3.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                stdout=log,
                stderr=log,
                env=environment,
            )
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                break
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.stop()
                raise RuntimeError(f"no S3 server: {(self._folder / 's3.log').read_text()[-2000:]}")
            time.sleep(0.1)
        self._relay.start(port)
        return self

    def make_bucket(self, name: str) -> None:
        from pyarrow.fs import S3FileSystem

        S3FileSystem(
            endpoint_override=f"127.0.0.1:{self.port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        ).create_dir(name)

    def cut(self) -> None:
        """Nobody answers from now on, and what was on its way is lost."""
        self._relay.cut()

    def mend(self) -> None:
        """Everything is as it was before `cut`."""
        self._relay.mend()

    def stop(self) -> None:
        self._relay.cut()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class _Relay:
    """Passes bytes on to a port; keeps its own port while it is cut."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._target = 0
        self.port = 0

    def start(self, target: int) -> None:
        self._target = target
        self.mend()

    def mend(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), 10.0)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for one, other in ((near, far), (far, near)):
                self._open.add(one)
                threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := one.recv(1 << 16):
                other.sendall(content)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)
        self._open.discard(one)
        one.close()


@contextlib.contextmanager
def s3_environment() -> Iterator[None]:
    """Only the test's credentials, no proxy, and no question to a cloud's metadata service."""
    changed = {**CREDENTIALS, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    changed["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
    before = {name: os.environ.get(name) for name in (*changed, *NO_OTHERS)}
    for name in NO_OTHERS:
        os.environ.pop(name, None)
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def s3_server(folder: Path, *, bucket: str = "studies") -> Iterator[S3Server]:
    """A running server with a bucket, and this process's credentials those that it knows."""
    with s3_environment():
        server = S3Server(folder).start()
        try:
            server.make_bucket(bucket)
            yield server
        finally:
            server.stop()
