"""The notes below a table of results: cohort, exclusions, template collapse, generation, and what is not available."""

from collections.abc import Mapping

from samf.evaluation.markdown import TEXT_NAMES, format_value
from samf.evaluation.schema import GenerationReport, Results, TaskScores

__all__ = ["missing_notes", "results_notes", "unknown_patient_notes"]

_LONGEST_QUOTE = 12  # words


def results_notes(results: Results) -> list[str]:
    """Return the notes of `score_predictions`' results as Markdown list items."""
    return [
        *_cohort_notes(results),
        *_collapse_notes(results["tasks"]),
        *_generation_notes(results.get("generation")),
        *missing_notes(results["not_available"]),
        *(f"- {_note_name(name)}: {note}" for name, note in results["notes"].items()),
        *_provenance_notes(results),
    ]


def missing_notes(not_available: Mapping[str, str]) -> list[str]:
    """Return a note for each reason why metrics are not available."""
    names: dict[str, list[str]] = {}
    for name, reason in not_available.items():
        names.setdefault(reason, []).append(TEXT_NAMES.get(name, name))
    return [f"- {', '.join(group)}: not available. {reason}" for reason, group in names.items()]


def unknown_patient_notes(unknown: int, answers: int) -> list[str]:
    """Return a note if `unknown` of the answers name no patient."""
    if not unknown:
        return []
    return [
        f"- Patients are not known for {unknown} of {answers} answers (no patient_id, and no name of CT-RATE's): each of their "
        "scans, or each answer without a scan, counts as a patient. Where a patient has several, intervals are too narrow and "
        "p-values too small. Give each row a patient_id."
    ]


def _cohort_notes(results: Results) -> list[str]:
    cohort, counts, statistics = results["cohort"], results["counts"], results["statistics"]
    volumes = f"{cohort['volumes']} volumes, " if cohort["volumes"] else ""
    unknown = statistics["unknown_patients"]
    patients = f"{cohort['patients']} patients" if unknown < cohort["predictions"] else "patients not known"
    notes = [f"- Cohort: {cohort['predictions']} answers, {volumes}{cohort['scans']} scans, {patients}."]
    notes += unknown_patient_notes(unknown, cohort["predictions"])
    for reason, excluded in cohort["excluded"].items():
        examples = f", e.g. {', '.join(excluded['ids'][:3])}" if excluded["ids"] else ""
        notes.append(f"- Left out: {excluded['count']} ({reason}){examples}.")
    if counts["duplicate_ids"]:
        notes.append(f"- {counts['duplicate_ids']} answers repeat an id; all of them are scored.")
    if counts["missing_ids"]:
        notes.append(f"- {counts['missing_ids']} answers have no id.")
    if statistics["intervals"]:
        notes.append(
            f"- In brackets: {statistics['level']:.0%} intervals ({statistics['method']}), and n, the number of patients that "
            "a value depends on."
        )
    return notes


def _provenance_notes(results: Results) -> list[str]:
    """Return what answers and scores were computed with."""
    settings, code = results["settings"], results["code"]
    chosen = {name: value for name, value in settings.items() if name != "finding_names" and value not in (None, [])}
    listed = ", ".join(f"{name} {value}" for name, value in chosen.items())
    version = f"samf {code['samf']}, " if "samf" in code else ""
    notes = [
        f"- Scores: {version}source {code['source']}; {listed}; {len(settings['finding_names'])} findings; "
        f"results.json of schema {results['schema']}."
    ]
    if model := results.get("model"):
        notes.insert(0, f"- Model: {model.get('model', 'not named')}, weights {model.get('weights', 'not known')}.")
    return notes


def _note_name(name: str) -> str:
    task, _, metric = name.partition(": ")
    return f"{TEXT_NAMES.get(metric, metric)}, {task}" if metric else name


def _collapse_notes(tasks: Mapping[str, TaskScores]) -> list[str]:
    collapse = tasks["report"].get("collapse") if "report" in tasks else None
    if not collapse:
        return []
    ours, theirs = collapse["predictions"], collapse["references"]
    notes = [
        f"- Distinct reports: {format_value(ours['distinct_ratio'])} of all (references "
        f"{format_value(theirs['distinct_ratio'])}); the most frequent is {format_value(ours['most_frequent'])} of all "
        f"({format_value(theirs['most_frequent'])})."
    ]
    runs = (
        ("in half of the reports", ours["template"], theirs["template"]),
        ("twice in one report", ours["loop"], theirs["loop"]),
    )
    for meaning, run, reference in runs:
        notes.append(
            f"- Longest run of words {meaning}: {run['words']} (references {reference['words']}){_quote(run['text'])}."
        )
    return notes


def _quote(text: str) -> str:
    words = text.split()
    if not words:
        return ""
    return f': "{" ".join(words[:_LONGEST_QUOTE])}{" …" if len(words) > _LONGEST_QUOTE else ""}"'


def _generation_notes(report: GenerationReport | None) -> list[str]:
    if not report:
        return []
    processes = f" with {report['processes']} processes" if report.get("processes", 1) > 1 else ""
    before = f"; {report['resumed']} more are from earlier runs" if report["resumed"] else ""
    notes = [f"- {report['written']} answers generated in {report['seconds']:.0f} s{processes}{before}."]
    if report["failures"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.get("failure_kinds", {}).items())
        notes.append(f"- {report['failures']} records failed and are not scored ({kinds}); failures.jsonl lists them.")
    return notes
