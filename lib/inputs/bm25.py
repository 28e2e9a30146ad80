"""Tokens of any language, and BM25 of given pairs by rank_bm25's formula. Without PyTorch: processes that
count words start in a second."""

import functools
import multiprocessing
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import regex
from rank_bm25 import BM25Okapi
from scipy.sparse import csr_matrix, vstack

from lib.stages.files import write_parquet

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TOKEN = regex.compile(rf"(?P<run>[{_UNSPACED}ー]+)|(?:(?![{_UNSPACED}])[\p{{L}}\p{{N}}\p{{M}}])+")
_ASCII = regex.compile(r"[a-z0-9]+")
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")  # soft hyphens, joiners, zero-width spaces
PATTERNS = {"token": _TOKEN.pattern, "invisible": _INVISIBLE.pattern}


def tokenize(text, characters=True):
    """Runs of Unicode letters and digits, case-folded. A run of a script written without spaces becomes its
    character bigrams and, so that a word of one character is found in it, its single `characters`."""
    if text.isascii():
        return _ASCII.findall(text.lower())
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text).casefold())
    tokens = []
    for match in _TOKEN.finditer(text):
        word = match.group()
        if match.group("run") and len(word) > 1:
            tokens += [word[i : i + 2] for i in range(len(word) - 1)]
            if characters:
                tokens += [c for c in word if not unicodedata.category(c).startswith("M")]
        else:
            tokens.append(word)
    return tokens


def count_terms(columns, texts):
    """B texts -> how often each has each term of `columns` {term: column} (sparse [B, terms]), how many
    tokens it has [B], and in how many texts each token of any kind stands (Counter)."""
    counts, terms, ends, lengths, texts_with = [], [], [0], [], Counter()
    for text in texts:
        tokens = tokenize(text)
        frequency = Counter(tokens)
        texts_with.update(frequency.keys())
        lengths.append(len(tokens))
        for term in columns.keys() & frequency.keys():
            terms.append(columns[term])
            counts.append(frequency[term])
        ends.append(len(terms))
    matrix = csr_matrix((np.array(counts, np.int32), terms, ends), shape=(len(texts), len(columns)))
    matrix.sort_indices()
    return matrix, np.array(lengths, np.int32), texts_with


def mapped(function, chunks, workers):
    """function(chunk) of every chunk, in order, computed by so many processes."""
    if workers == 1:
        yield from map(function, chunks)
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            yield from pool.imap(function, chunks)


class PairBM25(BM25Okapi):
    """BM25 of given (query, pin) pairs. rank_bm25's BM25Okapi owns the formula: its k1, b, epsilon, and its
    _calc_idf, which raises a negative idf to epsilon x the mean idf. A pair is one product of two sparse
    rows."""

    def __init__(self, queries, pin_texts, workers=1, k1=1.5, b=0.75, epsilon=0.25):
        """queries: list of strings; pin_texts: iterable of lists of strings (chunks), pins in index order."""
        self.k1, self.b, self.epsilon, self.idf = k1, b, epsilon, {}
        self.terms = sorted({term for query in queries for term in tokenize(query)})
        count = functools.partial(count_terms, {term: column for column, term in enumerate(self.terms)})
        self.queries, self.query_length, _ = count(queries)
        matrices, lengths, pins_with = [], [], Counter()
        for matrix, length, texts_with in mapped(count, pin_texts, workers):
            matrices.append(matrix)
            lengths.append(length)
            pins_with.update(texts_with)
        self.pins, self.doc_len = vstack(matrices, format="csr"), np.concatenate(lengths)
        self.corpus_size, self.avgdl = len(self.doc_len), self.doc_len.mean() or 1.0
        if pins_with:
            self._calc_idf(pins_with)
        self.term_idf = np.array([self.idf.get(term, 0.0) for term in self.terms])

    def save(self, path):
        """The idf of every term of the pins and, in the schema's metadata, the other numbers of the formula:
        what BM25 of a new query or pin needs. Then lets go of terms that no query of ours has."""
        terms = sorted(self.idf)
        idf = pa.array([self.idf[term] for term in terms], pa.float64())
        table = pa.table({"token": pa.array(terms, pa.string()), "idf": idf})
        numbers = {"k1": self.k1, "b": self.b, "epsilon": self.epsilon, "mean_length": float(self.avgdl)}
        numbers["corpus_size"] = self.corpus_size
        metadata = {name: repr(number) for name, number in numbers.items()}
        write_parquet(path, table.replace_schema_metadata(metadata))
        self.idf = None

    def use(self, path):
        """From now on scores with the statistics that save() left at `path`; a term that they do not know is
        in no pin. Returns {what: how far ours are from them, as a share}."""
        numbers, idf = saved_statistics(path)
        known = np.array([term in idf for term in self.terms], bool)
        asked = self.queries.sum(axis=0).A1  # how often queries have each term
        ours, self.term_idf = self.term_idf, np.array([idf.get(term, 0.0) for term in self.terms])
        moved = asked @ np.abs(ours - self.term_idf) / max(asked @ np.abs(self.term_idf), 1e-12)
        length = abs(self.avgdl / numbers["mean_length"] - 1)
        self.k1, self.b, self.avgdl = numbers["k1"], numbers["b"], numbers["mean_length"]
        self.queries.data[~known[self.queries.indices]] = 0
        self.idf = None
        return {"mean length of a pin's text": float(length), "idf of the words of queries": float(moved)}

    def score(self, query, pin):
        """Query and pin indices [B] -> BM25 [B], and the share of the query's tokens that the pin has [B]."""
        asked, found = self.queries[query], self.pins[pin]
        length = self.doc_len[pin] / self.avgdl
        norm = self.k1 * (1 - self.b + self.b * length)
        f = found.data.astype(np.float64)
        norm = np.repeat(norm, np.diff(found.indptr))
        found.data = f * (self.k1 + 1) / (f + norm)
        score = asked.multiply(found) @ self.term_idf
        found.data = np.ones_like(f)
        matched = asked.multiply(found).sum(axis=1).A1
        return score, matched / np.maximum(self.query_length[query], 1)


def saved_statistics(path):
    """What PairBM25.save() wrote: its numbers {name: value}, and {term: idf}."""
    table = pq.read_table(path)
    numbers = {name.decode(): float(value) for name, value in table.schema.metadata.items()}
    tokens, idf = (table[name].to_pylist() for name in ("token", "idf"))
    return numbers, dict(zip(tokens, idf))
