"""Laterality of each finding in a clause: right, left or both, from the phrase that names it or shares its location.

"Right effusion with left basal atelectasis" has a side for each; "atelectasis and consolidation in the left lower lobe"
shares one; "the right lower lobe", "lingula" and "both lung bases" name sides, "right atrium" doesn't.
"""

import re
from collections.abc import Sequence

from .text_cues import FRESH
from .text_expressions import Expression

_NO_SIDE = (
    r"(?! (?:atri|ventric|heart|main cor|main pulmonary|main stem cor|anterior descending|coronary|circumflex"
    r"|thyroid|kidney"
    r"|adrenal|renal|hepatic|brachioceph|aortic|of midline|descending))"
)
_PAIRED = (
    r"(?:lungs?|hemithora\w*|sides?|ap(?:ices|exes|ex)|bases?|lobes?|hila|axilla\w*|pleurae|pleural (?:spaces?"
    r"|cavit\w+)|upper|lower|mid|apical|basal|hilar"
    r"|zones?|parenchyma\w*|segments?|costophrenic|breasts?|chest|posterior|anterior|central|main bronch"
    r"|diaphragm\w*)"
)
_SIDES = Expression(
    rf"\b(?:(?P<right>right(?:-sided|ward)?{_NO_SIDE}|(?<!left )middle lobe)"
    rf"|(?P<left>left(?:-sided)?{_NO_SIDE}(?! main)|lingul\w*)"
    rf"|(?P<both>bi-?lateral\w*|bi-?bas\w+|bi-?ap\w+|bi-?hilar|(?:both|either"
    rf"|each)(?: of the)? (?:\w+ ){{0,2}}?{_PAIRED}\b"
    r"|both(?: sides)?\Z|on both))"
)
_PHRASE_END = re.compile(
    r",\s+|\s+(?:and|with|plus|as well as|accompan\w+ by|associated with|along with|causing|together with)\s+"
    r"|[:;]\s+|\s+-\s+|\s+\(|\)\s*"
)
_SHARES_PLACE = Expression(
    r"\b(?:adjacent|underlying|overlying|accompanying|compress\w+|passive|relaxation|neighbou?ring|subjacent"
    r"|secondary|surrounding|around it|within it)\b"
)
_FRESH_START = re.compile(rf"{FRESH}\b")
_SIDE_ALONE = re.compile(r"(?:^|\b(?:the|in|of|from|at) )(?:right|left)\Z")
_RIGHT_LEFT = ("right", "left")


def named_sides(text: str, start: int = 0, end: int | None = None) -> list[tuple[int, str]]:
    """Return (index, "right" or "left") of every side that `text[start:end]` names; `end` None is the end of the text."""
    sides = []
    for match in _SIDES.finditer(text, start, len(text) if end is None else end):
        names = _RIGHT_LEFT if match["both"] else ("right",) if match["right"] else ("left",)
        sides += [(match.start(), name) for name in names]
    return sides


class ClauseSides:
    """The phrases of a clause, their sides, and the findings in them.

    Args:
        clause: the clause, with abbreviations written out.
        heads: start of each finding in the clause.
    """

    def __init__(self, clause: str, heads: Sequence[int]):
        joints = [*_PHRASE_END.finditer(clause)]
        self._starts = [0, *(joint.end() for joint in joints)]
        ends = [*(joint.start() for joint in joints), len(clause)]
        self._joints = ["", *(joint[0].strip() for joint in joints)]
        self._texts = [clause[start:end] for start, end in zip(self._starts, ends, strict=True)]
        self._sides = [named_sides(clause, start, end) for start, end in zip(self._starts, ends, strict=True)]
        self._heads: list[list[int]] = [[] for _ in self._starts]
        for head in heads:
            self._heads[self._phrase(head)].append(head)

    def _phrase(self, place: int) -> int:
        return max(number for number, start in enumerate(self._starts) if start <= place)

    def of(self, head: int) -> frozenset[str]:
        """Return the sides of the finding that starts at index `head`."""
        here = self._phrase(head)
        own = {side for _, side in self._own(head, here)} | self._following(here)
        if own and here and self._joints[here] == "and" and _SIDE_ALONE.search(self._texts[here - 1]):
            own |= {side for _, side in self._sides[here - 1][-1:]}
        return frozenset(own or self._shared_after(here) or self._shared_before(here))

    def _own(self, head: int, here: int) -> list[tuple[int, str]]:
        """Return the sides of the phrase itself; where it has several findings and sides, those nearest to this finding."""
        heads, sides = self._heads[here], self._sides[here]
        if len({*heads}) < 2 or len({side for _, side in sides}) < 2:
            return sides
        return [side for side in sides if min(heads, key=lambda other: abs(other - side[0])) == head] or sides

    def _following(self, here: int) -> set[str]:
        """Return the sides of following phrases without a finding: "effusion on the right, 5 mm, and on the left"."""
        sides: set[str] = set()
        for number in range(here + 1, len(self._texts)):
            if self._heads[number]:
                break
            sides.update(side for _, side in self._sides[number])
        return sides

    def _shared_after(self, here: int) -> set[str]:
        """Return the sides after the last of several findings: "nodules and atelectasis in the left lung"."""
        for number in range(here + 1, len(self._texts)):
            if _FRESH_START.match(self._texts[number]) or _SHARES_PLACE.search(self._texts[number]):
                break
            if self._sides[number]:
                last = max(self._heads[number], default=-1)
                return {side for place, side in self._sides[number] if place > last}
        return set()

    def _shared_before(self, here: int) -> set[str]:
        """Return the sides before the first of several findings, or before all of them."""
        if not any(self._heads[:here]):
            return {side for sides in self._sides[:here] for _, side in sides}
        shares_place = _SHARES_PLACE.search(self._texts[here])
        if _FRESH_START.match(self._texts[here]) and not shares_place:
            return set()
        for number in range(here - 1, -1, -1):
            if self._sides[number]:
                first = min(self._heads[number], default=len(self._texts) + self._starts[-1])
                sides = self._sides[number]
                return {side for place, side in sides if shares_place or place < first or not self._heads[number]}
        return set()
