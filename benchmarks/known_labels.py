"""Labels that are known: how fast stage 03 looks keys up, in how much memory, on how much disk.

As 03 does for a day: shards of random keys, of which 1 % are new, the others in the table of yesterday; each
shard is looked up in yesterday's table and in what the day has so far, and kept. No tokens, no teacher. Rates
are by the processor's seconds of one process.

    python benchmarks/known_labels.py --known 3000000
    python benchmarks/known_labels.py --known 30000000
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.inputs.known import FILE, KEY, KnownLabels, merge_own  # noqa: E402

DECIDED_BY = "00" * 16
SHARD = 250_000  # rows of a shard, as stage 01's preset paper makes them
NEW = 0.01  # share of today's pairs


def keys_of(day, start, rows):
    """The keys [n] of a shard of a day, sorted: random ones, the same at every call."""
    drawn = np.random.default_rng([day, start]).bytes(16 * rows)
    return np.unique(np.frombuffer(drawn, KEY))


def labels_of(keys):
    """Labels [n, C] that tell a wrong row from the right one."""
    first_byte = keys.view(np.uint8).reshape(-1, 16)[:, :1]
    return first_byte * np.arange(1, 6, dtype=np.float32)


def shards(pairs):
    """(name, first row, rows) of each shard."""
    for number, start in enumerate(range(0, pairs, SHARD)):
        yield f"part-{number:05d}", start, min(SHARD, pairs - start)


def yesterday(folder, pairs):
    """The table of as many pairs, made shard by shard as 03 makes it."""
    known = KnownLabels({}, folder / "parts", DECIDED_BY, set())
    for name, start, rows in shards(pairs):
        keys = keys_of(0, start, rows)
        known.add(name, keys, labels_of(keys))
    return merge_own(folder / "parts", folder / FILE)


def today(table, folder, pairs):
    """Looks a day's pairs up. Returns how many yesterday had, and the processor's seconds of the lookup in
    its table alone, and of all but that."""
    known = KnownLabels({"yesterday": table}, folder, DECIDED_BY, set())
    found, alone, whole = 0, 0.0, 0.0
    for name, start, rows in shards(pairs):
        old, new = keys_of(0, start, rows), keys_of(1, start, int(NEW * rows))
        keys = np.unique(np.concatenate([old[len(new) :], new]))
        begin = time.process_time()
        table.find(keys, np.zeros((len(keys), 5), np.float32))
        alone += time.process_time() - begin
        begin = time.process_time()
        labels, source = known.find(keys)
        is_old = source == 1
        labels[~is_old] = labels_of(keys[~is_old])
        known.add(name, keys, labels)
        whole += time.process_time() - begin
        assert np.array_equal(labels, labels_of(keys))
        found += int(is_old.sum())
    return found, alone, whole


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--known", type=int, default=3_000_000, help="pairs of yesterday, and of today")
    pairs = parser.parse_args(argv).known
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        table = yesterday(Path(folder), pairs)
        made = time.process_time() - begin
        size = table.path.stat().st_size / 1e6
        print(f"table: {table.rows:,} pairs, {size:,.0f} MB, made in {made:.1f} s")
        found, alone, whole = today(table, Path(folder) / "today", pairs)
    print(f"found {found:,} of {pairs:,}: {pairs / alone:,.0f} lookups/s in the table")
    print(f"a day, with what it has itself and keeps: {pairs / whole:,.0f} rows/s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"peak memory {peak:,.0f} MB")


if __name__ == "__main__":
    main()
