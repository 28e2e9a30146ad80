"""The text of a query and of a pin as BM25 and the text encoder see it, and the match features of a pair."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from common import FIELDS, MATCH_FEATURES
from lib.stages.streams import row_groups, slices


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


class MatchFeatures:
    """The four match features of pairs: BM25, share of query tokens matched, cosine of the text embeddings,
    and log(1 + engagement events of that query on that pin within the window)."""

    def __init__(self, bm25, query_vectors, pin_vectors, chunk=1 << 13):
        """Vectors [queries, D] and [pins, D]; of different width: the cosine is 0."""
        self.bm25, self.query_vectors, self.pin_vectors, self.chunk = bm25, query_vectors, pin_vectors, chunk
        self.threads = ThreadPoolExecutor(os.cpu_count())  # NumPy and PyTorch release the interpreter lock

    def __call__(self, query, pin, engaged):
        """Query and pin indices [B] and events [B] -> {feature: float32 [B]}."""
        out = {name: np.zeros(len(query), dtype=np.float32) for name in MATCH_FEATURES}
        out["engagement"][:] = np.log1p(engaged)
        fill = functools.partial(self.fill, out, query, pin)
        starts = range(0, len(query), self.chunk)
        list((self.threads.map if len(starts) > 1 else map)(fill, starts))
        return out

    def fill(self, out, query, pin, start):
        """The first three features of a chunk that fits into a core's cache."""
        rows = slice(start, start + self.chunk)
        query, pin = query[rows], pin[rows]
        out["bm25"][rows], out["terms_matched"][rows] = self.bm25.score(query, pin)
        if self.query_vectors.shape[1] == self.pin_vectors.shape[1]:
            q = torch.from_numpy(self.query_vectors[query]).float()
            p = torch.from_numpy(self.pin_vectors[pin]).float()
            cosine = (q * p).sum(1) / (q.norm(dim=1) * p.norm(dim=1)).clamp(min=1e-12)
            out["text_cosine"][rows] = cosine.numpy()
