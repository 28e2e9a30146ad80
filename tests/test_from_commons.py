"""The Commons converter on a handful of rows in the dump's schema."""

import csv
import gzip

import from_commons
import pyarrow.parquet as pq
import pytest
from helpers import stop_line

HEADER = "id,search_term,wikidata_id,language,file_name,rating"
RATED = ("1", "0", "-1")
TERMS = [f"old {color} house {number}" for number in range(20) for color in ("red", "blue", "green")]
ROWS = []  # 60 searches with three ratings each, of three kinds but for every fifth search
for number, term in enumerate(TERMS):
    for place, rating in enumerate(RATED):
        title = term.replace(" ", "_") if place else f"Cottage in {term.split()[1]}, {number}"
        ROWS.append((term, "", "en", f"{title}_{place}.jpg", "-1" if number % 5 == 0 else rating))
ROWS += [
    ("  Éléphant ", "Q7378", "fr", 'L\'éléphant "Jumbo".v2.png', "1"),
    ("e\u0301le\u0301phant", "Q7378", "fr", "Souris.png", "-1"),  # the same search, typed otherwise
    ("éléphant", "Q7378", "fr", "Souris.png", "1"),  # and the same file again
    ("éléphant", "Q7378", "fr", "Trompe.png", ""),
]
ARTICLE = ("11_أغسطس", "Q2778", "ar", "Main Street.jpg", "-1")  # after the last typed search


def numbered():
    rows = [(str(number), *row) for number, row in enumerate(ROWS, 1)]
    return [*rows, (str(from_commons.LAST_TYPED + 1), *ARTICLE)]


