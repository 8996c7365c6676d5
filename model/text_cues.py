"""Clauses of a sentence, and the scopes of negation, uncertainty and history in a clause.

The expressions expect abbreviations to be written out (`text_abbreviations`). Every expression is bounded, and a sentence
has at most 200 words, so that matching takes linear time.
"""

import re
from dataclasses import dataclass
from enum import Enum

from .text_expressions import Expression


class Status(Enum):
    """What a report says about a finding that it mentions."""

    AFFIRMED = "affirmed"
    UNCERTAIN = "uncertain"
    NEGATED = "negated"


# --- Clauses ------------------------------------------------------------------------------------------------------

SEEN = (
    r"observ\w+|detect\w+|seen|encounter\w+|identif\w+|found|present|visuali[sz]\w+|visible|distinguish\w+"
    r"|evident|noted"
    r"|select\w+|monitor\w+|determin\w+|track\w+|demonstrat\w+|appreciat\w+|available|considered|in question"
    r"|follow\w+"
    r"|discern\w+|recogni[sz]\w+|apparent|recorded|delineated|depicted|shown|appreciable"
)
# Words at which a new statement begins, whether or not it has a verb.
_EXCEPT = (
    r"except(?: for| that)?|excepting|other than|apart from|aside from|besides|with the exception of|save for"
    r"|but for|outside of"
)
_BREAK = Expression(
    rf"\b(?:but(?! for)|however|although|though|whereas|while|nevertheless|nonetheless|yet(?= there)|{_EXCEPT})\b"
)
_EXCEPTION = re.compile(rf"(?:{_EXCEPT})\Z")
# Beginnings of an affirmed noun phrase: after "no effusion, " the words "mild cardiomegaly" affirm.
FRESH = (
    r"(?:there (?:is|are)|an?|mild\w*|moderate\w*|small(?!-? vessel)|tiny|trace|minimal\w*|minor|marked\w*"
    r"|severe\w*|few|several|multiple"
    r"|scattered|patchy|stable|unchanged|persist\w+|residual|known|slight\w*|subtle|extensive|bibasal|bibasilar"
    r"|borderline|old|chronic|mildly|early|dependent|linear|plate-?like|subsegmental|some|one|two|three|likely"
    r"|possible|probable"
    r"|coarse|advanced|heavy|widespread|progress\w+|increas\w+|improv\w+|status post|post)"
)
_FRESH_START = re.compile(rf"(?:and |with )?{FRESH}\b")
_JOINT = re.compile(
    rf"(,\s+|\s+and\s+|\s+with\s+(?={FRESH}\b)|\s+-\s+(?!(?:none|no|absent|present|normal|negative)\b))"
)
_VERB = re.compile(
    rf"\b(?:is|are|was|were|has|have|had|{SEEN}|shows?|showed|increased|decreased|continues?|measur\w+|persists?"
    r"|normal|natural|unremarkable|clear|appears?|resolved|cleared|absent)\b|:\s*(?:none|no|yes)\b"
)
_CONTINUES = re.compile(
    r"^(?:which|that|whose|is|are|was|were|has|have|not)\b(?! (?:any|an?|no|mild|small)\b)|^[\d.]+ ?[mc]m (?:on"
    r"|in|at)\b"
)
_PLACE = re.compile(r"^(?:in|on|at) (?:the|both)\b")
_NONE_HERE = re.compile(r"^(?:none|no|not|nor)\b")
_OR = re.compile(r"\b(?:or|nor)\b")


def split_clauses(sentence: str) -> list[str]:
    """Split a sentence where a new statement begins, which limits the scope of negation.

    Lists stay together: "no mass, nodule or effusion was seen" is one clause; "effusion is seen, and no nodule was
    detected" and "no effusion, mild cardiomegaly" are two.
    """
    return [sentence[start:end] for start, end in clause_spans(sentence)]


