"""A study run as a job on a cluster that this machine is no part of: Ray's job submission, seen from outside.

The laptop sends one archive (`shipping`) and a command line to the dashboard on the cluster's head. There
`hpsearch.cli.submitted` runs the verb as any launch on the head would be, and its log is followed (`job_log`). What is
secret takes another way than command line, environment and log: it is laid into the head's memory, and the job takes it
out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import re
import secrets
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from hpsearch.errors import ClusterError, UsageError
from hpsearch.fleets.job_log import JobLog, Outcome
from hpsearch.fleets.ray_cluster import REACH_S, be_quiet

T = TypeVar("T")

BASE = "~/hpsearch-runs"  # on the head: where run directories lie unless the user says otherwise
ANSWER_S = 30.0  # that the head may take for one answer
UPLOAD_S = 900.0  # and for taking an archive
SILENCE_S = 60.0  # without a line of log before the connection is doubted; a study says something every 10 s
RETRY_S = 120.0  # how long a broken connection is tried again
LOOK_EVERY_S = 1.0
ENDING_S = 0.2  # the same when its result is there, and the job has only to end
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

ID = re.compile(r"hpsearch-(?P<study>.+)-(?P<number>\d+)")
STUDY_KEY, RUN_DIR_KEY, VERB_KEY = "hpsearch_study", "hpsearch_run_dir", "hpsearch_verb"  # in a job's metadata
SECRETS_HEAD = b"hpsearch secrets\n"  # Ray quotes the first bytes of what it could not store


@dataclass(frozen=True, kw_only=True)
class Job:
    """A study that was submitted."""

    id: str
    study: str
    run_dir: str  # on the head, relative to BASE unless absolute
    status: str  # PENDING, RUNNING, or one of ENDED
    verb: str = "launch"
    started_at: float = 0.0  # Unix time, s; 0: not yet
    ended_at: float = 0.0
    exit_code: int | None = None
    message: str = ""  # Ray's own, of several lines

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class LostTouch(ClusterError):
    """The head of the cluster cannot be reached any more; what runs there may go on."""


class Head:
    """The head of a cluster, reached through its dashboard."""

    def __init__(self, address: str, *, told_address: str | None = None) -> None:
        """
        Args:
            address: "http://head:8265" or "https://…".
            told_address: how messages call it; without credentials.

        Raises:
            UsageError: the extra that brings Ray's job submission is not installed, or the address is no URL.
            ClusterError: nobody answers there, or refuses us.
        """
        self.address = told_address or address
        _check_reachable(address, self.address)
        self._client = self._asked(lambda: _client(address), ANSWER_S)

    def jobs(self) -> list[Job]:
        """The studies that were submitted to this cluster since it was started, the newest last."""
        found = self._asked(self._client.list_jobs, ANSWER_S)
        ours = [_job(details) for details in found if STUDY_KEY in (details.metadata or {})]
        return sorted(ours, key=lambda job: (job.started_at or float("inf"), _number(job.id)))

    def job(self, job_id: str) -> Job:
        return _job(self._asked(lambda: self._client.get_job_info(job_id), ANSWER_S))

    def submit(
        self,
        arguments: Sequence[str],
        *,
        archive: Path,
        typed: str,
        study: str,
        run_dir: str,
        private: Mapping[str, str],
    ) -> Job:
        """Start a study there.

        Args:
            arguments: of hpsearch, with paths as they are on the head.
            archive: what the job finds around it, by `shipping.pack`.
            typed: the command as the user gave it, without secrets; told when the study has to be resumed.
            run_dir: as in `Job`.
            private: environment variables of the job that nobody else may read.

        Raises:
            UsageError: a job on the same run directory has not ended.
            ClusterError: the head did not take it.
        """
        earlier = self.jobs()
        self._refuse_second(earlier, run_dir)
        job_id = next_id(study, [job.id for job in earlier])
        metadata = {STUDY_KEY: study, RUN_DIR_KEY: run_dir, VERB_KEY: arguments[0]}
        try:
            self._start(job_id, arguments, archive=archive, typed=typed, metadata=metadata, private=private)
        except ClusterError:
            self._refuse_second(self.jobs(), run_dir)  # another launch took the same number a moment before us
            raise
        return Job(id=job_id, study=study, run_dir=run_dir, status="PENDING", verb=arguments[0])

    def ask(
        self,
        arguments: Sequence[str],
        *,
        archive: Path,
        private: Mapping[str, str] | None = None,
        show: Callable[[str], None] | None = None,
    ) -> Outcome:
        """What a verb says when it is run on the head, by a small job that is not listed afterwards.

        Args:
            show: as of `follow`.

        Raises:
            ClusterError: it could not be run.
        """
        job_id = f"hpsearch-{arguments[0]}-{secrets.token_hex(6)}"
        self._start(job_id, arguments, archive=archive, typed="", metadata={}, private=private or {})
        try:
            return self.follow(job_id, show)
        finally:
            with contextlib.suppress(ClusterError):
                self._asked(lambda: self._client.delete_job(job_id), ANSWER_S)

    def follow(self, job_id: str, show: Callable[[str], None] | None) -> Outcome:
        """Show a job's progress until it has ended; what it came to.

        A connection that breaks is tried again for RETRY_S, and nothing is shown twice.

        Args:
            show: told each line of progress; None: they are told only by the error of a job that failed.

        Raises:
            LostTouch: the head stays out of reach; the job may go on.
            ClusterError: the job ended without a word of hpsearch's.
        """
        log = JobLog()
        shown: list[str] = []
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        ends: list[Job | Exception] = []

        def work() -> None:
            try:
                ends.append(asyncio.run(self._follow(job_id, log, lines.put)))
            except Exception as error:
                ends.append(error)
            finally:
                lines.put(None)

        # In a thread, since an interrupt must be heard at once, also while an answer is waited for.
        threading.Thread(target=work, daemon=True).start()
        while (line := lines.get()) is not None:
            (show or shown.append)(line)
        job = ends[0]
        if isinstance(job, Exception):
            raise job
        if log.outcome is not None:
            return log.outcome
        if job.status == "STOPPED":
            (show or shown.append)(f"job {job.id} was stopped there; what was finished is kept, --resume goes on")
            return Outcome(stdout="", exit_code=130)
        why = _why_failed(job, [*log.before, *shown])
        raise ClusterError(
            f"job {job.id} on {self.address} ended without a result: {why}",
            hint=f"its whole log: ray job logs {job.id} --address {self.address}",
        )

    async def _follow(self, job_id: str, log: JobLog, show: Callable[[str], None]) -> Job:
        read = 0  # characters of the log, which every connection tells from its beginning
        broken_since: float | None = None
        while True:
            with contextlib.suppress(Exception):  # aiohttp's and ray's own kinds; whether the head lives is asked below
                position = 0
                async with contextlib.aclosing(self._client.tail_job_logs(job_id)) as chunks:
                    while log.outcome is None:
                        chunk = await asyncio.wait_for(anext(chunks), SILENCE_S)
                        broken_since = None
                        fresh, position = chunk[max(0, read - position) :], position + len(chunk)
                        read = max(read, position)
                        for line in log.feed(fresh):
                            show(line)
            try:
                job = self.job(job_id)
                if log.outcome is None:  # what did not come through the connection
                    whole = self._whole_log(job_id)
                    fresh, read = whole[read:], max(read, len(whole))
                    for line in log.feed(fresh):
                        show(line)
                broken_since = None
            except ClusterError as error:
                if broken_since is None:
                    broken_since = time.monotonic()
                    show(f"note: {error.message}; trying again for {RETRY_S:.0f} s")
                elif time.monotonic() - broken_since > RETRY_S:
                    raise LostTouch(error.message) from None
            else:
                if job.ended:  # and was asked before its log, so that nothing is missing
                    for line in log.feed("\n"):  # a last line without an end
                        show(line)
                    return job
            await asyncio.sleep(LOOK_EVERY_S if log.outcome is None else ENDING_S)

    def _whole_log(self, job_id: str) -> str:
        told: str = self._asked(lambda: self._client.get_job_logs(job_id), ANSWER_S) or ""
        return told

    def _start(
        self,
        job_id: str,
        arguments: Sequence[str],
        *,
        archive: Path,
        typed: str,
        metadata: Mapping[str, str],
        private: Mapping[str, str],
    ) -> None:
        key = self._leave_secrets(private) if private else ""
        words = [*(["--secrets", key] if key else []), *(["--typed", typed] if typed else []), "--", *arguments]
        # The head's python has whichever of the two names its PATH knows.
        command = f'"$(command -v python || command -v python3)" -m hpsearch.cli.submitted {shlex.join(words)}'

        def submit() -> str:
            submitted: str = self._client.submit_job(
                entrypoint=command,
                submission_id=job_id,
                runtime_env={"working_dir": str(archive)},
                metadata=dict(metadata),
            )
            return submitted

        self._asked(submit, UPLOAD_S)

    def _leave_secrets(self, private: Mapping[str, str]) -> str:
        """Lay variables into the memory of the head, for one job to take; the key to them.

        Ray would take them as `env_vars` too, but writes those into the logs of every node.
        """
        key = f"hpsearch-{secrets.token_hex(16)}.zip"
        content = SECRETS_HEAD + json.dumps(dict(private)).encode()

        def put() -> None:
            # Asking first makes Ray forget what nobody has taken within ten minutes.
            self._client._do_request("GET", f"/api/packages/gcs/{key}")
            answer = self._client._do_request("PUT", f"/api/packages/gcs/{key}", data=content)
            if answer.status_code != 200:
                raise RuntimeError(f"the head does not keep what it is told in private (status {answer.status_code})")

        self._asked(put, ANSWER_S)
        return key

    def _refuse_second(self, jobs: Sequence[Job], run_dir: str) -> None:
        for job in jobs:
            if job.run_dir == run_dir and not job.ended:
                raise UsageError(
                    f"study {job.study!r} runs there already, as job {job.id} in {shown_run_dir(run_dir)}",
                    hint=f"see it: hpsearch status {job.study} --address {self.address}\n"
                    f"        follow it: ray job logs {job.id} --follow --address {self.address}\n"
                    f"        end it: ray job stop {job.id} --address {self.address}",
                )

    def _asked(self, ask: Callable[[], T], timeout_s: float) -> T:
        """Ray's answer. Its requests know no timeout of their own, so each is made in a thread that may be left."""
        answers: list[T] = []
        errors: list[Exception] = []

        def work() -> None:
            try:
                answers.append(ask())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(timeout_s)
        if answers:
            return answers[0]
        if not errors:
            raise ClusterError(f"the dashboard at {self.address} does not answer within {timeout_s:.0f} s")
        raise _told(errors[0], self.address) from None


