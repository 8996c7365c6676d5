"""Markdown tables of scores."""

from collections.abc import Iterable, Sequence

__all__ = ["TEXT_NAMES", "format_value", "markdown_table", "metric_name"]

# What metrics are called in tables.
TEXT_NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "mean_bleu_1": "mean BLEU-1",
    "mean_bleu_2": "mean BLEU-2",
    "mean_bleu_3": "mean BLEU-3",
    "mean_bleu_4": "mean BLEU-4",
    "meteor": "METEOR",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr (0 to 10)",
    "bertscore_p": "BERTScore P",
    "bertscore_r": "BERTScore R",
    "bertscore_f1": "BERTScore F1",
    "crg": "CRG",
    "macro": "macro means of findings",
    "micro": "micro-F1 of findings",
    "judge_score": "judge's score",
}


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def format_value(value: float | None, interval: Sequence[float] | None = None, n: int | None = None) -> str:
    """Return a metric's value as text: "0.412 (0.398 to 0.427; n 57)", "0.412 (n 57)", or "n/a" for None.

    Args:
        value: of the metric.
        interval: low and high.
        n: the number of patients that the value depends on.
    """
    if value is None:
        return "n/a"
    brackets = [] if interval is None else [f"{interval[0]:.3f} to {interval[1]:.3f}"]
    brackets += [] if n is None else [f"n {n}"]
    return f"{value:.3f} ({'; '.join(brackets)})" if brackets else f"{value:.3f}"


def metric_name(path: str) -> str:
    """Return what a metric is called, without its group: "text.bleu_4" as "BLEU-4"."""
    name = path.partition(".")[2]
    return TEXT_NAMES.get(name, name.replace(".", " "))
