"""Files of (query, pin) pairs and their labels: 03 writes labels, 04 and 05 read them, 04 streams both. In 04
a row is a NumPy record: query, pin (row numbers of queries.parquet and pins.parquet), match [F] (numbers of
the pair), target [C] (probability of each level)."""

import json
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import NUM_LEVELS
from lib.inputs.match import match_names
from lib.inputs.pool import read_pool
from lib.inputs.regression import stacked
from lib.stages.files import write_parquet
from lib.stages.terminal import Stop, progress_bar
from lib.tables.names import is_spoken
from lib.tables.splits import held_out, query_key

COLUMNS = [f"p{level}" for level in range(1, NUM_LEVELS + 1)]  # of a file of labels
HELD_OUT = {"teacher": 0.05, "human": 0.1}  # share of the queries; at most a tenth of the rows
HELD_OUT_ROWS = 100_000  # of these are scored, about, at most


def write_labels(path, labels, counts):
    """Soft labels [N, C] -> columns p1 … p5. counts: where they are from, {"rows", "passes", "looked_up":
    {run: labels}}. Stop, nothing written, where a label is no number."""
    is_finite = np.isfinite(labels).all(axis=1)
    bad = np.flatnonzero(~is_finite)
    if len(bad):
        rows = f"{len(bad)} rows, {bad[:5].tolist()}…"
        raise Stop(f"{path.name}: no finite labels for {rows}: --precision fp32, or another teacher")
    table = pa.table(dict(zip(COLUMNS, labels.T)))
    write_parquet(path, table.replace_schema_metadata({"counts": json.dumps(counts)}))


def read_labels(path):
    """Soft labels [N, C] of a file."""
    table = pq.read_table(path)
    return np.stack([table[name].to_numpy() for name in COLUMNS], axis=1)


def count_labels(paths):
    """Where the labels of files are from: the sum of their counts (write_labels)."""
    total, looked_up = Counter(), Counter()
    for path in paths:
        counts = json.loads(pq.read_metadata(path).metadata[b"counts"])
        looked_up.update(counts.pop("looked_up"))
        total.update(counts)
    return {**total, "looked_up": dict(looked_up)}


def count_rows(paths):
    """Rows of some shards."""
    return sum(pq.read_metadata(path).num_rows for path in paths)


def read_queries(features):
    """Keys (query_key), tags (BCP 47) and languages, a tag's first part, of all queries: three lists."""
    queries = pq.read_table(features / "queries.parquet", columns=["query", "language"])
    keys = [query_key(text) for text in queries["query"].to_pylist()]
    tags = queries["language"].to_pylist()
    return keys, tags, [tag.split("-")[0] for tag in tags]


def read_labelled(run, labels="labels"):
    """(train, evaluation) rows of labelled.parquet as dicts of arrays, with the query's `language` and `key`,
    and `query`: the first query_index with this key, for a text is one query under however many ids. Of the
    folder RUN/labels, unless None: the teacher's p1 … p5 as `teacher` [B, C], where 03 has pooled them those
    as `pooled`, and what students learn of the two as `learnt`."""
    table = pq.read_table(run / "features" / "labelled.parquet")
    rows = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    rows["label"] = rows["label"].astype(np.int64)
    keys, _, languages = read_queries(run / "features")
    for name, of_queries in (("key", keys), ("language", languages)):
        rows[name] = np.array(of_queries, dtype=object)[rows["query_index"]]
    first = {key: number for number, key in reversed([*enumerate(keys)])}
    rows["query"] = np.array([first[key] for key in rows["key"]])
    if labels:
        p = read_labels(run / labels / "labelled.parquet")
        pool = read_pool(run / labels)
        rows["teacher"] = rows["learnt"] = p.astype(np.float64)
        if pool:
            rows["pooled"] = rows["learnt"] = pool(p, stacked(rows, pool.names), rows["language"])
    splits = []
    for split in ("train", "eval"):
        chosen = rows["split"] == split
        splits.append({name: column[chosen] for name, column in rows.items()})
    return splits