def clause_spans(sentence: str) -> list[tuple[int, int]]:
    """Return start and end of each clause of a sentence whose abbreviations are written out."""
    breaks = [*_BREAK.finditer(sentence)]
    starts = [0, *(match.end() for match in breaks)]
    ends = [*(match.start() for match in breaks), len(sentence)]
    spans = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        is_exception = number > 0 and _EXCEPTION.search(breaks[number - 1][0])
        leads = number > 0 and not sentence[: breaks[number - 1].start()].strip(" ,")
        comma = sentence.find(", ", start, end) if is_exception and leads else -1
        parts = [(start, comma), (comma + 2, end)] if comma >= 0 else [(start, end)]
        for part in parts:
            spans += _statements(sentence, *part)
    trimmed = [_trim(sentence, *span) for span in spans]
    return [span for span in trimmed if span[0] < span[1]]


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start] in " ,":
        start += 1
    while end > start and text[end - 1] in " ,":
        end -= 1
    return start, end


def _statements(sentence: str, start: int, end: int) -> list[tuple[int, int]]:
    """Join the pieces of [start, end), separated by commas and "and", into statements with one verb each.

    A piece without a verb belongs to the preceding statement when "and" joins it ("plaques are seen in the aorta and
    coronary arteries") or a negation has begun there ("there is no effusion, nodule"), and otherwise to the following one
    ("effusion, nodule were not seen"). After a negation, a piece that begins like an affirmed phrase ("mild …", "a …")
    is a statement of its own, unless an "or" shows that the list of negated findings continues.
    """
    joints = [*_JOINT.finditer(sentence, start, end)]
    begins = [start, *(joint.end() for joint in joints)]
    stops = [*(joint.start() for joint in joints), end]
    pieces = [sentence[begin:stop] for begin, stop in zip(begins, stops, strict=True)]
    spans = [(begins[0], stops[0])]
    complete, negated = bool(_VERB.search(pieces[0])), bool(_denies(pieces[0]))
    is_separate = False
    for number in range(1, len(pieces)):
        piece, joint = pieces[number], joints[number - 1][0]
        has_verb = bool(_VERB.search(piece))
        fresh = negated and _FRESH_START.match(piece) and not _list_goes_on(pieces, number)
        is_new = bool(fresh or piece.startswith("none ") or (complete and _NONE_HERE.match(piece)))
        if is_new:
            belongs = False
        elif " - " in joint:
            belongs = not (complete or negated)
        elif has_verb and not _CONTINUES.match(piece):
            belongs = not complete
        else:
            goes_on = _CONTINUES.match(piece) or _PLACE.match(piece)
            belongs = bool(not complete or "and" in joint or negated or goes_on)
        if belongs:
            spans[-1] = (spans[-1][0], stops[number])
            complete, negated = complete or has_verb, negated or bool(_denies(piece))
        else:
            spans.append((begins[number], stops[number]))
            complete, negated, is_separate = has_verb, bool(_denies(piece)), is_new
    if len(spans) > 1 and not complete and not is_separate:
        spans[-2:] = [(spans[-2][0], spans[-1][1])]
    return spans


def _list_goes_on(pieces: list[str], number: int) -> bool:
    """Return whether an "or" follows in the list of negated findings, before another negation or verb."""
    for later in pieces[number:]:
        if _denies(later):
            return False
        if _OR.search(later):
            return True
        if _VERB.search(later):
            return False
    return False


# --- Negation -----------------------------------------------------------------------------------------------------

