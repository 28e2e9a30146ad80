"""Files of a dataset, however they are written: as SQL for DuckDB, or one line on what is wrong with them."""

import codecs
import contextlib
import csv
import io
import os
import re
import shutil
import stat
import unicodedata
import urllib.parse
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from lib.stages.files import whole_file
from lib.stages.terminal import Stop, first_line

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json"}
NUMERIC = re.compile(r"U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(.*")  # types in SQL
PACKED = {".gz": "gzip", ".zst": "zstd"}  # what pyarrow calls it
FILE = "name of the file"  # a column of ours that no table has
NAMELESS = "without a name"  # ends the name that we give to a column that has none
# What lies in a table of a format whose log says which files count: the format, what exports its live rows.
LOG_STRUCTURED = {
    "_delta_log": ("Delta Lake", "DuckDB: COPY (FROM delta_scan('FOLDER')) TO 'TABLE.parquet'"),
    "metadata/*.metadata.json": ("Iceberg", "DuckDB: COPY (FROM iceberg_scan('FOLDER')) TO 'TABLE.parquet'"),
    ".hoodie": ("Apache Hudi", "Spark: spark.read.format('hudi').load('FOLDER').write.parquet('TABLE')"),
    "_spark_metadata": ("Spark Streaming", "Spark: spark.read.parquet('FOLDER').write.parquet('TABLE')"),
    "snapshot/snapshot-*": ("Apache Paimon", "its own engine, as Parquet"),
}
CSV_OPTIONS = f"""auto_detect = false, header = true, quote = '"', escape = '"', comment = '',
    max_line_size = 16777216, buffer_size = 33554432, hive_partitioning = false, filename = '{FILE}'"""


def spellings(path):
    """Ways to write the path of a file of the dataset: as it stands, without spaces around it, a file: URL as
    a path, composed and decomposed (a table and a file system may differ in that). Case counts."""
    plain = path.strip()
    if plain.lower().startswith("file:"):
        plain = urllib.parse.unquote(urllib.parse.urlsplit(plain).path)
    return dict.fromkeys([path, plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))])


def regular_file(folder, path):
    """Full path of a regular file of the dataset, links followed: no pipe or device, which may have no end.
    ValueError with the reason if there is none, or if it is outside."""
    try:
        full = (Path(folder) / path).resolve()
        inside = full.is_relative_to(Path(folder).resolve())
        mode = os.stat(full).st_mode if inside else 0
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(first_line(error)) from None
    if not stat.S_ISREG(mode):
        raise ValueError("no regular file" if inside else "path leaves the dataset folder")
    return full


def find_table(folder, name):
    """Files of the table NAME, the file or folder that it is, and what lies there and is not read."""
    found, others = [], []
    for path in sorted(folder.iterdir()):
        if table_name(path) == name:
            for sign, (kind, export) in LOG_STRUCTURED.items():
                if path.is_dir() and any(path.rglob(sign)):
                    how = f"export its live rows, with {export}"
                    raise Stop(f"{path}/: a table of {kind}, whose log says which files count: {how}")
            parts = sorted(path.rglob("*")) if path.is_dir() else [path]
            parts = [part for part in parts if not part.is_dir() and not is_hidden(part.relative_to(folder))]
            files = [part for part in parts if format_of(part)]
            others += [str(part.relative_to(folder)) for part in parts if part not in files]
            if files:
                found.append((files, path))
    if len(found) > 1:
        names = ", ".join(path.name + "/" * path.is_dir() for _, path in found)
        raise Stop(f"{folder}: the table {name} is there more than once ({names}): keep one")
    files, base = found[0] if found else ([], None)
    for path in files:
        try:
            regular_file(folder, path.relative_to(folder))
        except ValueError as error:
            raise Stop(f"{path}: cannot be read ({error})") from None
    if len({format_of(path) for path in files}) > 1:
        raise Stop(f"{base}: files of different kinds; a table is of one kind")
    return files, base, others


def other_files(folder, names):
    """What lies in a dataset folder and looks like a table, but has the name of none."""
    files = [path for path in sorted(folder.iterdir()) if format_of(path) and not is_hidden(path.name)]
    return [path.name for path in files if table_name(path) not in names]


def is_hidden(path):
    """Of another program's own, such as _SUCCESS and .ipynb_checkpoints/."""
    return any(part[0] in "._" for part in Path(path).parts)


def table_name(path):
    """Of a file or folder: boards, Boards.parquet, boards.csv.gz -> boards."""
    return path.name.split(".")[0].lower()


