"""Rule-based labeller of English chest-CT reports: CT-RATE's 18 labels, with negation and uncertainty.

A report is cut into sentences and clauses; in each clause the expressions of `TERMS` are looked up, and a mention is
affirmed, uncertain or negated by the cues around it. Nothing is downloaded. The rules follow the manner of CT-RATE's
translated reports ("Pleural effusion-thickening was not detected."); other houses' wording may need more terms.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import numpy as np

from samf.data.ct_rate import CT_RATE_LABELS


class Status(Enum):
    """What a report says about a finding where it mentions it."""

    AFFIRMED = "affirmed"
    UNCERTAIN = "uncertain"
    NEGATED = "negated"


@dataclass(frozen=True)
class Term:
    """An expression for a finding, matched in one lower-case clause.

    Attributes:
        head: regular expression of the finding itself; cues before and after its place decide about negation.
        near: must match somewhere in the same clause as well ("" asks nothing).
        unless: must match nowhere in the clause ("" asks nothing).
    """

    head: str
    near: str = ""
    unless: str = ""


@dataclass(frozen=True)
class Mention:
    """One place where a report speaks of a finding: the label, what is said, and the clause that says it."""

    label: str
    status: Status
    clause: str


CALCIFICATION = r"calcif\w*|calcium|athero\w*|plaque\w*"
ARTERY = r"aort\w*|arter\w*|vascular|vessel\w*|supra-?aortic"
CORONARY = r"coronary|coronaries|lad\b|rca\b|circumflex"
NOT_LUNG = (
    r"thyroid|adrenal|liver|hepat|spleen|splenic|kidney|renal|breast|subcutan|pancrea|periton|omental|mesenter"
    r"|gallbladder|bone|vertebra|goit|isthmus|axilla|skin|lymph"
)
THICK = (
    r"thicken\w*|thickness(?:es)?[- ]increas\w*|thickness(?:es)? (?:is|are|was|were|has|have) increased"
    r"|increase\w* (?:in|of) [\w ]*thickness"
)

TERMS: dict[str, tuple[Term, ...]] = {
    "Medical material": (
        Term(
            r"\b(?:catheter\w*|stents?|stented|pacemaker\w*|pace wires?|port|port-?a-?cath|prosthe\w+|sternotomy|clips?"
            r"|sutures?|cannula\w*|tubes?|valvuloplasty|cerclage|surg\w+ materials?|metallic materials?"
            r"|osteosynthes\w+|icd|electrodes?|cardiac leads|screws?|chemoport|breast implant\w*)\b"
        ),
    ),
    "Arterial wall calcification": (
        Term(CALCIFICATION, near=ARTERY, unless=CORONARY),
        Term(CALCIFICATION, near=r"aort\w*(?! valve)|vascular|supra-?aortic|carotid|iliac|subclavian"),
        Term(r"atherosclerosis|atherosclerotic (?:changes|calcif\w*)", unless=CORONARY),
    ),
    "Cardiomegaly": (
        Term(r"cardiomegaly|enlarged heart|(?:enlarge|increase)\w* (?:of|in) (?:the )?(?:heart|cardiac)"),
        Term(
            r"heart|cardiac|cardiothoracic",
            near=r"(?:size|dimension|ratio|index|diameter|volume|width)s?\b.*(?:increas|large|greater|above normal)",
        ),
        Term(
            r"heart|cardiac",
            near=r"(?:heart|silhouette|contours?) (?:is|are|was|were|appears?) (?:\w+ )?(?:enlarged|larger?|increased)",
        ),
    ),
    "Pericardial effusion": (
        Term(r"pericardial[- ](?:\w+[- ]){0,3}?(?:effusion|fluid|collection)\w*"),
        Term(r"(?:effusion|fluid)\w* (?:\w+ ){0,4}(?:pericardi\w+)"),
        Term(r"(?:pleural|pleuro)\w*(?:,| and| or|-)? ?(?:and |or )?pericardial (?:effusion|fluid)"),
    ),
    "Coronary artery wall calcification": (Term(CALCIFICATION, near=CORONARY),),
    "Hiatal hernia": (Term(r"hiat\w+ herni\w*|herni\w* hiat\w*|diaphragmatic hiatus hernia"),),
    "Lymphadenopathy": (
        Term(r"lymphadenopath\w*|lymphadenomegal\w*|\blaps?\b"),
        Term(r"lymph nodes?|lymphadeni\w*"),
    ),
    "Emphysema": (
        Term(
            r"emphysem\w*|\bbullae?\b|\bbullous|\bblebs?\b", unless=r"subcutaneous emphysema|emphysema under the skin"
        ),
    ),
    "Atelectasis": (Term(r"(?<!fibro)atelecta\w*"), Term(r"collapse\w*", near=r"lung|lobe")),
    "Lung nodule": (
        Term(
            r"(?:micro|pseudo)?nodul(?:e|es|ar lesions?|ar formations?|ar density|ar densities|ar opacit\w+)\b",
            unless=NOT_LUNG,
        ),
    ),
    "Lung opacity": (
        Term(r"ground[- ]?glass|opaci\w+|crazy paving|infiltra\w+"),
        Term(
            r"densit(?:y|ies)[- ](?:increa?s?e?m?\w*)|increase\w* (?:in|of) density",
            near=r"lung|lobe|segment|parenchym|lingula|bilateral|pleur",
            unless=r"sequela|fibro|atelecta|subcutaneous|adipose|bone|vertebra",
        ),
    ),
    "Pulmonary fibrotic sequela": (Term(r"sequela\w*|fibro\w+|\bscar\w*", unless=r"surgical|incision"),),
    "Pleural effusion": (
        Term(r"pleural[- ](?:\w+[- ]){0,3}?(?:effusion|fluid)\w*|pleurisy|hydrothorax|hydropneumothorax"),
        Term(r"effusion\w*", near=r"hemithora\w*|pleura\w*|lung", unless=r"pericardi"),
        Term(r"(?:pleural|pleuro)\w*(?: and| or|-|/) ?pericardial (?:effusion|fluid)"),
    ),
    "Mosaic attenuation pattern": (Term(r"mosaic"),),
    "Peribronchial thickening": (
        Term(r"peribronch\w+", near=THICK),
        Term(r"bronch\w+", near=rf"bronch\w+ walls?.*(?:{THICK})|(?:{THICK}) (?:of|in) (?:the )?bronch\w+ wall"),
    ),
    "Consolidation": (Term(r"consolid\w+"),),
    "Bronchiectasis": (
        Term(
            r"bronchi(?:olo)?ecta\w+|bronchi\w* (?:dilatation|enlargement|widening)\w*"
            r"|(?:dilatation|enlargement) (?:of|in) (?:the )?bronchi\w*|bronchi (?:is|are|was|were) (?:\w+ )?dilated"
        ),
    ),
    "Interlobular septal thickening": (
        Term(
            r"sept(?:al|a|um)\b",
            near=rf"sept\w+ (?:\w+ ){{0,3}}?(?:{THICK})|(?:{THICK}) (?:\w+ ){{0,3}}(?:interlobular|septa)",
        ),
    ),
}

# --- cues -------------------------------------------------------------------------------------------------------

SEEN = (
    r"observ\w+|detect\w+|seen|encounter\w+|identif\w+|found|present|visuali[sz]\w+|visible|distinguish\w+|evident|noted"
    r"|select\w+|monitor\w+|determin\w+|track\w+|demonstrat\w+|appreciat\w+|available|considered|in question|follow\w+"
)
# "no significant change in the effusion" speaks of an effusion that is there.
NO_CHANGE = (
    r"(?:\w+ ){0,2}"
    r"(?:change|changes|difference|increase|decrease|progression|regression|growth|doubt|contrast|interval)\b"
)
NEGATION_BEFORE = re.compile(
    rf"\b(?:no(?! {NO_CHANGE})|without|absence of|free of|negative for|neither|nor|no evidence of|no sign\w* of)\b"
)
NEGATION_AFTER = re.compile(
    rf"\b(?:(?:not|never|cannot be|no longer) (?:\w+ )?(?:{SEEN})(?! (?:in|on|at) (?:the )?(?:previous|prior|old))"
    r"|absent|disappeared|(?:completely|totally) (?:resolved|regressed|resorbed)|(?:has|have) resolved"
    r"|(?<!be )(?<!not )ruled out"
    r"|(?:is|are|was|were) (?:within )?(?:normal|natural|unremarkable)|within normal limits)\b"
)
UNCERTAIN = re.compile(
    r"\?|\b(?:may|might|could|possibl\w+|probabl\w+|suspect\w*|suspicious|likely|suggest\w*|questionable"
    r"|cannot be (?:excluded|ruled out)|not (?:excluded|ruled out))\b"
)

# --- sentences and clauses --------------------------------------------------------------------------------------

LONGEST_SENTENCE = 200
SENTENCE_END = re.compile(r"(?<!\d)\.(?=\s|$|[A-Za-z\"])|(?<=\d)\.(?=\s|$)|[;\n\"•!]|\.{2,}|\. ")
# Words at which a new statement begins, whether or not it has a verb.
BREAK = re.compile(r"\b(?:but|however|although|though|whereas|while|except(?: for)?|other than|apart from|besides)\b")
JOINT = re.compile(r"(,\s+|\s+and\s+)")
VERB = re.compile(
    rf"\b(?:is|are|was|were|has|have|had|{SEEN}|shows?|showed|increased|decreased|continues?|measur\w+)\b"
)
CONTINUES = re.compile(r"^(?:which|that|whose|is|are|was|were|has|have|not)\b")
PLACE = re.compile(r"^(?:in|on|at) the\b")


def split_sentences(report: str) -> list[str]:
    """Sentences of a report in lower case; dates and decimals ("26.02.2015", "4.5 mm") stay whole.

    What runs on for more than LONGEST_SENTENCE words, as a model caught in a loop does, is cut there.
    """
    text = report.lower().replace("\u2019", "'").replace("\u2013", "-").replace("\u2014", "-")
    sentences = []
    for piece in SENTENCE_END.split(text):
        words = piece.split()
        starts = range(0, len(words), LONGEST_SENTENCE)
        sentences += [" ".join(words[start : start + LONGEST_SENTENCE]) for start in starts]
    return sentences


def split_clauses(sentence: str) -> list[str]:
    """Cut a sentence where a statement with a verb of its own begins, so that a negation reaches no further.

    Lists stay together: "no mass, nodule or effusion was seen" is one clause, "effusion is seen, and no nodule was
    detected" is two.
    """
    clauses = [clause for part in BREAK.split(sentence) for clause in _statements(JOINT.split(part))]
    return [clause for clause in clauses if clause]


def _statements(pieces: Sequence[str]) -> list[str]:
    """Join pieces [text, joint, text, joint, …] of a sentence into statements with one verb each.

    A piece without a verb belongs to the statement before it when "and" joins it ("plaques are seen in the aorta and
    coronary arteries") or a negation has begun there ("there is no effusion, nodule"), else to the one that follows
    ("effusion, nodule were not seen").
    """
    statements = [pieces[0]]
    for joint, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        complete = VERB.search(statements[-1])
        if VERB.search(piece) and not CONTINUES.match(piece):
            belongs_before = not complete
        else:
            listed = "and" in joint or NEGATION_BEFORE.search(statements[-1])
            belongs_before = not complete or listed or CONTINUES.match(piece) or PLACE.match(piece)
        if belongs_before:
            statements[-1] += joint + piece
        else:
            statements.append(piece)
    if len(statements) > 1 and not VERB.search(statements[-1]):
        last = statements.pop()
        statements[-1] += ", " + last
    return [statement.strip(" ,") for statement in statements]


class _Cues:
    """Where a clause negates: "no" forwards from its place, "was not seen" backwards from its."""

    def __init__(self, clause: str):
        forwards = NEGATION_BEFORE.search(clause)
        backwards = [match.start() for match in NEGATION_AFTER.finditer(clause)]
        self.negated_from = forwards.end() if forwards else len(clause) + 1
        self.negated_until = max(backwards, default=-1)
        self.otherwise = Status.UNCERTAIN if UNCERTAIN.search(clause) else Status.AFFIRMED

    def status(self, start: int, end: int) -> Status:
        """What the clause says about the expression at [start, end)."""
        is_negated = start >= self.negated_from or end <= self.negated_until
        return Status.NEGATED if is_negated else self.otherwise


# --- public -----------------------------------------------------------------------------------------------------

_COMPILED = {
    label: [tuple(re.compile(part) if part else None for part in (t.head, t.near, t.unless)) for t in terms]
    for label, terms in TERMS.items()
}
_SIDES = {
    "right": re.compile(r"\b(?:right|bilateral\w*|both)\b"),
    "left": re.compile(r"\b(?:left|bilateral\w*|both)\b"),
}


def find_mentions(report: str) -> list[Mention]:
    """Every mention of one of the 18 findings in a report, in the order of its sentences; once a clause and status."""
    return list(_report_mentions(report))


@lru_cache(maxsize=1 << 14)  # a report is asked for its labels, its sides, and again beside each baseline
def _report_mentions(report: str) -> tuple[Mention, ...]:
    return tuple(mention for sentence in split_sentences(report) for mention in _sentence_mentions(sentence))


@lru_cache(maxsize=1 << 15)  # and reports repeat each other's sentences
def _sentence_mentions(sentence: str) -> tuple[Mention, ...]:
    mentions = []
    for clause in split_clauses(sentence):
        cues = _Cues(clause)
        for label, terms in _COMPILED.items():
            statuses = dict.fromkeys(_statuses(clause, terms, cues))
            mentions.extend(Mention(label, status, clause) for status in statuses)
    return tuple(mentions)


def _statuses(clause: str, terms: list[tuple[re.Pattern | None, ...]], cues: _Cues) -> Iterator[Status]:
    for head, near, unless in terms:
        if (near and not near.search(clause)) or (unless and unless.search(clause)):
            continue
        for match in head.finditer(clause):
            yield cues.status(*match.span())


def label_report(report: str, *, uncertain_is_positive: bool = True) -> dict[str, int]:
    """CT-RATE's 18 labels of one report: 1 when any clause affirms the finding (or, by default, calls it possible)."""
    present = {mention.label for mention in _present(report, uncertain_is_positive)}
    return {label: int(label in present) for label in CT_RATE_LABELS}


def label_reports(reports: Sequence[str], *, uncertain_is_positive: bool = True) -> np.ndarray:
    """Labels of N reports as an int64 array (N, 18), columns in the order of `CT_RATE_LABELS`."""
    rows = [list(label_report(report, uncertain_is_positive=uncertain_is_positive).values()) for report in reports]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(CT_RATE_LABELS))


def finding_sides(report: str, *, uncertain_is_positive: bool = True) -> frozenset[tuple[str, str]]:
    """(finding, "left" or "right") for every side named in a clause that affirms the finding.

    A clause that places another finding on the other side as well counts for both.
    """
    present = _present(report, uncertain_is_positive)
    return frozenset((m.label, side) for m in present for side, words in _SIDES.items() if words.search(m.clause))


def effusion_sides(report: str, *, uncertain_is_positive: bool = True) -> frozenset[str]:
    """Sides ("left", "right") of the pleural effusion that a report affirms; empty without effusion or side."""
    sides = finding_sides(report, uncertain_is_positive=uncertain_is_positive)
    return frozenset(side for label, side in sides if label == "Pleural effusion")


def _present(report: str, uncertain_is_positive: bool) -> list[Mention]:
    wanted = {Status.AFFIRMED, Status.UNCERTAIN} if uncertain_is_positive else {Status.AFFIRMED}
    return [mention for mention in _report_mentions(report) if mention.status in wanted]