_GAP = (
    r"(?:(?:significant|significantly|interval|appreciable|definite|major|substantial|obvious|further"
    r"|considerable|notable"
    r"|gross|other|recent|relevant|evident|marked|important|clear|real|visible|meaningful|size|apparent|any"
    r"|convincing) ){0,3}"
)
# "no significant change in the effusion" and "no increase in the effusion" affirm the effusion;
# "no increase in heart size" denies that the heart is large.
_CHANGE = (
    r"(?:change[ds]?|differences?|decrease[ds]?|progress\w+|regress\w+|improve\w+|worsen\w+|reduc\w+|doubts?|contrast"
    r"|enhance\w+|resolution|clearing"
    r"|evolution|interval (?:change|growth|increase))"
)
_GROWTH = r"(?:increase[ds]?|growth|enlargement|widening|expansion|enlarging)"
_CONTRAST_MEDIUM = (
    r"(?:(?:iv|i\.v\.?|intravenous|oral|the use of|any|administration of|injection of) )*(?:contrast|enhancement)"
)
_PARTIAL = (
    r"(?:partial|partially|incomplete|incompletely|near[- ]complete|nearly complete|almost complete|subtotal"
    r"|some|ongoing"
    r"|gradual|slow|nearly|almost|mostly|largely|not|not yet|not completely|not fully|yet to|near[- ]completely)"
)
_SHOW = (
    r"(?:show|demonstrate|reveal|contain|exhibit|have|suggest|display|indicate|identify|see|detect|depict"
    r"|include|observe"
    r"|represent|support|meet|find)"
)
_NOT_A_DENIAL = (
    r"(?:only|just|merely|simply|necessarily|uncommon|yet|excluded|ruled out|rule out|exclude|be excluded|be ruled)"
)
_FORWARD = Expression(
    rf"\b(?P<neutral>(?:no|without|not|lack of)(?: any)? {_GAP}{_CHANGE}\b|without {_CONTRAST_MEDIUM}"
    rf"|not (?:\w+ )?{_NOT_A_DENIAL}\b|no\. ?\d|{_PARTIAL} (?:resolution|clearing|disappearance|removal) of)"
    rf"|\b(?P<growth>(?:no|without|not|not significantly) {_GAP}{_GROWTH}\b)"
    r"|\b(?P<hard>no(?!-)(?! longer)|(?<!. )absent(?= [a-z])|without|absence of|lack(?:s|ing)?(?: of)?|free (?:of|from)"
    r"|devoid of|clear of|negative (?:for|of)|neither|nor"
    r"|nothing|rather than|instead of|as opposed to|unlikely to (?:be|represent|reflect)|none of|rules out|excludes"
    r"|(?:complete |interval |near )?(?:resolution|clearing|disappearance|removal) of"
    rf"|(?:do|does|did) not (?:appear to )?{_SHOW}|fail(?:s|ed)? to {_SHOW}|no longer (?:shows?|contains?|has"
    rf"|have|any|an?|evidence|signs?)\b"
    rf"|(?:not|cannot) (?:\w+ )?(?:{SEEN}) (?:any|an?)\b|(?:not|cannot) {_SHOW} (?:any|an?|the|evidence)\b"
    r"|(?:is|are|was|were) not (?:any|an?)\b|not (?:any|those of|that of|suggestive|consistent|compatible"
    r"|indicative|typical"
    r"|characteristic|in keeping|diagnostic|due to|because of|representing))\b"
    rf"|\b(?P<short>not|no longer)\b(?! (?:\w+ )?(?:{SEEN})\b)"
)
# Scope of a bare "not", in characters ("not significantly enlarged", "not consolidation").
_REACH_OF_NOT = 30

