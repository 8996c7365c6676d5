"""The words of a phantom: reports in CT-RATE's manner, and questions whose options are all equally likely.

Vocabulary is small on purpose (about 120 words), so that a tiny language model can learn it; each finding keeps one
name, in reports and options alike, and each sentence speaks of one finding, so that a rule can read the labels back.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from samf.phantoms.findings import (
    DEMO_FINDINGS,
    LOBES,
    PREVALENCE,
    SIDES,
    Finding,
    sample_findings,
)

T = TypeVar("T")

#: What reports and options call each finding.
PHRASES = {
    "Arterial wall calcification": "aortic wall calcification",
    "Cardiomegaly": "cardiomegaly",
    "Pericardial effusion": "pericardial effusion",
    "Emphysema": "emphysema",
    "Lung nodule": "lung nodule",
    "Pleural effusion": "pleural effusion",
    "Consolidation": "consolidation",
    "Lymphadenopathy": "lymphadenopathy",
    "Atelectasis": "atelectasis",
    "Peribronchial thickening": "peribronchial thickening",
}

#: A report's course: a finding's name stands for its statement, anything else for one of NORMAL's sentences.
ORDER = (
    "trachea",
    "vessels",
    "Cardiomegaly",
    "Pericardial effusion",
    "Arterial wall calcification",
    "Lymphadenopathy",
    "Peribronchial thickening",
    "Emphysema",
    "Consolidation",
    "Lung nodule",
    "Atelectasis",
    "Pleural effusion",
    "bones",
)

NORMAL = {
    "trachea": (
        "Trachea and both main bronchi are open.",
        "Trachea is in the midline and both main bronchi are open.",
        "The lumen of the trachea and both main bronchi is open.",
    ),
    "vessels": (
        "Mediastinal main vascular structures are normal.",
        "Calibration of the main vascular structures is natural.",
        "Thoracic aorta diameter is normal.",
    ),
    "bones": (
        "Bone structures in the study area are natural.",
        "Vertebral corpus heights are preserved.",
        "No lytic lesion was detected in the bone structures.",
    ),
}

PRESENT = {
    "Cardiomegaly": (
        "Cardiomegaly is observed.",
        "There is cardiomegaly.",
        "Heart size is increased, cardiomegaly is observed.",
        "Cardiomegaly was detected.",
    ),
    "Pericardial effusion": (
        "Pericardial effusion is observed.",
        "There is pericardial effusion around the heart.",
        "Pericardial effusion was detected.",
    ),
    "Arterial wall calcification": (
        "Aortic wall calcification is observed.",
        "There is aortic wall calcification.",
        "Aortic wall calcification was detected in the thoracic aorta.",
    ),
    "Lymphadenopathy": (
        "Lymphadenopathy is observed in the mediastinum.",
        "There is mediastinal lymphadenopathy.",
        "Lymphadenopathy was detected in the mediastinum.",
    ),
    "Peribronchial thickening": (
        "Peribronchial thickening is observed in both lungs.",
        "There is peribronchial thickening.",
        "Bilateral peribronchial thickening was detected.",
    ),
    "Emphysema": (
        "Emphysema is observed in both lungs.",
        "There is emphysema in both lungs.",
        "Emphysema was detected, more prominent in the upper zones.",
    ),
    "Consolidation": (
        "Consolidation is observed in the {lobe}.",
        "There is consolidation with air bronchograms in the {lobe}.",
        "An area of consolidation was detected in the {lobe}.",
    ),
    "Lung nodule": (
        "A lung nodule of {size_mm} mm is observed in the {lobe}.",
        "There is a lung nodule in the {lobe}, {size_mm} mm in diameter.",
        "A lung nodule measuring {size_mm} mm was detected in the {lobe}.",
    ),
    "Atelectasis": (
        "Linear atelectasis is observed in the {lobe}.",
        "There is atelectasis in the {lobe}.",
        "Atelectasis was detected in the {lobe}.",
    ),
    "Pleural effusion": (
        "{Side} pleural effusion is observed.",
        "There is {side} pleural effusion.",
        "{Side} pleural effusion was detected.",
    ),
}

ABSENT = {
    "Cardiomegaly": (
        "Heart size is normal, cardiomegaly was not observed.",
        "No cardiomegaly was detected.",
        "There is no cardiomegaly, heart contour and size are normal.",
    ),
    "Pericardial effusion": (
        "Pericardial effusion was not observed.",
        "No pericardial effusion was detected.",
        "There is no pericardial effusion.",
    ),
    "Arterial wall calcification": (
        "Aortic wall calcification was not observed.",
        "No aortic wall calcification was detected.",
        "There is no aortic wall calcification.",
    ),
    "Lymphadenopathy": (
        "Lymphadenopathy was not observed.",
        "No lymphadenopathy was detected in the mediastinum.",
        "There is no mediastinal lymphadenopathy.",
    ),
    "Peribronchial thickening": (
        "Peribronchial thickening was not observed.",
        "No peribronchial thickening was detected.",
        "There is no peribronchial thickening.",
    ),
    "Emphysema": (
        "Emphysema was not observed.",
        "No emphysema was detected in both lungs.",
        "There is no emphysema.",
    ),
    "Consolidation": (
        "Consolidation was not observed.",
        "No consolidation was detected in both lungs.",
        "There is no consolidation.",
    ),
    "Lung nodule": (
        "Lung nodule was not observed.",
        "No lung nodule was detected.",
        "There is no lung nodule.",
    ),
    "Atelectasis": (
        "Atelectasis was not observed.",
        "No atelectasis was detected.",
        "There is no atelectasis.",
    ),
    "Pleural effusion": (
        "Pleural effusion was not observed.",
        "No pleural effusion was detected.",
        "There is no pleural effusion.",
    ),
}

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

#: Options of the side question, in the order of SIDES and then absence.
SIDE_OPTIONS = ("right pleural effusion", "left pleural effusion", "bilateral pleural effusion", "no pleural effusion")

#: How often each family is tried for one scan: about five questions come of it.
QUESTIONS_PER_SCAN = {"present": 3, "absent": 2, "side": 1, "lobe": 1}


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: its family (a key of QUESTIONS), text, options and the right option's index."""

    family: str
    text: str
    choices: tuple[str, ...]
    answer: int
    about: tuple[str, ...]  # the findings that its options or its text name

    @property
    def letter(self) -> str:
        return "abcd"[self.answer]

    @property
    def answer_text(self) -> str:
        """CT-RATE's form of an answer, '(b) right upper lobe'."""
        return f"({self.letter}) {self.choices[self.answer]}"

    @property
    def options_text(self) -> str:
        """'(a) … (b) … (c) … (d) …'"""
        return " ".join(f"({letter}) {choice}" for letter, choice in zip("abcd", self.choices, strict=True))


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, uniformly (`rng.choice` makes an array of them first, fifty times slower)."""
    return options[int(rng.integers(len(options)))]


def shuffled(rng: np.random.Generator, options: Sequence[T]) -> list[T]:
    """`options` in random order."""
    return [options[k] for k in rng.permutation(len(options))]


# ---- reports -------------------------------------------------------------------------------------------------------


def state(rng: np.random.Generator, name: str, finding: Finding | None) -> str:
    """One sentence that says that finding `name` is there (as `finding`) or, for None, that it is not."""
    if finding is None:
        return pick(rng, ABSENT[name])
    side = finding.side or ""
    sentence = pick(rng, PRESENT[name])
    return sentence.format(side=side, Side=side.capitalize(), lobe=finding.lobe, size_mm=finding.size_mm)


def write_statements(rng: np.random.Generator, findings: Mapping[str, Finding]) -> dict[str, str]:
    """{entry of ORDER: its sentence}, in the report's order."""
    return {
        entry: pick(rng, NORMAL[entry]) if entry in NORMAL else state(rng, entry, findings.get(entry))
        for entry in ORDER
    }


