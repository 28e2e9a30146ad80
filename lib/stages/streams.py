"""Rows that do not fit into memory: streams of tables, files of chunks that survive a kill, matrices."""

import contextlib
import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.stages.files import whole_file, write_parquet
from lib.stages.terminal import progress_bar


def slices(tables, rows):
    """A stream of tables (or batches) -> tables of `rows` rows each, the last one what is left."""
    waiting = None
    for table in tables:
        table = pa.table(table)
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        while len(waiting) >= rows:
            yield waiting.slice(0, rows)
            waiting = waiting.slice(rows)
    if waiting is not None and len(waiting):
        yield waiting


def ahead(items, depth):
    """What a generator yields, made by a thread up to `depth` items before its use: while that computes, the
    libraries of the one or the other let Python run."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


def chosen(lists, choice, size):
    """Those elements of a stream of lists that `choice` [N] says, in lists of `size`."""
    start, waiting = 0, []
    for some in lists:
        waiting += itertools.compress(some, choice[start : start + len(some)])
        start += len(some)
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting


def row_groups(path, columns):
    """A Parquet file as tables, one a row group: iter_batches would keep all that it has read."""
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        yield file.read_row_group(group, columns=list(columns))


def write_stream(path, batches):
    """A stream of Arrow batches of one schema -> a Parquet file."""
    with whole_file(path) as temporary, contextlib.ExitStack() as stack:
        writer = None
        for batch in batches:
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(temporary, batch.schema, compression="zstd"))
            writer.write_batch(batch)


def keep_chunks(folder, chunks, make, total, what, first=0, part=(0, 1)):
    """Columns make(chunk) of every chunk -> folder/part-N.parquet, N counted from `first`: a stream of the
    files. One that is there is kept: killed, the same command goes on after the last file. total, what:
    number of rows and a name, for the progress bar. part: this process, of how many."""
    mine, of = part
    with progress_bar(total=total // of, desc=what, unit=" rows", unit_scale=True, disable=mine > 0) as bar:
        for number, chunk in enumerate(chunks, first):
            path = folder / f"part-{number:05d}.parquet"
            if number % of == mine:
                if not path.exists():
                    write_parquet(path, make(chunk))
                bar.update(pq.read_metadata(path).num_rows)
            yield path


def kept_column(folder, name):
    """A column of all files of keep_chunks, one chunk a file (Arrow); None if there is no file."""
    parts = sorted(folder.glob("part-*.parquet"))
    columns = [pq.read_table(part, columns=[name])[name].combine_chunks() for part in parts]
    return pa.chunked_array(columns) if columns else None


def without_kept(table, folder, name):
    """Rows of a table whose key, its column `name`, no file of keep_chunks has; each key once, no null."""
    keys = pc.unique(table[name]).drop_null()
    kept = kept_column(folder, name)
    if kept is not None:
        keys = keys.filter(pc.invert(pc.is_in(keys, kept)))
    return table.take(pc.index_in(keys, table[name]))


def kept_rows(keys, folder, name):
    """For every file of keep_chunks: positions in `keys` whose rows it holds, and these rows as a table. Keys
    stand in the files' column `name`."""
    kept, start = kept_column(folder, name), 0
    place = pc.index_in(keys, kept).fill_null(-1).to_numpy()
    for part, some in zip(sorted(folder.glob("part-*.parquet")), kept.chunks):
        positions = np.flatnonzero((place >= start) & (place < start + len(some)))
        yield positions, pq.read_table(part).take(place[positions] - start)
        start += len(some)


@contextlib.contextmanager
def new_matrix(path, rows, dim, dtype=np.float16):
    """Yields a new .npy file [rows, dim], memory-mapped; it is there under its name when the block ends well.
    Its size is reserved first: a full disk is an error here, later it would be a signal that kills."""
    with whole_file(path) as temporary:
        matrix = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=(rows, dim))
        if hasattr(os, "posix_fallocate"):
            with open(temporary, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
        yield matrix
        matrix.flush()


def vector_column(matrix):
    """Matrix [B, D] -> an Arrow column of B lists of D values."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])


def matrix_of(column):
    """The other way."""
    values = column.combine_chunks()
    return values.flatten().to_numpy().reshape(len(values), values.type.list_size)
