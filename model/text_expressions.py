"""Regular expressions that are tried only on text which holds one of the literals that every match contains.

The labeller tries some sixty expressions on each clause, and nearly all fail. Whether a text holds "atelecta" is found in
fifty nanoseconds; that an expression matches nowhere in it takes some microseconds.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

try:
    from re import _constants, _parser  # type: ignore[attr-defined]  # the parse tree has no public name
except ImportError:  # without it, expressions are tried on any text
    _parser = None

# More literals than this take as long to look for as the expression.
_MOST_LITERALS = 80


class Expression:
    """A compiled regular expression, case-sensitive, with the interface of `re.Pattern` that the labeller needs.

    Attributes:
        literals: strings of which every match contains at least one; None where there are none to name.
        groupindex: numbers of the groups that have names.
    """

    def __init__(self, pattern: str):
        self._pattern = re.compile(pattern)
        self.literals = required_literals(pattern)
        self.groupindex = self._pattern.groupindex

    def _may_match(self, text: str) -> bool:
        if self.literals is None:
            return True
        for literal in self.literals:  # noqa: SIM110  # three times as fast as any()
            if literal in text:
                return True
        return False

    def search(self, text: str) -> re.Match[str] | None:
        """Return the first match in a text."""
        return self._pattern.search(text) if self._may_match(text) else None

    def match(self, text: str) -> re.Match[str] | None:
        """Return the match at the beginning of a text."""
        return self._pattern.match(text) if self._may_match(text) else None

    def finditer(self, text: str, start: int = 0, end: int | None = None) -> Iterator[re.Match[str]]:
        """Yield the matches in [start, end) of a text; `end` None is its end."""
        if not self._may_match(text):
            return iter(())
        return self._pattern.finditer(text, start, len(text) if end is None else end)


def required_literals(pattern: str) -> tuple[str, ...] | None:
    """Return strings of which every match of a pattern contains at least one; None where there are none to name."""
    if _parser is None:
        return None
    found = _of_sequence(_parser.parse(pattern))
    if found is None:
        return None
    shortest = tuple(s for s in found if not any(other != s and other in s for other in found))
    return tuple(sorted(shortest)) if len(shortest) <= _MOST_LITERALS else None


def _of_sequence(items: Iterable[tuple[Any, Any]]) -> frozenset[str] | None:
    """Return the literals of the part of a sequence that has long and few ones."""
    candidates, run = [], ""
    for operator, argument in [*_flat(items), (None, None)]:
        if operator is _constants.LITERAL:
            run += chr(argument)
            continue
        if operator in (_constants.AT, _constants.ASSERT, _constants.ASSERT_NOT):  # between characters
            continue
        if run:
            candidates.append(frozenset([run]))
            run = ""
        found = _of_branches(argument[1]) if operator is _constants.BRANCH else None
        if operator in (_constants.MAX_REPEAT, _constants.MIN_REPEAT) and argument[0] > 0:
            found = _of_sequence(argument[2])
        if found is not None:
            candidates.append(found)
    return max(candidates, key=lambda found: min(map(len, found)) - len(found) / 4, default=None)


def _flat(items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Yield the items of a sequence, those of its groups in their place."""
    for operator, argument in items:
        if operator is _constants.SUBPATTERN and not argument[1] and not argument[2]:  # no flags of its own
            yield from _flat(argument[3])
        else:
            yield operator, argument


def _of_branches(branches: Iterable[Iterable[tuple[Any, Any]]]) -> frozenset[str] | None:
    """Return the literals of all alternatives; None where one of them has none."""
    found = [_of_sequence(branch) for branch in branches]
    known = [literals for literals in found if literals is not None]
    return frozenset().union(*known) if len(known) == len(found) else None
