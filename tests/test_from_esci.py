"""The ESCI converter on a fixture in its schema, made by hand, and the five stages on what it makes."""

import from_esci
import pyarrow.parquet as pq
import pytest
from helpers import stage, stop_line, write_table

from lib.stages.files import read_json
from lib.tables.raw import RawTables

WORDS = {  # objects and colours of a locale
    "us": (("chair", "lamp", "sofa", "rug", "mirror", "desk"), ("red", "blue", "green")),
    "es": (("silla", "lámpara", "sofá"), ("roja", "azul", "verde")),
    "jp": (("椅子", "ランプ", "ソファ"), ("赤い", "青い", "緑の")),
}
LABELS = "ESCI"
COLUMNS = ("example_id", "query", "query_id", "product_id", "product_locale", "esci_label")
COLUMNS += ("small_version", "large_version", "split")


def catalogue():
    """One product for every colour and object of a locale; ids are shared between locales."""
    columns = {
        name: [] for name in ("id", "title", "description", "bullet_point", "brand", "color", "locale")
    }
    for locale, (objects, colours) in WORDS.items():
        for number, (thing, colour) in enumerate((x, c) for x in objects for c in colours):
            columns["id"].append(f"B{number:03d}")
            columns["title"].append(f"{colour} {thing} &amp; more")
            columns["description"].append(f"<p>{thing}<br>&nbsp;for 5 < 6 rooms</p>" if number % 2 else None)
            columns["bullet_point"].append(f"<b>{colour}</b>\nsolid" if number % 3 else None)
            columns["brand"].append("Acme" if number % 2 else None)
            columns["color"].append(colour)
            columns["locale"].append(locale)
    return {f"product_{name}": values for name, values in columns.items()}