def format_of(path):
    """'parquet', 'csv' or 'json' by a file's name, else None. CSV and JSON may be packed (.gz, .zst)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in (".gz", ".zst")
    found = FORMATS.get(suffixes[-1 - packed]) if len(suffixes) > packed else None
    return None if packed and found == "parquet" else found


def reader(db, files, base, contract, sample):
    """SQL that reads the files of a table, which is the file or folder `base`, and {column: type as stored}.
    Everything in CSV, and what is text in JSON, stays text: DuckDB's own guesses would rewrite a title that
    looks like a date. contract: {column: kind}; sample: JSON rows by which types are told (-1: all)."""
    kind, options = format_of(files[0]), f"{listed(files)}, union_by_name = true, hive_partitioning = false"
    if kind == "csv":
        sql, types = csv_reader(files)
    elif kind == "json":
        sql, types = json_reader(db, files, options, contract, sample)
    else:
        sql, types = parquet_reader(db, files, f"{options}, binary_as_string = true")
    return with_folder_columns(sql, types, files, base)


def parquet_reader(db, files, options):
    """Likewise of Parquet, without what the names of folders say; options: of read_parquet."""
    described = db.execute(f"DESCRIBE FROM read_parquet({options})").fetchall()
    types, sql = {row[0]: row[1] for row in described}, f"FROM read_parquet({options}, filename = '{FILE}')"
    for place, name in enumerate(pq.read_schema(files[0]).names):
        if not name and f"C{place}" in types:  # as DuckDB calls it
            ours = f"column {place + 1} {NAMELESS}"
            types[ours] = types.pop(f"C{place}")
            sql = f'FROM (SELECT * RENAME ("C{place}" AS {quoted(ours)}) {sql})'
    return sql, types


def without_marks(files, base, folder):
    """JSON of files (their table is the file or folder `base`) as DuckDB reads it: where one begins with a
    byte order mark, copies of all of them below `folder`, without. Returns files and base."""
    starts = {path: start_of(path, 3) for path in files}
    for path, start in starts.items():
        if len(start) == 1:  # DuckDB would find no row in it, and nothing wrong
            raise Stop(
                f"{path}: cannot be read as JSON (nothing in it but {start.decode(errors='replace')!r})"
            )
    if codecs.BOM_UTF8 not in starts.values():
        return files, base
    copies = {path: folder / f"{path.relative_to(base.parent)}.jsonl" for path in files}
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with unpacked(path) as stream, open(copy, "wb") as plain:
            stream.read(3 * (starts[path] == codecs.BOM_UTF8))
            shutil.copyfileobj(stream, plain)
    return [*copies.values()], copies.get(base, folder / base.name)


def unpacked(path):
    """A file's content as a stream, without its packing."""
    return pa.input_stream(str(path), compression=PACKED.get(path.suffix.lower()))


def start_of(path, size):
    """The first bytes of a file."""
    with unpacked(path) as stream:
        return stream.read(size)


def json_reader(db, files, options, contract, sample):
    """Likewise of lines of JSON; options: of read_json."""
    if not any(path.stat().st_size for path in files):
        raise Stop(f"{files[0]}: the table is empty")
    options += ", format = 'newline_delimited', records = true, maximum_object_size = 67108864"
    guess = f"maximum_depth = 3, sample_size = {sample}, map_inference_threshold = -1"
    described = db.execute(f"DESCRIBE FROM read_json({options}, {guess})").fetchall()
    types = {row[0]: row[1] for row in described}
    begun = {column.strip().lower() for column in types}
    unmet = contract if sample != -1 else ()  # a sample of the rows may not have met a column
    wanted = [*types, *(column for column in unmet if column not in begun)]
    columns = {}
    for column in wanted:
        kind, numeric = types.get(column, "VARCHAR"), column.lower() not in contract
        if re.match(r"STRUCT|MAP|JSON|.*\]", kind):  # nested, or of several kinds
            columns[column] = types[column] = "JSON"
        else:
            columns[column] = "DOUBLE" if numeric and NUMERIC.fullmatch(kind) else "VARCHAR"
    keys = ", ".join(f"{quoted(column)}: '{kind}'" for column, kind in columns.items())
    types = {column: types.get(column, "VARCHAR") for column in columns}
    return f"FROM read_json({options}, columns = {{{keys}}}, filename = '{FILE}')", types


def csv_reader(files):
    """SQL that reads CSV files, each way in which they are written by its own read_csv."""
    ways = {}
    for path in files:
        header = csv_header(path)
        if header:
            ways.setdefault(header, []).append(path)
    if not ways:
        raise Stop(f"{files[0]}: the table is empty")
    readers, names = [], {}
    for (delimiter, blank_lines, *columns), paths in ways.items():
        keys = ", ".join(f"{quoted(column)}: 'VARCHAR'" for column in columns)
        known = {name.strip().lower() for name in names}  # in other files' letters, as UNION BY NAME has it
        names |= {name: "CSV" for name in columns if not names or name.strip().lower() not in known}
        way = f"columns = {{{keys}}}, delim = '{delimiter}', skip = {blank_lines}"
        readers.append(f"FROM read_csv({listed(paths)}, {way}, {CSV_OPTIONS})")
    return f"FROM ({' UNION ALL BY NAME '.join(readers)})", names


