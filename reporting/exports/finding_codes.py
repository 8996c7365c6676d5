"""SNOMED CT codes of findings, where a concept means just the finding; others go as text."""

SNOMED = "http://snomed.info/sct"

_CODES = {
    "Atelectasis": ("46621007", "Atelectasis"),
    "Bronchiectasis": ("12295008", "Bronchiectasis"),
    "Cardiomegaly": ("8186001", "Cardiomegaly"),
    "Consolidation": ("95436008", "Lung consolidation"),
    "Emphysema": ("87433001", "Pulmonary emphysema"),
    "Hiatal hernia": ("84089009", "Hiatal hernia"),
    "Lymphadenopathy": ("30746006", "Lymphadenopathy"),
    "Pericardial effusion": ("373945007", "Pericardial effusion"),
    "Pleural effusion": ("60046008", "Pleural effusion"),
}


def finding_code(name: str) -> tuple[str, str] | None:
    """Return code and display of a finding's concept in SNOMED CT, None where no concept is known to be the same."""
    return _CODES.get(name)
