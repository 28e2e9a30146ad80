"""Judgment lists and result lists as search teams write them: a reader and a writer a format (data/README.md
has them). Nothing that is read is trusted.
"""

import csv
import hashlib
import json
import math
import re
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from lib.stages.terminal import Stop, stop_on_error
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
QRELS = "{query} 0 {pin} {rating}"  # TREC's
RUN = "{query} Q0 {pin} {rank} {rating} tag"  # as in trec_eval the score counts, no rank


def plain(rating):
    """2.0 -> '2', 2.5 -> '2.5'"""
    return repr(float(rating)) if rating % 1 else str(int(rating))


def fitting(text, wrong=r"\s"):
    """A text in which no `wrong` stands: a format has no sign for that."""
    if text is None:
        raise ValueError("the text of a query is not known: --queries names a dataset that has it")
    if re.search(wrong, text):
        raise ValueError(f"{text!r} cannot be written: the format has other uses for spaces, line breaks, #")
    return text


def read_lines(path, form):
    """Lines of a form, its fields between tabs if as many, else between spaces. UTF-8, with or without a BOM;
    empty lines and comments (#) are left out."""
    parts = form.split()
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            fields = line.split("\t") if line.count("\t") == len(parts) - 1 else line.split()
            fields = [field.strip() for field in fields]
            if not line.strip() or line[0] == "#":
                continue
            if len(fields) != len(parts):
                raise ValueError(f"line {number} is not {re.sub('[{}]', '', form)}: {line[:80]!r}")
            found = dict(zip(parts, fields))
            yield Judgment(found["{query}"], None, found["{pin}"], found["{rating}"])


def write_lines(file, judgments, form):
    for query, listed in groupby(judgments, attrgetter("query_id")):
        best_first = sorted(listed, key=attrgetter("rating"), reverse=True)
        for rank, found in enumerate(best_first, 1):
            if form == QRELS and found.rating % 1:
                raise ValueError(f"rating {found.rating}: TREC's tools read whole numbers")
            names = {"query": fitting(query, r"\s|^#"), "pin": fitting(found.pin_id)}
            file.write(form.format(**names, rank=rank, rating=plain(found.rating)) + "\n")


def read_ranklib(path):
    """Features are passed over. An id ends at a tab, or without one at the first space."""
    lines, texts = path.read_text(encoding="utf-8-sig").split("\n"), {}
    for header in filter(None, (re.fullmatch(r"#\s*qid:(\S+?):\s+(.*?)\s*", line) for line in lines)):
        if texts.setdefault(header[1], header[2]) != header[2]:
            raise ValueError(f"qid {header[1]!r} has two texts: {texts[header[1]]!r}, {header[2]!r}")
    for number, line in enumerate(lines, 1):
        found = re.fullmatch(r"\s*([^\s#]+)\s+qid:(\S+)(?:\s+\d+:\S+)*\s*#\s*(.*)", line)
        if found:
            pin, _, title = found[3].partition("\t" if "\t" in found[3] else " ")
            yield Judgment(found[2], texts.get(found[2]), pin, found[1], title.strip())
        elif line.strip() and line[0] != "#":
            raise ValueError(f"line {number} is not RATING qid:QUERY_ID # PIN_ID: {line[:80]!r}")


def write_ranklib(file, judgments):
    judgments, line = list(judgments), r"[\t\r\n]"
    for query, text in {found.query_id: found.query for found in judgments}.items():
        if text is not None:
            file.write(f"# qid:{fitting(query)}: {fitting(text, line)}\n")
    for found in judgments:
        query, pin = fitting(found.query_id), fitting(found.pin_id, line)
        file.write(f"{plain(found.rating)} qid:{query} # {pin}\t{' '.join(found.title.split())}\n")


def read_quepid(path):
    """Other columns are passed over."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
        for row in rows:
            yield Judgment(None, *(row[name] or "" for name in ("query", "docid", "rating")))


def write_quepid(file, judgments):
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("query", "docid", "rating"))
    rows.writerows((fitting(found.query, "^$"), found.pin_id, plain(found.rating)) for found in judgments)


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
    entries = []
    for query, rated in groupby(judgments, attrgetter("query")):
        ratings = [{"docId": found.pin_id, "rating": plain(found.rating)} for found in rated]
        entries.append({"query": fitting(query, "^$"), "ratings": ratings})
    content = {"name": "judgments", "type": "IMPORT_JUDGMENT", "judgmentRatings": entries}
    json.dump(content, file, ensure_ascii=False)


FORMATS = {  # name: suffix of its files, reader, writer
    "qrels": (".qrels", partial(read_lines, form=QRELS), partial(write_lines, form=QRELS)),
    "run": (".run", partial(read_lines, form=RUN), partial(write_lines, form=RUN)),
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
    query_id, query, pin = (text and text.strip() for text in judgment[:3])
    number = float(judgment.rating)
    f"{pin}{query}".encode()  # JSON may hold halves of characters, UTF-8 has none
    if not pin or not math.isfinite(number) or not (query or query_id):
        raise ValueError(f"no query, no id or no rating: {tuple(judgment)}")
    return Judgment(query_id or query_id_of(query), query, pin, number, judgment.title)


def read_judgments(path, name=None):
    """A file's Judgments, those of a query together, each pair once. A query whose text is known is this text
    (query_key), whatever its id; without an id it has one made of it."""
    name, queries, unrated = format_of(path, name), {}, 0
    with stop_on_error(f"{path}: not read as {name}"):  # what it has may be of any shape
        for judgment in FORMATS[name][1](path):
            if judgment.rating in (None, ""):
                unrated += 1
                continue
            judgment = checked(judgment)
            key = judgment.query_id if judgment.query is None else ("text", query_key(judgment.query))
            rated = queries.setdefault(key, {})
            first = next(iter(rated.values()), judgment)
            judgment = judgment._replace(query_id=first.query_id, query=first.query)
            first = rated.setdefault(judgment.pin_id, judgment)
            if first.rating != judgment.rating:
                raise ValueError(f"two ratings of a pair: {tuple(first)}, {tuple(judgment)}")
    if not queries:
        raise Stop(f"{path}: no judgment in it")
    found = [judgment for rated in queries.values() for judgment in rated.values()]
    left_out = f"; {unrated:,} without a rating" if unrated else ""
    print(f"{path}: {len(found):,} judgments of {len(queries):,} queries{left_out}")
    return found
