"""Notes: one line each, kept beside the journal."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hpsearch.errors import UsageError
from hpsearch.notes import FILE_NAME, Note, add_note, read_notes


def test_notes_come_back_in_order_with_their_numbers(tmp_path: Path) -> None:
    assert add_note(tmp_path, "first", clock=lambda: 1.23456) == Note(number=1, time=1.235, text="first")
    assert add_note(tmp_path, "  second \n", clock=lambda: 2.0) == Note(number=2, time=2.0, text="second")
    assert [note.text for note in read_notes(tmp_path)] == ["first", "second"]


def test_directory_without_notes_has_none(tmp_path: Path) -> None:
    assert read_notes(tmp_path) == []


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_empty_note_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="a note needs some text"):
        add_note(tmp_path, text)
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("text", ["two\nlines", "naïve η → 3", 'a "quoted" \\ word', "line\u2028separator", "\x85 nel"])
def test_any_text_is_one_line_of_the_file(tmp_path: Path, text: str) -> None:
    add_note(tmp_path, text)
    add_note(tmp_path, "after")
    assert (tmp_path / FILE_NAME).read_bytes().count(b"\n") == 2
    assert [note.text for note in read_notes(tmp_path)] == [text.strip(), "after"]


def test_half_written_last_note_is_left_out_and_the_next_is_whole(tmp_path: Path) -> None:
    add_note(tmp_path, "whole")
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b'{"time": 3.0, "te')
    assert [note.text for note in read_notes(tmp_path)] == ["whole"]
    assert add_note(tmp_path, "next", clock=lambda: 4.0) == Note(number=2, time=4.0, text="next")
    assert [note.text for note in read_notes(tmp_path)] == ["whole", "next"]


def test_notes_of_several_people_do_not_mix(tmp_path: Path) -> None:
    writers = [
        threading.Thread(target=lambda who=who: [add_note(tmp_path, f"{who}{n}" * 50) for n in range(20)])  # type: ignore[misc]
        for who in "abcd"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    texts = [note.text for note in read_notes(tmp_path)]
    assert sorted(texts) == sorted(f"{who}{n}" * 50 for who in "abcd" for n in range(20))


def test_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        add_note(tmp_path / "no", "text")
    assert str(raised.value) == f"error[usage]: {tmp_path / 'no'} cannot be written: No such file or directory"
