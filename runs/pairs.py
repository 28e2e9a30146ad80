"""Pairs of a query and a pin as training rows: read, held out by query, dealt, shuffled, streamed.

No method of the paper is in this file. Rows are NumPy records with the fields query, pin (row numbers of
queries.parquet and pins.parquet), match [F] (numbers of the pair) and target [C] (probability of each level).
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq

from common import NUM_LEVELS
from data.splits import hash_split, in_hash_split, query_key
from runs.stage import Stop, progress_bar, require_finished

HELD_OUT = {"teacher": 0.05, "human": 0.1}  # share of the queries; at most a tenth of the rows
HELD_OUT_ROWS = 100_000  # of these are scored, about, at most


def require_pairs(run, reads, labels=True, impressions=False):
    """{"features": its stage.json, "labels": its stage.json}, checked; both stay locked as long as it
    lives. impressions: the labels must be those of impressions too."""
    read = {"features": require_finished(run / "features", f"01_build_features.py --run {run}", reads)}
    if labels:
        command = f"03_label.py --run {run}"
        read["labels"] = require_finished(run / "labels", command, reads)
        if read["labels"]["inputs"]["features"] != read["features"]["identity"]:
            raise Stop(f"{run / 'labels'}: of other features than those here; python {command} --overwrite")
        if impressions and read["labels"]["arguments"].get("only_labelled"):
            raise Stop(f"{run / 'labels'}: made with --only-labelled; python {command} --overwrite")
    return read


def read_labelled(run, teacher=True):
    """(train, evaluation) rows of labelled.parquet as dicts of arrays, with the query's `language` and `key`,
    and the teacher's p1 … p5 as `teacher` [B, C]."""
    table = pq.read_table(run / "features" / "labelled.parquet")
    rows = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    rows["label"] = rows["label"].astype(np.int64)
    if teacher:
        rows["teacher"] = read_soft_labels(run / "labels" / "labelled.parquet", len(table)).astype(np.float64)
    queries = pq.read_table(run / "features" / "queries.parquet", columns=["query", "language"])
    rows["language"] = np.array(queries["language"].to_pylist(), dtype=object)[rows["query_index"]]
    keys = [query_key(text) for text in queries["query"].to_pylist()]
    rows["key"] = np.array(keys, dtype=object)[rows["query_index"]]
    splits = []
    for split in ("train", "eval"):
        splits.append({name: column[rows["split"] == split] for name, column in rows.items()})
    return splits


def read_soft_labels(path, n):
    """The teacher's probabilities [n, C] of n pairs."""
    table = pq.read_table(path)
    if len(table) != n:
        raise Stop(f"{path}: {len(table):,} rows of labels for {n:,} pairs; run 03_label.py --overwrite")
    p = np.stack([table[f"p{level}"].to_numpy() for level in range(1, NUM_LEVELS + 1)], axis=1)
    bad = n - np.isfinite(p).all(axis=1).sum()
    if bad:
        raise Stop(f"{path}: {bad:,} rows are no finite numbers; run 03_label.py --overwrite")
    return p