def csv_source(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([HEADER.split(","), *numbered()])
    return path


def sql_source(path):
    """The rows as mysqldump writes them."""
    tuples = []
    for number, *texts, rating in numbered():
        quoted = []
        for text in texts:
            escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"')
            quoted.append(f"'{escaped}'" if text else "NULL")
        tuples.append(f"({number},{','.join(quoted)},{rating or 'NULL'})")
    head = "CREATE TABLE `ratedSearchResult` (\n  `id` int(11) NOT NULL,\n  KEY (`searchTerm`,`rating`)\n);\n"
    path.write_text(f"{head}INSERT INTO `ratedSearchResult` VALUES {','.join(tuples)};\n", encoding="utf-8")
    return path


def read(folder, name):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commons")
    from_commons.main([str(csv_source(folder / "rows.csv.gz")), "--out", str(folder / "out")])
    return folder / "out"


def test_titles_and_levels(out):
    titles = {row["pin_id"]: row["title"] for row in read(out, "pins")}
    assert titles["Cottage in red, 0_0.jpg"] == "Cottage in red, 0 0"
    assert titles["old_blue_house_0_1.jpg"] == "old blue house 0 1"
    assert titles['L\'éléphant "Jumbo".v2.png'] == 'L\'éléphant "Jumbo".v2'
    assert "Main Street.jpg" not in titles  # an article's title was never typed
    assert len(titles) == 183 and all(row["description"] is None for row in read(out, "pins"))

    queries = {row["query_id"]: row for row in read(out, "queries")}
    assert len(queries) == 61
    rating = {(term, file): rating for term, _, _, file, rating in ROWS}
    for row in read(out, "labels"):
        query = queries[row["query_id"]]["query"]
        if query in TERMS:
            assert row["label"] == {"-1": 1, "0": 3, "1": 5}[rating[query, row["pin_id"]]]


def test_one_query_is_one_text(out):
    (query,) = [row for row in read(out, "queries") if row["language"] == "fr"]
    assert query["query"] == "Éléphant"
    labels = [row for row in read(out, "labels") if row["query_id"] == query["query_id"]]
    shown = [row for row in read(out, "impressions") if row["query_id"] == query["query_id"]]
    assert len({row["split"] for row in labels}) <= 1
    files = {row["pin_id"]: row["label"] for row in labels}
    if labels:  # not hidden: two ratings, the first of the twice rated file; one row without
        assert files == {'L\'éléphant "Jumbo".v2.png': 5, "Souris.png": 1}
    assert "Trompe.png" in {row["pin_id"] for row in shown}  # no rating: an unlabelled impression
    with open(out / "skipped_ratings.csv", newline="", encoding="utf-8") as f:
        skipped = list(csv.DictReader(f))
    assert [(row["id"], row["file_name"]) for row in skipped] == [
        ("183", "Souris.png"),
        ("10691", "Main Street.jpg"),
    ]
    assert "earlier row" in skipped[0]["reason"] and "article" in skipped[1]["reason"]


def test_sides(out):
    """A query is on one side; what evaluates has ratings of more than one kind and is in no impression."""
    kinds, sides = {}, {"train": set(), "eval": set()}
    for row in read(out, "labels"):
        kinds.setdefault(row["query_id"], set()).add(row["label"])
        sides[row["split"]].add(row["query_id"])
    hidden = {row["query_id"] for row in read(out, "queries")} - sides["train"] - sides["eval"]
    assert not sides["train"] & sides["eval"]
    assert len(sides["train"]) > 15 and len(sides["eval"]) > 10 and len(hidden) > 4  # 40 %, 40 %, 20 %
    assert all(len(kinds[query]) > 1 for query in sides["eval"])
    assert any(len(kinds[query]) == 1 for query in sides["train"])
    shown = {row["query_id"] for row in read(out, "impressions") if row["pin_id"] != "Trompe.png"}
    assert shown == sides["train"] | hidden


def test_impressions(out, tmp_path):
    """Every rating is a label or an impression; the crossed pairs are new, half of them share a word."""
    queries = {row["query_id"]: row["query"] for row in read(out, "queries")}
    labels = {(row["query_id"], row["pin_id"]) for row in read(out, "labels")}
    impressions = [(row["query_id"], row["pin_id"]) for row in read(out, "impressions")]
    assert len(set(impressions)) == len(impressions) and not labels & set(impressions)
    rated = {(term, file) for term, _, _, file, _ in ROWS if term in TERMS}
    found = {(queries[query], file) for query, file in [*labels, *impressions]}
    assert rated <= found
    query = next(query for query, _ in impressions if queries[query] in TERMS[9:])
    crossed = [file for q, file in impressions if q == query and (queries[q], file) not in rated]
    assert len(crossed) == 20
    number = queries[query].split()[3]
    assert all(
        number in from_commons.words_of(file) for file in crossed[:5]
    )  # its rarest word; five others have it

    again = tmp_path / "again"
    from_commons.main([str(sql_source(tmp_path / "rows.sql")), "--out", str(again)])
    for path in sorted(out.glob("*.parquet")):  # the dump gives the same tables, bit for bit
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_stage_01_takes_it(out, tmp_path):
    from lib.tables.raw import RawTables

    RawTables(out, spill=tmp_path / "spill").check()


def test_images(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "Souris.png").write_bytes(b"mouse")
    (pictures / "Cottage_in_red,_0_0.jpg").write_bytes(b"cottage")  # as Commons names a download
    source = csv_source(tmp_path / "rows.csv")
    with open(source, "a", encoding="utf-8", newline="") as f:
        csv.writer(f).writerow(["184", "outside", "", "en", "../outside.png", "1"])
    (tmp_path / "outside.png").write_bytes(b"no")
    for _ in range(2):  # a second time over the first
        argv = [str(source), "--out", str(tmp_path / "out"), "--images", str(pictures), "--cross", "0"]
        from_commons.main(argv)
    images = {row["pin_id"]: row["image"] for row in read(tmp_path / "out", "pins")}
    assert {pin: image for pin, image in images.items() if image} == {
        "Souris.png": "images/Souris.png",
        "Cottage in red, 0_0.jpg": "images/Cottage_in_red,_0_0.jpg",
    }
    assert (tmp_path / "out" / "images" / "Souris.png").read_bytes() == b"mouse"
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2


def test_wrong_input_is_one_line(tmp_path):
    source = tmp_path / "rows.csv"
    line = stop_line(from_commons.main, [str(source)])
    assert "missing" in line and "media-search-signal-test" in line
    source.write_text("id,query\n1,x\n")
    assert "search_term" in stop_line(from_commons.main, [str(source)])
    source.write_text(f"{HEADER}\n1,x,,en,a.jpg,2\n")
    assert "'2'" in stop_line(from_commons.main, [str(source)])
    source.write_text(f"{HEADER}\n20000,x,,en,a.jpg,1\n")
    line = stop_line(from_commons.main, [str(source), "--out", str(tmp_path / "out")])
    assert "no label for eval and train" in line and "left out 1, see skipped_ratings.csv" in line
    assert "no typed search" in (tmp_path / "out" / "skipped_ratings.csv").read_text()
