"""Every node is asked for a token before the search starts; and a study over two nodes with large checkpoints."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpsearch.archive import Archive, Driver
from hpsearch.errors import StorageError
from hpsearch.fleets import storage_check
from hpsearch.fleets.storage_check import check_driver, check_here
from hpsearch.journal import read_journal
from hpsearch.state import StudyState
from hpsearch.storage import Storage
from tests.mirrored_study import archive_in, launch, missing
from tests.s3_server import CREDENTIALS, S3Server, s3_server


def test_check_leaves_no_token_behind(tmp_path: Path) -> None:
    check_driver(str(tmp_path))
    assert Storage(str(tmp_path)).contents() == {}


def test_folder_that_is_another_one_on_another_machine_is_told(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    token = check_here(str(tmp_path / "here"))
    check_here(str(tmp_path / "here"), token)
    with pytest.raises(StorageError) as caught:
        check_here(str(tmp_path / "there"), token)
    assert str(caught.value) == (
        f"error[storage]: {tmp_path}/there does not give back what another node has written\n"
        "  hint: a folder has to be the same one on every machine, on NFS or another shared file system"
    )


def test_node_that_comes_later_is_checked_against_what_the_driver_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_check, "LATER_S", 0.05)
    monkeypatch.setattr(storage_check, "AGAIN_S", 0.01)
    archive = Archive(str(tmp_path), "study", "0" * 32)
    with pytest.raises(
        StorageError, match=rf"\(node abcdefab\), which came later, cannot use storage: {archive} is not"
    ):
        storage_check._check_later_node(archive, "abcdefabcdef")
    archive.claim(Driver(fence=1, start=0, run_dir="/runs/study"))
    storage_check._check_later_node(archive, "abcdefabcdef")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(server: S3Server) -> Iterator[Any]:
    """Two nodes; the second one has no credentials until it is told."""
    from hpsearch.fleets.ray_cluster import be_quiet

    be_quiet()
    from ray.cluster_utils import Cluster

    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield head
    head.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_nodes_write_and_read_and_one_that_cannot_is_named_with_its_reason(
    cluster: Any, server: S3Server, tmp_path: Path
) -> None:
    import ray

    from hpsearch.fleets.ray_cluster import connect
    from hpsearch.fleets.storage_check import check_nodes

    uri = server.uri("studies", uuid.uuid4().hex)
    good = cluster.add_node(num_cpus=1)
    connect(cluster.address)
    try:
        nodes = check_nodes(uri)
        assert len(nodes) == 2
        assert good.node_id in nodes
        assert Storage(uri).contents() == {}
        poor = cluster.add_node(num_cpus=1, env_vars=dict.fromkeys(CREDENTIALS, ""))
        cluster.wait_for_nodes()
        with pytest.raises(StorageError) as caught:
            check_nodes(uri)
        first, second, hint = str(caught.value).splitlines()
        assert first == f"error[storage]: 1 of 3 nodes cannot use {Storage(uri)}:"
        assert f"(node {poor.node_id[:8]}): tokens/" in second
        assert hint.startswith("  hint: ")
        cluster.remove_node(poor)
    finally:
        ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_study_on_two_nodes_keeps_its_large_checkpoints_in_s3(cluster: Any, server: S3Server, tmp_path: Path) -> None:
    from hpsearch.fleets.tune import TuneFleet
    from tests.test_carrier import large_executor

    storage = server.uri("studies", uuid.uuid4().hex)
    study = dataclasses.replace(
        launch(tmp_path / "run", storage), make_executor=large_executor, folder=tmp_path, inline_bytes=3000
    )
    (tmp_path / "task.py").write_text("")
    fleet = TuneFleet(study, address=cluster.address, workers=2)
    try:
        fleet.run(lambda entries: None)
    finally:
        fleet.close()
    state = StudyState.of(read_journal(study.run_dir))
    assert state.done
    assert len(state.trials) == 27
    archive = archive_in(storage, study.run_dir)
    assert missing(archive) == []
    assert archive.journal(archive.segments()) == (study.run_dir / "journal.jsonl").read_bytes()
    assert list(study.run_dir.glob("checkpoints/*")) == []
    assert any("/checkpoints/" in name for name in archive.blobs())
