"""Result lists over the queries and pins of a run: their pairs, and the metrics of each list.

Shapes: N pairs in some list's top, Q queries with a list, C = 5 levels.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from experiments.estimates import certain, list_metrics
from lib.inputs.pairs import read_queries
from lib.stages.terminal import Stop
from lib.tables.result_lists import read_columns, read_results, rows_of_queries

PAIR = ["query", "pin"]


class Lists:
    """Result lists of a run's queries. tops: {list: table of query, pin, rank from 0}; pairs [N]: query and
    pin of all of them, row numbers of the run's tables; queries [Q]: what `queries` has of those with a list,
    by row number, and their key."""

    def __init__(self, files, run, top):
        features, self.top = run / "features", top
        queries = pd.read_parquet(features / "queries.parquet")
        queries["key"], queries["language"] = read_queries(features)
        self.pins = pd.Index(pd.read_parquet(features / "pins.parquet", columns=["pin_id"])["pin_id"])
        self.tops = {name: read_top(path, queries, self.pins, top) for name, path in files.items()}
        pairs = pd.concat(self.tops.values())[PAIR].drop_duplicates()
        self.pairs = pairs.sort_values(PAIR, ignore_index=True)
        self.queries = queries.loc[self.pairs["query"].unique()]

    def columns(self):
        """Of the pairs: ids of query and pin, and the place in each list, from 1 (null: not in its top)."""
        found = {
            "query_id": pa.array(self.queries["query_id"][self.pairs["query"]], pa.string()),
            "pin_id": pa.array(self.pins[self.pairs["pin"]], pa.string()),
        }
        for name, top in self.tops.items():
            place = self.pairs.merge(top, how="left", on=PAIR)["rank"] + 1
            found[f"rank_{name}"] = pa.array(place.astype("Int32"))
        return found

    def metrics(self, gain, relevant):
        """{list: table of metrics by query [Q]}, NaN for queries that it does not answer. gain, relevant
        [N]."""
        judged, found = self.pairs.assign(gain=gain, relevant=relevant), {}
        for name, top in self.tops.items():
            made = list_metrics(top.merge(judged, on=PAIR), judged, self.top)
            found[name] = made.reindex(self.queries.index)
        return found


def read_top(path, queries, pins, top):
    """The first `top` pins of each list in a file: a table of query, pin, rank from 0. queries: a table of
    the run's; pins: its ids. Says in one line what the run does not have."""
    table = read_results(path)
    found = pd.DataFrame({"score": table["score"].to_numpy()})
    found["query"] = rows_of_queries(table, queries["query_id"], queries["key"])
    found["pin"] = pins.get_indexer(table["pin_id"].to_pylist())
    for what in PAIR:
        unknown = np.flatnonzero(found[what] < 0)
        if len(unknown):
            rest = f"{len(unknown):,} of {len(found):,} rows with a {what} unknown to the run left out"
            [first] = table.slice(int(unknown[0]), 1).to_pylist()
            print(f"{path}: {rest}, the first: {first}")
    found = found[(found[PAIR] >= 0).all(axis=1)]
    if found.empty:
        raise Stop(f"{path}: no row with a query and a pin of this run")
    found["score"] *= -1
    found = found.sort_values(["query", "score"])
    found = found.drop_duplicates(PAIR)  # a pin that a list names twice counts once
    found["rank"] = found.groupby("query").cumcount()
    return found.loc[found["rank"] < top, [*PAIR, "rank"]]


def people_on(lists, evaluation):
    """People's labels of the lists' pairs: probabilities of 1 [N, C], and which queries have all of their
    pairs labelled [Q]. evaluation: rows that the teacher was not trained on."""
    people = pd.DataFrame({"query": evaluation["query_index"], "pin": evaluation["pin_index"]})
    people["label"] = evaluation["label"]
    label = lists.pairs.merge(people.drop_duplicates(PAIR), how="left", on=PAIR)["label"]
    known = label.notna()
    p = certain(label.fillna(1).astype(int)) * known.to_numpy()[:, None]
    covered = known.groupby(lists.pairs["query"]).all()
    return p, covered.to_numpy()


def strata_of(named, lists):
    """Stratum (a text) and weight of each query [Q]. named: a column of the run's queries, or a table with
    query_id or query, stratum, and perhaps weight; "": one stratum."""
    queries = lists.queries
    stratum, weight = np.full(len(queries), "all", object), np.ones(len(queries))
    if not named:
        return stratum, weight
    if named in queries:
        return queries[named].astype("string").fillna("None").to_numpy(object), weight
    if not Path(named).is_file():
        raise Stop(f"--strata {named}: no column of queries and no file")
    table = read_columns(Path(named), {"stratum": "text", "weight": "number"})
    row = rows_of_queries(table, queries["query_id"], queries["key"])
    known = row >= 0
    stratum[row[known]] = np.array(table["stratum"].to_pylist(), object)[known]
    if "weight" in table.column_names:
        weight[:] = 0
        weight[row[known]] = np.nan_to_num(table["weight"].to_numpy())[known]
    return stratum, weight
