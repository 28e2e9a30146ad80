"""Rows that do not fit into memory: streams of tables, files of chunks that survive a kill, matrices."""

import contextlib
import itertools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.stages.files import whole_file, write_parquet
from lib.stages.terminal import progress_bar

MOST_NORM = 1e9  # of a vector in a matrix: the product of two squares is within fp32


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
    """What a generator yields, made by a thread up to `depth` items before its use."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(depth))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


def row_groups(path, columns):
    """A Parquet file as tables, one a row group: iter_batches would keep all that it has read."""
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        yield file.read_row_group(group, columns=list(columns))


def write_stream(path, batches):
    """A stream of Arrow batches of one schema -> a Parquet file."""
    first = next(batches := iter(batches))
    with whole_file(path) as file, pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for batch in itertools.chain([first], batches):
            writer.write_batch(batch)


def keep_chunks(folder, chunks, make, total, what, first=0, part=(0, 1)):
    """Columns make(chunk) of every chunk -> folder/part-N.parquet, N counted from `first`: a stream of the
    files. One that is there is kept. total, what: rows and a name, for the progress bar. part: this process,
    of how many."""
    mine, of = part
    with progress_bar(total=total // of, desc=what, unit=" rows", unit_scale=True, disable=mine > 0) as bar:
        for number, chunk in enumerate(chunks, first):
            path = folder / f"part-{number:05d}.parquet"
            if number % of == mine:
                if not path.exists():
                    write_parquet(path, make(chunk))
                bar.update(pq.read_metadata(path).num_rows)
            yield path


@contextlib.contextmanager
def new_matrix(path, rows, dim, dtype=np.float16):
    """Yields a new .npy file [rows, dim], memory-mapped, there under its name when the block ends well.
    Reserved first: a full disk is an error here, later it would be a signal that kills."""
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
