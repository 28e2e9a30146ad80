"""Evaluation queries one by one: where a system is worse than BM25, and where it is better."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from lib.results.report import escaped, section
from lib.stages.files import whole_file
from lib.tables.files import plain_cell

SHOWN = 10  # queries in the report
MAIN = ("student", "teacher", "student_human_labels", "match")  # the first that is there is compared


def one_by_one(features, rows, ndcg, found):
    """A dict for each evaluation query that has a gain: its row number, text, language, judged pins, best
    level, nDCG@20 of each system, and `difference`, of the first of MAIN to bm25; worst first.
    ndcg(labels, scores) -> nDCG of one query; found: {system: (probabilities, score)}."""
    main = next(name for name in MAIN if name in found)
    texts = pq.read_table(features / "queries.parquet", columns=["query", "language"])
    queries = []
    for number in np.unique(rows["query_index"]).tolist():
        at = np.flatnonzero(rows["query_index"] == number)
        label = rows["label"][at]
        best = int(label.max())
        if best == 1:
            continue
        query = {"index": number, **texts.slice(number, 1).to_pylist()[0]}
        query["judged pins"], query["best level"] = len(at), best
        for name, (_, score) in found.items():
            query[name] = float(ndcg(label, score[at]))
        query["difference"] = query[main] - query["bm25"]
        queries.append(query)
    return sorted(queries, key=lambda query: query["difference"])


def write_csv(queries, path):
    """queries.csv: all of them; no text is a formula to a spreadsheet."""
    rows = []
    for query in queries:
        texts = {name: plain_cell(query[name]) for name in ("query", "language")}
        rows.append(query | texts)
    with whole_file(path) as temporary:
        pa.csv.write_csv(pa.Table.from_pylist(rows), temporary)


def for_pages(queries, n):
    """The queries that are shown as pages: half of them the worst beside bm25, half the best."""
    n = min(n, len(queries))
    worst = queries[: n - n // 2]
    return worst + queries[len(queries) - n // 2 :][::-1]


def worst(queries, systems):
    """The worst queries beside bm25 as Markdown; systems: names."""
    if not queries:
        return []
    names, body = [name for name in systems if name != "majority"], []
    for query in queries[:SHOWN]:
        about = [escaped(query[name]) for name in ("query", "language", "judged pins")]
        scores = [f"{query[name]:.3f}" for name in names]
        body.append([*about, *scores, f"{query['difference']:+.3f}"])
    better, worse = (sum(sign * query["difference"] > 0 for query in queries) for sign in (1, -1))
    says = f"nDCG@20: {better:,} of {len(queries):,} queries are better than with bm25, {worse:,} worse; all"
    head = ["query", "language", "judged pins", *names, "difference"]
    return section("Queries, the worst beside bm25 first", f"{says} are in queries.csv.", head, body)
