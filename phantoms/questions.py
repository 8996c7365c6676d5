"""Questions about phantoms; the options of a multiple-choice question are all equally likely."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from samf.phantoms.draws import pick, shuffled
from samf.phantoms.findings import DEMO_FINDINGS, LOBES, PREVALENCE, SIDES, Finding, sample_findings
from samf.phantoms.text import PHRASES, write_impression

QUESTIONS = {
    "present": (
        "Which of the following findings is present in this chest CT?",
        "Which of these findings is observed?",
        "Which finding does this chest CT show?",
    ),
    "absent": (
        "Which of the following findings is absent in this chest CT?",
        "Which of these findings is not observed?",
        "Which finding does this chest CT not show?",
    ),
    "side": (
        "On which side is the pleural effusion?",
        "What is the side of the pleural effusion in this chest CT?",
        "Where is pleural effusion observed?",
    ),
    "lobe": (
        "In which lobe is the {finding} observed?",
        "What is the location of the {finding} in this chest CT?",
        "Where is the {finding}?",
    ),
}

REPORT_REQUESTS = (
    "Write the report of this chest CT.",
    "Generate the findings of the report for this chest CT.",
    "What are the findings in this chest CT?",
)

# In the order of SIDES, then absence.
_SIDE_OPTIONS = ("right pleural effusion", "left pleural effusion", "bilateral pleural effusion", "no pleural effusion")

# How often each family is tried for one scan, which gives about five questions.
_TRIES_PER_SCAN = {"present": 3, "absent": 2, "side": 1, "lobe": 1}


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        family: a key of QUESTIONS.
        text: the question without its options.
        choices: the options.
        answer: index of the right option.
        about: the findings that its options or its text name.
    """

    family: str
    text: str
    choices: tuple[str, ...]
    answer: int
    about: tuple[str, ...]

    @property
    def letter(self) -> str:
        """Return the letter of the right option."""
        return "abcd"[self.answer]

    @property
    def answer_text(self) -> str:
        """Return the answer in CT-RATE's form, "(b) right upper lobe"."""
        return f"({self.letter}) {self.choices[self.answer]}"

    @property
    def options_text(self) -> str:
        """Return the options as "(a) … (b) … (c) … (d) …"."""
        return " ".join(f"({letter}) {choice}" for letter, choice in zip("abcd", self.choices, strict=True))


def ask(
    rng: np.random.Generator,
    family: str,
    findings: Mapping[str, Finding],
    names: Sequence[str] = DEMO_FINDINGS,
    prevalence: float = PREVALENCE,
) -> list[Question]:
    """Return the questions of one family about a scan; none where its findings don't allow one.

    Given text and options, each option is right with probability 1/4: findings are equally frequent and independent, the
    options a uniform draw from those present and absent; sides and lobes are uniform; and a scan without effusion is asked
    for its side as often as a scan with an effusion on a given side.

    Args:
        rng: source of the draws.
        family: a key of QUESTIONS.
        findings: of the scan.
        names: the findings to ask about.
        prevalence: probability of each finding.
    """
    present = [name for name in names if name in findings]
    absent = [name for name in names if name not in findings]
    if family in ("present", "absent"):
        right, wrong = (present, absent) if family == "present" else (absent, present)
        if not right or len(wrong) < 3:
            return []
        options = [pick(rng, right), *shuffled(rng, wrong)[:3]]
        return [_compose(rng, family, [PHRASES[name] for name in options], options)]
    if family == "side":
        return _ask_side(rng, findings.get("Pleural effusion"), prevalence)
    questions = []
    for name in ("Consolidation", "Lung nodule"):
        if name in present and (right_lobe := findings[name].lobe) is not None:
            others = shuffled(rng, [lobe for lobe in LOBES if lobe != right_lobe])[:3]
            questions.append(_compose(rng, family, [right_lobe, *others], [name]))
    return questions