class PairFiles:
    """The pairs of a run as rows, of queries in some languages (none named: all). keys: of all queries
    (query_key); match: names of the match features and the user's own numbers of a pair."""

    def __init__(self, run, languages=()):
        self.run, features = run, run / "features"
        self.keys, tags, languages_of = read_queries(features)
        self.languages = np.array(languages_of, dtype=object)
        wanted = {tag for tag in set(tags) if not languages or is_spoken(tag, languages)}
        self.is_wanted = np.array([tag in wanted for tag in tags])
        self.shards = sorted((features / "impressions").glob("part-*.parquet"))
        self.match = match_names(features / "labelled.parquet")
        self.row = np.dtype(
            [
                ("query", np.int32),
                ("pin", np.int32),
                ("match", np.float32, len(self.match)),
                ("target", np.float32, NUM_LEVELS),
            ]
        )

    def read(self, path):
        """All rows of a file, targets not set."""
        table = pq.read_table(path)
        rows = np.empty(len(table), self.row)
        rows["query"] = table["query_index"].to_numpy()
        rows["pin"] = table["pin_index"].to_numpy()
        for column, name in enumerate(self.match):
            rows["match"][:, column] = table[name].to_numpy()
        return rows

    def impressions(self, path):
        """The wanted rows of a shard; their targets are soft labels."""
        rows = self.read(path)
        rows["target"] = self.soft_labels(f"impressions/{path.name}", rows)
        return rows[self.is_wanted[rows["query"]]]

    def soft_labels(self, name, rows):
        """What is learnt of the rows of a file: the teacher's labels [N, C], pooled where 03 says so."""
        folder = self.run / "labels"
        p = read_labels(folder / name)
        pool = read_pool(folder)
        if not pool:
            return p
        columns = [self.match.index(feature) for feature in pool.names]
        return pool(p, rows["match"][:, columns], self.languages[rows["query"]])

    def sample(self, labels, most=200_000):
        """The teacher's own labels [N, C] in 03's folder `labels`, match features [N, F] and languages [N] of
        about so many impressions at most, evenly spaced; where 03 has labelled none, of the human-labelled
        pairs."""
        names = [f"impressions/{path.name}" for path in self.shards]
        names = [name for name in names if (labels / name).exists()] or ["labelled.parquet"]
        step = math.ceil(count_rows(labels / name for name in names) / most)
        parts = []
        for name in names:
            rows = self.read(self.run / "features" / name)[::step]
            parts.append((read_labels(labels / name)[::step], rows["match"], self.languages[rows["query"]]))
        return [np.concatenate(part) for part in zip(*parts)]

    def labelled(self):
        """The human-labelled rows, targets not set; their levels [N]; which are wanted for training [N]."""
        path = self.run / "features" / "labelled.parquet"
        rows = self.read(path)
        table = pq.read_table(path, columns=["label", "split"])
        is_train = table["split"].to_numpy() == "train"
        is_train &= self.is_wanted[rows["query"]]
        return rows, table["label"].to_numpy(), is_train

    def count(self, path):
        """Wanted rows of each query [Q] in a shard."""
        table = pq.read_table(path, columns=["query_index"])
        query = table["query_index"].to_numpy()
        counts = np.bincount(query, minlength=len(self.keys))
        return counts * self.is_wanted


# ------------------------------------------------------------------------------------------------------------
# The student's training rows


