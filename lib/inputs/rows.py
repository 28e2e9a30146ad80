"""Rows of token ids for the teacher: read and tokenized, compared, dealt out to steps, processes and forward
passes. With any forward passes of the same rows a step has the same gradients but for dropout, which each
pass draws for itself.
"""

import functools
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from common import pad_rows
from lib.stages.streams import row_groups
from lib.tables.splits import held_out, query_key


class LabelledRows:
    """The human-labelled training rows, in an order of their content. ids: token ids, N arrays [T]; levels
    [N], 0 for level 1; `train`, `held_out`: row numbers; train_queries, held_out_queries: how many they are
    of; match: {feature: [N]}, what needs no training."""

    def __init__(self, features, text, settings):
        table = pq.read_table(features / "labelled.parquet", filters=[("split", "=", "train")])
        queries = pq.read_table(features / "queries.parquet", columns=["query"])["query"]
        self.queries = queries.to_pylist()  # of all rows and impressions
        ids = token_ids_of(features, text, queries, table)
        keys = [query_key(self.queries[query]) for query in table["query_index"].to_numpy()]
        order = content_order(ids, table["label"].to_numpy(), keys)
        table = table.take(order)
        self.ids = [ids[row] for row in order]
        self.lengths = np.array([len(row) for row in self.ids])
        labels = table["label"].to_numpy().astype(np.int64)
        self.levels = torch.from_numpy(labels - 1)
        self.pad_id = text.tokenizer.pad_token_id
        keys = np.array(keys, object)[order]
        self.train, self.held_out, self.split = split_rows(keys, settings)
        self.train_queries = len(set(keys[self.train]))
        self.held_out_queries = len(set(keys[self.held_out]))
        self.match = {name: table[name].to_numpy() for name in ("bm25", "text_cosine")}

    def batch(self, rows, device):
        """Row numbers [B] -> token ids [B, T], attention mask [B, T], levels [B]."""
        ids, mask = pad_rows([self.ids[row] for row in rows], self.pad_id)
        return [column.to(device, non_blocking=True) for column in (ids, mask, self.levels[rows])]


def split_rows(keys, settings):
    """Row numbers to train on, those held out (of a tenth of the queries), and the split (of in_hash_split).
    keys [N]: of the rows' queries (query_key)."""
    is_held_out, split = held_out(keys, 0.1, f"teacher:{settings.seed}", np.ones(len(keys)))
    train = np.flatnonzero(~is_held_out)
    if settings.rows:
        shuffled = np.random.default_rng(settings.seed).permutation(train)
        train = np.sort(shuffled[: settings.rows])
    return train, np.flatnonzero(is_held_out), split


def tokenize_pairs(text, query_texts, read_pins, query_index, pin_index):
    """Token ids of pairs [B] (int32 arrays); each query and each pin is tokenized once. query_texts: Arrow
    column of all queries; read_pins(pin numbers, sorted) -> {field: list of texts}."""
    queries, which_query = np.unique(query_index, return_inverse=True)
    pins, which_pin = np.unique(pin_index, return_inverse=True)
    query_ids = text.queries(query_texts.take(queries).to_pylist())
    pin_ids = text.pins(read_pins(pins))
    pairs = zip(which_query, which_pin)
    return [text.pair(query_ids[query], pin_ids[pin]) for query, pin in pairs]


def token_ids_of(features, text, queries, pairs):
    """Token ids of pairs (Arrow), N arrays [T]. queries: Arrow column of all queries."""
    read_pins = functools.partial(read_fields, features / "pins.parquet", text.fields)
    indices = (pairs[name].to_numpy() for name in ("query_index", "pin_index"))
    return tokenize_pairs(text, queries, read_pins, *indices)


def tokenized_shards(features, text, paths, made=()):
    """Yields (path, token ids: N arrays [T]) of shards of pairs; those in `made` {path: token ids} are
    there."""
    queries = pq.read_table(features / "queries.parquet", columns=["query"])["query"]
    for path in paths:
        if path in made:
            yield path, made[path]
        else:
            pairs = pq.read_table(path, columns=["query_index", "pin_index"])
            yield path, token_ids_of(features, text, queries, pairs)


def read_fields(path, fields, pins):
    """Text columns of pins (sorted row numbers) of pins.parquet, one row group in memory at a time."""
    found, start = [], 0
    for table in row_groups(path, fields):
        inside = (pins >= start) & (pins < start + len(table))
        found.append(table.take(pins[inside] - start))
        start += len(table)
    return pa.concat_tables(found).to_pydict()


def content_order(rows, *columns):
    """The order of N rows of token ids and columns [N] by what they are, wherever they stand in a table."""
    tokens = [row.tobytes() for row in rows]
    content = list(zip(tokens, *columns))
    return sorted(range(len(content)), key=content.__getitem__)


def hash_rows(rows, *columns):
    """Hash of rows of token ids (N arrays [T]) in their order, and of further columns [N]."""
    lengths = np.array([len(row) for row in rows], np.int64)
    digest = hashlib.blake2b(lengths.tobytes(), digest_size=16)
    for row in rows:
        digest.update(row.tobytes())
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def epoch_batches(lengths, batch_size, seed, epoch, pool=16):
    """One epoch's batches of row numbers: shuffled, then sorted by length inside pools of `pool` batches, so
    that a batch has little padding, then the batches shuffled; by seed and epoch alone."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), pool * batch_size):
        block = order[start : start + pool * batch_size]
        block = block[np.argsort(lengths[block], kind="stable")]
        for first in range(0, len(block), batch_size):
            batches.append(block[first : first + batch_size])
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(batch, lengths, token_budget, rank, world):
    """This process's part of a batch, cut into forward passes of at most `token_budget` padded tokens; as
    many passes on every process, so that gradients are exchanged in step. A pass may be empty."""
    parts = [batch[r::world] for r in range(world)]

    def fits(rows):
        return len(rows) <= 1 or len(rows) * lengths[rows].max() <= token_budget

    passes = 1
    while not all(fits(rows) for part in parts for rows in np.array_split(part, passes)):
        passes += 1
    return np.array_split(parts[rank], passes)
