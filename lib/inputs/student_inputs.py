"""What the student is given for a pair: its query's and its pin's row of the features, gathered by index."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.inputs.match import match_names
from lib.levels import FIELDS, side_of
from lib.stages.terminal import Stop

OUR_COLUMNS = {"query": ("query_id", "query", "language"), "pin": ("pin_id", "image", *FIELDS)}
TABLES = {"query": "queries.parquet", "pin": "pins.parquet"}


class StudentInputs:
    """Gathers the student's inputs by query and pin index. Embeddings stay memory-mapped, stored once a
    query and once a pin: pairs are never widened on disk."""

    def __init__(self, features, spec=None, max_values=1_000):
        """spec: a trained student's inputs and the values of its categories, used whatever else is there; a
        column that is not there is unknown. Without it all columns, and their most frequent values."""
        features, columns = Path(features), {}
        self.embeddings, self.resident = {}, {}
        self.categories, self.codes = {}, {}  # column -> its values, the number of each row's value
        self.numbers, self.values = {}, {}  # column -> [mean, std, low, high], each row's value
        for path in sorted(features.glob("*_embedding.npy")):
            name = path.name.removesuffix("_embedding.npy")
            if spec is None or name in spec["embeddings"]:
                self.embeddings[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        self.dims = {name: array.shape[1] for name, array in self.embeddings.items()}
        if spec is not None and self.dims != spec["embeddings"]:
            trained = f"the student was trained on the embeddings {spec['embeddings']}"
            raise Stop(f"{trained}, {features} has {self.dims}: it cannot read these features")
        self.match = spec["match"] if spec else match_names(features / "labelled.parquet")
        for side, table in TABLES.items():
            for name in further_columns(features / table, side):
                columns[f"{side}_{name}"] = name
        for name in columns if spec is None else (*spec["categories"], *spec["numbers"]):
            column = read_column(features / TABLES[side_of(name)], columns.get(name))
            self.add(name, column, spec, max_values)

    def add(self, name, column, spec, max_values):
        """A numeric column becomes numbers, another one a category; with a spec, what they are there."""
        is_number = is_numeric(column.type)
        if is_number if spec is None else name in spec["numbers"]:
            known = column.cast(pa.float32()) if is_number else unknown(len(column))
            self.values[name] = known.to_numpy()  # NaN where it is null
            self.numbers[name] = moments(self.values[name])
        else:
            column = column.cast(pa.string())
            known = spec["categories"][name] if spec else frequent_values(column, max_values)
            self.categories[name] = known
            codes = pc.index_in(column, pa.array(known, pa.string())).fill_null(-1)
            self.codes[name] = codes.to_numpy().astype(np.int64) + 1

    def to(self, device, share=0.5):
        """On a GPU: moves the embeddings there if they take at most `share` of its free memory."""
        import torch  # a service has none, and gathers nothing

        size = sum(array.nbytes for array in self.embeddings.values())
        if device.type == "cuda" and size < share * torch.cuda.mem_get_info(device)[0]:
            for name, array in self.embeddings.items():
                self.resident[name] = torch.from_numpy(np.array(array)).to(device)
        return self

    def gather(self, query_index, pin_index, match):
        """Row numbers [B] of queries and pins, and numbers of the pairs [B, F] -> the student's inputs:
        embeddings [B, D], category codes [B] int64, numbers and match features [B], by name."""
        import torch

        index, gathered = {"query": query_index, "pin": pin_index}, {}
        for name, column in {**self.embeddings, **self.codes, **self.values}.items():
            rows = index[side_of(name)]
            if name in self.resident:
                table = self.resident[name]
                gathered[name] = table[torch.from_numpy(rows).to(table.device)].float()
            else:
                some = torch.from_numpy(column[rows])
                gathered[name] = some if name in self.codes else some.float()
        columns = torch.from_numpy(np.ascontiguousarray(match)).unbind(dim=1)
        return gathered | dict(zip(self.match, columns))


def is_numeric(kind):
    """Is it an Arrow type of numbers?"""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def further_columns(path, side):
    """The columns of a table of queries or pins beyond the contract's: {name: "number" or "category"}."""
    kinds = {}
    for field in pq.read_schema(path):
        if field.name not in OUR_COLUMNS[side]:
            kinds[field.name] = "number" if is_numeric(field.type) else "category"
    return kinds


def read_column(path, name):
    """A column of a Parquet file (Arrow); None: one of nulls."""
    if name is None:
        return unknown(pq.read_metadata(path).num_rows)
    return pq.read_table(path, columns=[name])[name]


def unknown(rows):
    """A column of nulls (Arrow)."""
    return pa.chunked_array([pa.nulls(rows, pa.float32())])


def moments(values):
    """[mean, standard deviation, least, greatest] of the known values; a deviation of 0 is 1."""
    known = values[np.isfinite(values)].astype(np.float64)
    if not len(known):
        return [0.0, 1.0, 0.0, 0.0]
    std = known.std()
    numbers = known.mean(), std if std > 1e-6 else 1.0, known.min(), known.max()
    return [float(number) for number in numbers]


def frequent_values(column, n=1_000):
    """The n most frequent values of an Arrow text column, ties by value."""
    counts = pa.Table.from_struct_array(column.drop_null().value_counts())
    rows = pc.select_k_unstable(counts, n, [("counts", "descending"), ("values", "ascending")])
    return counts["values"].take(rows).to_pylist()
