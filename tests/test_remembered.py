"""What is kept at hand: the most recent, as many bytes as fit."""

from __future__ import annotations

from hpsearch.training.remembered import Remembered


def test_what_was_not_asked_for_the_longest_gives_way() -> None:
    remembered = Remembered(6)
    remembered.put("a", b"aa")
    remembered.put("b", b"bb")
    remembered.put("c", b"cc")
    assert remembered.get("a") == b"aa"
    remembered.put("d", b"dd")
    assert [remembered.get(ref) for ref in "abcd"] == [b"aa", None, b"cc", b"dd"]


def test_a_blob_put_again_counts_once_and_one_too_large_is_not_kept() -> None:
    remembered = Remembered(4)
    for _ in range(3):
        remembered.put("a", b"aaa")
    assert remembered.get("a") == b"aaa"
    remembered.put("b", b"bbbbb")
    assert (remembered.get("a"), remembered.get("b")) == (None, None)
    remembered.put("c", b"cccc")
    assert remembered.get("c") == b"cccc"
    remembered.clear()
    assert remembered.get("c") is None
