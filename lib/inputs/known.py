"""Labels that are known: a pair is labelled once, on whatever day, in whatever place of whatever file. A
label's key is what decides it: teacher, template, precision, token ids. A table of labels is an Arrow file of
rows sorted by key, read a batch at a time: memory does not grow with what is known."""

import hashlib
import math
import os

import numpy as np
import pyarrow as pa

from common import NUM_LEVELS
from lib.inputs.base import bases_of
from lib.inputs.inherited import require
from lib.stages.files import whole_file
from lib.stages.finished import check_files, read_about
from lib.stages.streams import slices, vector_column
from lib.stages.terminal import Stop

BATCH = 1 << 20  # rows of a table that are in memory at once, 36 MB
FILE = "known.arrow"  # of RUN/labels
KEY = "S16"  # NumPy's type of a key; compared byte by byte
DECIDED_BY = b"label decided by"  # in a table's metadata


def label_keys(rows, decided_by):
    """Keys [N] of rows of token ids (arrays [T] int32). decided_by: hash, in hex, of what else decides."""
    person = bytes.fromhex(decided_by)
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16, person=person).digest() for row in rows]
    return np.frombuffer(b"".join(digests), KEY)


def batch_of(keys, labels):
    """Keys [n] and labels [n, C] -> an Arrow batch of a table."""
    buffers = [None, pa.py_buffer(keys)]
    keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), buffers)
    return pa.record_batch([keys, vector_column(np.ascontiguousarray(labels))], ["key", "label"])


