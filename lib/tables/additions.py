"""Tables that are added to a dataset, beside those that it has. No method of the paper is in this file."""

from lib.stages.files import write_parquet
from lib.stages.streams import write_stream
from lib.stages.terminal import Stop
from lib.tables.raw import RawTables


def add_tables(folder, name, tables):
    """{table: its columns, or a stream of Arrow batches} -> files TABLE/NAME.parquet of a dataset folder.
    Stop, and none of them stays, if one is there already, or if the dataset would not hold what
    data/README.md promises; its labels and impressions may still be missing. Returns {table: rows}."""
    paths = {table: folder / table / f"{name}.parquet" for table in tables}
    for path in paths.values():
        if path.exists():
            raise Stop(f"{path}: is there already; remove it, or rename what it is made from")
    try:
        for table, rows in tables.items():
            write = write_parquet if isinstance(rows, dict) else write_stream
            write(paths[table], rows)
        raw = RawTables(folder, required=("pins", "queries"))
        raw.check()
    except BaseException:
        for path in paths.values():
            path.unlink(missing_ok=True)
        raise
    for line in raw.remarks():
        print(line)
    return {table: raw.ask(f"SELECT count(*) FROM '{path}'")[0][0] for table, path in paths.items()}
