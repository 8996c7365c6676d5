"""Text metrics against their reference libraries, and against hand-made counts."""

import csv
import itertools
import math
import random
import zipfile
from collections import Counter

import nltk
import numpy as np
import pytest
import rouge_score.tokenize
import sacrebleu
from nltk.corpus import wordnet
from nltk.translate.meteor_score import single_meteor_score
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer

from samf.evaluation.metrics import text_metrics as metrics
from samf.evaluation.metrics import wordnet_synonyms
from samf.evaluation.metrics.cider import cider_tokens
from samf.evaluation.metrics.ngrams import shared_counts
from samf.evaluation.metrics.text_tables import TextTables, text_tables

REFERENCES = [
    "Pleural effusion was observed in the right hemithorax. Heart size is normal.",
    "No nodule was detected in both lungs.",
    "Emphysematous changes are observed, more prominent in the upper lobes; 4.5 mm nodule.",
]
PREDICTIONS = [
    "Pleural effusions were seen in the left hemithorax. The heart size is normal.",
    "A nodule was detected in the left lung.",
    "Emphysematous changes are observed in the upper lobes.",
]


@pytest.fixture
def no_wordnet(monkeypatch, tmp_path):
    """A machine whose nltk finds no data, whatever lies on the real one."""
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    unloaded = nltk.corpus.util.LazyCorpusLoader("wordnet", nltk.corpus.WordNetCorpusReader, None)
    monkeypatch.setattr(wordnet_synonyms, "_wordnet", unloaded)


@pytest.fixture(scope="module")
def with_wordnet(test_data, tmp_path_factory):
    """nltk's own WordNet reader on the real files."""
    folder = tmp_path_factory.mktemp("nltk")
    (folder / "corpora").mkdir()
    with zipfile.ZipFile(test_data / "nltk" / "wordnet.zip") as archive:
        archive.extractall(folder / "corpora")
    before = list(nltk.data.path)
    nltk.data.path.insert(0, str(folder))
    wordnet.ensure_loaded()
    yield
    nltk.data.path[:] = before


@pytest.fixture(scope="module", params=[40, pytest.param(199, marks=pytest.mark.slow)])
def real_pairs(request, test_data):
    """Real reports against the next one each; among the predictions are an empty one and odd ones."""
    with (test_data / "reports" / "CT-CLIP_text_classifier_val.csv").open(encoding="utf-8", newline="") as lines:
        reports = [row["report_text"] for row in csv.DictReader(lines)][: request.param + 1]
    predictions, references = reports[1:], reports[:-1]
    odd = ["", "\n \n", "胸水なし。", references[3], " ".join(["nodule"] * 1500), "Heart &amp; lungs; 4.5mm-\nnodule."]
    return odd + predictions[len(odd) :], references


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_of_real_reports_equals_sacrebleu(real_pairs, order):
    predictions, references = real_pairs
    bleu = sacrebleu.metrics.BLEU(max_ngram_order=order, smooth_method="none")
    expected = bleu.corpus_score(predictions, [references]).score / 100
    samples = metrics.text_samples(predictions, references)
    assert samples[f"bleu_{order}"].value() == pytest.approx(expected, abs=1e-9)
    alone = [bleu.corpus_score([p], [[r]]).score / 100 for p, r in zip(predictions, references, strict=True)]
    np.testing.assert_allclose(samples[f"mean_bleu_{order}"].samples[:, 0], alone, atol=1e-9)
    np.testing.assert_allclose(samples[f"bleu_{order}"].of_samples(), alone, atol=1e-9)


def test_rouge_of_real_reports_equals_rouge_score(real_pairs):
    predictions, references = real_pairs
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    pairs = list(zip(predictions, references, strict=True))
    # The library takes a second for 1,500 words, so the longest goes without.
    pairs = [pair for pair in pairs if len(pair[0]) < 5000]
    expected = [scorer.score(reference, prediction) for prediction, reference in pairs]
    found = metrics.rouge(*zip(*pairs, strict=True))
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        np.testing.assert_allclose(found[ours], [score[theirs].fmeasure for score in expected], atol=1e-9)


