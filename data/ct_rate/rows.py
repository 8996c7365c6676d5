"""Records from the rows of CT-RATE's reports CSV and the entries of its VQA file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from samf.data.ct_rate.questions import vqa_exchanges
from samf.data.ct_rate.tables import VOLUME_COLUMN, read_json_array, read_rows, row_volume
from samf.data.prompts import REPORT_QUESTION
from samf.data.records import RecordBuilder
from samf.data.schema import Record
from samf.data.texts import given

#: Columns of the reports CSV by the names that `report_sections` uses.
SECTIONS = {
    "findings": "Findings_EN",
    "impression": "Impressions_EN",
    "clinical_information": "ClinicalInformation_EN",
}


def report_records(builder: RecordBuilder, path: Path, sections: Sequence[str]) -> Iterator[Record]:
    """Yield the records of a reports CSV.

    Args:
        builder: makes the records.
        path: the CSV.
        sections: some of SECTIONS.
    """
    for row in read_rows(path, (VOLUME_COLUMN, *(SECTIONS[name] for name in sections))):
        name = str(row_volume(row, path))
        if record := builder.report(name, *_report_texts(row, sections)):
            yield record


def _report_texts(row: dict[str, str], sections: Sequence[str]) -> tuple[str, str]:
    """Return question and answer of a report row; the answer is empty if the first section is missing."""
    texts = {name: given(row[SECTIONS[name]]) for name in sections}
    context = texts.pop("clinical_information", "")
    question = f"Clinical information: {context} {REPORT_QUESTION}" if context else REPORT_QUESTION
    leading = next(iter(texts.values()))
    if not leading or len(texts) == 1:
        return question, leading
    return question, "\n".join(f"{name.capitalize()}: {text}" for name, text in texts.items() if text)


def vqa_records(builder: RecordBuilder, path: Path, skip_reports: bool) -> Iterator[Record]:
    """Yield the records of a VQA file, one per exchange.

    Args:
        builder: makes the records.
        path: the JSON file.
        skip_reports: leave out its reports, where the reports CSV has them.
    """
    for entry in read_json_array(path):
        name, entry_id = entry.get("image") or None, str(entry.get("id", "vqa"))
        if name is not None and not isinstance(name, str):
            builder.load_stats.drop("image that is no file name", entry_id)
            continue
        for exchange in vqa_exchanges(entry, builder.load_stats):
            if skip_reports and exchange["task"] == "report":
                continue
            if record := builder.record(name, entry_id, exchange):
                yield record
