"""The page "From a shop's tables" of data/README.md: its SQL makes a dataset of a made-up export with
the oddities of real ones."""

import re

import duckdb
import pytest
from helpers import ROOT

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


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """The dataset that the page's SQL makes of EXPORT, opened."""
    page = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    [sql] = re.findall(r"^```sql\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "export").mkdir()
    (tmp_path / "shop").mkdir()
    for name, text in EXPORT.items():
        (tmp_path / "export" / f"{name}.csv").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with duckdb.connect() as db:
        db.execute(sql)
    return RawTables(tmp_path / "shop", levels=levels_of(LEVELS))


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
