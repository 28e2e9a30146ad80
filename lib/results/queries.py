"""Evaluation queries one by one: where a system is worse than BM25, and where it is better."""

import csv

import numpy as np
import pyarrow.parquet as pq

from lib.results.report import escaped, markdown_table
from lib.stages.files import whole_file
from lib.tables.files import plain_cell

SHOWN = 10  # queries in the report


def one_by_one(features, rows, ndcg, found):
    """A dict for each evaluation query that has a gain: its row number, text, language, judged pins, best
    level, nDCG@20 of each system, and `difference`, of the best trained kind of system here to bm25; worst
    first. ndcg(labels, scores) -> nDCG of one query; found: {system: (probabilities, score)}."""
    main = next(name for name in ("student", "teacher", "student_human_labels", "match") if name in found)
    texts = pq.read_table(features / "queries.parquet", columns=["query", "language"])
    order = np.argsort(rows["query_index"], kind="stable")
    numbers, starts = np.unique(rows["query_index"][order], return_index=True)
    queries = []
    for number, at in zip(numbers.tolist(), np.split(order, starts[1:])):
        label = rows["label"][at]
        if label.max() > 1:
            about = {"index": number, **texts.slice(number, 1).to_pylist()[0]}
            about |= {"judged pins": len(at), "best level": int(label.max())}
            scores = {name: float(ndcg(label, score[at])) for name, (_, score) in found.items()}
            queries.append({**about, **scores, "difference": scores[main] - scores["bm25"]})
    return sorted(queries, key=lambda query: query["difference"])


def write_csv(queries, path):
    """queries.csv: all of them."""
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for line in [list(queries[0]), *(query.values() for query in queries)] if queries else ():
            cells = (f"{cell:.4f}" if isinstance(cell, float) else plain_cell(str(cell)) for cell in line)
            writer.writerow(cells)


def for_pages(queries, n):
    """The queries that are shown as pages: half of them the worst beside bm25, half the best."""
    n = min(n, len(queries))
    worst = queries[: n - n // 2]
    return worst + queries[len(queries) - n // 2 :][::-1]


def section(queries, systems):
    """The worst queries beside bm25 as Markdown; systems: names."""
    if not queries:
        return []
    names = ["bm25", *(name for name in systems if name not in ("majority", "bm25"))]
    body = []
    for query in queries[:SHOWN]:
        cells = [escaped(query["query"]), escaped(query["language"]), f"{query['judged pins']:,}"]
        cells += [f"{query[name]:.3f}" for name in names]
        body.append([*cells, f"{query['difference']:+.3f}"])
    worse = sum(query["difference"] < 0 for query in queries)
    better = sum(query["difference"] > 0 for query in queries)
    says = f"{better:,} of {len(queries):,} queries are better than with bm25, {worse:,} worse"
    head = ["query", "language", "judged", *names, "difference"]
    title = ["## Queries, the worst beside bm25 first", "", f"nDCG@20. {says}; all in queries.csv."]
    return [*title, *markdown_table(head, body)]