def next_id(study: str, taken: Sequence[str]) -> str:
    """The submission id of a study's next job: counted, so two launches at once want the same and one is refused.

    >>> next_id("digits", []), next_id("digits", ["hpsearch-digits-1", "hpsearch-digits-7", "hpsearch-mnist-9"])
    ('hpsearch-digits-1', 'hpsearch-digits-8')
    """
    numbers = [int(match["number"]) for id in taken if (match := ID.fullmatch(id)) and match["study"] == study]
    return f"hpsearch-{study}-{max(numbers, default=0) + 1}"


def find(jobs: Sequence[Job], named: str) -> Job | None:
    """The newest job that is called so: by its id, its study, or its run directory.

    >>> old, new = (Job(id=f"hpsearch-digits-{n}", study="digits", run_dir="digits", status="") for n in (1, 2))
    >>> [find([old, new], name) is new for name in ("digits", "~/hpsearch-runs/digits", "hpsearch-digits-1", "mnist")]
    [True, True, False, False]
    """
    plain = plain_run_dir(named)
    exact = [job for job in jobs if job.id == named]
    by_place = [job for job in jobs if job.run_dir == plain]
    by_name = [job for job in jobs if job.study == named]
    return next((found[-1] for found in (exact, by_place, by_name) if found), None)


