"""The page "From a shop's tables" of data/README.md: its SQL makes a dataset of a made-up export with
the oddities of real ones; README's commands make the report of it."""

import re
import shlex

import duckdb
import pytest
from helpers import ROOT, stage

from lib.tables.raw import RawTables, levels_of

LEVELS = "0=1,1=2,2=4,3=5"
EXPORT = {
    # A byte-order mark, line breaks and quotes in a cell, a renamed product, a bare one
    "products": """\ufeffsku;ean;name;description;brand;price;attributes;categories;image_url;updated
00017;4006381333931;Old kettle;;Ardo;99;NULL;["Offers"];NULL;2023-01-02
00017;4006381333931;Kettle;"Boils 1,7 l
""fast"" ; quietly";Ardo;1.125,95;"{""colour"": ""red"", ""max. litres"": 1.7}";"[""Home"", ""Kitchen""]";https://shop.example/17.jpg;2024-01-02
00018;NULL;Teekanne;NULL;NULL;on request;{};[];;2024-01-02
19;x;NULL;NULL;Ardo;12;NULL;NULL;NULL;2024-01-02
""",
    "rankings": """term;sku;position
Red Kettle;00017;1
red kettle;00018;2
red kettle;00018;2
red kettle;gone;3
red kettle;19;101
te\u0301;00018;1
""",
    # Spellings in case, spaces and composed letters; three raters; a product that is gone; no rating at all
    "ratings": """term;sku;rater;rating
Red Kettle;00017;ann;3
red kettle ;00017;bob;0
red kettle;00017;bob;1
red kettle;00017;cy;3
red kettle;00018;ann;1
red kettle;00018;bob;2
t\u00e9;00018;ann;0
t\u00e9;00017;ann;cannot tell
red kettle;gone;ann;3
""",
    "events": """time;action;term;sku
2024-05-01 23:59:59;order;red kettle;00017
2024-05-01 08:00:00;add_to_cart;red kettle;00017
2024-05-02 08:00:00;click;red kettle;00017
2024-05-02 08:00:00;order;NULL;00018
2024-05-03 08:00:00;order;red kettle;gone
""",
}


COLOURS, THINGS = ("red", "green", "blue", "white"), ("chair", "table", "lamp", "sofa")


def grown(export):
    """The same with a product for each colour and thing, each thing and colour searched for, shown with every
    product and rated by two."""
    products = [(f"{colour} {thing}", f"9{i}") for i, colour in enumerate(COLOURS) for thing in THINGS]
    products = [(name, f"{sku}{i}") for i, (name, sku) in enumerate(products)]
    terms = [*THINGS, *COLOURS, *(name for name, _ in products)]
    more = {name: [] for name in export}
    for name, sku in products:
        more["products"].append(f"{sku};;{name};made of wood;Ardo;{sku},5;{{}};[];;2024-01-02")
    for t, term in enumerate(terms):
        for r, (name, sku) in enumerate(products):
            more["rankings"].append(f"{term};{sku};{r + 1}")
            if (t + r) % 3 == 0:
                right = len(set(term.split()) & set(name.split())) / len(term.split())
                more["ratings"] += [f"{term};{sku};ann;{3 * right:.0f}", f"{term};{sku};bob;{2 * right:.0f}"]
        more["events"].append(f"2024-05-01 08:00:00;order;{term};{products[t % len(products)][1]}")
    return {name: text + "\n".join([*more[name], ""]) for name, text in export.items()}


def dataset(export, folder):
    """FOLDER/shop: the dataset that the page's SQL makes of an export."""
    page = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    [sql] = re.findall(r"^```sql\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (folder / "export").mkdir()
    (folder / "shop").mkdir()
    for name, text in export.items():
        (folder / "export" / f"{name}.csv").write_text(text, encoding="utf-8")
    with duckdb.connect() as db:
        db.execute(sql)
    return folder / "shop"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """The dataset made of EXPORT, opened."""
    monkeypatch.chdir(tmp_path)
    return RawTables(dataset(EXPORT, tmp_path), levels=levels_of(LEVELS))


def rows(raw, sql):
    return raw.db.execute(sql).fetchall()


def test_the_export_passes_the_tables_checks(shop):
    shop.check()


def test_products_become_pins(shop):
    found = rows(shop, "SELECT pin_id, title, description, brand, price FROM raw_pins ORDER BY ALL")
    kettle = 'Ardo. colour red, max. litres 1.7. Boils 1,7 l\n"fast" ; quietly'
    assert found == [
        ("00017", "Kettle", kettle, "Ardo", 1125.95),
        ("00018", "Teekanne", None, None, None),
        ("19", None, "Ardo", "Ardo", 12.0),
    ]
    assert rows(shop, "SELECT * FROM raw_boards ORDER BY ALL") == [("00017", "Home"), ("00017", "Kitchen")]


def test_spellings_are_one_query_and_raters_one_label(shop):
    assert rows(shop, "SELECT query_id, query, language FROM raw_queries ORDER BY ALL") == [
        ("red kettle", "red kettle", "de"),
        ("té", "té", "de"),
    ]
    found = rows(shop, "SELECT query_id, pin_id, label FROM raw_labels ORDER BY ALL")
    assert found == [("red kettle", "00017", 5), ("red kettle", "00018", 2), ("té", "00018", 1)]


def test_impressions_and_engagements(shop):
    found = rows(shop, "SELECT query_id, pin_id FROM raw_impressions ORDER BY ALL")
    assert found == [("red kettle", "00017"), ("red kettle", "00018"), ("té", "00018")]
    found = rows(shop, "SELECT query, pin_id, date::VARCHAR, count FROM raw_engagements ORDER BY ALL")
    assert found == [("red kettle", "00017", "2024-05-01", 2), ("red kettle", "gone", "2024-05-03", 1)]


def test_from_export_to_report_by_readmes_commands(tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = dataset(grown(EXPORT), tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Your data")[2]
    [block] = re.findall(r"^```\n(ENC=.*?)^```", readme, re.DOTALL | re.MULTILINE)
    values = {"$RUN": str(tmp_path / "run"), "$ENC": str(models["bert"]), "DATASET_DIR": str(folder)}
    scripts = []
    for line in block.splitlines()[1:]:
        python, script, *arguments = shlex.split(line, comments=True)
        arguments = [values.get(argument, argument) for argument in arguments]
        if script.startswith("01"):
            arguments += ["--levels", LEVELS]
        assert python == "python"
        stage(script[:2]).main(arguments)
        scripts.append(script[:2])
    assert scripts == ["01", "01", "02", "03", "04", "04", "05"]
    report = (tmp_path / "run" / "report" / "report.md").read_text(encoding="utf-8")
    assert all(system in report for system in ("bm25", "student_human_labels", "student", "teacher"))
