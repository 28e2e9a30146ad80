"""Labels that are known: how fast stage 03 looks keys up, in how much memory, on how much disk.

As 03 does for a day: shards of random keys, of which a share is in the table of yesterday, the others new;
each shard is looked up in yesterday's table and in what the day has so far, and kept. No tokens, no teacher.
Rates are by the processor's seconds of one process.

    python benchmarks/known_labels.py --known 3000000
    python benchmarks/known_labels.py --known 30000000
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from lib.inputs.known import FILE, KEY, KnownLabels, merge_own

DECIDED_BY = "00" * 16
SHARD = 250_000  # rows of a shard, as stage 01's preset paper makes them


def keys_of(numbers):
    """The keys [n] of pairs by their number: an integer hash (splitmix64, Steele et al., 2014)."""
    columns = []
    for salt in (1, 2):
        z = (numbers + np.uint64(salt << 40)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        columns.append(z ^ (z >> np.uint64(31)))
    return np.stack(columns, axis=1).view(KEY)[:, 0]


def labels_of(keys):
    """Labels [n, C] that tell a wrong row from the right one."""
    numbers = keys.view(np.uint64).reshape(-1, 2)[:, :1] >> np.uint64(40)
    return numbers.astype(np.float32) * np.arange(1, 6, dtype=np.float32)


def yesterday(folder, pairs):
    """The table of as many pairs, made shard by shard as 03 makes it."""
    known = KnownLabels({}, folder / "parts", DECIDED_BY, set())
    for start in range(0, pairs, SHARD):
        keys = np.unique(keys_of(np.arange(start, min(start + SHARD, pairs), dtype=np.uint64)))
        known.add(f"part-{start // SHARD:05d}", keys, labels_of(keys))
    return merge_own(folder / "parts", folder / FILE)


def today(table, folder, rows, new):
    """Looks `rows` pairs up, of which a share `new` nobody has labelled. Returns how many were found, and the
    processor's seconds of the lookup in yesterday's table alone."""
    known = KnownLabels({"yesterday": table}, folder, DECIDED_BY, set())
    found, seconds = 0, 0.0
    for start in range(0, rows, SHARD):
        numbers = np.arange(start, min(start + SHARD, rows), dtype=np.uint64)
        numbers = numbers * np.uint64(2_654_435_761) % np.uint64(table.rows)  # in another order
        numbers[: int(new * len(numbers))] += np.uint64(1 << 32)
        keys = np.unique(keys_of(numbers))
        begin = time.process_time()
        table.find(keys, np.zeros((len(keys), 5), np.float32))
        seconds += time.process_time() - begin
        labels, source = known.find(keys)
        assert np.array_equal(labels[source == 1], labels_of(keys[source == 1]))
        labels[source < 0] = labels_of(keys[source < 0])
        known.add(f"part-{start // SHARD:05d}", keys, labels)
        found += int((source == 1).sum())
    return found, seconds


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--known", type=int, default=3_000_000, help="pairs of yesterday, and rows of today")
    parser.add_argument("--new", type=float, default=0.01, help="share of today's pairs that are new")
    parser.add_argument("--folder", default=None, help="where to write (default: the system's)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        begin = time.process_time()
        table = yesterday(Path(folder), args.known)
        made = time.process_time() - begin
        size = table.path.stat().st_size
        print(f"table: {table.rows:,} pairs, {size / 1e6:,.0f} MB, made in {made:.1f} s")
        begin = time.process_time()
        found, seconds = today(table, Path(folder) / "today", args.known, args.new)
        whole = time.process_time() - begin - seconds
        print(f"found {found:,} of {args.known:,}: {args.known / seconds:,.0f} lookups/s in the table")
        print(f"a day, with what it has itself and keeps: {args.known / whole:,.0f} rows/s")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(
            f"peak memory {peak:,.0f} MB, of which {8 * args.known / 1e6:,.0f} MB are this script's own list"
        )


if __name__ == "__main__":
    main()