def test_meteor_of_real_reports_equals_nltk(real_pairs, with_wordnet):
    predictions, references = real_pairs
    expected = [
        single_meteor_score(nltk.wordpunct_tokenize(r), nltk.wordpunct_tokenize(p))
        for p, r in zip(predictions, references, strict=True)
    ]
    np.testing.assert_allclose(metrics.meteor(predictions, references), expected, atol=1e-9)


def test_cider_of_real_reports_equals_pycocoevalcap(real_pairs):
    predictions, references = ([" ".join(cider_tokens(text)) for text in texts] for texts in real_pairs)
    expected = Cider().compute_score(
        {k: [text] for k, text in enumerate(references)}, {k: [text] for k, text in enumerate(predictions)}
    )
    np.testing.assert_allclose(metrics.cider(*real_pairs), expected[1], atol=1e-9)
    assert metrics.text_samples(*real_pairs)["cider"].value() == pytest.approx(expected[0], abs=1e-9)


def cider_by_loops(predictions, references) -> list[float]:
    """CIDEr as its authors define it, with clipping and the length's Gaussian, word for word."""

    def ngrams(text, n):
        words = cider_tokens(text)
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def weighed(text, n):
        owners = {ngram: sum(ngram in ngrams(other, n) for other in references) for ngram in ngrams(text, n)}
        return {g: k * math.log(len(references) / max(1, owners[g])) for g, k in ngrams(text, n).items()}

    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            a, b = weighed(prediction, n), weighed(reference, n)
            norm = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
            if norm:
                total += sum(min(v, b.get(g, 0)) * b.get(g, 0) for g, v in a.items()) / norm
        lengths = [max(0, len(cider_tokens(text)) - 1) for text in (prediction, reference)]
        scores.append(10 * total / 4 * math.exp(-((lengths[0] - lengths[1]) ** 2) / 72))
    return scores


def test_cider_equals_loops():
    references = [*REFERENCES, "No nodule. No effusion.", "Heart size is normal."]
    predictions = [*PREDICTIONS, "", "Heart size is normal."]
    assert metrics.cider(predictions, references) == pytest.approx(cider_by_loops(predictions, references), abs=1e-12)


def test_cider_of_identical_texts_is_ten_and_needs_two():
    assert metrics.cider(REFERENCES, REFERENCES) == pytest.approx([10, 10, 10])
    assert metrics.cider(REFERENCES[:1], REFERENCES[:1]) is None
    result = metrics.text_metrics(REFERENCES[:1], REFERENCES[:1])
    assert result["scores"]["cider"] is None and "at least two" in result["not_available"]["cider"]


def naive_lcs(a, b) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
    return int(table[-1, -1])


def test_rouge_l_of_random_words_equals_the_table():
    rng = random.Random(0)
    pairs = [[rng.choices("abcde", k=rng.randint(1, 25)) for _ in range(2)] for _ in range(100)]
    found = metrics.rouge(*([" ".join(words) for words in texts] for texts in zip(*pairs, strict=True)))["rouge_l"]
    expected = [2 * naive_lcs(a, b) / (len(a) + len(b)) for a, b in pairs]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def odd_texts(seed: int, count: int) -> list[str]:
    """Texts of the characters that tokenisers disagree on: blanks of all kinds, hyphens at line ends, entities, numbers."""
    rng = random.Random(seed)
    pieces = [
        *"ab.,-5 \n\t\r\x0b\x1c\x85\xa0",
        "-\n",
        "&amp;",
        "&quot;x",
        "<skipped>",
        "4.5",
        "ΑΣ",
        "İ",
        "胸水",
        "lung's",
        "T2-",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(count)]


