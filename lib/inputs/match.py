"""The text of a query and of a pin as BM25 and the text encoder see it, and the match features of a pair,
named, computed and described in one table, MATCH_FEATURES: for stage 01, a service, and features.json."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from lib.inputs.bm25 import PairBM25
from lib.levels import FIELDS
from lib.stages.streams import row_groups, slices

RULES = 1  # of 01's identity: raise it when a field of the text or a match feature is computed in another way

WINDOW_YEARS = 2  # paper: engaged queries of the past two years
ENGAGEMENTS = "engagements.parquet"  # of a run's queries and pins: what a service needs for a known query


def pin_text(columns, row):
    """All text of a pin, the document that BM25 and the text encoder see."""
    return " ".join(columns[name][row] for name in FIELDS if columns[name][row])


def pin_texts(path, rows=20_000):
    """The text of every pin of a pins.parquet in index order, in lists of `rows`."""
    for table in slices(row_groups(path, FIELDS), rows):
        columns = table.to_pydict()
        yield [pin_text(columns, row) for row in range(len(table))]


def query_texts(path, rows=20_000):
    """Likewise the text of every query of a queries.parquet."""
    for table in slices(row_groups(path, ["query"]), rows):
        yield table["query"].to_pylist()


class Pairs:
    """B pairs of a query and a pin, what a match feature is computed from: `query` and `pin` [B], rows of
    what `source` (MatchFeatures) has; `engaged` [B], engagement events of that query on that pin."""

    def __init__(self, source, query, pin, engaged):
        self.source, self.query, self.pin, self.engaged = source, query, pin, engaged

    @cached_property
    def bm25(self):
        """BM25 [B], and the share of the query's tokens that the pin has [B]."""
        return self.source.bm25.score(self.query, self.pin)

    def text_cosine(self):
        """Cosine of the text embeddings [B]; 0 where they are of different width."""
        queries, pins = self.source.query_vectors, self.source.pin_vectors
        if queries.shape[1] != pins.shape[1]:
            return np.zeros(len(self.query))
        q, p = (vectors.astype(np.float32) for vectors in (queries[self.query], pins[self.pin]))
        product, qq, pp = (np.einsum("bd,bd->b", *pair) for pair in ((q, p), (q, q), (p, p)))
        return product / np.maximum(np.sqrt(qq * pp), 1e-12)


class MatchFeature(NamedTuple):
    """compute: Pairs -> [B]; unit and how: in words; source: the model or file that a new pair needs."""

    compute: Callable
    unit: str
    how: str
    source: str | None


ENGAGED = "high-engagement events of this query on this pin in the window"
MATCH_FEATURES = {
    "bm25": MatchFeature(
        lambda pairs: pairs.bm25[0],
        "BM25 score",
        "Okapi BM25 of the query's tokens in all text of the pin",
        "bm25.parquet",
    ),
    "terms_matched": MatchFeature(
        lambda pairs: pairs.bm25[1], "share, 0 to 1", "tokens of the query that the pin's text has", None
    ),
    "text_cosine": MatchFeature(
        Pairs.text_cosine, "cosine, -1 to 1", "of query_text and pin_text", "text encoder"
    ),
    "engagement": MatchFeature(lambda pairs: np.log1p(pairs.engaged), "log(1 + events)", ENGAGED, None),
}
NOT_MATCH = ("query_index", "pin_index", "label", "split")  # other columns of a file of pairs


def match_names(path):
    """Names of the match features and the user's own numbers in a file of pairs."""
    return [name for name in pq.read_schema(path).names if name not in NOT_MATCH]


class MatchFeatures:
    """Computes MATCH_FEATURES of pairs."""

    def __init__(self, bm25, query_vectors, pin_vectors, chunk=1 << 13):
        """Text embeddings [queries, D] and [pins, D]; chunk: pairs that fit into a core's cache."""
        self.bm25, self.query_vectors, self.pin_vectors, self.chunk = bm25, query_vectors, pin_vectors, chunk

    def columns(self, pairs, numbers):
        """Pairs of index_pairs (Arrow) -> columns of a file: indices, match features, the columns
        `numbers`."""
        query, pin, engaged = (pairs[name].to_numpy() for name in ("query_index", "pin_index", "engaged"))
        features = self(query, pin, engaged)
        return {"query_index": query, "pin_index": pin, **features, **{name: pairs[name] for name in numbers}}

    def __call__(self, query, pin, engaged):
        """Query and pin indices [B] and events [B] -> {feature: float32 [B]}."""

        def computed(rows):
            pairs = Pairs(self, query[rows], pin[rows], engaged[rows])
            values = {name: feature.compute(pairs) for name, feature in MATCH_FEATURES.items()}
            return {name: np.asarray(column, np.float32) for name, column in values.items()}

        if len(query) <= self.chunk:
            return computed(slice(None))
        chunks = [slice(start, start + self.chunk) for start in range(0, len(query), self.chunk)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy releases the interpreter lock
            parts = list(threads.map(computed, chunks))
        return {name: np.concatenate([part[name] for part in parts]) for name in MATCH_FEATURES}


def open_match_features(out, workers, base=None):
    """MatchFeatures over a features folder, with the statistics of a base if there is one. Writes
    bm25.parquet."""
    queries = pq.read_table(out / "queries.parquet", columns=["query"])["query"].to_pylist()
    bm25 = PairBM25(queries, pin_texts(out / "pins.parquet", rows=100_000), workers)
    if base:
        base.drift |= bm25.use(base.bring("bm25.parquet", out))
    else:
        bm25.save(out / "bm25.parquet")
    vectors = [np.load(out / f"{side}_text_embedding.npy", mmap_mode="r") for side in ("query", "pin")]
    return MatchFeatures(bm25, *vectors)
