"""YAML without its traps, of a bounded size."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from fedrounds.fl_components.rules import MAX_WHOLE

LARGEST_BYTES = 1_000_000
MAX_NODES = 100_000
DEEPEST = 50
"""Of a YAML text: its size, its values once its aliases are written out, and how deep they are nested."""


class _Loader(yaml.SafeLoader):
    """YAML without its traps: what it would take for something else than a reader does is text, or refused.

    `yes`, `no`, `on` and `off` are text, and so are dates; 1e-3 is a number, as YAML 1.2 has it. Of two equal keys none
    wins. A number is refused that YAML reads in another base (010 is 8, 1:30 is 90) or as infinity (1e999), and so are
    aliases that multiply what is there, or hold themselves.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {}, ())
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > DEEPEST:
            raise _refused(self.peek_event(), f"it is nested more than {DEEPEST} deep")  # type: ignore[no-untyped-call]
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`, which a key may override
                continue
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise _refused(key_node, f"the key {key!r} stands twice")
            seen.append(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        written = str(node.value)
        digits = written.lstrip("+-")
        is_int = node.tag.endswith(":int")
        if len(digits) > 400:
            raise _refused(node, f"the number {written[:10]}... has more than 400 digits")
        value: int | float = self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)
        if ":" in digits or (is_int and digits[0] == "0" and digits[1:].replace("_", "").isdecimal()):
            raise _refused(node, f"YAML reads {written} as the number {value}: write it in quotes, or write {value}")
        if math.isinf(value) and "inf" not in digits.lower():
            raise _refused(node, f"the number {written} is too large")
        if isinstance(value, int) and not -MAX_WHOLE - 1 <= value <= MAX_WHOLE:
            raise _refused(node, f"the whole number {written[:40]!r} has more than 64 bits")
        return value


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile("^(?:true|True|TRUE|false|False|FALSE)$") if tag.endswith(":bool") else pattern)
        for tag, pattern in resolvers
        if not tag.endswith(":timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",  # of YAML 1.2; PyYAML asks for a dot, and for a sign of the exponent
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    list("+-.0123456789"),
)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _refused(place: yaml.Node | yaml.Event, reason: str) -> yaml.constructor.ConstructorError:
    mark: Any = place.start_mark
    return yaml.constructor.ConstructorError(None, None, reason, mark)


def _measure(
    node: yaml.Node, measured: dict[yaml.Node, tuple[int, int]], above: tuple[yaml.Node, ...]
) -> tuple[int, int]:
    """The number of values in `node`, and its depth, once its aliases are written out.

    Raises ConstructorError when these are too many.
    """
    if node in above:
        raise _refused(node, "the anchor here holds an alias of itself")
    if node not in measured:
        pairs = node.value if isinstance(node, yaml.CollectionNode) else []
        below = [each for pair in pairs for each in (pair if isinstance(pair, tuple) else (pair,))]
        sizes = [_measure(each, measured, (*above, node)) for each in below]
        measured[node] = 1 + sum(count for count, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    count, depth = measured[node]
    if count > MAX_NODES:
        raise _refused(node, f"its aliases stand for more than {MAX_NODES:,} values")
    if depth > DEEPEST:
        raise _refused(node, f"it is nested more than {DEEPEST} deep")
    return count, depth


def parse_yaml(text: str | bytes) -> Any:
    """Raises ValueError, with one line that says where, when `text` is not YAML that can be used.

    Bytes are UTF-8, or UTF-16 after a byte order mark.
    """
    if len(text) > LARGEST_BYTES:
        raise ValueError(f"it is larger than {LARGEST_BYTES:,} bytes")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise ValueError(f"{' '.join(filter(None, [error.context, error.problem]))}{place}") from error
    except yaml.reader.ReaderError as error:
        if error.encoding == "unicode" or error.reason.startswith("special"):
            raise ValueError(f"it holds the control character {error.character:#04x}") from error
        raise ValueError(f"the byte at position {error.position} is not UTF-8 text: save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # of explicit tags: !!int x, !!set [1]
        raise ValueError(" ".join(str(error).split())) from error