_BACKWARD = Expression(
    rf"\b(?:(?:not|never|cannot be|could not be|no longer) (?:\w+ )?(?:{SEEN})"
    r"(?! (?:(?:in|on|at) (?:the |his |her |a )?(?:previous|prior|old)|previously|before|earlier))(?! (?:any|an?)\b)"
    rf"|(?<!not )absent|(?P<partial>{_PARTIAL} |to be )?(?:completely |totally |fully |entirely |also |now |since )*"
    r"(?:been )?(?:resolved|cleared|resorbed|dissolved|disappeared|vanished|subsided)(?! (?:partial|incomplete))"
    r"|(?:completely|totally|fully) (?:regressed|resorbed|drained|evacuated)|(?:regressed|resorbed"
    r"|drained) (?:completely|totally|fully)"
    r"|(?:has|have|had|was|were|been|is|are) (?:since |now |surgically )?(?:been )?(?:removed|extracted|resected"
    r"|excised|evacuated)"
    r"|(?<!be )(?<!not )(?<!not been )(?<!completely )(?:ruled out|excluded)|(?:is|are|was|were|thought"
    r"|considered|felt|appears?|seems?)"
    r" (?:to be )?(?:\w+ )?unlikely|unlikely(?=[ .)]*\Z)|no more|(?:is|are|was|were) negative|not (?:a feature"
    r"|the case)|non-?visuali[sz]\w+"
    r"|(?:has|have|did) not (?:yet )?(?:develop\w*|occur\w*|recur\w*|form\w*))\b"
    r"|\b(?:none|absent|no|negative)[ .)]*\Z|\(none\)|\((?:no|absent)\)|\bnone (?:seen|noted|detected|observed"
    r"|identified|present)\b"
    r"|[:=] ?(?:none|absent|negative)\b|[:=] ?-[ .]*\Z|\b(?:is|are) lacking\b|\b(?:removed|extracted)[ .)]*\Z"
)
# "Effusion: no …", "Effusion - none …": what is before the colon is denied.
_FORM = Expression(
    r"[^:=]{2,60}?(?P<end>\s*[:=]|\s+-(?=\s))\s*(?:there (?:is|are|was|were) )?(?:none|nil|absent|negative"
    r"|without|free|no(?! \w+ (?:change|increase)"
    rf"| (?:change|increase|interval|signific\w+ (?:change|interval)))|not (?:{SEEN}))\b"
)
_NORMAL = Expression(
    r"\b(?:(?:is|are|was|were|appears?|remains?|:|-) (?:within |in |at |of )?(?:\w+ ){0,2}?"
    r"(?:normal|natural|unremarkable|physiological)|within (?:the )?normal|normal (?:in|limits)"
    r"|(?<!that )(?<!which )(?:is|are|was|were|:|-|appears?|remains?) not (?:\w+ )?"
    r"(?:enlarged|pathological\w*|increased|prominent|thickened|dilated|significant\w*|remarkable|abnormal\w*))\b"
    r"|: ?(?:normal|not|unremarkable|natural|clear)\b|\bnormal\Z"
)

# --- Uncertainty and history --------------------------------------------------------------------------------------

_DOUBT_FORWARD = Expression(
    r"(?:^|[\s(])\?(?=\s?\w)|\b(?:may|might|could|possibl\w+|probabl\w+|suspect\w*|suspicious|likely|suggest\w*"
    r"|questionable"
    r"|presumed|concern\w*|rule out|exclude|equivocal|query|differential\w*|versus|vs|doubtful|cannot exclude)\b"
)
_DOUBT_BACKWARD = Expression(
    r"\w\s?\?|\b(?:may|might|could|suspect\w*|questionable|cannot be (?:\w+ )?(?:excluded|ruled out)"
    r"|not (?:be )?(?:\w+ )?(?:excluded|ruled out)"
    r"|(?:is|are|was|were|also|most|very|more) (?:\w+ )?(?:possible|probable|likely|suspected|equivocal"
    r"|considered)|suggested|doubtful|(?:possible|probable)(?=[ .)]*\Z))\b"
)
_OPEN = Expression(
    r"\b(?:cannot|not|can not|difficult to|hard to|does not|to) (?:be )?(?:\w+ )?(?:excluded?|rule[d]? out)\b"
    r"|\brule out\b|^\?"
)
_HISTORY = Expression(
    r"\b(?:history of|known case of|family history|anamnesis of|previously (?:treated|operated) for|treated for"
    r"|screening for"
    r"|(?:operat\w+|surgery|lobectomy|resection|segmentectomy|pneumonectomy|excision|treatment"
    r"|underwent [a-z ]{0,40})"
    r" (?:\w+ )?(?:for|due to|because of)|(?:referred|evaluate|evaluation) for|(?:resection|excision|removal"
    r"|ablation) of)\b"
)


