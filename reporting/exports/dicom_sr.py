"""Reports as a DICOM Basic Text SR: a sentence per TEXT item, with the source images that its evidence points to."""

import json
from collections.abc import Sequence
from pathlib import Path

from highdicom import sr
from highdicom.sr import RelationshipTypeValues
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import BasicTextSRStorage

from samf.model.report_samf import Report
from samf.reporting.exports.dicom_object import (
    MANUFACTURER,
    Algorithm,
    complete,
    derived_uid,
    general_values,
    quiet_libraries,
    save,
    unnamed,
)
from samf.reporting.exports.heat import source_slices
from samf.reporting.exports.plain_words import CAUTION, is_report, warnings_of
from samf.reporting.exports.source_series import UTF8, SourceSeries

_DESCRIPTION = "AI report, not verified"
_TITLE = Code("18748-4", "LN", "Diagnostic imaging report")
_REQUEST = Code("121062", "DCM", "Request")
_LANGUAGE = Code("121049", "DCM", "Language of Content Item and Descendants")
_ENGLISH = Code("en", "RFC5646", "English")
_CONTAINS = RelationshipTypeValues.CONTAINS
_EMPTY = "(no text)"


def write(reports: Sequence[Report], file: Path, series: SourceSeries) -> None:
    """Write reports as one SR document of the source's study."""
    with quiet_libraries():
        document = text_sr(reports, series)
    save(document, file)


def text_sr(reports: Sequence[Report], series: SourceSeries) -> Dataset:
    """Return reports as a Basic Text SR dataset.

    highdicom has no class for it: an Enhanced SR of containers, texts, codes, UID references and images is one as soon as
    it says so.

    Args:
        reports: one report, or the answers about one scan.
        series: that they were made from.
    """
    root = _root(reports, series)
    headers = unnamed(series.headers)
    content = json.dumps(root.to_json_dict(), sort_keys=True)
    values = general_values(reports, series, "sr", content)
    document = sr.EnhancedSR(
        evidence=headers,
        content=root,
        is_complete=not any(report.truncated for report in reports),
        is_final=False,
        is_verified=False,
        series_description=_DESCRIPTION,
        specific_character_set=UTF8,
        **values,
    )
    document.SOPClassUID = document.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    complete(document, reports, series, _DESCRIPTION)
    return document


def _root(reports: Sequence[Report], series: SourceSeries) -> sr.ContainerContentItem:
    root = sr.ContainerContentItem(_TITLE, is_content_continuous=False, template_id="2000")
    root.ContentSequence = sr.ContentSequence(
        [
            sr.CodeContentItem(_LANGUAGE, _ENGLISH, relationship_type=RelationshipTypeValues.HAS_CONCEPT_MOD),
            *_algorithm(reports[0]),
            _text(codes.DCM.Comment, CAUTION),
            *(_text(codes.DCM.Comment, f"Warning: {text}") for text in warnings_of(reports)),
            *(_findings(report, series) for report in reports),
        ]
    )
    return root


def _algorithm(report: Report) -> list[sr.ContentItem]:
    """Return the algorithm as the document's observer, a device (TID 1002), and by name and version (TID 4019)."""
    algorithm = Algorithm.of(report)
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=derived_uid("device", *algorithm.parts),
        name="SAMF",
        manufacturer_name=MANUFACTURER,
        model_name=algorithm.name,
    )
    observer = sr.ObserverContext(codes.DCM.Device, device)
    weights = [f"weights {algorithm.quantization}"] if algorithm.quantization else []
    identification = sr.AlgorithmIdentification(
        name=f"SAMF, model {algorithm.name}",
        version=", ".join(part for part in (algorithm.version, algorithm.revision) if part),
        parameters=weights or None,
        family=codes.DCM.ArtificialIntelligence,
    )
    return [*observer, *identification]


def _findings(report: Report, series: SourceSeries) -> sr.ContainerContentItem:
    """Return the container of one report or answer; the question of an answer comes first."""
    items = [] if is_report(report) else [_text(_REQUEST, report.question)]
    for sentence, slices in zip(report.sentences, source_slices(report, series), strict=True):
        item = _text(codes.DCM.Finding, sentence.text)
        if slices:
            item.ContentSequence = sr.ContentSequence([_image(series, number) for number in slices])
        items.append(item)
    if not report.sentences:
        items.append(_text(codes.DCM.Finding, report.text.strip() or _EMPTY))
    items += [_text(codes.DCM.Comment, check) for check in report.checks()]
    if report.truncated:
        items.append(_text(codes.DCM.Comment, "The text ended at the limit of new tokens."))
    container = sr.ContainerContentItem(codes.DCM.Findings, relationship_type=_CONTAINS)
    container.ContentSequence = sr.ContentSequence(items)
    return container


def _text(concept: Code, words: str) -> sr.TextContentItem:
    return sr.TextContentItem(concept, words, relationship_type=_CONTAINS)


def _image(series: SourceSeries, number: int) -> sr.ImageContentItem:
    """Return a reference to one slice of the source."""
    header, frame = series.slices[number]
    source = series.headers[header]
    return sr.ImageContentItem(
        codes.SCT.Source,
        source.SOPClassUID,
        source.SOPInstanceUID,
        referenced_frame_numbers=None if frame is None else [frame],
        relationship_type=RelationshipTypeValues.INFERRED_FROM,
    )