def csv_header(path):
    """A CSV file's delimiter, blank lines above its header, and names of columns; None: nothing is in it."""
    start = start_of(path, 1 << 20)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start[:100]:
        raise Stop(f"{path}: cannot be read as csv (it is UTF-16: save it as UTF-8)")
    text = start.decode("utf-8-sig", errors="replace")
    header = text.lstrip("\r\n")
    blank_lines = len(text[: len(text) - len(header)].splitlines())
    first = header.splitlines()[0] if header else ""
    delimiter = max(",\t;|", key=first.count)
    names = next(csv.reader(io.StringIO(header, newline=""), delimiter=delimiter), None)
    names = [name or f"column {place} {NAMELESS}" for place, name in enumerate(names or (), 1)]
    return names and (delimiter, blank_lines, *names)


def plain_names(columns, contract):
    """{name as stored: name}: without spaces around it, columns of the contract in lower case. Stop if two
    differ in nothing else: DuckDB does not tell them apart, and names the second NAME_1."""
    names, taken = {}, {}
    for column in columns:
        plain = column.strip()
        if "\0" in column:
            raise Stop(f"the name of the column {column!r} holds a zero byte: rename it")
        renamed = re.fullmatch(r"(.+)_\d+", plain)
        same = taken.get(plain.lower())
        if same is None and renamed and renamed[1] not in columns:
            same = taken.get(renamed[1].lower())
        if same is not None:
            raise Stop(f"the columns {same!r} and {column!r} cannot be told apart: rename or remove one")
        taken[plain.lower()] = column
        names[column] = plain.lower() if plain.lower() in contract else plain
    return names


def with_folder_columns(sql, types, files, base):
    """Adds the columns that Hive-style folders below a table's folder stand for: boards/date=2024-01-01/.
    Only those: DuckDB's own reading would take a folder label=3/ above the dataset for a column."""
    keys = {}
    for path in files if base.is_dir() else ():
        for part in path.relative_to(base).parts[:-1]:
            key, equals, _ = part.partition("=")
            if equals and key.lower() not in {column.lower() for column in types}:
                keys[key] = f"/{re.escape(part.partition('=')[0])}=([^/]*)/"
    columns = []
    for key, pattern in keys.items():
        below = f'substr("{FILE}", {len(str(base)) + 1})'
        value = f"nullif(regexp_extract({below}, {text_literal(pattern)}, 1), '__HIVE_DEFAULT_PARTITION__')"
        columns.append(f", nullif(url_decode({value}), '') AS {quoted(key)}")
    sql = f'FROM (SELECT * EXCLUDE ("{FILE}"){"".join(columns)} {sql})'
    return sql, {**types, **dict.fromkeys(keys, "CSV")}


@contextlib.contextmanager
def one_line(where):
    """What goes wrong with a file or in DuckDB inside the block becomes one line."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise Stop(f"{where}: more memory is needed than --memory allows ({first_line(error)})") from error
    except RuntimeError as error:
        if "interrupted" in str(error):  # as DuckDB hands on Ctrl-C
            raise KeyboardInterrupt from None
        raise
    except Stop as error:
        raise Stop(str(error) if str(where) in str(error) else f"{where}: {error}") from None
    except (duckdb.Error, pa.ArrowException, csv.Error, OSError) as error:
        raise Stop(f"{where}: cannot be read ({reason(error)})") from error


def reason(error):
    """What an error of DuckDB says in one line: its first line, or of a CSV file the line's number and what
    is wrong with it."""
    text = str(error)
    line, file = (re.search(pattern, text) for pattern in (r"CSV Error on Line: (\d+)", r"\n  file = (.*)"))
    if "reached an invalid state" in text:
        return f"{file[1]}: its lines end in different ways (LF, CRLF, CR), or a quote is not closed"
    if not line:
        return first_line(error)
    if "unterminated quote" in text:
        return f"{file[1]}, line {line[1]}: unterminated quote, or a line over 16 MiB"
    said = re.split(r"\n+Possible ", text)[0].strip().split("\n")[-1]
    return f"{file[1]}, line {line[1]}: {first_line(said)}"


def quoted(name):
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def text_literal(text):
    """A text in SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def listed(files):
    """Paths in SQL, as a list; signs by which DuckDB would look for several files stand for themselves."""
    paths = [re.sub(r"[*?\[]", r"[\g<0>]", str(path)) for path in files]
    return "[" + ", ".join(text_literal(path) for path in paths) + "]"


def plain_cell(text):
    """A text for a CSV file that people open in a spreadsheet: never a formula."""
    return f"'{text}" if re.match(r"[=+\-@\t\r]", text) and not re.fullmatch(r"[+-]?[\d.]+", text) else text


def list_skipped(path, names, rows):
    """Rows that cannot be used -> CSV. names: of the columns; rows: texts."""
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            writer.writerow([plain_cell(value) for value in row])