def write_table(path, batches, decided_by):
    """A stream of batches in the order of their keys -> a table. The same rows give the same bytes."""
    with whole_file(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        schema = batch_of(np.empty(0, KEY), np.empty((0, NUM_LEVELS), np.float32)).schema
        with pa.ipc.new_file(file, schema.with_metadata({DECIDED_BY: decided_by})) as writer:
            for rows in slices(batches, BATCH):
                writer.write_batch(rows.combine_chunks().to_batches()[0])
    return LabelTable(path)


class LabelTable:
    """Labels [rows, C] by key, in a file. firsts: the first key of each batch."""

    def __init__(self, path):
        self.path = path
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            self.decided_by = reader.schema.metadata.get(DECIDED_BY, b"").decode()
            self.firsts = np.array([batch["key"][0].as_py() for batch in batches], KEY)
            self.rows = sum(map(len, batches))

    def read(self, number):
        """A batch: keys [n], labels [n, C]. Mapped, not read: its pages leave memory with it."""
        with pa.memory_map(str(self.path)) as file:
            batch = pa.ipc.open_file(file).get_batch(number)
        labels = batch["label"].flatten().to_numpy().reshape(-1, NUM_LEVELS)
        return np.frombuffer(batch["key"].buffers()[1], KEY, len(labels)), labels

    def find(self, keys, labels):
        """Looks n sorted keys up. Fills in `labels` [n, C] those that are here; returns which these are
        [n]."""
        found = np.zeros(len(keys), bool)
        ends = [*np.searchsorted(keys, self.firsts[1:]), len(keys)]
        for number, start, end in zip(range(len(self.firsts)), [0, *ends], ends):
            if start < end:
                known, of_known = self.read(number)
                wanted = keys[start:end]
                place = np.searchsorted(known, wanted).clip(max=len(known) - 1)
                hit = np.flatnonzero(known[place] == wanted)
                labels[start + hit] = of_known[place[hit]]
                found[start + hit] = True
        return found

    def between(self, low, high):
        """Copies of the keys from `low` to below `high`, and of their labels, in parts."""
        first, end = np.searchsorted(self.firsts, low, "right") - 1, np.searchsorted(self.firsts, high)
        for number in range(max(first, 0), end):
            known, of_known = self.read(number)
            rows = slice(*np.searchsorted(known, np.array([low, high], KEY)))
            yield known[rows].copy(), of_known[rows].copy()


def merge(tables, path):
    """Tables -> one at `path`; of a key that stands in several of them the label of the first counts."""
    parts = math.ceil(sum(table.rows for table in tables) / BATCH) or 1
    last = 2**128 - 1
    bounds = [(last * part // parts).to_bytes(16, "big") for part in range(parts + 1)]

    def batches():
        for low, high in zip(bounds, bounds[1:]):
            found = [part for table in tables for part in table.between(low, high)]
            if found:
                keys, labels = map(np.concatenate, zip(*found))
                keys, rows = np.unique(keys, return_index=True)
                yield batch_of(keys, labels[rows])

    return write_table(path, batches(), tables[0].decided_by)


class KnownLabels:
    """What a process looks labels up in: the tables of earlier runs, {name: LabelTable}, and those of this
    run in the folder `own`: of each shard one, of what a process has labelled or found for it."""

    def __init__(self, earlier, own, decided_by, unwritten):
        """unwritten: names of shards without labels, of which a killed process may have left the table. Of
        the others all labels are here if they are `covered`: a damaged table is gone."""
        self.earlier, self.own, self.decided_by = earlier, own, decided_by
        self.covered = {path.stem for path in own.glob("*.arrow")} - unwritten
        self.tables = []
        for shard in sorted(self.covered):
            self.look_in(LabelTable(own / f"{shard}.arrow"))

    def find(self, keys):
        """Looks n sorted keys up. Returns labels [n, C], and whence [n]: 0, this run; i, the i-th earlier;
        -1: new."""
        labels = np.zeros((len(keys), NUM_LEVELS), np.float32)
        source = np.full(len(keys), -1, np.int32)
        tables = [(0, table) for table in self.tables]
        for number, table in [*tables, *enumerate(self.earlier.values(), 1)]:
            missing = np.flatnonzero(source < 0)
            some = labels[missing]
            found = table.find(keys[missing], some)
            labels[missing], source[missing[found]] = some, number
        return labels, source

    def add(self, shard, keys, labels):
        """Keeps n sorted keys and their labels, under the name of a shard that is going to be written."""
        batches = [batch_of(keys, labels)] if len(keys) else []
        self.look_in(write_table(self.own / f"{shard}.arrow", batches, self.decided_by))

    def look_in(self, table):
        """Joins tables of about one size: those to look through grow as the logarithm of the shards."""
        while self.tables and self.tables[-1].rows <= 2 * table.rows:
            pair = [self.tables.pop(), table]
            merged = self.own / f"merged{os.environ.get('RANK', '0')}"  # each process has its own
            table = merge(pair, merged / table.path.name)
            for joined in pair:
                if joined.path.parent != self.own and joined.path != table.path:
                    joined.path.unlink()
        self.tables.append(table)


def merge_own(own, path):
    """The tables of all processes of a run, in its folder `own` -> one at `path`."""
    return merge([LabelTable(table) for table in sorted(own.glob("*.arrow"))], path)


def tables_of(runs, run, decided_by, say=print):
    """{run: its LabelTable} of earlier runs whose labels are decided by the same; say(line) about the others.
    runs: None: RUN itself, whose labels --overwrite replaces, and those that RUN builds on. Also locks on
    them."""
    tables, locks = {}, []
    if runs is None:
        runs = bases_of(run)
        if runs and not runs[0].exists():
            raise Stop(f"{runs[0]}: missing, {run} builds on it; --known says where labels are")
        runs = [run, *runs] if (run / "labels").exists() else runs
    for earlier in runs:
        folder = earlier / "labels"
        try:
            if earlier.resolve() == run.resolve():  # locked already, by this process
                check_files(folder, about := read_about(folder), [FILE])
            else:
                about = require(folder, [FILE])
            table = LabelTable(folder / FILE) if FILE in about["outputs"] else None
            if not table or table.decided_by != decided_by:
                raise Stop(f"{folder}: of another teacher, template, precision or version of stage 03")
            tables[str(earlier)] = table
            locks.append(about)
        except Stop as why:
            say(f"not looked up: {why}")
    return tables, locks
