"""Files of a dataset, however they are written: as SQL for DuckDB, or one line on what is wrong with them."""

import codecs
import contextlib
import csv
import io
import itertools
import os
import re
import stat
import unicodedata
import urllib.parse
from collections import Counter
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from lib.stages.files import whole_file
from lib.stages.terminal import Stop, first_line, stop_on_error

FORMATS = {
    "parquet": r".+\.parquet",
    "csv": r".+\.[ct]sv(\.gz|\.zst)?",
    "json": r".+\.(jsonl|ndjson)(\.gz|\.zst)?",
}
NUMERIC = re.compile(r"U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(.*")  # types in SQL
NAMELESS = "without a name"  # ends the name that we give to a column that has none
FILE = "path of the file"  # a column of ours while folders are read
# How a file of another kind begins, and what to do with one that is named .csv or .jsonl.
OTHER_KINDS = {
    b"\x1f\x8b": "it is packed by gzip: name it {name}.gz",
    b"\x28\xb5\x2f\xfd": "it is packed by Zstandard: name it {name}.zst",
    b"PAR1\x15": "it is Parquet: name it {stem}.parquet",
    b"PK\3\4": "it is a workbook, or packed by zip: export or unpack it as CSV",
    b"\xd0\xcf\x11\xe0": "it is a workbook: export it as CSV",
}
# What lies in a table whose files alone do not say its rows: its format, what exports these.
MORE_THAN_FILES = {
    "_delta_log": ("Delta Lake", "DuckDB: COPY (FROM delta_scan('FOLDER')) TO 'TABLE.parquet'"),
    "metadata/*.metadata.json": ("Iceberg", "DuckDB: COPY (FROM iceberg_scan('FOLDER')) TO 'TABLE.parquet'"),
    ".hoodie": ("Apache Hudi", "Spark: spark.read.format('hudi').load('FOLDER').write.parquet('TABLE')"),
    "_spark_metadata": ("Spark Streaming", "Spark: spark.read.parquet('FOLDER').write.parquet('TABLE')"),
    "snapshot/snapshot-*": ("Apache Paimon", "its own engine, as Parquet"),
}
OPTIONS = f"hive_partitioning = false, filename = '{FILE}'"  # of every reader
CSV_OPTIONS = f"""auto_detect = false, header = true, quote = '"', escape = '"', comment = '',
    max_line_size = 16777216, buffer_size = 33554432, {OPTIONS}"""


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
            for sign, (kind, export) in MORE_THAN_FILES.items():
                if any(path.rglob(sign)):
                    why = "whose log says which files count: export its live rows"
                    raise Stop(f"{path}/: a table of {kind}, {why}, with {export}")
            parts = sorted(path.rglob("*")) if path.is_dir() else [path]
            # A link to a folder is not gone into: it is named among the others.
            parts = [part for part in parts if part.is_symlink() or not part.is_dir()]
            parts = [part for part in parts if not is_hidden(part.relative_to(folder))]
            files = [part for part in parts if format_of(part)]
            others += [str(part.relative_to(folder)) for part in parts if part not in files]
            if files:
                found.append((files, path))
    if len(found) > 1:
        names = ", ".join(path.name + "/" * path.is_dir() for _, path in found)
        raise Stop(f"{folder}: the table {name} is there more than once ({names}): keep one")
    files, base = found[0] if found else ([], None)
    for path in files:
        with stop_on_error(f"{path}: cannot be read"):
            regular_file(folder, path.relative_to(folder))
    if len({format_of(path) for path in files}) > 1:
        raise Stop(f"{base}: files of different kinds; a table is of one kind")
    return files, base, others


def other_files(folder, names):
    """What lies in a dataset folder, a file or a folder, and looks like a table or like vectors, but has the
    name of none."""
    found = []
    for path in sorted(folder.iterdir()):
        if table_name(path) not in names and path.name != "embeddings" and not is_hidden(path.name):
            parts = itertools.islice(path.rglob("*"), 1_000) if path.is_dir() else [path]  # or of pictures
            if any(format_of(part) or part.suffix.lower() == ".npy" for part in parts):
                found.append(path.name + "/" * path.is_dir())
    return found


def is_hidden(path):
    """Of another program's own, such as _SUCCESS and .ipynb_checkpoints/."""
    return any(part[0] in "._" for part in Path(path).parts)


def table_name(path):
    """Of a file or folder: boards, Boards.parquet, " boards.csv.gz" -> boards."""
    return path.name.split(".")[0].strip().lower()


