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


def one_by_one(features, rows, ndcg):
    """A dict for each evaluation query that has a gain: its row number, text, language, judged pins, best
    level, nDCG@20 of each system, and `difference`, of the first of MAIN to bm25; worst first. ndcg: {system:
    [Q]}, in the order of their row numbers."""
    main = next(name for name in MAIN if name in ndcg)
    number, of_row, pins = np.unique(rows["query"], return_inverse=True, return_counts=True)
    best = np.zeros(len(number), int)
    np.maximum.at(best, of_row, rows["label"])
    texts = pq.read_table(features / "queries.parquet", columns=["query", "language"]).take(number)
    columns = {"index": number, "query": texts["query"], "language": texts["language"]}
    columns |= {"judged pins": pins, "best level": best}
    columns |= {**ndcg, "difference": ndcg[main] - ndcg["bm25"]}
    queries = [query for query in pa.table(columns).to_pylist() if query["best level"] > 1]
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
    names, scores = ("query", "language", "judged pins"), [name for name in systems if name != "majority"]
    body = []
    for query in queries[:SHOWN]:
        line = [escaped(query[name]) for name in names]
        line += [f"{query[name]:.3f}" for name in scores]
        line.append(f"{query['difference']:+.3f}")
        body.append(line)
    better = sum(query["difference"] > 0 for query in queries)
    worse = sum(query["difference"] < 0 for query in queries)
    text = f"nDCG@20: {better:,} of {len(queries):,} queries are better than with bm25, {worse:,} worse; all"
    head = [*names, *scores, "difference"]
    return section("Queries, the worst beside bm25 first", f"{text} are in queries.csv.", head, body)
