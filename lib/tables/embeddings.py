"""Users' own embeddings: embeddings/NAME.npy and NAME.ids of a dataset, aligned to our rows."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.stages.files import fingerprint, hashed
from lib.stages.streams import MOST_NORM, new_matrix
from lib.stages.terminal import Stop, stop_on_error
from lib.tables.files import is_hidden, regular_file

NAMES = ("query_text", "pin_text", "pin_visual", "pin_graph")  # 01's, if the user has none of this name


def own_embeddings(folder):
    """Names of embeddings/NAME.npy of a dataset, sorted. Stop if one cannot be used."""
    paths = (folder / "embeddings").glob("*.npy")
    names = sorted(path.stem for path in paths if not is_hidden(path.name))
    for name in names:
        source = folder / "embeddings" / f"{name}.npy"
        ids = source.with_suffix(".ids")
        if not name.startswith(("query_", "pin_")):
            raise Stop(f"{source}: the name must begin with query_ or pin_")
        for path in (source, ids):
            what = "NAME.ids holds the id of every row of NAME.npy, one a line"
            with stop_on_error(f"{path}: cannot be read", what):
                regular_file(folder, path.relative_to(folder))
        vectors = open_vectors(source)
        rows = len(vectors)
        size = ids.stat().st_size
        if size > 1_000 * (rows + 1):
            raise Stop(f"{ids}: {size:,} bytes are too many for {rows:,} ids")
        refuse_wild(source, vectors, read_ids(ids, rows))
    return names


def own_fingerprint(folder, name):
    """Hash of an embedding's two files."""
    source = folder / "embeddings" / f"{name}.npy"
    return hashed([fingerprint(source), fingerprint(source.with_suffix(".ids"))])


def open_vectors(path):
    """A user's vectors [rows, D], memory-mapped: no more is taken on a header's word than the file holds."""
    with stop_on_error(f"{path}: no NumPy array"):
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    is_matrix = vectors.ndim == 2 and vectors.size > 0
    if not is_matrix or vectors.dtype not in (np.float16, np.float32):
        found = f"{vectors.dtype} {list(vectors.shape)}"
        raise Stop(f"{path}: must be float16 or float32 [rows, dim], is {found}")
    return vectors


def read_ids(path, rows):
    """The ids of a user's vectors, one a line, as an Arrow column. Stop if they do not fit, or repeat."""
    with stop_on_error(f"{path}: not UTF-8"), open(path, encoding="utf-8-sig") as lines:
        ids = pa.array([line.rstrip("\n") for line in lines], pa.string())
    if len(ids) != rows:
        raise Stop(f"{path}: {len(ids):,} ids for {rows:,} rows of {path.stem}.npy")
    first = pc.index_in(ids, ids)
    repeated = ids.filter(pc.not_equal(first, np.arange(rows)))
    if len(repeated):
        example = repeated[0].as_py()
        raise Stop(f"{path}: {len(repeated):,} ids stand more than once, the first: {example!r}")
    return ids


def refuse_wild(source, vectors, ids):
    """Stop if a vector has NaN, infinity, or a norm that nothing can be computed with."""
    for start in range(0, len(ids), 65_536):
        block = vectors[start : start + 65_536]
        squares = np.einsum("rd,rd->r", block, block, dtype=np.float32)
        bad = np.flatnonzero(~(squares <= MOST_NORM**2))
        if len(bad):
            first = ids[start + int(bad[0])].as_py()
            rows = f"{len(bad):,} rows (of the first {start + len(block):,})"
            problem = f"with NaN, infinity or a norm over {MOST_NORM:g}, the first: {first!r}"
            raise Stop(f"{source}: {rows} {problem}; a vector may be divided by its norm")


def users_embedding(source, ids, target):
    """Aligns the vectors of NAME.npy (`source`) by NAME.ids to `ids`, an Arrow column of our rows: a row
    without a vector gets zeros. Writes `target`; returns how many have none."""
    vectors = open_vectors(source)
    known = read_ids(source.with_suffix(".ids"), len(vectors))
    row = pc.index_in(ids, known).fill_null(-1).to_numpy().astype(np.int64)
    with new_matrix(target, len(ids), vectors.shape[1], vectors.dtype) as out:
        for start in range(0, len(ids), 65_536):
            end = min(start + 65_536, len(ids))
            wanted = row[start:end]
            block = vectors[np.maximum(wanted, 0)]
            block[wanted < 0] = 0
            out[start:end] = block
    return int((row < 0).sum())
