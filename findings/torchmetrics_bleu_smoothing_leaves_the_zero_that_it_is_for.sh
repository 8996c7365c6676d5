#!/usr/bin/env bash
# torchmetrics' BLEU with smooth=True is 0 where there is no common 4-gram, the one case that smoothing is for.
#
# Guessed: BLEUScore(smooth=True) and SacreBLEUScore(smooth=True) add 1 to the counts, as nltk's method2 does, so that a report
# without a 4-gram of the reference has more than 0; and SacreBLEUScore() gives sacrebleu's score.
# Seen: the count is looked at before it is smoothed: any n-gram order without a match makes 0, with and without smoothing.
# Where all orders match, smooth=True changes a score that needed no smoothing. SacreBLEUScore() is 0 where sacrebleu, whose
# default smooths, gives 38. Short sentences, of which reports are made, are the ones concerned.
# Here: the project's BLEU is sacrebleu's, over the whole corpus (evaluation/metrics/bleu.py).
#
# Versions: torchmetrics 1.9.0, torch 2.13.0+cpu, sacrebleu 2.6.0, nltk 3.10.4, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet "$@"; }
pip "torch==2.13.0+cpu" 2> /dev/null || pip --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0"
pip "torchmetrics==1.9.0" "sacrebleu==2.6.0" "nltk==3.10.4" "numpy==2.4.6"
cd "$folder"

cat > bleu.py <<'PYTHON'
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from torchmetrics.text import BLEUScore, SacreBLEUScore

for report, reference in (
    ("nodule in the left lung .", "nodule in the right lung ."),
    ("no pleural effusion .", "no effusion ."),
    ("there is a small nodule in the left lung .", "there is a small nodule in the right lung ."),
):
    smoothed = corpus_bleu([[reference.split()]], [report.split()], smoothing_function=SmoothingFunction().method2)
    print(
        f"{report} | {reference} sacrebleu {sacrebleu.corpus_bleu([report], [[reference]]).score:.1f},"
        f" torchmetrics SacreBLEUScore {100 * SacreBLEUScore()([report], [[reference]]).item():.1f},"
        f" smooth {100 * SacreBLEUScore(smooth=True)([report], [[reference]]).item():.1f};"
        f" nltk, add one {100 * smoothed:.1f}, torchmetrics BLEUScore smooth"
        f" {100 * BLEUScore(smooth=True)([report], [[reference]]).item():.1f}"
    )
PYTHON
"$folder/venv/bin/python" bleu.py | tee seen.txt
diff seen.txt - <<'SEEN'
nodule in the left lung . | nodule in the right lung . sacrebleu 38.0, torchmetrics SacreBLEUScore 0.0, smooth 0.0; nltk, add one 48.5, torchmetrics BLEUScore smooth 0.0
no pleural effusion . | no effusion . sacrebleu 35.4, torchmetrics SacreBLEUScore 0.0, smooth 0.0; nltk, add one 50.0, torchmetrics BLEUScore smooth 0.0
there is a small nodule in the left lung . | there is a small nodule in the right lung . sacrebleu 70.7, torchmetrics SacreBLEUScore 70.7, smooth 74.0; nltk, add one 74.0, torchmetrics BLEUScore smooth 74.0
SEEN
echo "as seen"