@pytest.mark.parametrize(
    "name, tokenise",
    [
        ("13a", lambda text: sacrebleu.tokenizers.tokenizer_13a.Tokenizer13a()(text.rstrip()).split()),
        ("rouge", lambda text: rouge_score.tokenize.tokenize(text, None)),
        ("meteor", lambda text: [word.lower() for word in nltk.wordpunct_tokenize(text)]),
        ("cider", cider_tokens),
    ],
)
def test_tables_split_texts_as_the_libraries_do(name, tokenise):
    texts = list(dict.fromkeys(odd_texts(seed=3, count=400)))
    tokens = TextTables(texts).tokens(name)
    assert [[tokens.vocabulary[number] for number in tokens.of(row)] for row in range(len(texts))] == [
        tokenise(text) for text in texts
    ]


def test_tables_count_ngrams_as_a_loop_does():
    texts = ["a b a b a b", "a", "", "b a b", "c c c c c"]
    tokens = TextTables(texts).tokens("13a")
    for order, ngrams in zip((1, 2, 3, 4), tokens.ngrams, strict=True):
        for first, second in itertools.product(range(len(texts)), repeat=2):
            a, b = (
                Counter(tuple(words[k : k + order]) for k in range(len(words) - order + 1))
                for words in (texts[first].split(), texts[second].split())
            )
            assert shared_counts(ngrams, np.array([first]), np.array([second])).tolist() == [(a & b).total()]


def test_metrics_of_odd_texts_equal_the_libraries(with_wordnet):
    predictions, references = odd_texts(seed=1, count=60), odd_texts(seed=2, count=60)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    found = metrics.rouge(predictions, references)
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        np.testing.assert_allclose(found[ours], [score[theirs].fmeasure for score in expected], atol=1e-9)
    meteor = [
        single_meteor_score(nltk.wordpunct_tokenize(r), nltk.wordpunct_tokenize(p))
        for p, r in zip(predictions, references, strict=True)
    ]
    np.testing.assert_allclose(metrics.meteor(predictions, references), meteor, atol=1e-9)
    bleu = sacrebleu.metrics.BLEU(max_ngram_order=4, smooth_method="none").corpus_score(predictions, [references])
    assert metrics.corpus_bleu(predictions, references, 4) == pytest.approx(bleu.score / 100, abs=1e-9)


def test_a_baseline_uses_the_tables_of_its_system():
    """Its texts are all in them, and its scores are those that it has by itself."""
    tables, _, _ = text_tables(PREDICTIONS, REFERENCES)
    exchanged = PREDICTIONS[1:] + PREDICTIONS[:1]
    again, _, _ = text_tables(exchanged, REFERENCES)
    together = metrics.text_metrics(exchanged, REFERENCES)["scores"]
    text_tables(["another"], ["text"])
    assert again is tables
    assert metrics.text_metrics(exchanged, REFERENCES)["scores"] == pytest.approx(together, abs=1e-12)


