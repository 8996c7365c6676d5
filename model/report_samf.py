"""A report as an object: its sentences with their confidence, findings, and what it was made from and with."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .evidence_samf import Evidence
from .files_samf import atomic_path

SCHEMA_VERSION = 1
REPORT_QUESTION = "Write the radiology report of this chest CT."
DISCLAIMER = "For research only, not for diagnosis."

_ABBREVIATIONS = ("approx", "ca", "cf", "dr", "e.g", "etc", "fig", "i.e", "no", "vs")
_SENTENCE_END = re.compile(r"[.!?;]+(?=\s)|\n+")


@dataclass(frozen=True)
class Sentence:
    """One sentence of a report.

    Attributes:
        text: the sentence without surrounding blanks.
        start, end: its characters in the report's text.
        tokens: how many tokens it has.
        log_probability: the sum of its tokens' log-probabilities given the scan, the prompt and what precedes it; None
            where it was not computed.
    """

    text: str
    start: int
    end: int
    tokens: int = 0
    log_probability: float | None = None


@dataclass(frozen=True)
class Provenance:
    """What a report was made from and with.

    Attributes:
        source: the scan as it was given: path, address, or the kind of an object in memory.
        shape: voxels along X, Y, Z (right, front, top).
        spacing: voxel size in mm along the same axes.
        orientation: directions of the axes as stored, such as "LPS".
        slice_settings: hash of the image processor's settings.
        model, revision: Hub id or folder of the model, and its commit where it came from the Hub.
        generation: options of `generate` that differ from the model's own.
        versions: of this model's code and of the libraries.
    """

    source: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str
    slice_settings: str
    model: str
    revision: str | None = None
    generation: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A generated report, or the answer to one question about a scan.

    Attributes:
        text: what the model wrote.
        question: the question that it answers.
        sentences: the text's sentences, in order.
        findings: probability of each finding by the findings head, uncalibrated; empty for a model without one.
        truncated: whether the text ended at the limit of new tokens.
        warnings: what was repaired or unusual when the scan was read.
        provenance: what it was made from and with.
        evidence: what of the scan each sentence rests on; None where it was not asked for.
    """

    text: str
    question: str
    sentences: tuple[Sentence, ...]
    provenance: Provenance
    findings: Mapping[str, float] = field(default_factory=dict)
    truncated: bool = False
    warnings: tuple[str, ...] = ()
    evidence: Evidence | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a mapping of plain values, with its schema version and the disclaimer."""
        values = dataclasses.asdict(dataclasses.replace(self, evidence=None))
        values["evidence"] = None if self.evidence is None else self.evidence.to_dict()
        return {"schema_version": SCHEMA_VERSION, **values, "disclaimer": DISCLAIMER}

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Return the report that `to_dict` gave.

        Raises:
            ValueError: another schema version.
        """
        if values.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"The report has schema version {values.get('schema_version')}; this code reads {SCHEMA_VERSION}."
            )
        known = {"evidence": None, **values}  # reports of earlier versions have none
        known = {item.name: known[item.name] for item in dataclasses.fields(cls)}
        if known["evidence"] is not None:
            known["evidence"] = Evidence.from_dict(known["evidence"])
        made = {**known["provenance"]}
        made |= {name: tuple(made[name]) for name in ("shape", "spacing")}
        sentences = tuple(Sentence(**sentence) for sentence in known["sentences"])
        warnings = tuple(known["warnings"])
        return cls(**{**known, "sentences": sentences, "provenance": Provenance(**made), "warnings": warnings})

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Return the report that `to_json` gave."""
        return cls.from_dict(json.loads(text))

    def save(self, folder: str | os.PathLike, name: str = "report") -> list[Path]:
        """Write `name`.txt and `name`.json into a folder, and the evidence's heat maps as `name`.evidence.nii.gz.

        Args:
            folder: where to write; made when missing.
            name: of the files, without an ending.

        Returns:
            The files' paths; those of the text and the JSON come first.
        """
        saved, maps = self.save_maps(folder, name)
        contents = {".txt": f"{self.text}\n\n{DISCLAIMER}\n", ".json": saved.to_json()}
        files = [Path(folder) / f"{name}{ending}" for ending in contents]
        for file, content in zip(files, contents.values(), strict=True):
            with atomic_path(file) as temporary:
                temporary.write_text(content, encoding="utf-8")
        return [*files, *maps]

    def save_maps(self, folder: str | os.PathLike, name: str = "report") -> tuple["Report", list[Path]]:
        """Write the evidence's heat maps as `name`.evidence.nii.gz.

        Args:
            folder: where to write; made when missing.
            name: of the file, without its ending.

        Returns:
            The report, whose evidence names the file, and the file's path; no path for a report without evidence.
        """
        if self.evidence is None:
            return self, []
        maps = self.evidence.save_maps(folder, name)
        listed = (*self.evidence.files, *(file.name for file in maps))
        return dataclasses.replace(self, evidence=dataclasses.replace(self.evidence, files=listed)), maps

    def __str__(self) -> str:
        return self.text


def find_sentence_tokens(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]], list[list[int]]]:
    """Return the text of tokens, the (start, end) characters of its sentences, and the indices of each sentence's tokens.

    A token belongs to the sentence in which it ends, since many tokens begin with the blank before a word; special tokens
    belong to none.

    Args:
        tokenizer: decodes the tokens.
        ids: of the tokens.
    """
    ids, special = list(ids), set(tokenizer.all_special_ids)
    ends = [len(tokenizer.decode(ids[: index + 1], skip_special_tokens=True)) for index in range(len(ids))]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    spans = split_sentences(text)
    words = [(index, end) for index, end in enumerate(ends) if ids[index] not in special]
    return text, spans, [[index for index, end in words if first < end <= last] for first, last in spans]


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Return the (start, end) characters of each sentence of a text.

    Sentences end at `.`, `!`, `?` or `;` before a blank, and at line breaks; not after abbreviations, initials or
    list numbers, and not within decimal numbers.
    """
    spans, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        word = text[start : match.start()].rsplit(maxsplit=1)[-1:] if match[0] == "." else []
        if word and (
            word[0].lower().lstrip("(") in _ABBREVIATIONS or word[0].rstrip(".").isdigit() or len(word[0]) == 1
        ):
            continue
        spans.append((start, match.end()))
        start = match.end()
    spans.append((start, len(text)))
    stripped = [_strip(text, *span) for span in spans]
    return [span for span in stripped if span[0] < span[1]]


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    """Return a span without the blanks at its ends."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - (len(part) - len(part.rstrip()))