class TrainingRows:
    """Streams training rows. A shard of impressions is read whole, `shuffle_window` shards at a time: memory
    does not grow with their number. The human-labelled rows are few and stay in memory.

    Shards come in random order, human-labelled rows are dealt to the windows, rows are shuffled inside a
    window. Two rows of different windows never meet in a batch; with impressions in log order that costs
    little as long as a window spans many queries."""

    def __init__(self, settings, run):
        self.settings, self.run = settings, run
        queries = pq.read_table(run / "features" / "queries.parquet", columns=["query", "language"])
        languages = queries["language"].to_pylist()
        wanted = set(settings.languages or languages)
        self.is_wanted = np.array([language in wanted for language in languages])
        self.keys = [query_key(text) for text in queries["query"].to_pylist()]
        self.match = pair_columns(run)
        self.row = np.dtype(
            [
                ("query", np.int32),  # row of queries.parquet
                ("pin", np.int32),  # row of pins.parquet
                ("match", np.float32, len(self.match)),
                ("target", np.float32, NUM_LEVELS),  # probability of each level
            ]
        )
        self.shards = []
        if settings.labels == "teacher":
            self.shards = sorted((run / "features" / "impressions").glob("part-*.parquet"))
        self.human = self.read_human()
        self.hold_out()
        self.counts = []  # training rows of each shard; survey() fills it

    def read_pairs(self, path):
        """The rows of a file of pairs, without targets."""
        table = pq.read_table(path)
        rows = np.empty(len(table), self.row)
        rows["query"], rows["pin"] = table["query_index"].to_numpy(), table["pin_index"].to_numpy()
        for column, name in enumerate(self.match):
            rows["match"][:, column] = table[name].to_numpy()
        return rows

    def read_shard(self, shard):
        """The rows of a shard of impressions, in the wanted languages."""
        path = self.shards[shard]
        rows = self.read_pairs(path)
        rows["target"] = read_soft_labels(self.run / "labels" / "impressions" / path.name, len(rows))
        return rows[self.is_wanted[rows["query"]]]

    def read_human(self):
        """The human-labelled training rows with the targets that --human-rows asks for."""
        asked = "human" if self.settings.labels == "human" else self.settings.human_rows
        path = self.run / "features" / "labelled.parquet"
        rows, table = self.read_pairs(path), pq.read_table(path, columns=["label", "split"])
        targets = [np.eye(NUM_LEVELS)[table["label"].to_numpy() - 1]]
        if asked in ("teacher", "half"):
            targets.append(read_soft_labels(self.run / "labels" / "labelled.parquet", len(rows)))
        rows["target"] = targets[-1] if asked == "teacher" else sum(targets) / len(targets)
        used = (table["split"].to_numpy() == "train") & self.is_wanted[rows["query"]]
        return rows[used & (asked != "none")]

    def hold_out(self):
        """Chooses the held-out queries: none of their rows is trained on."""
        counts = np.bincount(self.human["query"], minlength=len(self.keys))
        for path in self.shards:
            query = pq.read_table(path, columns=["query_index"])["query_index"].to_numpy()
            counts += np.bincount(query, minlength=len(self.keys)) * self.is_wanted
        share, salt = HELD_OUT[self.settings.labels], f"student:{self.settings.seed}"
        self.held_out = hash_split(self.keys, counts, share, salt)
        self.is_held_out = in_hash_split(self.keys, **self.held_out)

    def survey(self):
        """One pass: counts the training rows and deals --rows to them. Returns mean and standard deviation
        [F] of the match features, and held-out rows: of every shard at most its share of HELD_OUT_ROWS, for
        logs change over time."""
        held_out, counts = [], []
        is_held_out = self.is_held_out[self.human["query"]]
        if not self.shards:  # else the student is compared with the teacher, on impressions
            held_out.append(self.human[is_held_out])
        self.human = self.human[~is_held_out]
        known, total, squares = moments_of(self.human["match"])
        for shard in progress_bar(iterable=range(len(self.shards)), desc="survey", unit=" shards"):
            rows = self.read_shard(shard)
            is_held_out = self.is_held_out[rows["query"]]
            held_out.append(rows[is_held_out][: math.ceil(HELD_OUT_ROWS / len(self.shards))])
            counts.append(np.count_nonzero(~is_held_out))
            moments = moments_of(rows["match"][~is_held_out])
            known, total, squares = known + moments[0], total + moments[1], squares + moments[2]
        if not sum(counts) + len(self.human):
            wanted = " ".join(["", "for --languages", *self.settings.languages])
            raise Stop(f"no rows to train on in {self.run}" + wanted * bool(self.settings.languages))
        self.deal(counts)
        n = np.maximum(known, 1)
        mean = total / n
        std = np.sqrt(np.maximum(squares / n - mean**2, 0))
        return mean, np.where(std > 1e-6, std, 1.0), np.concatenate(held_out)

    def deal(self, counts):
        """Deals --rows to the shards, which have so many training rows, or to the human-labelled rows."""
        rng, n = np.random.default_rng([self.settings.seed, 1]), self.settings.rows
        if n and self.settings.labels == "human":
            self.human = rng.permutation(self.human)[:n]
        elif n and n < sum(counts):
            counts = rng.multivariate_hypergeometric(counts, n, method="marginals")
        self.counts = [int(count) for count in counts]

    @property
    def total(self):
        """Training rows of an epoch."""
        return sum(self.counts) + len(self.human)

    def training_rows(self, shard):
        """The training rows of a shard, --rows applied: the same in every epoch."""
        rows = self.read_shard(shard)
        rows = rows[~self.is_held_out[rows["query"]]]
        if self.counts[shard] < len(rows):
            chooser = np.random.default_rng([self.settings.seed, 2, shard])
            rows = rows[np.sort(chooser.permutation(len(rows))[: self.counts[shard]])]
        return rows

    def read_window(self, shards, human):
        """The training rows of some shards and some of the human-labelled rows, one after another."""
        window = np.empty(sum(self.counts[shard] for shard in shards) + len(human), self.row)
        window[: len(human)] = self.human[human]
        start = len(human)
        for shard in shards:
            window[start : start + self.counts[shard]] = self.training_rows(shard)
            start += self.counts[shard]
        return window

    def batches(self, epoch, skip=0):
        """One epoch's batches of rows, without the first `skip`."""
        size, step = self.settings.batch_size, self.settings.shuffle_window
        rng = np.random.default_rng([self.settings.seed, 3, epoch])
        order = rng.permutation(len(self.shards))
        windows = [order[start : start + step] for start in range(0, len(order), step)] or [order]
        human = np.array_split(rng.permutation(len(self.human)), len(windows))
        for shards, few in zip(windows, human):
            shuffled = rng.permutation(sum(self.counts[shard] for shard in shards) + len(few))
            first, skip = skip * size, max(skip - math.ceil(len(shuffled) / size), 0)
            if first < len(shuffled):
                window = None  # the one before is not held while this one is read
                window = self.read_window(shards, few)
                for start in range(first, len(shuffled), size):
                    yield window[shuffled[start : start + size]]


def pair_columns(run):
    """Names of the match features and the user's own numbers of a pair."""
    names = pq.read_schema(run / "features" / "labelled.parquet").names
    return [name for name in names if name not in ("query_index", "pin_index", "label", "split")]


def moments_of(match):
    """Match features [N, F] -> [3, F]: how many are known, their sum, their sum of squares."""
    known = np.isfinite(match)
    values = np.where(known, match, 0).astype(np.float64)
    return np.stack([known.sum(0), values.sum(0), (values**2).sum(0)])


def ahead(batches, depth=4):
    """What a generator yields, made by a thread up to `depth` items before its use (while NumPy gathers,
    other threads run)."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, batches, None) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, batches, None))
            yield batch
