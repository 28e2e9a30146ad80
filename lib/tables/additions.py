"""Tables that are added to a dataset, beside those that it has."""

import pyarrow as pa

from lib.stages.files import write_parquet
from lib.stages.streams import write_stream
from lib.stages.terminal import Stop
from lib.tables.raw import RawTables

# A row for each text (key: query_key) of the table `searches`, which has its own ids or null: the dataset's
# id (old) or null, and an id whatever happens.
TEXTS = """
    CREATE TABLE texts AS
    SELECT key, min(text) AS text, min(known.query_id) AS old,
        coalesce(old, min(searches.query_id), md5(key)[:16]) AS query_id
    FROM searches LEFT JOIN (SELECT query_id, query_key(query) AS key FROM raw_queries) known USING (key)
    WHERE key IS NOT NULL GROUP BY key"""


def add_tables(folder, name, tables):
    """{table: an Arrow table, or a stream of batches} -> files TABLE/NAME.parquet of a dataset folder.
    Stop, and none of them stays, if one is there already, or if the dataset would not hold what
    data/README.md promises; its labels and impressions may still be missing. Returns {table: rows}."""
    paths = {table: folder / table / f"{name}.parquet" for table in tables}
    for path in paths.values():
        if path.exists():
            raise Stop(f"{path}: is there already; remove it, or rename what it is made from")
    try:
        for table, rows in tables.items():
            write = write_parquet if isinstance(rows, pa.Table) else write_stream
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
