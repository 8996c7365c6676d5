"""WordNet's synonyms by nltk, without what METEOR never asks of it.

nltk's reader also maps WordNet to itself for the languages of Open Multilingual WordNet, two thirds of its start, and
keeps its index as 150,000 dictionaries of lists. Here the index stays text until a word is looked up.
"""

import zipfile
from collections.abc import Iterator, Mapping
from functools import lru_cache

from nltk.corpus.reader.api import CorpusReader
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader


class _Index(Mapping[str, dict[str, list[int]]]):
    """Lemma → part of speech → offsets of its synsets, from the lines of WordNet's index files."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, text: str) -> None:
        """Add an index file: lines of `lemma pos synset_cnt p_cnt [symbol ...] sense_cnt tagsense_cnt offset ...`."""
        for line in text.splitlines():
            lemma, _, rest = line.partition(" ")
            if lemma:  # the licence's lines begin with a blank
                self._lines[lemma] = f"{self._lines[lemma]}\n{rest}" if lemma in self._lines else rest

    def __getitem__(self, lemma: str) -> dict[str, list[int]]:
        found = {}
        for line in self._lines[lemma].splitlines():
            pos, count, *fields = line.split()
            found[pos] = [int(offset) for offset in fields[-int(count) :]]
        if "a" in found:
            found["s"] = found["a"]  # adjective satellites are in the adjectives' files
        return found

    def __contains__(self, lemma: object) -> bool:
        return lemma in self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


class _EnglishReader(WordNetCorpusReader):
    """nltk's reader of WordNet with a small index, for English only."""

    def map_wn(self, version: str = "wordnet") -> None:
        """Map nothing: only other languages need it."""

    def _scan_satellites(self) -> None:
        self.satellite_offsets: frozenset[int] = frozenset()

    def _load_lemma_pos_offset_map(self) -> None:
        if not hasattr(self, "_lemma_pos_offset_map"):  # an nltk that keeps its index elsewhere
            super()._load_lemma_pos_offset_map()
            return
        self._lemma_pos_offset_map = _Index()
        for suffix in self._FILEMAP.values():
            with self.open(f"index.{suffix}") as stream:
                self._lemma_pos_offset_map.add(stream.read())


_wordnet = LazyCorpusLoader(
    "wordnet",
    _EnglishReader,
    LazyCorpusLoader("omw-1.4", CorpusReader, r".*/wn-data-.*\.tab", encoding="utf8"),  # not opened for English
)


def wordnet_available() -> bool:
    """Return whether nltk finds WordNet on this machine; never downloads."""
    try:
        _wordnet.ensure_loaded()
    except (LookupError, OSError, zipfile.BadZipFile):  # absent, or cut off while it was copied
        return False
    return True


@lru_cache(maxsize=1 << 16)
def synonyms(word: str) -> frozenset[str]:
    """Return the word and WordNet's single-word lemmas that share a sense with it."""
    names = (lemma.name() for synset in _wordnet.synsets(word) for lemma in synset.lemmas())
    return frozenset(name for name in names if "_" not in name) | {word}
