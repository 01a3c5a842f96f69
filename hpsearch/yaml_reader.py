"""YAML as people expect it, with the place of every value, and nothing that could hurt.

PyYAML reads YAML 1.1, where `1e-4` is text, `no` is a boolean, `1:30` is ninety, a key may come twice (the last one
wins in silence), and a tag may build any object. Here plain scalars follow YAML 1.2's core schema, and whatever a
search space has no use for is refused with its place. What the values mean is left to `spec`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from hpsearch.errors import Problem

MAX_BYTES = 256 * 1024  # a thousand parameters take about 60 KiB
MAX_DEPTH = 24
MAX_NODES = 50_000  # counted after aliases are followed, so that nine lines of anchors cannot become a billion nodes
MAX_DIGITS = 300  # of an integer; every float ends below 1e309

Loc = tuple[str | int, ...]
"""The way to a value: keys and list indices, outermost first."""

_NULL, _BOOL, _INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "merge"))
_PLAIN = (  # YAML 1.2 core schema, section 10.3.2, without octal and hexadecimal numbers
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
    (_MERGE, re.compile(r"^<<$"), ["<"]),  # YAML 1.1's; known here only to be refused as a key
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where something was written: line and column count from 1; an override has its own text and no line."""

    line: int
    column: int
    override: str = ""

    def order(self) -> tuple[int, int]:
        """Sorts problems as a reader meets them, overrides last."""
        return (self.line, self.column) if not self.override else (1 << 60, 0)


@dataclass(frozen=True, kw_only=True)
class Document:
    """What a YAML text says, where each part of it stands, and what is wrong with it as YAML.

    `value` is None when the text cannot be read at all; `problems` then says why.
    """

    name: str
    value: Any
    keys: Mapping[Loc, Place] = field(default_factory=dict)
    values: Mapping[Loc, Place] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def place(self, loc: Loc) -> Place:
        """The key for a mapping or list, the value for a scalar, the nearest enclosing thing for what is absent.

        A mapping with an override right inside it stands where the override does: that is what was changed last.
        """
        value = self.at(loc)
        for key in value if isinstance(value, dict) and loc else ():
            if (place := self.values.get((*loc, key))) and place.override:
                return place
        for end in range(len(loc), 0, -1):
            way = loc[:end]
            if way in self.keys and (end < len(loc) or isinstance(self.at(way), dict | list)):
                return self.keys[way]
            if way in self.values:
                return self.values[way]
        return self.values.get((), Place(line=1, column=1))

    def key_place(self, loc: Loc) -> Place:
        """Where the key itself stands, for a key that should not be there."""
        return self.keys.get(loc) or self.place(loc)

    def at(self, loc: Loc) -> Any:
        """The value at `loc`; None where nothing is."""
        value = self.value
        for step in loc:
            inside = step in value if isinstance(value, dict) else isinstance(value, list) and step in range(len(value))
            if not inside:
                return None
            value = value[step]
        return value

    def where(self, place: Place) -> str:
        """A place as an editor understands it: `space.yaml:14:9`."""
        return place.override or f"{self.name}:{place.line}:{place.column}"


class _PlainResolver(BaseResolver):
    """Tells what a plain scalar is; quoted ones are always text."""