def _ask_side(rng: np.random.Generator, effusion: Finding | None, prevalence: float) -> list[Question]:
    """Ask for the side of the effusion, with "no" among the options; absence is subsampled to the frequency of one side."""
    if effusion is None and rng.random() >= prevalence / len(SIDES) / (1 - prevalence):
        return []
    right = SIDES.index(effusion.side) if effusion else len(SIDES)
    options = [_SIDE_OPTIONS[right], *(option for k, option in enumerate(_SIDE_OPTIONS) if k != right)]
    return [_compose(rng, "side", options, ["Pleural effusion"])]


def _compose(rng: np.random.Generator, family: str, options: list[str], about: Sequence[str]) -> Question:
    """Return a question whose right option, the first of `options`, gets a uniformly drawn letter."""
    order = rng.permutation(len(options))
    text = pick(rng, QUESTIONS[family]).format(finding=PHRASES[about[0]])
    choices = tuple(options[k] for k in order)
    return Question(family, text, choices, int(np.flatnonzero(order == 0)[0]), tuple(about))


def ask_all(
    rng: np.random.Generator,
    findings: Mapping[str, Finding],
    names: Sequence[str] = DEMO_FINDINGS,
    prevalence: float = PREVALENCE,
) -> list[Question]:
    """Return the multiple-choice questions of all families about a scan, without repeats of the same options.

    Args:
        rng: source of the draws.
        findings: of the scan.
        names: the findings to ask about.
        prevalence: probability of each finding.
    """
    questions: dict[tuple[str, tuple[str, ...]], Question] = {}
    for family, tries in _TRIES_PER_SCAN.items():
        for _ in range(tries):
            for question in ask(rng, family, findings, names, prevalence):
                questions.setdefault((family, question.about), question)
    return list(questions.values())


def ask_about_text(
    rng: np.random.Generator, names: Sequence[str] = DEMO_FINDINGS, prevalence: float = PREVALENCE
) -> tuple[str, Question]:
    """Return the impression of an invented scan, and a question that it answers.

    The impression lists only findings that are present, half of the time only those of the question. From these a small
    language model learns to find a finding among the options, before the volume replaces the impression.

    Args:
        rng: source of the draws.
        names: the findings to ask about.
        prevalence: probability of each finding.
    """
    while True:
        findings = sample_findings(rng, prevalence)
        if questions := ask_all(rng, findings, names, prevalence):
            question = pick(rng, questions)
            break
    lists_all = rng.random() < 0.5
    kept = {name: finding for name, finding in findings.items() if lists_all or name in question.about}
    return write_impression(kept), question


def short_question(
    rng: np.random.Generator, findings: Mapping[str, Finding], names: Sequence[str] = DEMO_FINDINGS
) -> tuple[str, str]:
    """Return a yes-or-no question and its answer; both answers are equally frequent where the scan allows both.

    Args:
        rng: source of the draws.
        findings: of the scan.
        names: the findings to ask about.
    """
    present = [name for name in names if name in findings]
    absent = [name for name in names if name not in findings]
    wants_present = rng.random() < 0.5
    pool = (present or absent) if wants_present else (absent or present)
    name = pick(rng, pool)
    return f"Is there {PHRASES[name]} in this chest CT?", "Yes." if name in findings else "No."


def long_question(
    rng: np.random.Generator, statements: Mapping[str, str], names: Iterable[str] = DEMO_FINDINGS
) -> tuple[str, str]:
    """Return a question for the findings of one organ, and the report's sentences about it.

    Args:
        rng: source of the draws.
        statements: the report's sentences, from `write_statements`.
        names: the findings to ask about.
    """
    organs = {
        "heart": ("Cardiomegaly", "Pericardial effusion"),
        "aorta": ("Arterial wall calcification",),
        "lungs": ("Emphysema", "Consolidation", "Lung nodule"),
        "pleura": ("Pleural effusion",),
    }
    asked = set(names)
    organ = pick(rng, list(organs))
    return f"What are the findings of the {organ}?", " ".join(
        statements[entry] for entry in organs[organ] if entry in asked
    )