class TrainingRows:
    """Streams training rows, `shuffle_window` shards of impressions in memory at a time. Shards come in
    random order, human-labelled rows, which are few, are dealt to the windows, rows are shuffled inside a
    window: with impressions in log order that costs little as long as a window spans many queries."""

    def __init__(self, files, human, settings):
        """files: PairFiles; human: the human-labelled rows to train on, alone with --labels human."""
        self.files, self.human, self.settings = files, human, settings
        self.shards = files.shards if settings.labels == "teacher" else []
        counts = np.bincount(human["query"], minlength=len(files.keys))
        counts += sum(map(files.count, self.shards))
        share, salt = HELD_OUT[settings.labels], f"student:{settings.seed}"
        # [Q]: no row of these is trained on
        self.is_held_out, self.held_out = held_out(files.keys, share, salt, counts)
        self.counts = []  # training rows of each shard; survey() fills it

    def survey(self):
        """Counts the training rows and deals --rows to them. Returns moments_of() the match features of all
        of them, whatever --rows, for these need no label; and held-out rows: of every shard at most its share
        of HELD_OUT_ROWS, for logs change."""
        self.human, watched = self.parted(self.human)
        held_out = [] if self.shards else [watched]  # the teacher's labels are of impressions
        counts, found = [], [statistics_of(self.human["match"])]
        for path in progress_bar(iterable=self.shards, desc="survey", unit=" shards"):
            rows, watched = self.parted(self.files.impressions(path))
            share = math.ceil(HELD_OUT_ROWS / len(self.shards))
            held_out.append(watched[:share])
            counts.append(len(rows))
            found.append(statistics_of(rows["match"]))
        if not sum(counts) + len(self.human):
            asked = " ".join(self.settings.languages)
            raise Stop(f"no rows to train on in {self.files.run}" + f", --languages {asked}" * bool(asked))
        self.deal(counts)
        return moments_of(np.stack(found)), np.concatenate(held_out)

    def parted(self, rows):
        """Rows -> those to train on, and those held out."""
        is_held_out = self.is_held_out[rows["query"]]
        return rows[~is_held_out], rows[is_held_out]

    def count_queries(self, rows):
        """Of how many queries rows are: a text is one, under however many ids it stands."""
        return len({self.files.keys[query] for query in np.unique(rows["query"])})

    def deal(self, counts):
        """Deals --rows to the shards, which have so many training rows, or to the human-labelled rows."""
        rng, n = np.random.default_rng([self.settings.seed, 1]), self.settings.rows
        if n and self.settings.labels == "human":
            self.human = rng.permutation(self.human)[:n]
        elif n and n < sum(counts):
            counts = rng.multivariate_hypergeometric(counts, n, method="marginals")
        self.counts = list(map(int, counts))

    @property
    def total(self):
        """Training rows of an epoch."""
        return sum(self.counts) + len(self.human)

    def training_rows(self, shard):
        """The training rows of a shard, --rows applied: the same in every epoch."""
        rows, _ = self.parted(self.files.impressions(self.shards[shard]))
        if self.counts[shard] < len(rows):
            chooser = np.random.default_rng([self.settings.seed, 2, shard])
            chosen = chooser.permutation(len(rows))[: self.counts[shard]]
            rows = rows[np.sort(chosen)]
        return rows

    def read_window(self, shards, human):
        """Some of the human-labelled rows and the training rows of some shards, one after another."""
        return np.concatenate([self.human[human], *map(self.training_rows, shards)])

    def batches(self, epoch, skip=0):
        """One epoch's batches of rows, without the first `skip`."""
        size, step = self.settings.batch_size, self.settings.shuffle_window
        rng = np.random.default_rng([self.settings.seed, 3, epoch])
        order = rng.permutation(len(self.shards))
        starts = range(0, max(len(order), 1), step)
        windows = [order[start : start + step] for start in starts]
        human = np.array_split(rng.permutation(len(self.human)), len(windows))
        for shards, few in zip(windows, human):
            rows = sum(self.counts[shard] for shard in shards) + len(few)
            shuffled = rng.permutation(rows)
            in_window = math.ceil(len(shuffled) / size)
            if skip >= in_window:
                skip -= in_window
                continue
            window = None  # the one before is not held while this one is read
            window = self.read_window(shards, few)
            for start in range(skip * size, len(shuffled), size):
                yield window[shuffled[start : start + size]]
            skip = 0


def statistics_of(match):
    """Match features [N, F] -> [5, F]: how many are known, sum, sum of squares, least, greatest times -1."""
    known = np.isfinite(match)
    values = np.where(known, match, 0).astype(np.float64)
    squares = values**2
    least = np.where(known, match, np.inf).min(axis=0, initial=np.inf)
    greatest = np.where(known, -match, np.inf).min(axis=0, initial=np.inf)
    return np.stack([known.sum(0), values.sum(0), squares.sum(0), least, greatest])


def moments_of(statistics):
    """statistics_of() all parts [S, 5, F] -> {"mean", "std", "low", "high": [F]}; a deviation of 0 is 1."""
    known, total, squares = statistics[:, :3].sum(axis=0)
    low, high = statistics[:, 3:].min(axis=0)
    n = np.maximum(known, 1)
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    moments = {"mean": mean, "std": np.where(std > 1e-6, std, 1.0)}
    moments["low"] = np.where(known, low, mean)
    moments["high"] = np.where(known, -high, mean)
    return moments