class _Loader(Reader, Scanner, Parser, Composer, _PlainResolver):
    """Composes nodes, and stops at tags and at depth before Python's own stack would."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._depth = 0

    def single_node(self) -> Any:
        """The document's root node; None for an empty text."""
        try:
            return self.get_single_node()
        except (ValueError, OverflowError) as error:  # PyYAML takes "\UFFFFFFFF" and versions of 5,000 digits on trust
            raise _Refused("yaml", self.get_mark(), "not valid YAML: a number in an escape is out of range") from error

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            tag = shown(tag.replace("tag:yaml.org,2002:", "!!"))
            raise _Refused("tag", event.start_mark, f"the tag `{tag}` is not accepted", "values are plain YAML")
        if self._depth >= MAX_DEPTH:
            raise _Refused("too-deep", event.start_mark, f"more than {MAX_DEPTH} levels lie inside each other")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.emitter.Emitter, yaml.serializer.Serializer, yaml.representer.SafeRepresenter, _PlainResolver):
    """Writes what `_Loader` reads: text that would read as a number is quoted, `no` is not."""

    def __init__(self, stream: Any) -> None:
        yaml.emitter.Emitter.__init__(self, stream, allow_unicode=True, width=10_000)
        yaml.serializer.Serializer.__init__(self)
        yaml.representer.SafeRepresenter.__init__(self, sort_keys=False)
        BaseResolver.__init__(self)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Text with line breaks or control characters in escapes, since PyYAML's other styles fold some of them."""
        style = None if data.isprintable() else '"'
        return self.represent_scalar(BaseResolver.DEFAULT_SCALAR_TAG, data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _tag, _pattern, _first in _PLAIN:
    _PlainResolver.add_implicit_resolver(_tag, _pattern, _first)


class _Refused(Exception):
    """Readable YAML that goes no further."""

    def __init__(self, code: str, mark: Any, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.code, self.what, self.hint = code, what, hint
        self.line, self.column = mark.line + 1, mark.column + 1


def read_document(data: bytes | str, *, name: str) -> Document:
    """A YAML text with places; never raises for what the text may hold.

    Integers, floats, booleans, null, text, lists and mappings come out as Python's own; keys are always text.

    Args:
        data: the file's bytes, or its text.
        name: what the file is called in messages.
    """
    size = len(data)
    if size > MAX_BYTES:
        return _unreadable(name, "too-large", f"{size:,} bytes; more than {MAX_BYTES:,} is no search space")
    text = data
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1  # type: ignore[arg-type]
            column = error.start - data.rfind(b"\n", 0, error.start)  # type: ignore[arg-type]
            found = f"byte 0x{error.object[error.start]:02x} is not UTF-8 text"
            return _unreadable(name, "not-text", found, "save the file as UTF-8", line=line, column=column)
    try:
        loader = _Loader(text)
        node = loader.single_node()
        if node is None:
            return _unreadable(name, "empty", "the file is empty", "the README has one to start from")
        reading = _Reading(name)
        value = reading.value_of(node, ())
    except ReaderError as error:
        before = text[: error.position]
        found = f"the character U+{ord(text[error.position]):04X} is not text"
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        return _unreadable(name, "not-text", found, "save the file as UTF-8", line=line, column=column)
    except yaml.MarkedYAMLError as error:
        return _syntax_problem(name, error)
    except _Refused as error:
        return _unreadable(name, error.code, error.what, error.hint, line=error.line, column=error.column)
    return Document(name=name, value=value, keys=reading.keys, values=reading.values, problems=tuple(reading.problems))


def write_yaml(value: Any) -> str:
    """YAML that `read_document` reads back to the same value, keys in their order."""
    from io import StringIO

    stream = StringIO()
    dumper = _Dumper(stream)
    try:
        dumper.open()
        dumper.represent(value)
        dumper.close()
    finally:
        dumper.dispose()
    return stream.getvalue()


def shown(text: str, *, limit: int = 60) -> str:
    """Text fit for one line of a message: control characters escaped, and no longer than `limit`."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in short)


def with_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """The document after `--set key=value`, in order; a key is dotted and may be new, a value is read as YAML.

    Every value that an override gave has the override as its place, and so has every problem of the override itself.
    """
    value = document.value
    keys, values, problems = dict(document.keys), dict(document.values), list(document.problems)
    for text in overrides:
        dotted, equals, written = text.partition("=")
        dotted = dotted.strip()
        here = Place(line=0, column=0, override=f"--set {dotted}")
        way = tuple(dotted.split("."))
        if not equals or not all(way):
            what = f"`{text}` is not of the form key=value"
            problems.append(Problem(code="override", where=f"--set {text}", what=what, hint="such as search.trials=16"))
            continue
        given = read_document(written, name=here.override) if written.strip() else None
        if given is not None and given.problems:
            problems += [Problem(code=p.code, where=here.override, what=p.what, hint=p.hint) for p in given.problems]
            continue
        found, blocked = _replaced(value, way, None if given is None else given.value)
        if blocked is not None:
            what = f"`{'.'.join(way[: len(blocked)])}` is not a mapping, so it has no key `{way[len(blocked)]}`"
            problems.append(Problem(code="override", where=here.override, what=what, hint="set the whole value"))
            continue
        value = found
        for places in (keys, values):
            for loc in [loc for loc in places if loc[: len(way)] == way]:
                del places[loc]
        for loc in (*(way[:end] for end in range(1, len(way))), *_locs(None if given is None else given.value, way)):
            keys.setdefault(loc, here)
            values.setdefault(loc, here)
    return Document(name=document.name, value=value, keys=keys, values=values, problems=tuple(problems))


def _replaced(value: Any, way: Sequence[str], new: Any) -> tuple[Any, Loc | None]:
    """A copy of `value` with `new` at `way`; the way to what stands in between, where something does."""
    if not way:
        return new, None
    if value is None:
        value = {}
    if not isinstance(value, dict):
        return None, ()
    inner, blocked = _replaced(value.get(way[0]), way[1:], new)
    if blocked is not None:
        return None, (way[0], *blocked)
    return {**value, way[0]: inner}, None


def _locs(value: Any, loc: Loc) -> Iterator[Loc]:
    """The ways to a value and to everything inside it."""
    yield loc
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        yield from _locs(inner, (*loc, step))


def _unreadable(name: str, code: str, what: str, hint: str = "", *, line: int = 1, column: int = 1) -> Document:
    problem = Problem(code=code, where=f"{name}:{line}:{column}", what=what, hint=hint)
    return Document(name=name, value=None, problems=(problem,))


def _syntax_problem(name: str, error: yaml.MarkedYAMLError) -> Document:
    """PyYAML's complaint in one line."""
    mark: Any = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    problem = error.problem or "it ends too early"
    if error.context and "single document" in error.context:
        hint = "keep one study to a file; `---` starts another"
        return _unreadable(name, "documents", "the file holds more than one document", hint, line=line, column=column)
    if "found undefined alias" in problem:
        return _unreadable(name, "yaml", f"{problem.removeprefix('found ')}", line=line, column=column)
    hint = ""
    if "'\\t'" in problem:
        hint = "indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        hint = "look for a wrong indentation, or text with a colon that needs quotes"
    elif "expected <block end>" in problem or "could not find expected ':'" in problem:
        hint = "look for a wrong indentation, or a missing colon, bracket or quote, here or just above"
    context = f"{error.context}, " if error.context else ""
    return _unreadable(name, "yaml", f"not valid YAML: {context}{problem}", hint, line=line, column=column)


class _Reading:
    """One pass over the nodes: values, places and problems."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: dict[Loc, Place] = {}
        self.values: dict[Loc, Place] = {}
        self.problems: list[Problem] = []
        self._nodes = 0

    def value_of(self, node: yaml.Node, loc: Loc) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _Refused("too-large", node.start_mark, f"aliases make this more than {MAX_NODES:,} values")
        if len(loc) > MAX_DEPTH:
            raise _Refused("too-deep", node.start_mark, f"aliases make this more than {MAX_DEPTH} levels deep")
        self.values[loc] = _place(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return [self.value_of(item, (*loc, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key is None:
                continue
            way = (*loc, key)
            if key in result:
                first = self.keys[way]
                what = f"`{shown(key)}` is given twice (first in line {first.line})"
                self._problem("duplicate-key", key_node, what, "keep one of them")
                continue
            self.keys[way] = _place(key_node)
            result[key] = self.value_of(value_node, way)
        return result

    def _key(self, node: yaml.Node) -> str | None:
        if isinstance(node, yaml.ScalarNode):
            text = self._text(node)
            if node.tag == _MERGE:
                self._problem("merge-key", node, "merge keys (`<<`) are not accepted", "write the keys out")
                return None
            if node.tag == BaseResolver.DEFAULT_SCALAR_TAG:
                return text
            kind = {_NULL: "null", _BOOL: "a boolean"}.get(node.tag, "a number")
            self._problem("key-not-text", node, f"the key `{text}` is {kind}, and keys are text", f'write "{text}"')
        else:
            kind = "mapping" if isinstance(node, yaml.MappingNode) else "list"
            self._problem(
                "key-not-text", node, f"a {kind} stands where a key is expected", "text in braces needs quotes"
            )
        return None

    def _scalar(self, node: yaml.Node) -> bool | int | float | str | None:
        text = str(node.value)
        if node.tag == _NULL:
            return None
        if node.tag == _BOOL:
            return text.lower() == "true"
        if node.tag == _INT:
            if len(text) > MAX_DIGITS:
                self._problem("number", node, f"a whole number of {len(text)} digits is too large")
                return 0
            return int(text)
        if node.tag == _FLOAT:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        return self._text(node)

    def _text(self, node: yaml.Node) -> str:
        """The scalar's text, which can be written to a file or a terminal as UTF-8."""
        text = str(node.value)
        try:
            text.encode()
        except UnicodeEncodeError:
            self._problem("not-text", node, f"`{shown(text)}` holds half a character", "write the character itself")
            return text.encode(errors="replace").decode()
        return text

    def _problem(self, code: str, node: yaml.Node, what: str, hint: str = "") -> None:
        place = _place(node)
        self.problems.append(Problem(code=code, where=f"{self.name}:{place.line}:{place.column}", what=what, hint=hint))


def _place(node: yaml.Node) -> Place:
    return Place(line=node.start_mark.line + 1, column=node.start_mark.column + 1)