def plain_run_dir(run_dir: str) -> str:
    """A run directory on the head, relative to BASE where it lies within; a `~` that this shell has filled in counts.

    >>> [plain_run_dir(d) for d in ("digits", "~/hpsearch-runs/digits", "/data/runs/digits/")]
    ['digits', 'digits', '/data/runs/digits']
    """
    for base in (BASE, os.path.expanduser(BASE)):
        if run_dir.startswith(base + "/"):
            return os.path.normpath(run_dir.removeprefix(base + "/"))
    return os.path.normpath(run_dir)


def shown_run_dir(run_dir: str) -> str:
    """A run directory on the head as it is told.

    >>> shown_run_dir("digits"), shown_run_dir("/data/digits")
    ('~/hpsearch-runs/digits', '/data/digits')
    """
    return run_dir if run_dir.startswith(("/", "~")) else f"{BASE}/{run_dir}"


def take_secrets(key: str) -> dict[str, str]:
    """The variables that were left for this job, on the head; afterwards nobody finds them any more.

    Raises:
        ClusterError: they are gone.
    """
    be_quiet()
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without types

    name = f"gcs://{key}".encode()
    try:
        gcs = GcsClient(address=os.environ["RAY_ADDRESS"])
        content: bytes | None = gcs.internal_kv_get(name, None)
        if content is not None:
            gcs.internal_kv_del(name, False, None)
    except Exception as error:
        raise ClusterError(f"the job's secrets cannot be read: {type(error).__name__}: {error}") from None
    if content is None or not content.startswith(SECRETS_HEAD):
        raise ClusterError(
            "the tracking URI and its credentials, which are kept for ten minutes, are gone",
            hint="launch again; if jobs wait that long, set MLFLOW_TRACKING_URI on the head instead",
        )
    told: dict[str, str] = json.loads(content.removeprefix(SECRETS_HEAD))
    return told