def judgments():
    """Every query of a colour and object with six products; every third one tests; one is not in task 1."""
    rows, number = [], 0
    for locale, (objects, colours) in WORDS.items():
        queries = [(f"{colour} {thing}", thing, colour) for thing in objects for colour in colours]
        queries.append(("PS5" if locale == "us" else " ps5", objects[0], colours[0]))
        for place, (query, thing, colour) in enumerate(queries):
            split = "test" if place % 3 == 2 else "train"
            if query.strip().lower() == "ps5":
                split = "test" if locale == "jp" else "train"
            number += 1
            for product in range(6):
                other = (objects.index(thing) + product // 3) % len(objects)
                same = product % 3 == colours.index(colour)
                label = LABELS[(0 if same else 1) if product < 3 else (2 if same else 3)]
                pin = other * len(colours) + product % 3
                row = (len(rows), query, number, f"B{pin:03d}", locale, label, int(place != 1), 1, split)
                rows.append(row)
    return dict(zip(COLUMNS, zip(*rows)))


def source(folder, examples=None):
    write_table(folder, "shopping_queries_dataset_products", catalogue())
    write_table(folder, "shopping_queries_dataset_examples", examples or judgments())
    return folder


def read(folder, name):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def esci(tmp_path_factory):
    folder = tmp_path_factory.mktemp("esci")
    from_esci.main([str(source(folder / "source")), "--out", str(folder / "out")])
    return folder / "source", folder / "out"


def test_pins(esci):
    pins = {row["pin_id"]: row for row in read(esci[1], "pins")}
    assert len(pins) == 18 + 9 + 9
    assert pins["jp-B001"] == {
        "pin_id": "jp-B001",
        "title": "青い 椅子 & more",
        "description": "Acme 青い 青い solid 椅子 for 5 < 6 rooms",
        "brand": "Acme",
        "color": "青い",
    }
    assert pins["us-B000"]["description"] == "red" and pins["us-B000"]["brand"] is None


def test_html():
    text = "<p>Caf&eacute; <B class=x>bo</B>ld</p><ul><li>a &lt; b</li></ul>"
    text += "<script>if (1 < 2)</script>5 <3<!--\n-->"
    assert from_esci.plain_text(text) == "Café bold a < b 5 <3"
    assert from_esci.plain_text("&amp;lt;b&amp;gt;\n x") == "&lt;b&gt; x"  # once, not twice


def test_sides(esci):
    """English trains, the test split evaluates, all else is shown; a text that evaluates trains nowhere."""
    queries = {row["query_id"]: row for row in read(esci[1], "queries")}
    examples = {}
    for row in zip(*judgments().values()):
        found = dict(zip(COLUMNS, row))
        examples[str(found["query_id"]), f"{found['product_locale']}-{found['product_id']}"] = found
    labels = {(row["query_id"], row["pin_id"]): row for row in read(esci[1], "labels")}
    shown = {(row["query_id"], row["pin_id"]) for row in read(esci[1], "impressions")}
    assert not shown & set(labels)
    for pair, found in examples.items():
        if not found["small_version"]:
            assert pair not in labels and pair not in shown
        elif found["split"] == "test":
            assert labels[pair]["split"] == "eval"
        elif found["product_locale"] == "us" and found["query"] != "PS5":
            assert labels[pair]["split"] == "train"
        else:
            assert pair in shown
        if pair in labels:
            assert labels[pair]["label"] == {"E": 5, "S": 4, "C": 3, "I": 1}[found["esci_label"]]
    assert {row["language"] for row in queries.values()} == {"en", "es", "ja"}
    assert "ja" in {queries[row["query_id"]]["language"] for row in labels.values()}
    RawTables(esci[1]).check()


def test_settings(esci, tmp_path):
    flags = [
        "--version",
        "large",
        "--levels",
        "E=5,S=4,C=2,I=1",
        "--locales",
        "us",
        "jp",
        "--train-locales",
        "jp",
    ]
    from_esci.main([str(esci[0]), "--out", str(tmp_path / "out"), *flags])
    queries = {row["query_id"]: row["language"] for row in read(tmp_path / "out", "queries")}
    labels = read(tmp_path / "out", "labels")
    assert {queries[row["query_id"]] for row in labels if row["split"] == "train"} == {"ja"}
    assert set(queries.values()) == {"en", "ja"} and {row["label"] for row in labels} == {5, 4, 2, 1}
    assert len(labels) + len(read(tmp_path / "out", "impressions")) == 6 * (19 + 10)
    from_esci.main([str(esci[0]), "--out", str(tmp_path / "some"), "--share", "0.5"])
    assert 8 < len(read(tmp_path / "some", "queries")) < 28


def test_what_does_not_hold_is_one_line(esci, tmp_path):
    def refused(*flags, folder=esci[0]):
        return stop_line(from_esci.main, [str(folder), "--out", str(tmp_path / "out"), *flags])

    assert "pins: no rows" in refused("--share", "0")
    assert "impressions: no rows" in refused("--locales", "jp", "--train-locales", "jp")
    assert "'label'" in refused("--levels", "E=5,S=4,C=3")
    line = refused(folder=tmp_path / "none")
    assert "products.parquet" in line or "examples.parquet" in line and "esci-data" in line
    lost = catalogue()
    write_table(tmp_path / "lost", "shopping_queries_dataset_examples", judgments())
    write_table(tmp_path / "lost", "shopping_queries_dataset_products", {k: v[1:] for k, v in lost.items()})
    assert "us-B000" in refused(folder=tmp_path / "lost")


def test_the_five_stages(esci, models, tmp_path):
    """On four levels, in three languages, with a model of random weights as encoder and teacher."""
    run = ["--run", str(tmp_path / "run")]
    cpu, bert = ["--device", "cpu"], str(models["bert"])
    stage("01").main([*run, *cpu, "--data", str(esci[1]), "--text-encoder", bert, "--graph-dim", "4"])
    stage("02").main([*run, *cpu, "--model", bert, "--epochs", "1", "--rows", "24", "--batch-size", "8"])
    stage("03").main([*run, *cpu])
    stage("04").main([*run, *cpu, "--epochs", "1"])
    gains = ["--gains", "0", "0", "0.01", "0.1", "1"]
    stage("05").main([*run, *gains, "--resamples", "5", "--search-pages", "1"])
    found = read_json(tmp_path / "run" / "report" / "metrics.json")["systems"]
    assert set(found["student"]["by_language"]) == {"en", "es", "ja"}
    assert {"ndcg", "macro_f1", "accuracy"} <= found["teacher"]["by_language"]["ja"].keys()
    assert "nDCG, given gains" in (tmp_path / "run" / "report" / "report.md").read_text(encoding="utf-8")
    rows = read_json(tmp_path / "run" / "features" / "stage.json")["rows"]
    assert rows["impressions"] == len(read(esci[1], "impressions"))
    tokens = pq.read_table(
        tmp_path / "run" / "features" / "impressions", columns=["terms_matched", "query_index"]
    )
    assert max(tokens["terms_matched"].to_pylist()) == 1  # Japanese words are matched too, as their signs
