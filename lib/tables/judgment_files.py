"""Judgment lists and result lists as search teams write them: a reader and a writer a format.

    qrels       .qrels   QUERY_ID 0 PIN_ID RATING             TREC
    run         .run     QUERY_ID Q0 PIN_ID RANK SCORE TAG    TREC; as in trec_eval the score counts, no rank
    ranklib     .txt     RATING qid:QUERY_ID # PIN_ID TITLE   RankLib, SVMlight; header: # qid:QUERY_ID: QUERY
    quepid      .csv     query,docid,rating                   Quepid
    workbench   .json    judgmentRatings                      OpenSearch's Search Relevance Workbench

No method of the paper is in this file, and nothing that is read is trusted.
"""

import csv
import hashlib
import json
import math
import re
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from lib.stages.terminal import Stop, first_line
from lib.tables.splits import query_key


class Judgment(NamedTuple):
    """How good a pin is for a query; of a result list the rating is the score. A reader leaves query_id or
    query out where its format has none, and the rating as it stands."""

    query_id: str | None
    query: str | None
    pin_id: str
    rating: float
    title: str = ""


# A reader: path -> Judgments. A writer: Judgments, those of a query together -> an open file. ValueError says
# what is wrong.


def fields_of(path, names):
    """Fields of the lines of a file, between tabs if as many as their names, else between spaces. UTF-8, with
    or without a BOM; empty lines and comments (#) are left out."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            fields = line.split("\t") if line.count("\t") == len(names) - 1 else line.split()
            if len(fields) == len(names) and line[0] != "#":
                yield [field.strip() for field in fields]
            elif line.strip() and line[0] != "#":
                raise ValueError(f"line {number} is not {' '.join(names)}: {line[:80]!r}")


def fitting(pattern, value):
    """The value, or ValueError if it is not there or has what its format takes for something else."""
    if value is None:
        raise ValueError("the text of a query is not known: --queries names a dataset that has it")
    if re.search(pattern, value):
        raise ValueError(f"{value!r} cannot be written: the format has other uses for spaces, line breaks, #")
    return value


def plain(rating):
    """2.0 -> '2', 2.5 -> '2.5'"""
    return repr(float(rating)) if rating % 1 else str(int(rating))


def read_qrels(path):
    for query, _, pin, rating in fields_of(path, ("QUERY_ID", "0", "PIN_ID", "RATING")):
        yield Judgment(query, None, pin, rating)


def write_qrels(file, judgments):
    for found in judgments:
        query, pin = fitting(r"\s|^#", found.query_id), fitting(r"\s", found.pin_id)
        if found.rating % 1:
            raise ValueError(f"rating {found.rating}: TREC's tools read whole numbers")
        file.write(f"{query} 0 {pin} {plain(found.rating)}\n")


def read_run(path):
    for query, _, pin, _, score, _ in fields_of(path, ("QUERY_ID", "Q0", "PIN_ID", "RANK", "SCORE", "TAG")):
        yield Judgment(query, None, pin, score)


def write_run(file, judgments):
    for query, listed in groupby(judgments, attrgetter("query_id")):
        query = fitting(r"\s|^#", query)
        best_first = sorted(listed, key=attrgetter("rating"), reverse=True)
        for rank, found in enumerate(best_first, 1):
            pin = fitting(r"\s", found.pin_id)
            file.write(f"{query} Q0 {pin} {rank} {plain(found.rating)} judgments\n")


def read_ranklib(path):
    """Features are passed over. An id ends at a tab, or without one at the first space."""
    lines, texts = path.read_text(encoding="utf-8-sig").split("\n"), {}
    for line in lines:
        header = re.fullmatch(r"#\s*qid:(\S+?):\s+(.*?)\s*", line)
        if header and texts.setdefault(header[1], header[2]) != header[2]:
            raise ValueError(f"qid {header[1]!r} has two texts: {texts[header[1]]!r}, {header[2]!r}")
    for number, line in enumerate(lines, 1):
        if line.strip() and line[0] != "#":
            found = re.fullmatch(r"\s*(\S+)\s+qid:(\S+)(?:\s+\d+:\S+)*\s*#\s*(.*)", line)
            if not found:
                raise ValueError(f"line {number} is not RATING qid:QUERY_ID # PIN_ID: {line[:80]!r}")
            pin, _, title = found[3].partition("\t" if "\t" in found[3] else " ")
            yield Judgment(found[2], texts.get(found[2]), pin.strip(), found[1], title.strip())


def write_ranklib(file, judgments):
    judgments = list(judgments)
    for query, text in {found.query_id: found.query for found in judgments}.items():
        if text is not None:
            header = fitting(r"\s", query), fitting(r"[\r\n]", text)
            file.write("# qid:{}: {}\n".format(*header))
    for found in judgments:
        query, pin = fitting(r"\s", found.query_id), fitting(r"[\t\r\n]", found.pin_id)
        file.write(f"{plain(found.rating)} qid:{query} # {pin}\t{' '.join(found.title.split())}\n")


def read_quepid(path):
    """Other columns are passed over."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        names = {name.strip().lower(): name for name in rows.fieldnames or ()}
        for row in rows:
            cells = [row[names[name]] or "" for name in ("query", "docid", "rating")]
            yield Judgment(None, *cells)


