"""The metric as a Space: type a generated report and its reference, see the scores."""

from pathlib import Path
from typing import Any

import evaluate
import gradio
import nltk

nltk.download("wordnet", quiet=True)
METRIC = evaluate.load(str(Path(__file__).with_name("report_generation.py")))


def score(prediction: str, reference: str) -> dict[str, Any]:
    """Return all metrics of one pair."""
    return METRIC.compute(predictions=[prediction], references=[reference])


page = gradio.Interface(
    fn=score,
    inputs=[gradio.Textbox(lines=8, label="generated report"), gradio.Textbox(lines=8, label="reference report")],
    outputs=gradio.JSON(label="scores"),
    title="Chest-CT report generation",
    description=METRIC.description,
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
