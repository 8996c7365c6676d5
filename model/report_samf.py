"""A report as an object: its sentences with their confidence, findings, and what it was made from and with."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .agreement_samf import Disagreement, Said, said_of_findings
from .constants_samf import REPORT_QUESTION as REPORT_QUESTION
from .evidence_samf import Evidence
from .files_samf import atomic_path

SCHEMA_VERSION = 1
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
            where it was not computed. It is the model's own, at temperature 1, also of sampled tokens and of beams.
        findings: the findings that it mentions, and what it says of them: "present", "uncertain" or "absent".
    """

    text: str
    start: int
    end: int
    tokens: int = 0
    log_probability: float | None = None
    findings: Mapping[str, Said] = field(default_factory=dict)

    @property
    def token_probability(self) -> float | None:
        """Return the geometric mean of the tokens' probabilities, which doesn't depend on the sentence's length."""
        if self.log_probability is None or not self.tokens:
            return None
        return math.exp(self.log_probability / self.tokens)


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
        versions: of this model's code and of the libraries; `quantization` where the weights are quantised.
        series: the DICOM series that was read: the label that the log gives it and a digest of its slices' UIDs, by which
            it is recognised later. UIDs cannot be recovered from it. None for other formats, and in older files.
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
    series: str | None = None


@dataclass(frozen=True)
class Report:
    """A generated report, or the answer to one question about a scan.

    Attributes:
        text: what the model wrote.
        question: the question that it answers.
        sentences: the text's sentences, in order.
        findings: probability of each finding, by the findings head or the model's statements, calibrated if the model was
            (`finding_temperature` in its configuration); empty for a model without either.
        truncated: whether the text ended at the limit of new tokens.
        warnings: what was repaired or unusual when the scan was read.
        provenance: what it was made from and with.
        disagreements: findings of which the text and `findings` say different things: to be checked first.
        evidence: what of the scan each sentence rests on; None where it was not asked for.
    """

    text: str
    question: str
    sentences: tuple[Sentence, ...]
    provenance: Provenance
    findings: Mapping[str, float] = field(default_factory=dict)
    truncated: bool = False
    warnings: tuple[str, ...] = ()
    disagreements: tuple[Disagreement, ...] = ()
    evidence: Evidence | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a mapping of plain values, with its schema version and the disclaimer."""
        values = dataclasses.asdict(dataclasses.replace(self, evidence=None))
        values["evidence"] = None if self.evidence is None else self.evidence.to_dict()
        for sentence, written in zip(self.sentences, values["sentences"], strict=True):
            written["token_probability"] = sentence.token_probability
        return {"schema_version": SCHEMA_VERSION, **values, "disclaimer": DISCLAIMER}

    def to_text(self) -> str:
        """Return the text, and below it one line, "check: …", for each disagreement."""
        return "\n".join([self.text, *self.checks()])

    def checks(self) -> list[str]:
        """Return one line, "check: …", for each disagreement."""
        return [f"check: {item}" for item in self.disagreements]

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
        known = {name: values[name] for name in _names(cls) if name in values}
        known = {"disagreements": (), "evidence": None, **known}  # which reports of earlier versions lack
        if known["evidence"] is not None:
            known["evidence"] = Evidence.from_dict(known["evidence"])
        made = {**known["provenance"]}
        made |= {name: tuple(made[name]) for name in ("shape", "spacing")}
        known["provenance"] = Provenance(**made)
        own = _names(Sentence)  # without token_probability, which follows from them
        known["sentences"] = tuple(
            Sentence(**{name: value for name, value in sentence.items() if name in own})
            for sentence in known["sentences"]
        )
        known["warnings"] = tuple(known["warnings"])
        known["disagreements"] = tuple(Disagreement(**item) for item in known["disagreements"])
        return cls(**known)

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
        contents = {".txt": f"{self.to_text()}\n\n{DISCLAIMER}\n", ".json": saved.to_json()}
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


def _names(kind: type) -> list[str]:
    """Return the fields of a dataclass."""
    return [item.name for item in dataclasses.fields(kind)]


def make_sentences(text: str, places: Sequence[int], log_probabilities: Sequence[float]) -> tuple[Sentence, ...]:
    """Return the sentences of a text with the log-probabilities of their tokens; see `assign_tokens`.

    Args:
        text: the decoded tokens.
        places: the index in the text where each token begins, (T,).
        log_probabilities: of the tokens, (T,).
    """
    spans = split_sentences(text)
    own = [[log_probabilities[index] for index in indices] for indices in assign_tokens(text, spans, places)]
    said = said_of_findings(text, spans)
    lead = len(text) - len(text.lstrip())  # a report's text begins without blanks
    return tuple(
        Sentence(text[start:end], start - lead, end - lead, len(values), sum(values) if values else None, findings)
        for (start, end), values, findings in zip(spans, own, said, strict=True)
    )


def assign_tokens(text: str, spans: Sequence[tuple[int, int]], places: Sequence[int]) -> list[list[int]]:
    """Return the indices of each sentence's tokens; every token belongs to one sentence.

    A token belongs to the sentence of its first character that isn't blank: " No" after a full stop begins the next one.

    Args:
        text: the decoded tokens.
        spans: start and end of its sentences.
        places: the index in the text where each token begins, (T,).
    """
    own: list[list[int]] = [[] for _ in spans]
    if not spans:
        return own
    for token, (place, end) in enumerate(zip(places, [*places[1:], len(text)], strict=True)):
        piece = text[place:end]
        anchor = place + (len(piece) - len(piece.lstrip()) if piece.strip() else 0)
        own[max((index for index, (start, _) in enumerate(spans) if start <= anchor), default=0)].append(token)
    return own


def locate_tokens(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int], list[int]]:
    """Return the text of tokens, the indices of those that aren't special, and where in the text each of them begins.

    Args:
        tokenizer: decodes the tokens.
        ids: of the tokens.
    """
    special = set(tokenizer.all_special_ids)
    kept = [index for index, token in enumerate(ids) if token not in special]
    words = [ids[index] for index in kept]
    places = [len(tokenizer.decode(words[:count], skip_special_tokens=True)) for count in range(len(words))]
    return tokenizer.decode(words, skip_special_tokens=True), kept, places


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
