#!/usr/bin/env bash
# The package rouge gives a report that repeats itself five times ROUGE-1 and ROUGE-L of 1.0.
#
# Guessed: two packages for ROUGE agree on plain lower-case words but for stemming, and a generator that loops is punished by
# precision: five times the words, a fifth of them matched.
# Seen: rouge counts sets by default: each word, each pair of words and each word of the longest common subsequence once. The
# looping report has F 1.0, where rouge-score has 0.33; a report with the reference's words in alphabetical order has 0.96 where
# that has 1. `Rouge(exclusive=False)` counts words, but mixes counts and sets in ROUGE-L, whose F then exceeds 1: 1.15 for the
# reference itself, 1.92 for five of it, so that repeating is better than being right.
# Here: the project's ROUGE is rouge-score's, tested for equality (evaluation/metrics/rouge.py).
#
# Versions: rouge 1.0.1, rouge-score 0.1.2, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "rouge==1.0.1" "rouge-score==0.1.2" "nltk==3.10.4" "numpy==2.4.6"
cd "$folder"

cat > score.py <<'PYTHON'
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

TRUE = "the lungs are clear . no pleural effusion . the heart is normal in size ."
scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
for name, report in (
    ("the reference", TRUE),
    ("five times the reference", " ".join([TRUE] * 5)),
    ("one sentence, looping", "the lungs are clear . " * 6),
    ("the reference's words, sorted", " ".join(sorted(TRUE.split()))),
):
    sets = [f"{score['f']:.2f}" for score in Rouge().get_scores(report, TRUE)[0].values()]
    counts = [f"{score['f']:.2f}" for score in Rouge(exclusive=False).get_scores(report, TRUE)[0].values()]
    other = [f"{score.fmeasure:.2f}" for score in scorer.score(TRUE, report).values()]
    print(f"{name}: 1, 2, L by rouge {', '.join(sets)}; exclusive=False {', '.join(counts)}; rouge-score {', '.join(other)}")
PYTHON
"$folder/venv/bin/python" score.py | tee seen.txt
diff seen.txt - <<'SEEN'
the reference: 1, 2, L by rouge 1.00, 1.00, 1.00; exclusive=False 1.00, 1.00, 1.15; rouge-score 1.00, 1.00, 1.00
five times the reference: 1, 2, L by rouge 1.00, 0.96, 1.00; exclusive=False 0.33, 0.32, 1.92; rouge-score 0.33, 0.32, 0.33
one sentence, looping: 1, 2, L by rouge 0.47, 0.35, 0.47; exclusive=False 0.26, 0.17, 1.58; rouge-score 0.27, 0.17, 0.27
the reference's words, sorted: 1, 2, L by rouge 0.96, 0.08, 0.64; exclusive=False 0.93, 0.08, 0.57; rouge-score 1.00, 0.08, 0.54
SEEN
echo "as seen"
