"""YAML: what plain scalars mean, where they stand, and what is refused."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.yaml_reader import MAX_BYTES, MAX_DEPTH, Document, Place, read_document, shown, with_overrides, write_yaml


def read(text: str | bytes) -> Document:
    return read_document(text, name="space.yaml")


def only_problem(document: Document) -> str:
    assert len(document.problems) == 1, document.problems
    return str(document.problems[0])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+7", 7),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("2024-01-01", "2024-01-01"),
        ("none", "none"),
        ("e5", "e5"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
    ],
)
def test_plain_scalar_means_what_it_looks_like(text: str, value: object) -> None:
    found = read(f"a: {text}").value["a"]
    assert found == value
    assert type(found) is type(value)


def test_infinity_and_nan_are_read_so_that_they_can_be_refused_by_name() -> None:
    values = read("[.inf, -.Inf, .nan]").value
    assert values[:2] == [math.inf, -math.inf]
    assert math.isnan(values[2])


def test_places_count_from_one_and_point_at_keys_of_mappings_and_at_scalar_values() -> None:
    document = read("name: digits\nsearch:\n  trials: 64\n  ids: [1, 2]\n")
    assert document.place(("search",)) == Place(line=2, column=1)
    assert document.place(("search", "trials")) == Place(line=3, column=11)
    assert document.key_place(("search", "trials")) == Place(line=3, column=3)
    assert document.place(("search", "ids", 1)) == Place(line=4, column=12)
    assert document.place(("search", "absent")) == Place(line=2, column=1)
    assert document.where(document.place(("name",))) == "space.yaml:1:7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"",
            "error[empty]: space.yaml:1:1: the file is empty\n  hint: the README has one to start from",
        ),
        (
            b"# only a comment\n",
            "error[empty]: space.yaml:1:1: the file is empty\n  hint: the README has one to start from",
        ),
        (
            b"a: 1\na: 2\n",
            "error[duplicate-key]: space.yaml:2:1: `a` is given twice (first in line 1)\n  hint: keep one of them",
        ),
        (
            b"a: !!python/object/apply:os.system [ls]",
            "error[tag]: space.yaml:1:4: the tag `!!python/object/apply:os.system` is not accepted\n"
            "  hint: values are plain YAML",
        ),
        (
            b"a: !mine x",
            "error[tag]: space.yaml:1:4: the tag `!mine` is not accepted\n  hint: values are plain YAML",
        ),
        (
            b"a: 1\nb: \xff\n",
            "error[not-text]: space.yaml:2:4: byte 0xff is not UTF-8 text\n  hint: save the file as UTF-8",
        ),
        (
            b"a: \x00",
            "error[not-text]: space.yaml:1:4: the character U+0000 is not text\n  hint: save the file as UTF-8",
        ),
        (
            b'a: "\\ud800"',
            "error[not-text]: space.yaml:1:4: `\\ud800` holds half a character\n  hint: write the character itself",
        ),
        (
            b"a: 1\n---\nb: 2\n",
            "error[documents]: space.yaml:2:1: the file holds more than one document\n"
            "  hint: keep one study to a file; `---` starts another",
        ),
        (
            b"a:\n\t- 1\n",
            "error[yaml]: space.yaml:2:1: not valid YAML: while scanning for the next token, "
            "found character '\\t' that cannot start any token\n  hint: indent with spaces, not tabs",
        ),
        (
            b"a: b: c\n",
            "error[yaml]: space.yaml:1:5: not valid YAML: mapping values are not allowed here\n"
            "  hint: look for a wrong indentation, or text with a colon that needs quotes",
        ),
        (b"a: *gone\n", "error[yaml]: space.yaml:1:4: undefined alias 'gone'"),
        (
            b"base: &b {a: 1}\nc: {<<: *b}\n",
            "error[merge-key]: space.yaml:2:5: merge keys (`<<`) are not accepted\n  hint: write the keys out",
        ),
        (
            b"1: a\n",
            'error[key-not-text]: space.yaml:1:1: the key `1` is a number, and keys are text\n  hint: write "1"',
        ),
        (
            b"{[a]: 1}\n",
            "error[key-not-text]: space.yaml:1:2: a list stands where a key is expected\n"
            "  hint: text in braces needs quotes",
        ),
        (
            b"a: " + b"9" * 5000,
            "error[number]: space.yaml:1:4: a whole number of 5000 digits is too large",
        ),
        (
            b'a: "\\UFFFFFFFF"',
            "error[yaml]: space.yaml:1:7: not valid YAML: a number in an escape is out of range",
        ),
        (b"a: &a [*a]\n", "error[too-deep]: space.yaml:1:4: aliases make this more than 24 levels deep"),
    ],
)
def test_hostile_or_broken_text_is_one_clear_problem(text: bytes, message: str) -> None:
    assert only_problem(read(text)) == message


def test_all_duplicate_keys_are_told() -> None:
    assert [p.where for p in read("a: 1\na: 2\nb: {c: 1, c: 2}\n").problems] == ["space.yaml:2:1", "space.yaml:3:11"]


def test_anchors_that_explode_are_stopped_early() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, after in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]")
    began = time.monotonic()
    assert "aliases make this more than 50,000 values" in only_problem(read("\n".join(lines)))
    assert time.monotonic() - began < 5


def test_an_alias_is_followed_where_it_is_harmless() -> None:
    assert read("a: &a [1, 2]\nb: *a\n").value == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_is_refused_before_the_stack_ends(opening: str) -> None:
    assert f"more than {MAX_DEPTH} levels" in only_problem(read(opening * 5000))


def test_a_file_that_is_too_large_is_not_parsed() -> None:
    assert "more than 262,144 is no search space" in only_problem(read(b"#" * (MAX_BYTES + 1)))


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm() -> None:
    assert read(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n").value == {"a": 1, "b": 2}


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))
def test_no_bytes_raise(data: bytes) -> None:
    document = read(data)
    assert document.value is None or isinstance(document.value, bool | int | float | str | list | dict)


@given(st.text(alphabet="ab:-[]{}&*!?|>'\"#%@,0.e\\xuU \n\t<~", max_size=60))
def test_no_arrangement_of_yaml_marks_raises(text: str) -> None:
    for problem in read(text).problems:
        assert problem.where.startswith("space.yaml:")
        assert "\n" not in problem.what


plain = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text()
    | st.sampled_from(["no", "1e-4", "~", "", "<<", "0x1", "1_0", "true", "-", "= a: b", ".inf", "1:30"])
)  # fmt: skip


@given(st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
def test_what_is_written_is_read_back_with_its_types(value: object) -> None:
    document = read(write_yaml(value))
    assert document.problems == ()
    assert repr(document.value) == repr(value)  # repr tells 1 from 1.0 and True


def test_shown_text_fits_a_line_and_cannot_steer_a_terminal() -> None:
    assert shown("\x1b[31mred\n") == "\\x1b[31mred\\n"
    assert len(shown("x" * 1000)) == 60


def test_override_replaces_a_value_and_gives_it_its_own_place() -> None:
    document = with_overrides(read("search: {trials: 64, method: tpe}\n"), ["search.trials=1e-4"])
    assert document.value == {"search": {"trials": 1e-4, "method": "tpe"}}
    assert document.where(document.place(("search", "trials"))) == "--set search.trials"
    assert document.where(document.place(("search", "method"))) == "space.yaml:1:30"


def test_override_may_create_keys_and_hold_any_yaml() -> None:
    document = with_overrides(read("a: 1\n"), ["b.c.d={x: [1, no]}", "b.c.e=", "f=a=b"])
    assert document.value == {"a": 1, "b": {"c": {"d": {"x": [1, "no"]}, "e": None}}, "f": "a=b"}
    assert document.where(document.place(("b", "c", "d", "x", 0))) == "--set b.c.d"


def test_later_override_wins() -> None:
    document = with_overrides(read("a: 1\n"), ["a=2", "a=3"])
    assert document.value == {"a": 3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "search",
            "error[override]: --set search: `search` is not of the form key=value\n  hint: such as search.trials=16",
        ),
        (
            "a..b=1",
            "error[override]: --set a..b=1: `a..b=1` is not of the form key=value\n  hint: such as search.trials=16",
        ),
        (
            "a.b=1",
            "error[override]: --set a.b: `a` is not a mapping, so it has no key `b`\n  hint: set the whole value",
        ),
        (
            "a={b: 1, b: 2}",
            "error[duplicate-key]: --set a: `b` is given twice (first in line 1)\n  hint: keep one of them",
        ),
        (
            "a=!!python/name:os.system x",
            "error[tag]: --set a: the tag `!!python/name:os.system` is not accepted\n  hint: values are plain YAML",
        ),
    ],
)
def test_wrong_override_is_a_problem_and_changes_nothing(override: str, message: str) -> None:
    document = with_overrides(read("a: 1\n"), [override])
    assert only_problem(document) == message
    assert document.value == {"a": 1}