@dataclass(frozen=True)
class _Scope:
    """The span of a clause, [start, end), that a cue applies to."""

    start: int
    end: int

    def holds(self, start: int, end: int) -> bool:
        """Return whether [start, end) is within the scope."""
        return start >= self.start and end <= self.end


class Cues:
    """Scopes of negation, uncertainty and history in a clause: "no" applies forwards, "was not seen" backwards."""

    def __init__(self, clause: str):
        size = len(clause)
        forward = [match for match in _FORWARD.finditer(clause) if match.lastgroup != "neutral"]
        self._denied = [_Scope(m.end(), size) for m in forward if m["hard"]][:1]
        self._denied += [_Scope(m.end(), m.end() + _REACH_OF_NOT) for m in forward if m["short"]]
        self._denied_measures = [_Scope(m.start(), size) for m in forward if m["growth"]][:1]
        backward = [match.start() for match in _BACKWARD.finditer(clause) if not match["partial"]]
        form = _FORM.match(clause)
        self._denied += [_Scope(0, max([*backward, form.start("end") if form else 0]))]
        normal = [match.start() for match in _NORMAL.finditer(clause)]
        self._denied_measures += [_Scope(0, max(normal, default=0))]
        self._doubted = [_Scope(match.start(), size) for match in _DOUBT_FORWARD.finditer(clause)][:1]
        self._doubted += [_Scope(0, max((match.end() for match in _DOUBT_BACKWARD.finditer(clause)), default=0))]
        self._open = bool(_OPEN.search(clause))
        history = _HISTORY.search(clause)
        self._history = _Scope(history.end() if history else size, size)

    def status(self, start: int, end: int, *, is_measure: bool = False) -> Status:
        """Return what the clause says about an expression.

        Args:
            start: where the expression begins in the clause.
            end: where it ends.
            is_measure: whether it is a measure or an organ that may be normal (`Term.is_measure`).
        """
        denied = self._denied + (self._denied_measures if is_measure else [])
        if any(scope.holds(start, end) for scope in denied) and not self._open:
            return Status.NEGATED
        if self._open or any(scope.holds(start, end) for scope in self._doubted):
            return Status.UNCERTAIN
        return Status.AFFIRMED

    def is_history(self, start: int, end: int) -> bool:
        """Return whether the expression at [start, end) is history: what a patient had, or had removed."""
        return self._history.holds(start, end)


# "It has resolved", "this is no longer seen", "they are present now": statements about the finding that was named last.
_PRONOUN = (
    r"(?:it|they|this|these|those|(?:this|the said|the described|the mentioned|these|the aforementioned)"
    r" (?:finding|lesion|area|appearance|abnormality|change)s?)"
)
_REFERS_BACK = Expression(
    rf"{_PRONOUN} (?:(?P<denied>(?:has|have|is|are) (?:since |now |completely |fully |totally |also )*"
    r"(?:resolved|cleared|disappeared|vanished|resorbed)|(?:is|are|was|were) (?:now )?(?:no longer|not) (?:\w+ )?"
    rf"(?:{SEEN})(?: (?:in|on|at) (?:the |this )?(?:current|present|today's|this)\b.*| now| today"
    rf"| any ?more)?[ .)]*\Z)"
    rf"|(?:is|are|was|were) (?:now )?(?:present|seen|observed|noted)\b(?! that| in the (?:prev|prior|old)))"
)


def refers_back(clause: str) -> Status | None:
    """Return what a clause without a finding says about the one that was named last; None where it says nothing."""
    match = _REFERS_BACK.match(clause)
    if not match:
        return None
    return Status.NEGATED if match["denied"] else Status.AFFIRMED


def _denies(piece: str) -> bool:
    return any(match["hard"] or match["growth"] for match in _FORWARD.finditer(piece))