def join_report(statements: Mapping[str, str]) -> str:
    """The Findings text: one paragraph, the lungs introduced as CT-RATE's reports do."""
    lungs = "Peribronchial thickening"
    return " ".join(
        f"When examined in the lung parenchyma window; {text}" if entry == lungs else text
        for entry, text in statements.items()
    )


def write_impression(findings: Mapping[str, Finding]) -> str:
    """The positives, one short sentence each, in the report's order."""
    lines = []
    for name in (entry for entry in ORDER if entry in findings):
        finding, phrase = findings[name], PHRASES[name]
        line = f"{finding.side} {phrase}" if finding.side else phrase
        if finding.lobe:
            line += f" in the {finding.lobe}"
        lines.append(f"{line[0].upper()}{line[1:]}.")
    return " ".join(lines) or "Findings within normal limits."


# ---- multiple choice -----------------------------------------------------------------------------------------------


def ask(
    rng: np.random.Generator,
    family: str,
    findings: Mapping[str, Finding],
    names: Sequence[str] = DEMO_FINDINGS,
    prevalence: float = PREVALENCE,
) -> list[Question]:
    """The questions of one family about one scan; none where the scan doesn't allow one.

    Given a question's text and options each option is right with probability 1/4: findings are equally frequent and
    independent and the options a uniform draw from those present and absent; sides and lobes are uniform, and a scan
    without effusion is asked for its side just as often as a scan with an effusion on a given side.
    """
    present = [name for name in names if name in findings]
    absent = [name for name in names if name not in findings]
    if family in ("present", "absent"):
        right, wrong = (present, absent) if family == "present" else (absent, present)
        if not right or len(wrong) < 3:
            return []
        options = [pick(rng, right), *shuffled(rng, wrong)[:3]]
        return [compose(rng, family, [PHRASES[name] for name in options], options)]
    if family == "side":
        return ask_side(rng, findings.get("Pleural effusion"), prevalence)
    questions = []
    for name in ("Consolidation", "Lung nodule"):
        if name in present:
            others = shuffled(rng, [lobe for lobe in LOBES if lobe != findings[name].lobe])[:3]
            questions.append(compose(rng, family, [findings[name].lobe, *others], [name]))
    return questions