def format_of(path):
    """'parquet', 'csv' or 'json' by a file's name, else None. CSV and JSON may be packed (.gz, .zst)."""
    return next((kind for kind, name in FORMATS.items() if re.fullmatch(name, path.name.lower(), re.S)), None)


def reader(db, files, base, contract):
    """SQL that reads the files of a table, which is the file or folder `base`, and {column: type as stored}.
    Everything in CSV, and what is text in JSON, stays text: DuckDB's own guesses would rewrite a title that
    looks like a date. contract: {column: kind}."""
    kind = format_of(files[0])
    if kind == "json":
        sql, types = json_reader(db, files, contract)
    elif kind == "csv":
        sql = csv_reader(files)
        types = dict.fromkeys(columns_of(db, sql), "CSV")
    else:
        sql, types = parquet_reader(db, files)
    del types[FILE]
    folders = folder_columns(files, base, types)
    columns = [f", {value} AS {quoted(column)}" for column, value in folders.items()]
    sql = f"FROM (SELECT * EXCLUDE ({quoted(FILE)}){''.join(columns)} {sql})"
    return sql, types | dict.fromkeys(folders, "CSV")


def folder_columns(files, base, types):
    """{column: SQL} of what Hive's folders below the table's folder `base` say, boards/date=2024-01-01/a.csv;
    none of a column that the files have. Folders above it say nothing, which DuckDB would read too."""
    folders = {part for path in files for part in path.relative_to(base).parts[:-1] if "=" in part}
    keys = sorted({folder.partition("=")[0] for folder in folders})
    below, columns = f'substr("{FILE}", {len(str(base)) + 1})', {}
    for key in keys:
        if key.lower() not in map(str.lower, types):
            pattern = text_literal(f"/{re.escape(key)}=(?:__HIVE_DEFAULT_PARTITION__|([^/]*))/")
            columns[key] = f"nullif(url_decode(regexp_extract({below}, {pattern}, 1)), '')"
    return columns


def parquet_reader(db, files):
    """Likewise of Parquet, without regard to folders. DuckDB makes names for columns that have none, and of
    7.0 the text 7.0 where another file has text: here it is 7."""
    options = f"{listed(files)}, union_by_name = true, binary_as_string = true, {OPTIONS}"
    sql, unnamed, fractions = f"FROM read_parquet({options})", {}, {}
    types = columns_of(db, sql)  # tells which file cannot be read
    texts = {column.lower(): column for column, kind in types.items() if kind == "VARCHAR"}
    for path in files:
        schema = pq.read_schema(path)
        for field in schema:
            if field.name.lower() in texts and re.match("float|double|halffloat|decimal", str(field.type)):
                fractions.setdefault(texts[field.name.lower()], []).append(text_literal(path))
        if "" in (names := schema.names):
            told = columns_of(db, f"FROM read_parquet({listed([path])}, {OPTIONS})")  # ends with FILE
            unnamed |= {other: n for n, (other, name) in enumerate(zip(told, names), 1) if not name}
    if fractions:
        file, cells = quoted(FILE), {quoted(column): ", ".join(of) for column, of in fractions.items()}
        ours = [f"if({file} IN ({of}), digits({cell}), {cell}) AS {cell}" for cell, of in cells.items()]
        sql = f"FROM (SELECT * REPLACE ({', '.join(ours)}) {sql})"
    if unnamed:
        ours = [f'{quoted(other)} AS "column {n} {NAMELESS}"' for other, n in unnamed.items()]
        sql = f"FROM (SELECT * RENAME ({', '.join(ours)}) {sql})"
        types = columns_of(db, sql)
    return sql, types


def columns_of(db, sql):
    """{column: type} of a query."""
    return {row[0]: row[1] for row in db.execute(f"DESCRIBE {sql}").fetchall()}


def as_struct(columns):
    """{column: type} as read_json and read_csv take it."""
    return f"{{{', '.join(f'{quoted(column)}: {text_literal(kind)}' for column, kind in columns.items())}}}"


def json_reader(db, files, contract):
    """Likewise of lines of JSON. Only if it is told no format DuckDB takes a byte order mark."""
    filled = [path for path in files if start_of(path).strip(codecs.BOM_UTF8 + b"\r\n\t ")]
    if not filled:
        raise Stop(f"{files[0]}: the table is empty")
    options = f"{listed(filled)}, union_by_name = true, records = true, maximum_object_size = 67108864"
    guess = "maximum_depth = 3, sample_size = -1, map_inference_threshold = -1"
    types, columns = columns_of(db, f"FROM read_json({options}, {guess}, {OPTIONS})"), {}
    for column, kind in types.items():
        if re.match(r"STRUCT|MAP|JSON|.*\]", kind):  # nested, or of several kinds
            columns[column] = types[column] = "JSON"
        else:
            number = column.lower() not in contract and NUMERIC.fullmatch(kind)
            columns[column] = "DOUBLE" if number else "VARCHAR"
    del columns[FILE]
    return f"FROM read_json({options}, columns = {as_struct(columns)}, {OPTIONS})", types


