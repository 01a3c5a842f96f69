"""The journal: whole lines count, half-written ones do not, damage is named."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.errors import JournalError, UsageError
from hpsearch.events import Ended, Finished, Leased, Opened, RangeMeasured, Selected, TrialDrawn, from_json, to_json
from hpsearch.journal import FILE_NAME, Journal, JournalTail, is_locked, read_journal
from hpsearch.state import Entry


def write(run_dir: Path, *events: object) -> None:
    journal = Journal.open(run_dir, wait_s=0, clock=lambda: 1.5, steady=lambda: 0.0)
    for event in events:
        journal.append(event)  # type: ignore[arg-type]
    journal.close()


def drawn(n: int) -> list[TrialDrawn]:
    return [TrialDrawn(trial=i, config={"lr": 0.1 / (i + 1)}, seed=i) for i in range(n)]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    events = [
        *drawn(2),
        Finished(
            key="train/0/0-1",
            worker="w",
            outcome="done",
            trial=0,
            values={"checkpoint": "c"},
            epochs=((1, {"val_loss": 0.5}, 0.1),),
        ),
        RangeMeasured(
            branch={},
            lr=None,
            low=1e-5,
            high=1.0,
            spread_decades=0.0,
            at_edge=False,
            confirmed=False,
            per_seed_lr=(1.0,),
        ),
        Selected(n_trials=2, best=0, pool=(0, 1), members=((0, 0.5), (1, 0.5)), scores=(0.4, 0.3)),
    ]
    write(tmp_path, *events)
    assert [entry.event for entry in read_journal(tmp_path)] == events


def test_each_line_is_a_json_object(tmp_path: Path) -> None:
    write(tmp_path, *drawn(3))
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [0, 1, 2]


def test_half_written_last_line_is_ignored_and_overwritten(tmp_path: Path) -> None:
    write(tmp_path, *drawn(3))
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    for cut in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert len(read_journal(tmp_path)) == 2
        write(tmp_path, Ended(reason="done"))
        assert [entry.event.type for entry in read_journal(tmp_path)] == ["trial", "trial", "ended"]
        path.write_bytes(whole)


@given(data=st.data())
def test_any_altered_byte_before_the_last_line_is_named_by_its_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    write(run_dir, *drawn(4))
    path = run_dir / FILE_NAME
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, raw.rindex(b"\n", 0, -1) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw)
    line = bytes(path.read_bytes()[:at]).count(b"\n") + 1
    with pytest.raises(JournalError, match=rf"journal\.jsonl:({line}|{line + 1}): "):
        read_journal(run_dir)


def test_missing_line_is_named(tmp_path: Path) -> None:
    write(tmp_path, *drawn(4))
    path = tmp_path / FILE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))
    with pytest.raises(JournalError, match=r"journal\.jsonl:2: entry 1 is missing \(found 2\)"):
        read_journal(tmp_path)


def test_line_of_a_replaced_writer_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, *drawn(1))
    stale = (tmp_path / FILE_NAME).read_bytes()
    write(tmp_path, Ended(reason="second"))
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(stale)
    assert [entry.event.type for entry in read_journal(tmp_path)] == ["trial", "ended"]


def test_second_writer_is_refused_with_a_word(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)
    assert is_locked(tmp_path)
    with pytest.raises(UsageError, match="is in use by another launch"):
        Journal.open(tmp_path, wait_s=0)
    journal.close()
    assert not is_locked(tmp_path)
    Journal.open(tmp_path, wait_s=0).close()


def test_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hpsearch.journal import Journal\n"
        "journal = Journal.open(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert is_locked(tmp_path)
        process.kill()
    Journal.open(tmp_path, wait_s=5).close()


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot be written"):
        Journal.open(tmp_path / "file")


def test_directory_without_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no study"):
        read_journal(tmp_path)


def test_clock_that_jumps_back_does_not_turn_time_around(tmp_path: Path) -> None:
    wall, steady = [100.0], [7.0]
    journal = Journal.open(tmp_path, clock=lambda: wall[0], steady=lambda: steady[0])
    times = []
    for event, jump in zip(drawn(3), (0.0, -3600.0, 86400.0), strict=True):
        wall[0] += jump
        steady[0] += 1.0
        times.append(journal.append(event).time)
    assert times == [101.0, 102.0, 103.0]
    journal.close()


def test_times_go_on_where_the_last_driver_ended_though_the_clock_was_set_back(tmp_path: Path) -> None:
    for wall, expected in ((1000.0, 1001.0), (10.0, 1002.0), (5000.0, 5001.0)):
        steady = iter([0.0, 1.0])
        journal = Journal.open(tmp_path, clock=lambda wall=wall: wall, steady=lambda steady=steady: next(steady))
        assert journal.append(drawn(1)[0]).time == expected
        journal.close()


def test_tail_gives_each_entry_once_and_waits_for_whole_lines(tmp_path: Path) -> None:
    tail = JournalTail(tmp_path)
    assert list(tail.new_entries()) == []
    write(tmp_path, *drawn(2))
    assert [entry.seq for entry in tail.new_entries()] == [0, 1]
    assert list(tail.new_entries()) == []
    raw = (tmp_path / FILE_NAME).read_bytes()
    write(tmp_path, Ended(reason="done"))
    last = (tmp_path / FILE_NAME).read_bytes()[len(raw) :]
    (tmp_path / FILE_NAME).write_bytes(raw + last[:20])
    assert list(tail.new_entries()) == []
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(last[20:])
    assert [entry.event.type for entry in tail.new_entries()] == ["ended"]


def test_appends_from_many_threads_keep_sequence_and_order(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path)

    def append() -> None:
        for event in drawn(50):
            journal.append(event)
            journal.commit()

    threads = [threading.Thread(target=append) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert [entry.seq for entry in read_journal(tmp_path)] == list(range(400))


def test_full_disk_is_told_and_not_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = Journal.open(tmp_path)
    journal.append(Ended(reason="done"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(JournalError, match="No space left on device"):
            journal.commit()
        assert read_journal(tmp_path) == []
    journal.close()  # there is room again, and nothing was lost
    assert [entry.event for entry in read_journal(tmp_path)] == [Ended(reason="done")]


def test_ctrl_c_while_an_event_is_written_leaves_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(entry: Entry) -> bytes:
        raise KeyboardInterrupt

    journal = Journal.open(tmp_path)
    journal.append(drawn(1)[0])
    with monkeypatch.context() as patch:
        patch.setattr("hpsearch.journal._line", interrupt)
        with pytest.raises(KeyboardInterrupt):
            journal.append(Ended(reason="done"))
    journal.append(Ended(reason="interrupted"))
    journal.close()
    assert [entry.seq for entry in read_journal(tmp_path)] == [0, 1]


def test_fields_at_their_default_are_left_out() -> None:
    assert to_json(Leased(key="ramp/all/0", worker="w")) == {"type": "leased", "key": "ramp/all/0", "worker": "w"}


def test_event_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="'dance' is not known"):
        from_json({"type": "dance"})
    with pytest.raises(ValueError, match="other fields"):
        from_json({"type": "ended", "reason": "done", "mood": "good"})


def test_opened_keeps_the_whole_spec() -> None:
    event = Opened(study="s", uid="u", spec={"seed": 0, "nested": {"a": [1, None]}}, spec_text="name: s\n")
    assert from_json(json.loads(json.dumps(to_json(event)))) == event


def test_line_that_was_altered_after_it_was_read_is_found_out(tmp_path: Path) -> None:
    """Lines that this process has parsed are not parsed again, unless they are others now."""
    write(tmp_path, *drawn(3))
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    assert len(read_journal(tmp_path)) == 3
    path.write_bytes(whole.replace(b'"trial":1', b'"trial":7'))
    with pytest.raises(JournalError, match=r"journal\.jsonl:2: the line is damaged"):
        read_journal(tmp_path)
    with pytest.raises(JournalError, match=r"journal\.jsonl:2: the line is damaged"):
        list(JournalTail(tmp_path).new_entries())
    path.write_bytes(whole)
    assert len(read_journal(tmp_path)) == 3


def test_journals_read_in_turn_are_told_apart(tmp_path: Path) -> None:
    long, short = tmp_path / "long", tmp_path / "short"
    write(long, *drawn(3))
    write(short, Ended(reason="done"))
    for _ in range(2):
        assert [entry.event for entry in read_journal(long)] == drawn(3)
        assert [entry.event for entry in read_journal(short)] == [Ended(reason="done")]
    write(long, Ended(reason="done"))  # it grew since
    assert [entry.event.type for entry in read_journal(long)] == ["trial", "trial", "trial", "ended"]
    assert [entry.seq for entry in JournalTail(long).new_entries()] == [0, 1, 2, 3]
