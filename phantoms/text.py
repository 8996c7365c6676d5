"""Reports of phantoms in the style of CT-RATE's.

The vocabulary is small (about 120 words), so that a tiny language model can learn it. Each finding has one name, in reports
and options alike, and each sentence is about one finding, so that a rule can recover the labels.
"""

from collections.abc import Mapping

import numpy as np

from samf.phantoms.draws import pick
from samf.phantoms.findings import Finding

#: The name of each finding in reports and options.
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

#: The order of a report: for a finding, its statement; for any other entry, one of NORMAL's sentences.
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


def _state(rng: np.random.Generator, name: str, finding: Finding | None) -> str:
    """Return a sentence that says that a finding is present; for None, that it is absent."""
    if finding is None:
        return pick(rng, ABSENT[name])
    side = finding.side or ""
    sentence = pick(rng, PRESENT[name])
    return sentence.format(side=side, Side=side.capitalize(), lobe=finding.lobe, size_mm=finding.size_mm)


def write_statements(rng: np.random.Generator, findings: Mapping[str, Finding]) -> dict[str, str]:
    """Return {entry of ORDER: its sentence}, in the report's order."""
    return {
        entry: pick(rng, NORMAL[entry]) if entry in NORMAL else _state(rng, entry, findings.get(entry))
        for entry in ORDER
    }


def join_report(statements: Mapping[str, str]) -> str:
    """Return the Findings section: one paragraph, with the lungs introduced as in CT-RATE's reports."""
    lungs = "Peribronchial thickening"
    return " ".join(
        f"When examined in the lung parenchyma window; {text}" if entry == lungs else text
        for entry, text in statements.items()
    )


def write_impression(findings: Mapping[str, Finding]) -> str:
    """Return the Impressions section: one short sentence per finding, in the report's order."""
    lines = []
    for name in (entry for entry in ORDER if entry in findings):
        finding, phrase = findings[name], PHRASES[name]
        line = f"{finding.side} {phrase}" if finding.side else phrase
        if finding.lobe:
            line += f" in the {finding.lobe}"
        lines.append(f"{line[0].upper()}{line[1:]}.")
    return " ".join(lines) or "Findings within normal limits."