def ask_side(rng: np.random.Generator, effusion: Finding | None, prevalence: float) -> list[Question]:
    """The side of the effusion, 'none' among the options; absence is subsampled to the frequency of one side."""
    if effusion is None and rng.random() >= prevalence / len(SIDES) / (1 - prevalence):
        return []
    right = SIDES.index(effusion.side) if effusion else len(SIDES)
    options = [SIDE_OPTIONS[right], *(option for k, option in enumerate(SIDE_OPTIONS) if k != right)]
    return [compose(rng, "side", options, ["Pleural effusion"])]


def compose(rng: np.random.Generator, family: str, options: list[str], about: Sequence[str]) -> Question:
    """A question whose right option is the first of `options`, under a uniformly drawn letter."""
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
    """A scan's multiple-choice questions, all families, without exact repeats of the same options."""
    questions: dict[tuple, Question] = {}
    for family, tries in QUESTIONS_PER_SCAN.items():
        for _ in range(tries):
            for question in ask(rng, family, findings, names, prevalence):
                questions.setdefault((family, question.about), question)
    return list(questions.values())


def ask_about_text(
    rng: np.random.Generator, names: Sequence[str] = DEMO_FINDINGS, prevalence: float = PREVALENCE
) -> tuple[str, Question]:
    """A question about an invented scan and an impression that answers it.

    The impression lists positives only, half of the time no others than the question's own: what a small language model
    needs to learn to find a finding among the options, before the volume takes the impression's place.
    """
    while True:
        findings = sample_findings(rng, prevalence)
        if questions := ask_all(rng, findings, names, prevalence):
            question = pick(rng, questions)
            break
    lists_all = rng.random() < 0.5
    kept = {name: finding for name, finding in findings.items() if lists_all or name in question.about}
    return write_impression(kept), question


# ---- free answers --------------------------------------------------------------------------------------------------


def short_question(
    rng: np.random.Generator, findings: Mapping[str, Finding], names: Sequence[str] = DEMO_FINDINGS
) -> tuple[str, str]:
    """A yes-or-no question and its answer; yes and no are equally frequent where the scan allows both."""
    present = [name for name in names if name in findings]
    absent = [name for name in names if name not in findings]
    wants_present = rng.random() < 0.5
    pool = (present or absent) if wants_present else (absent or present)
    name = pick(rng, pool)
    return f"Is there {PHRASES[name]} in this chest CT?", "Yes." if name in findings else "No."


def long_question(
    rng: np.random.Generator, statements: Mapping[str, str], names: Iterable[str] = DEMO_FINDINGS
) -> tuple[str, str]:
    """A question for what the report says about one organ, and the report's own sentences."""
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
