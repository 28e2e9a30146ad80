"""Shards of (query, pin) pairs: read, tokenized ahead of the model, their labels written, kept and read.

No method of the paper is in this file.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common import NUM_LEVELS, tokenize_pairs
from runs.batches import hash_rows
from runs.files import fingerprint, read_json, write_parquet
from runs.models import quiet_libraries
from runs.stage import Stop


class PairShards(IterableDataset):
    """Yields (path, token ids: N arrays [T]) of shards of (query, pin) pairs. Of several workers each one
    takes its share of the shards."""

    def __init__(self, features, text, paths):
        self.features, self.text, self.paths = features, text, paths

    def __iter__(self):
        worker = get_worker_info()
        if worker is not None:
            quiet_libraries()
        queries = pq.read_table(self.features / "queries.parquet", columns=["query"])["query"]
        for path in self.paths if worker is None else self.paths[worker.id :: worker.num_workers]:
            pairs = pq.read_table(path, columns=["query_index", "pin_index"])
            query_index, pin_index = pairs["query_index"].to_numpy(), pairs["pin_index"].to_numpy()
            try:
                yield path, tokenize_pairs(self.text, queries, self.read_pins, query_index, pin_index)
            except Stop as error:  # a worker's exception would come with its traceback
                yield path, error

    def read_pins(self, pins):
        """Text columns of pins (sorted row numbers), one row group in memory at a time."""
        columns = {name: [] for name in self.text.fields}
        file, start = pq.ParquetFile(self.features / "pins.parquet", memory_map=True), 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            inside = pins[(pins >= start) & (pins < end)] - start
            if len(inside):
                table = file.read_row_group(group, columns=list(columns)).take(inside)
                for name, values in columns.items():
                    values += table[name].to_pylist()
            start = end
        return columns


def tokenized(shards, workers):
    """What the shards yield, in their order, made ahead of its use by `workers` processes."""
    workers = min(workers, len(shards.paths))
    context = "spawn" if workers else None
    options = {"batch_size": None, "collate_fn": as_it_is}
    for path, rows in DataLoader(shards, num_workers=workers, multiprocessing_context=context, **options):
        if isinstance(rows, Stop):
            raise rows
        yield path, rows


def as_it_is(shard):
    """Keeps DataLoader from turning arrays into tensors."""
    return shard


def write_labels(path, labels, key):
    """Soft labels [N, C] -> columns p1 … p5. key: teacher and rows that they are of. Stop where a label is no
    probability: nothing is written."""
    bad = np.flatnonzero(~np.isfinite(labels).all(axis=1))
    if len(bad):
        advice = "--precision fp32, or another teacher"
        raise Stop(f"{path.name}: no finite labels for {len(bad)} rows, {bad[:5].tolist()}…: {advice}")
    columns = {f"p{level}": labels[:, level - 1] for level in range(1, NUM_LEVELS + 1)}
    write_parquet(path, pa.table(columns).replace_schema_metadata(key))


def read_labels(path):
    """Soft labels [N, C] of a shard."""
    return np.stack([column.to_numpy() for column in pq.read_table(path).columns], axis=1)


class KeptLabels:
    """Labels of an earlier run of stage 03, by teacher and token ids: a pair is labelled once. folder: whole
    or absent; a file that is not what its stage wrote is not used."""

    def __init__(self, folder, teacher, use=True):
        self.teacher, self.found = teacher, {}
        outputs = read_json(folder / "stage.json")["outputs"] if use and folder.exists() else {}
        for name, file in outputs.items():
            if name.endswith(".parquet") and fingerprint(folder / name) == file["hash"]:
                kept = pq.read_metadata(folder / name)
                if (kept.metadata or {}).get(b"teacher") == teacher.encode():
                    self.found[kept.num_rows, kept.metadata[b"rows"].decode()] = folder / name

    def of_first(self, rows):
        """Labels [n, C] of the first n rows of token ids, n as large as was kept."""
        for size in sorted({size for size, _ in self.found if size <= len(rows)}, reverse=True):
            path = self.found.get((size, hash_rows(rows[:size])))
            if path is not None:
                return read_labels(path)
        return np.empty((0, NUM_LEVELS), np.float32)


def mean_label(paths):
    """Mean [C] of the label shards' rows."""
    total, rows = np.zeros(NUM_LEVELS), 0
    for path in paths:
        labels = read_labels(path)
        total += labels.sum(0, dtype=np.float64)
        rows += len(labels)
    return total / rows


def count_rows(paths):
    """Rows of some shards."""
    return sum(pq.read_metadata(path).num_rows for path in paths)
