"""The graph embedding of pins, from the boards that they were saved on: our open counterpart of PinSage."""

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer

from lib.stages.files import write_parquet
from lib.stages.streams import matrix_of, new_matrix, vector_column

# The titles under which our pins were saved most often, from the table `saves`.
TITLES = """
    SELECT text FROM saves SEMI JOIN pin_rows USING (pin_id)
    GROUP BY text ORDER BY sum(n) DESC, text LIMIT 200_000"""


def board_counts(raw, titles, pins):
    """How often each pin was saved under each of the titles: sparse float32 [pins, titles]."""
    boards = pa.table({"text": titles, "board": np.arange(len(titles), dtype=np.int32)})
    cells = """
        SELECT pin_index, board, n::FLOAT AS n FROM saves JOIN boards USING (text)
        JOIN (SELECT pin_id, pin_index FROM pin_rows) USING (pin_id) ORDER BY pin_index, board"""
    cells = raw.table(cells, boards=boards)
    pin, board, n = (cells[name].to_numpy() for name in ("pin_index", "board", "n"))
    return csr_matrix((n, (pin, board)), shape=(pins, len(titles)))


def svd_axes(weights, dim, seed, fit_rows=200_000):
    """Axes [D, boards] of the truncated SVD of at most `fit_rows` rows of a matrix [pins, boards]."""
    with_boards = np.flatnonzero(np.diff(weights.indptr))
    sample = np.sort(np.random.default_rng(seed).permutation(with_boards)[:fit_rows])
    dim = max(1, min(dim, weights.shape[1] - 1, len(sample) - 1))
    if min(weights.shape[1], len(sample)) < 2:
        return np.zeros((dim, weights.shape[1]), dtype=np.float32)
    return TruncatedSVD(dim, random_state=seed).fit(weights[sample]).components_.astype(np.float32)


def graph_embedding(raw, pins, dim, seed, out, base=None):
    """Truncated SVD of the TF-IDF-weighted pin x board matrix; with a Base on its axes. Writes
    pin_graph_embedding.npy [pins, D] and graph.parquet: every board title's idf and place on each axis.
    Nothing if no pin (of the base) is on a board."""
    titles, tfidf = raw.table(TITLES)["text"], TfidfTransformer(sublinear_tf=True)
    graph = base.graph if base else None
    counts = board_counts(raw, titles if graph is None else graph["board_title"], pins)
    if graph is not None:
        tfidf.idf_, axes = graph["idf"].to_numpy(), matrix_of(graph["axes"]).T
    elif base or not counts.nnz:
        print(f"no boards{' in the base' if base else ''}: no graph embedding")
        return
    else:
        tfidf.fit(counts)
        axes = svd_axes(tfidf.transform(counts), dim, seed)
    weights = tfidf.transform(counts)
    with new_matrix(out / "pin_graph_embedding.npy", pins, len(axes)) as matrix:
        for start in range(0, pins, 65_536):
            matrix[start : start + 65_536] = weights[start : start + 65_536] @ axes.T
    if graph is not None:
        base.note_boards(raw, titles)
        base.bring("graph.parquet", out)
        return
    columns = {"board_title": titles, "idf": tfidf.idf_, "axes": vector_column(axes.T)}
    write_parquet(out / "graph.parquet", columns)