def _check_reachable(address: str, told: str) -> None:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        host = None
    if not host:
        raise UsageError(f"--address {told} is no URL", hint="as in http://head:8265")
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except OSError as error:
        raise ClusterError(
            f"no dashboard answers at {told}: {error.strerror or error}",
            hint="it runs on the head where ray[default] is installed, by default on port 8265 of its loopback alone: "
            "ssh -L 8265:127.0.0.1:8265 HEAD, or ray dashboard cluster.yaml, brings it here as http://127.0.0.1:8265",
        ) from None


def _client(address: str) -> Any:
    be_quiet()
    try:
        import aiohttp  # noqa: F401  # the log is followed with it
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise _no_extra(error.name or str(error)) from None
    import logging

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.ERROR)
    with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # they would be taken instead of what the user wrote
        return JobSubmissionClient(address)


def _no_extra(missing: str) -> UsageError:
    return UsageError(
        f"to submit a study Ray's job submission is needed, and {missing} is not installed",
        hint="pip install 'hpsearch[cluster]'",
    )


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _told(error: Exception, address: str) -> Exception:
    """What went wrong between us and the dashboard, in our words."""
    if isinstance(error, (ClusterError, UsageError)):
        return error
    if type(error).__name__ == "AuthenticationError":
        return ClusterError(
            f"the cluster at {address} does not know our token",
            hint="put the head's (~/.ray/auth_token there) into ~/.ray/auth_token here, and set RAY_AUTH_MODE=token",
        )
    text = " ".join(str(error).split())
    if "ray[default]" in text:
        return _no_extra("ray[default]")
    if type(error).__name__ in ("JSONDecodeError", "HTTPError") or "Version check returned 404" in text:
        return ClusterError(f"what answers at {address} is no Ray dashboard", hint="its port is 8265 by default")
    return ClusterError(
        f"the dashboard at {address} does not answer as it should: {type(error).__name__}: {text[:500]}"
    )


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id or details.job_id or "",
        study=metadata.get(STUDY_KEY, ""),
        run_dir=metadata.get(RUN_DIR_KEY, ""),
        verb=metadata.get(VERB_KEY, ""),
        status=str(getattr(details.status, "value", details.status)),
        started_at=(details.start_time or 0) / 1000,
        ended_at=(details.end_time or 0) / 1000,
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )


def _number(job_id: str) -> int:
    match = ID.fullmatch(job_id)
    return int(match["number"]) if match else 0


def _why_failed(job: Job, lines: Sequence[str]) -> str:
    """The line that tells most of a job that failed before hpsearch could speak."""
    told = [line.strip() for line in (*lines, *job.message.splitlines()) if line.strip()]
    for line in told:
        if "No module named" in line:
            return f"{line}; every node needs hpsearch's dependencies"
        if "not found" in line and ("python" in line or "-m" in line):
            return f"{line}; the PATH of `ray start` on the head knows no python"
    return next(iter(reversed(told)), f"{job.status}, exit code {job.exit_code}")