def csv_reader(files):
    """SQL that reads CSV files, each way in which they are written by its own read_csv."""
    ways, readers = {}, []
    for path in files:
        ways.setdefault(csv_header(path), []).append(path)
    ways.pop(None, None)
    if not ways:
        raise Stop(f"{files[0]}: the table is empty")
    for (delimiter, blank_lines, *names), paths in ways.items():
        columns = as_struct(dict.fromkeys(names, "VARCHAR"))
        way = f"columns = {columns}, delim = '{delimiter}', skip = {blank_lines}"
        readers.append(f"FROM read_csv({listed(paths)}, {way}, {CSV_OPTIONS})")
    return f"FROM ({' UNION ALL BY NAME '.join(readers)})"


def start_of(path):
    """The first MiB of a file of text, unpacked. Stop if it is a file of another kind."""
    packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    with pa.input_stream(str(path), compression=packing) as stream:
        start = stream.read(1 << 20)
    for sign, advice in OTHER_KINDS.items():
        if start.startswith(sign):
            raise Stop(f"{path}: no text: {advice.format(name=path.name, stem=path.name.split('.')[0])}")
    return start


def csv_header(path):
    """A CSV file's delimiter, blank lines above its header, and names of columns; None: nothing is in it."""
    start = start_of(path)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start[:100]:
        raise Stop(f"{path}: cannot be read as csv (it is UTF-16: save it as UTF-8)")
    text = start.decode("utf-8-sig", errors="replace")
    header = text.lstrip("\r\n")
    if not header:
        return None
    blank_lines = len(text[: len(text) - len(header)].splitlines())
    delimiter = max(",\t;|", key=header.splitlines()[0].count)
    names = next(csv.reader(io.StringIO(header, newline=""), delimiter=delimiter))
    names = [name or f"column {n} {NAMELESS}" for n, name in enumerate(names, 1)]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise Stop(f"{path}: the column {twice[0]!r} stands there more than once: rename or remove one")
    return delimiter, blank_lines, *names


def plain_names(columns, contract):
    """{name as stored: name}: without spaces around it, columns of the contract in lower case. Stop if two
    differ in nothing else: DuckDB does not tell them apart, and names the second NAME_1."""
    names, taken = {}, {}
    for place, column in enumerate(columns, 1):
        plain = column.strip() or f"column {place} {NAMELESS}"
        if "\0" in column:
            raise Stop(f"the name of the column {column!r} holds a zero byte: rename it")
        first = re.sub(r"_\d+$", "", plain)
        same = taken.get(plain.lower()) or (first not in columns and taken.get(first.lower()))
        if same:
            raise Stop(f"the columns {same!r} and {column!r} cannot be told apart: rename or remove one")
        taken[plain.lower()] = column
        names[column] = plain.lower() if plain.lower() in contract else plain
    return names


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
        raise Stop(reason(error, where)) from error


def reason(error, where):
    """What an error of DuckDB says in one line: the file and, of a CSV file, the line, what is wrong with it;
    where DuckDB names no file, `where` and its first line."""
    text = str(error)
    line, file = (re.search(pattern, text) for pattern in (r"CSV Error on Line: (\d+)", r"\n  file = (.*)"))
    if bytes_found := re.search(r'Parquet file "(.*)": value (.*) is not valid UTF8', text):
        advice = "decode it as text, or leave its column out"
        return f"{bytes_found[1]}: the value {bytes_found[2][:80]} is not UTF-8: {advice}"
    if "reached an invalid state" in text:
        return f"{file[1]}: its lines end in different ways (LF, CRLF, CR), or a quote is not closed"
    if not line:
        advice = ": save the file as UTF-8" * ("invalid UTF-8" in text)  # of JSON
        return f"{where}: cannot be read ({first_line(error)}){advice}"
    if "Invalid unicode" in text:
        return f"{file[1]}, line {line[1]}: not UTF-8: save the file as UTF-8"
    said = re.split(r"\n+Possible ", text)[0].strip().split("\n")[-1]
    said = "unterminated quote, or a line over 16 MiB" if "unterminated quote" in text else first_line(said)
    return f"{file[1]}, line {line[1]}: {said}"


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
        csv.writer(file).writerows([plain_cell(value) for value in row] for row in (names, *rows))