def write_quepid(file, judgments):
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("query", "docid", "rating"))
    rows.writerows((fitting("^$", found.query), found.pin_id, plain(found.rating)) for found in judgments)


def read_workbench(path):
    """As it is imported, or as a search for it is answered."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    for hit in content.get("hits", {}).get("hits", ()):
        content = hit["_source"]
    for entry in content["judgmentRatings"]:
        for rated in entry["ratings"]:
            pin = rated["docId"]
            yield Judgment(None, entry["query"], str(pin) if isinstance(pin, int) else pin, rated["rating"])


def write_workbench(file, judgments):
    file.write('{"name": "judgments", "type": "IMPORT_JUDGMENT", "judgmentRatings": [')
    for number, (query, rated) in enumerate(groupby(judgments, attrgetter("query"))):
        ratings = [{"docId": found.pin_id, "rating": plain(found.rating)} for found in rated]
        entry = {"query": fitting("^$", query), "ratings": ratings}
        file.write(",\n" * (number > 0) + json.dumps(entry, ensure_ascii=False))
    file.write("]}\n")


FORMATS = {  # name: suffix of its files, reader, writer
    "qrels": (".qrels", read_qrels, write_qrels),
    "run": (".run", read_run, write_run),
    "ranklib": (".txt", read_ranklib, write_ranklib),
    "quepid": (".csv", read_quepid, write_quepid),
    "workbench": (".json", read_workbench, write_workbench),
}


def format_of(path, name=None):
    """The format `name`, or that of the file's suffix."""
    suffixes = {suffix: known for known, (suffix, _, _) in FORMATS.items()}
    name = name or suffixes.get(path.suffix.lower())
    if name is None:
        raise Stop(f"{path}: no folder, and no known format: --format {', '.join(FORMATS)}")
    return name


def query_id_of(text):
    """The id of a query that has none: of one text always the same. md5, which DuckDB has too."""
    return hashlib.md5(query_key(text).encode()).hexdigest()[:16]


def checked(judgment):
    """A rated Judgment as a reader finds it -> one with numbers and plain texts, or ValueError."""
    query_id, query, pin, rating, title = judgment
    pin, number, query = pin.strip(), float(rating), query and query.strip()
    f"{pin}{query}".encode()  # JSON may hold halves of characters, UTF-8 has none
    if not pin or not math.isfinite(number) or not (query or query_id):
        raise ValueError(f"no query, no id or no rating: {tuple(judgment)}")
    return Judgment(query_id or query_id_of(query), query, pin, number, title)


def read_judgments(path, name=None):
    """A file's Judgments, those of a query together, each pair once. A query whose text is known is this text
    (query_key), whatever its id; without an id it has one made of it."""
    name, ids, found, unrated = format_of(path, name), {}, {}, 0
    try:
        for judgment in FORMATS[name][1](path):
            if judgment.rating is None or judgment.rating == "":
                unrated += 1
                continue
            query_id, query, *rated = checked(judgment)
            key = query_id if query is None else ("text", query_key(query))
            known = ids.setdefault(key, (query_id, query))
            judgment = Judgment(*known, *rated)
            first = found.setdefault((key, judgment.pin_id), judgment)
            if first.rating != judgment.rating:
                raise ValueError(f"two ratings of a pair: {tuple(first)}, {tuple(judgment)}")
    except Exception as error:  # of decoding, csv, json, float, or content of another shape
        problem = f"no {error}" if isinstance(error, LookupError) else first_line(error)
        raise Stop(f"{path}: not read as {name} ({problem})") from None
    if not found:
        raise Stop(f"{path}: no judgment in it")
    left_out = f"; {unrated:,} without a rating" if unrated else ""
    print(f"{path}: {len(found):,} judgments of {len(ids):,} queries{left_out}")
    place = {}
    return sorted(found.values(), key=lambda judgment: place.setdefault(judgment.query_id, len(place)))
