"""Result lists over the queries and pins of a run: their pairs, and the metrics of each list.

Shapes: N pairs in some list's top, Q queries with a list, K places of a list.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common import NUM_LEVELS
from experiments.estimates import list_metrics
from lib.inputs.pairs import read_queries
from lib.stages.terminal import Stop
from lib.tables.result_lists import read_columns, read_results, rows_of_queries


class Lists:
    """Result lists of a run's queries. query, pin [N]: all pairs in some list's top; queries [Q]; places:
    {list: numbers of its pairs [Q, K], best first, -1 beyond its end}; judged [Q, K']: likewise of all lists;
    has: {list: which queries it answers [Q]}."""

    def __init__(self, files, run, top):
        features = run / "features"
        keys, language = read_queries(features)
        ids = pq.read_table(features / "queries.parquet", columns=["query_id"])["query_id"].to_pylist()
        pins = pq.read_table(features / "pins.parquet", columns=["pin_id"])["pin_id"].combine_chunks()
        self.pins = pins
        tops = {name: read_top(path, (ids, keys), pins, top) for name, path in files.items()}
        key = np.unique(np.concatenate([query << 32 | pin for query, pin, _ in tops.values()]))
        self.query, self.pin = key >> 32, key & 0xFFFFFFFF
        self.queries, first = np.unique(self.query, return_index=True)
        self.ids, self.language = ([column[row] for row in self.queries] for column in (ids, language))
        self.keys = [keys[row] for row in self.queries]
        self.places, self.has = {}, {}
        for name, (query, pin, rank) in tops.items():
            row = np.searchsorted(self.queries, query)
            places = np.full((len(self.queries), top), -1)
            places[row, rank] = np.searchsorted(key, query << 32 | pin)
            self.places[name], self.has[name] = places, (places >= 0).any(axis=1)
        sizes = np.diff([*first, len(key)])
        offset = np.arange(sizes.max())
        self.judged = np.where(offset < sizes[:, None], first[:, None] + offset, -1)  # [Q, K']

    def columns(self):
        """Of the pairs: ids of query and pin, and the place in each list, from 1 (null: not in its top)."""
        rank = {}
        for name, places in self.places.items():
            row, place = np.nonzero(places >= 0)
            values = np.zeros(len(self.query), np.int32)
            values[places[row, place]] = place + 1
            rank[f"rank_{name}"] = pa.array(values, mask=values == 0)
        ids = np.array(self.ids, object)[np.searchsorted(self.queries, self.query)]
        return {"query_id": pa.array(ids, pa.string()), "pin_id": self.pins.take(self.pin), **rank}

    def metrics(self, gain, relevant):
        """{list: {metric: [Q]}}, NaN for queries that a list does not answer. gain, relevant [N]."""
        found = {}
        for name, places in self.places.items():
            made = list_metrics(places, self.judged, gain, relevant)
            found[name] = {metric: np.where(self.has[name], x, np.nan) for metric, x in made.items()}
        return found


def read_top(path, queries, pins, top):
    """Rows of queries and pins, and places from 0, of the first `top` pins of each list in a file. queries:
    ids and keys of the run's; pins: ids. Says in one line what the run does not have."""
    table = read_results(path)
    query = rows_of_queries(table, *queries)
    pin = pc.index_in(table["pin_id"], pins).fill_null(-1).to_numpy().astype(np.int64)
    for what, row in (("queries", query), ("pins", pin)):
        unknown = np.flatnonzero(row < 0)
        if len(unknown):
            rest = f"{len(unknown):,} of {len(row):,} rows with {what} unknown to the run left out"
            print(f"{path}: {rest}, the first: {table.slice(int(unknown[0]), 1).to_pylist()[0]}")
    known = (query >= 0) & (pin >= 0)
    query, pin, score = query[known], pin[known], table["score"].to_numpy()[known]
    if not len(query):
        raise Stop(f"{path}: no row with a query and a pin of this run")
    order = np.lexsort((-score, query))
    query, pin = query[order], pin[order]
    _, first = np.unique(query << 32 | pin, return_index=True)  # a pin that a list names twice counts once
    first.sort()
    query, pin = query[first], pin[first]
    _, start, size = np.unique(query, return_index=True, return_counts=True)
    rank = np.arange(len(query)) - np.repeat(start, size)
    return query[rank < top], pin[rank < top], rank[rank < top]


def people_on(lists, evaluation):
    """People's labels of the lists' pairs: probabilities of 1 [N, C], and which queries have all of their
    pairs labelled [Q]. evaluation: rows that the teacher was not trained on."""
    key, labelled = (
        rows[0] << 32 | rows[1]
        for rows in (
            (lists.query, lists.pin),
            (evaluation["query_index"].astype(np.int64), evaluation["pin_index"]),
        )
    )
    place = np.argsort(labelled)
    at = np.minimum(np.searchsorted(labelled[place], key), len(labelled) - 1)
    row = place[at]
    has = labelled[row] == key
    p = np.eye(NUM_LEVELS)[evaluation["label"][row] - 1] * has[:, None]
    covered = np.bincount(np.searchsorted(lists.queries, lists.query), has) == (lists.judged >= 0).sum(axis=1)
    return p, covered


def strata_of(named, lists, run):
    """Stratum (a text) and weight of each query [Q]. named: a column of the run's queries, or a table with
    query_id or query, stratum, and perhaps weight; "": one stratum."""
    everything, weight = np.full(len(lists.queries), "all", object), np.ones(len(lists.queries))
    if not named:
        return everything, weight
    queries = pq.read_table(run / "features" / "queries.parquet")
    if named in queries.column_names:
        named = queries[named].take(lists.queries).to_pylist()
        return np.array([str(name) for name in named], object), weight
    if not Path(named).is_file():
        raise Stop(f"--strata {named}: no column of queries and no file")
    table = read_columns(Path(named), {"stratum": "text", "weight": "number"})
    row = rows_of_queries(table, lists.ids, lists.keys)
    everything[row[row >= 0]] = np.array(table["stratum"].to_pylist(), object)[row >= 0]
    if "weight" in table.column_names:
        weight[:] = 0
        weight[row[row >= 0]] = np.nan_to_num(table["weight"].to_numpy())[row >= 0]
    return everything, weight
