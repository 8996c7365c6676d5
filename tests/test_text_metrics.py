"""Text metrics against their reference libraries, and against hand-made counts."""

import math
import zipfile

import nltk
import pytest
import sacrebleu
from nltk.corpus import wordnet
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer

from samf.evaluation import text_metrics as metrics

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
    monkeypatch.setattr(
        metrics, "wordnet", nltk.corpus.util.LazyCorpusLoader("wordnet", nltk.corpus.WordNetCorpusReader, None)
    )


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


@pytest.mark.parametrize("order", [1, 2, 4])
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
    assert metrics.corpus_bleu(["a x", "c d e f"], ["a b", "c d e f"], 1) == pytest.approx(5 / 6)


def test_rouge_l_equals_rouge_score():
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert metrics.rouge_l(PREDICTIONS, REFERENCES) == expected


def test_rouge_l_by_hand():
    """Longest common subsequence "a c d": precision 3/3, recall 3/4, F 6/7."""
    assert metrics.rouge_l(["a c d"], ["a b c d"]) == pytest.approx([6 / 7])


def test_meteor_equals_nltk(with_wordnet):
    expected = [
        single_meteor_score(nltk.wordpunct_tokenize(r), nltk.wordpunct_tokenize(p))
        for p, r in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    assert metrics.meteor(PREDICTIONS, REFERENCES) == expected
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
    for function in (metrics.text_metrics, metrics.rouge_l, metrics.meteor):
        with pytest.raises(ValueError, match=message):
            function(predictions, references)


def test_bertscore_unless_named_is_not_available():
    result = metrics.text_metrics(PREDICTIONS, REFERENCES)
    assert result["scores"]["bertscore_f1"] is None
    assert "bertscore_model" in result["not_available"]["bertscore_f1"]


def test_bertscore_of_an_unknown_model_asks_for_its_layer():
    with pytest.raises(ValueError, match="bertscore_layers"):
        metrics.bertscore_f1(PREDICTIONS, REFERENCES, "no/such-model")


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
    """1 for a text against itself, 0 for an empty one, the same alone as among others."""
    texts = [REFERENCES[0], PREDICTIONS[1], "", REFERENCES[2]]
    scores = metrics.bertscore_f1(texts, [*REFERENCES, ""], tiny_bert, num_layers=2, device="cpu")
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert 0 < scores[1] < 1
    assert scores[2:] == [0, 0]
    alone = metrics.bertscore_f1([PREDICTIONS[1]], [REFERENCES[1]], tiny_bert, num_layers=2, device="cpu")
    assert alone[0] == pytest.approx(scores[1], abs=1e-5)


def test_bertscore_of_a_very_long_prediction(tiny_bert):
    scores = metrics.bertscore_f1(
        [" ".join(["nodule"] * 10_000)], [REFERENCES[1]], tiny_bert, num_layers=2, device="cpu"
    )
    assert 0 < scores[0] < 1