def test_meteor_of_random_words_equals_nltk(with_wordnet):
    """Words with common stems and synonyms, often repeated: many ways to match, of which nltk's is one."""
    words = [
        "car",
        "auto",
        "autos",
        "automobile",
        "car",
        "cars",
        "driven",
        "driving",
        "drive",
        "big",
        "large",
        "larger",
        "lung",
        "lungs",
        "the",
        "see",
        "seen",
        "look",
    ]
    rng = random.Random(1)
    for _ in range(200):
        a, b = (rng.choices(words, k=rng.randint(1, 15)) for _ in range(2))
        expected = single_meteor_score(a, b)
        assert metrics.meteor([" ".join(b)], [" ".join(a)])[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_equals_sacrebleu(order):
    expected = sacrebleu.metrics.BLEU(max_ngram_order=order, smooth_method="none").corpus_score(
        PREDICTIONS, [REFERENCES]
    )
    assert metrics.corpus_bleu(PREDICTIONS, REFERENCES, order) == pytest.approx(expected.score / 100, abs=1e-12)


def test_bleu_1_by_hand():
    """Clipped matches 2 of 3 words; the prediction is one word shorter, so the brevity penalty is exp(1 - 4/3)."""
    assert metrics.corpus_bleu(["no no effusion"], ["no pleural effusion seen"], 1) == pytest.approx(
        2 / 3 * math.exp(-1 / 3)
    )


def test_bleu_4_by_hand():
    """6 words of a 6-word reference with the last wrong: precisions 5/6, 4/5, 3/4, 2/3."""
    score = metrics.corpus_bleu(["a b c d e x"], ["a b c d e f"], 4)
    assert score == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_bleu_pools_counts_over_the_corpus():
    """BLEU-1 of two pairs is 5 matches of 6 words, not the mean of 1/2 and 4/4."""
    predictions, references = ["a x", "c d e f"], ["a b", "c d e f"]
    assert metrics.corpus_bleu(predictions, references, 1) == pytest.approx(5 / 6)
    assert metrics.text_metrics(predictions, references)["scores"]["mean_bleu_1"] == pytest.approx((1 / 2 + 1) / 2)


def test_rouge_l_equals_rouge_score():
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert metrics.rouge(PREDICTIONS, REFERENCES)["rouge_l"] == pytest.approx(expected, abs=1e-12)


def test_rouge_by_hand():
    """Longest common subsequence "a c d": precision 3/3, recall 3/4, F 6/7. Pairs of words: "c d" of 2 and of 3."""
    scores = metrics.rouge(["a c d"], ["a b c d"])
    assert scores == {"rouge_1": pytest.approx([6 / 7]), "rouge_2": pytest.approx([2 / 5]), "rouge_l": [6 / 7]}


def test_synonyms_equal_those_of_nltk(with_wordnet):
    """Of single words of each part of speech, of forms of them, of exceptions, and of what WordNet doesn't have."""
    rng = random.Random(0)
    lemmas = sorted({lemma for lemma in wordnet.all_lemma_names() if "_" not in lemma})
    words = [word + ending for word in rng.sample(lemmas, 1000) for ending in ("", "s", "ed", "ing", "er")]
    words += ["mice", "better", "lungs", "worse", "was", "xyzzy", "", "ground-glass"]
    names = {word: [lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas()] for word in words}
    expected = {word: {name for name in found if "_" not in name} | {word} for word, found in names.items()}
    assert {word: set(wordnet_synonyms.synonyms(word)) for word in words} == expected
    assert sum(len(found) > 1 for found in expected.values()) > 1000


def test_meteor_equals_nltk(with_wordnet):
    expected = [
        single_meteor_score(nltk.wordpunct_tokenize(r), nltk.wordpunct_tokenize(p))
        for p, r in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    assert metrics.meteor(PREDICTIONS, REFERENCES) == pytest.approx(expected, abs=1e-12)
    assert metrics.text_metrics(PREDICTIONS, REFERENCES)["scores"]["meteor"] == pytest.approx(sum(expected) / 3)


def test_meteor_by_hand(with_wordnet):
    """All four words match in one chunk: F 1, penalty 0.5 · (1/4)³."""
    assert metrics.meteor(["no effusion was seen"], ["No effusion was seen"]) == pytest.approx([1 - 0.5 / 4**3])


def test_without_wordnet_only_meteor_is_missing(no_wordnet, monkeypatch):
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("nothing may be downloaded"))
    result = metrics.text_metrics(PREDICTIONS, REFERENCES)
    assert result["scores"]["meteor"] is None
    assert "nltk.downloader wordnet" in result["not_available"]["meteor"]
    assert all(result["scores"][name] > 0 for name in ("bleu_1", "bleu_4", "rouge_l"))


def test_identical_texts_score_one():
    scores = metrics.text_metrics(REFERENCES, REFERENCES)["scores"]
    assert [scores[name] for name in ("bleu_1", "bleu_4", "rouge_l")] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_empty_predictions_score_zero_and_are_counted(empty):
    result = metrics.text_metrics([empty, REFERENCES[1]], [REFERENCES[0], REFERENCES[1]])
    assert result["empty_predictions"] == 1
    assert result["scores"]["rouge_l"] == pytest.approx(0.5)
    words = [len(sacrebleu.tokenizers.tokenizer_13a.Tokenizer13a()(text).split()) for text in REFERENCES[:2]]
    assert result["scores"]["bleu_1"] == pytest.approx(math.exp(1 - sum(words) / words[1]))


@pytest.mark.parametrize(
    "prediction, reference", [("", "text here"), ("text here", ""), ("", ""), ("胸水なし", "No effusion")]
)
def test_odd_pairs_score_zero(prediction, reference):
    scores = metrics.text_metrics([prediction], [reference])["scores"]
    assert {scores[name] for name in ("bleu_1", "bleu_4", "rouge_l")} == {0}


def test_meteor_of_empty_texts_is_zero(with_wordnet):
    assert metrics.meteor(["", "text", ""], ["text", "", ""]) == [0, 0, 0]


@pytest.mark.parametrize(
    "predictions, references, message", [([], [], "no predictions"), (["a"], [], "1 predictions for 0")]
)
def test_wrong_numbers_are_an_error(predictions, references, message):
    for function in (metrics.text_metrics, metrics.rouge, metrics.meteor, metrics.cider):
        with pytest.raises(ValueError, match=message):
            function(predictions, references)


def test_bertscore_unless_named_is_not_available():
    result = metrics.text_metrics(PREDICTIONS, REFERENCES)
    for name in metrics.BERTSCORE_NAMES:
        assert result["scores"][name] is None
        assert "bertscore_model" in result["not_available"][name]


def test_bertscore_of_an_unknown_model_asks_for_its_layer():
    with pytest.raises(ValueError, match="bertscore_layers"):
        metrics.bertscore(PREDICTIONS, REFERENCES, "no/such-model")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A random BERT with a word tokenizer that, like many, has no length of its own."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in PREDICTIONS + REFERENCES for word in nltk.wordpunct_tokenize(text)})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_bertscore_by_model(tiny_bert):
    """1 for a text against itself, 0 for an empty one, the same alone as among others; F1 of precision and recall."""
    texts = [REFERENCES[0], PREDICTIONS[1], "", REFERENCES[2]]
    scores = metrics.bertscore(texts, [*REFERENCES, ""], tiny_bert, num_layers=2, device="cpu")
    precision, recall, f1 = (scores[name] for name in metrics.BERTSCORE_NAMES)
    assert f1[0] == pytest.approx(1, abs=1e-5)
    assert 0 < f1[1] < 1 and f1[1] == pytest.approx(2 * precision[1] * recall[1] / (precision[1] + recall[1]), abs=1e-5)
    assert all(values[2:] == [0, 0] for values in (precision, recall, f1))
    alone = metrics.bertscore([PREDICTIONS[1]], [REFERENCES[1]], tiny_bert, num_layers=2, device="cpu")
    assert alone["bertscore_f1"][0] == pytest.approx(f1[1], abs=1e-5)


def test_bertscore_equals_its_library(tiny_bert):
    bert_score = pytest.importorskip("bert_score")
    scorer = bert_score.BERTScorer(model_type=tiny_bert, num_layers=2, device="cpu")
    scorer._tokenizer.model_max_length = 512
    expected = scorer.score(PREDICTIONS, REFERENCES)
    found = metrics.bertscore(PREDICTIONS, REFERENCES, tiny_bert, num_layers=2, device="cpu")
    for name, values in zip(metrics.BERTSCORE_NAMES, expected, strict=True):
        np.testing.assert_allclose(found[name], values.tolist(), atol=1e-9)


def test_bertscore_of_a_very_long_prediction(tiny_bert):
    long = " ".join(["nodule"] * 10_000)
    scores = metrics.bertscore([long], [REFERENCES[1]], tiny_bert, num_layers=2, device="cpu")
    assert 0 < scores["bertscore_f1"][0] < 1
