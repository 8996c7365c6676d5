"""The page's changing parts as HTML. Everything that a model or a file says is escaped here."""

from collections.abc import Mapping, Sequence
from html import escape

from samf.model.agreement_samf import Said
from samf.model.report_samf import Report, split_sentences

STEPS = {"queue": "Queue", "read": "Read", "encode": "Encode", "write": "Write", "evidence": "Evidence"}
_SAID_WORDS = {"present": "present", "absent": "absent", "uncertain": "uncertain", "nothing": "not mentioned"}


def steps_html(active: str, note: str, kind: str = "busy") -> str:
    """Return the steps of a report with the one that runs, and a sentence about it.

    Args:
        active: key of `STEPS`; "done" = all are.
        note: the sentence.
        kind: "busy", "done" or "stopped".
    """
    names = list(STEPS)
    place = names.index(active) if active in STEPS else len(names)
    items = []
    for number, (name, title) in enumerate(STEPS.items()):
        state = "done" if number < place else "active" if number == place else "next"
        current = ' aria-current="step"' if name == active else ""
        items.append(f'<li class="{state}"{current}>{title}</li>')
    return f'<ol class="steps {kind}">{"".join(items)}</ol><p class="note {kind}">{escape(note)}</p>'


def failure_html(message: str) -> str:
    """Return an error as one sentence."""
    return f'<p class="note failed" role="alert">{escape(message)}</p>'


def draft_html(text: str) -> str:
    """Return a report while it is written."""
    items = [f'<li class="draft">{escape(text[start:end])}</li>' for start, end in split_sentences(text)]
    return f'<ol class="sentences" aria-busy="true">{"".join(items)}<li class="caret" aria-hidden="true"></li></ol>'


def report_html(report: Report, explained: bool) -> str:
    """Return a report: a button for each sentence, those marked that disagree with the findings' probabilities.

    Args:
        report: the report.
        explained: whether a click can show what a sentence rests on.
    """
    doubted: dict[int, list[str]] = {}
    for item in report.disagreements:
        if item.sentence is not None:
            doubted.setdefault(item.sentence, []).append(f"{item.finding} {item.probability:.2f}")
    items = []
    for number, sentence in enumerate(report.sentences):
        said = _strongest(sentence.findings)
        flag = "".join(f'<span class="flag">check: {escape(what)}</span>' for what in doubted.get(number, ()))
        classes = f"sentence said-{said or 'nothing'}{' doubted' if flag else ''}"
        ready = "" if explained else ' aria-disabled="true"'
        items.append(
            f'<li><button type="button" class="{classes}" data-sentence="{number}" aria-pressed="false"{ready}>'
            f'<span class="words">{escape(sentence.text)}</span>{flag}</button></li>'
        )
    cut = '<p class="hint">The text ended at the limit of new tokens.</p>' if report.truncated else ""
    empty = "" if items else '<p class="hint">The model wrote no text.</p>'
    return f'<ol class="sentences">{"".join(items)}</ol>{empty}{cut}'


def _strongest(findings: Mapping[str, Said]) -> Said | None:
    """Return what a sentence says of the finding that it is surest to show; None if it mentions none."""
    return next((said for said in ("present", "uncertain", "absent") if said in findings.values()), None)


def findings_html(report: Report) -> str:
    """Return the findings' probabilities as bars, the likeliest first, next to what the text says of them."""
    if not report.findings:
        return '<p class="hint">This model gives no probabilities of findings.</p>'
    said: dict[str, str] = {}
    for sentence in report.sentences:
        for name, what in sentence.findings.items():
            ranks = ("absent", "uncertain", "present")
            if name not in said or ranks.index(what) > ranks.index(said[name]):
                said[name] = what
    doubted = {item.finding for item in report.disagreements}
    rows = []
    for name, share in sorted(report.findings.items(), key=lambda item: -item[1]):
        words = _SAID_WORDS[said.get(name, "nothing")]
        flag = '<span class="flag">check</span>' if name in doubted else ""
        label = escape(name, quote=True)
        rows.append(
            f'<li class="{"doubted" if flag else ""}"><span class="name">{label}</span>'
            f'<span class="meter" role="meter" aria-label="{label}" aria-valuemin="0" aria-valuemax="1" '
            f'aria-valuenow="{share:.2f}"><span style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></span></span>'
            f'<span class="number">{share:.2f}</span><span class="text-says">text: {words}{flag}</span></li>'
        )
    return f'<ul class="findings">{"".join(rows)}</ul>'


def facts_html(report: Report, model: str, seconds: float | None) -> str:
    """Return what is known of the scan and the reading: warnings first.

    Args:
        report: of the scan.
        model: its name as it may be shown.
        seconds: from the start to the first word; None = unknown.
    """
    made = report.provenance
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in dict.fromkeys(report.warnings))
    facts = {
        "Volume": f"{' × '.join(map(str, made.shape))} voxels",
        "Voxel": f"{' × '.join(f'{mm:.3g}' for mm in made.spacing)} mm",
        "Stored as": made.orientation,
        "Model": model + (f" @ {made.revision[:8]}" if made.revision else ""),
    }
    if seconds is not None:
        facts["First word"] = f"{seconds:.1f} s"
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'{warnings}<dl class="facts">{rows}</dl>'


def answers_html(answers: Sequence[tuple[str, str]], busy: bool = False) -> str:
    """Return questions with their answers, in order.

    Args:
        answers: pairs of question and answer.
        busy: whether the last answer is still written.
    """
    items = "".join(
        f'<div class="turn"><dt>{escape(question)}</dt><dd>{escape(answer) or "…"}</dd></div>'
        for question, answer in answers
    )
    return f'<dl class="answers" aria-busy="{"true" if busy else "false"}">{items}</dl>' if items else ""
