"""Result lists of a run's queries: their N pairs in some list's top, metrics of each list by Q queries."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from common import NUM_LEVELS
from experiments.estimates import GAINS
from lib.inputs.pairs import read_queries
from lib.stages.terminal import Stop
from lib.tables.result_lists import read_columns, read_results, rows_of_queries

PAIR = ["query", "pin"]


class Lists:
    """Result lists of a run's queries. pairs [N]: query and pin of all of them, row numbers of the run's
    tables; places [N]: in each list, from 1; NaN: not in its top; queries [Q]: what `queries` has of those
    with a list, by row number, and their key."""

    def __init__(self, files, run, top):
        features = run / "features"
        self.top = top
        queries = pd.read_parquet(features / "queries.parquet")
        queries["key"], _, queries["language"] = read_queries(features)
        pins = pd.read_parquet(features / "pins.parquet", columns=["pin_id"])
        self.pins = pd.Index(pins["pin_id"])
        tops = {name: read_top(path, queries, self.pins, top) for name, path in files.items()}
        self.places = pd.concat(tops, axis=1).sort_index()
        self.pairs = self.places.index.to_frame(index=False)
        self.queries = queries.loc[self.pairs["query"].unique()]

    def columns(self):
        """Of the pairs: ids of query and pin, and the place in each list."""
        found = {
            "query_id": pa.array(self.queries["query_id"][self.pairs["query"]], pa.string()),
            "pin_id": pa.array(self.pins[self.pairs["pin"]], pa.string()),
        }
        for name, place in self.places.items():
            found[f"rank_{name}"] = pa.array(place.astype("Int32"))
        return found

    def metrics(self, gain, relevant):
        """{list, or "b - a": table of metrics by query [Q]}, NaN for queries that a list does not answer.
        gain, relevant [N]."""
        gain = pd.Series(gain, self.places.index)
        relevant = pd.Series(relevant, self.places.index)
        found = {}
        for name, place in self.places.items():
            found[name] = list_metrics(place, gain, relevant, self.top)
        for a, b in combinations(self.places, 2):
            found[f"{b} - {a}"] = found[b] - found[a]
        return found

    def people(self, evaluation):
        """People's labels of the pairs as probabilities [N, C], of level 1 where they have none, and which
        queries have all of their pairs labelled [Q]. evaluation: rows that the teacher did not learn."""
        pairs = [evaluation["query_index"], evaluation["pin_index"]]
        level = pd.Series(evaluation["label"], pairs).reindex(self.places.index)
        covered = level.notna().groupby(level="query").all()
        return np.eye(NUM_LEVELS)[level.fillna(1).to_numpy(int) - 1], covered.to_numpy()


def list_metrics(place, gain, relevant, top):
    """Metrics of a result list by query: a table of ndcg, sdcg, precision. place [N]: in the list, from 1 to
    `top`, or NaN, of all pairs with a label, by query and pin; gain, relevant [N].

    ndcg: the ideal list is made of the query's pairs (Burges et al., 2005); NaN where none has a gain.
    sdcg: scaled DCG, the ideal list is `top` pins of level 5. precision: share of relevant pins."""
    best = gain.groupby(level="query").rank(method="first", ascending=False)
    ideal = dcg(gain, best.where(best <= top))
    found = pd.DataFrame({"dcg": dcg(gain, place)})
    found["ndcg"] = found["dcg"] / ideal.where(ideal > 0)
    discount = 1 / np.log2(np.arange(top) + 2)
    found["sdcg"] = found["dcg"] / (GAINS[-1] * discount.sum())
    found["precision"] = total(relevant.where(place > 0)) / top
    return found


def dcg(gain, place):
    """Discounted cumulative gain by query of pairs at places from 1; NaN: not in the list."""
    return total(gain / np.log2(place + 1))


def total(values):
    """The sum by query; NaN where none is known."""
    return values.groupby(level="query").sum(min_count=1)


def read_top(path, queries, pins, top):
    """The place, from 1 to `top`, of pairs of query and pin in the lists of a file. queries: a table of the
    run's; pins: its ids. Says in one line what the run does not have."""
    table = read_results(path)
    found = table.select(["pin_id", "score"]).to_pandas()
    found["query"] = rows_of_queries(table, queries["query_id"], queries["key"])
    found["pin"] = pins.get_indexer(found["pin_id"])
    known = (found["query"] >= 0) & (found["pin"] >= 0)
    if not known.all():
        unknown = f"{(~known).sum():,} rows of a query or a pin that the run does not have are left out"
        print(f"{path}: {unknown}, the first: {table.slice(known.argmin(), 1).to_pylist()[0]}")
    if not known.any():
        raise Stop(f"{path}: no row with a query and a pin of this run")
    found = found[known].sort_values("score", ascending=False, kind="stable")
    found = found.drop_duplicates(PAIR)  # a pin that a list names twice counts once
    found["place"] = found.groupby("query").cumcount() + 1
    return found[found["place"] <= top].set_index(PAIR)["place"]


def strata_of(named, queries):
    """Stratum (a text) and weight of each query [Q]. named: a column of the run's queries, or a table with
    query_id or query, stratum, and perhaps weight; "": one stratum."""
    stratum, weight = np.full(len(queries), "all", object), np.ones(len(queries))
    if named in queries:
        stratum = queries[named].astype("string").fillna("None").to_numpy(object)
    elif named:
        path = Path(named)
        if not path.is_file():
            columns = ", ".join(queries)
            raise Stop(f"--strata {named}: no file, and no column of queries, which are {columns}")
        table = read_columns(path, {"stratum": "text", "weight": "number"})
        row = rows_of_queries(table, queries["query_id"], queries["key"])
        table = table.to_pandas().set_axis(row)
        table = table[~table.index.duplicated()].reindex(range(len(queries)))
        if "stratum" in table:
            stratum = table["stratum"].fillna("other").to_numpy(object)
        if "weight" in table:
            weight = table["weight"].fillna(0).to_numpy()
            least = weight.min()
            most = weight.max()
            if least < 0 or not 0 < most < np.inf:
                raise Stop(f"{path}: weights of the lists' queries must be finite, none below 0, some above")
    return stratum, weight
