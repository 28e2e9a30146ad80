"""Amazon's Shopping Queries Dataset, ESCI (Reddy et al., 2022, arXiv 2206.06588, Apache-2.0) -> raw tables.

    python data/from_esci.py SOURCE_DIR --out data/esci

SOURCE_DIR holds the two Parquet files of github.com/amazon-science/esci-data, shopping_queries_dataset/.

    title; brand, colour, bullet points, description     title; description, without HTML; brand, color
    exact, substitute, complement, irrelevant            labels, as --levels says
    split test, of every locale                          labels to evaluate
    split train, of --train-locales; of other locales    labels to train; impressions, their labels hidden

A product is one a locale, LOCALE-ASIN. A text that evaluates in a locale trains in none: it is impressions.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import conversion  # the project's folder is on the path with it
import pyarrow as pa
from tyro.conf import Positional

from lib.stages.settings import ROOT, flags_read
from lib.stages.streams import write_stream
from lib.stages.terminal import Stop, run_main
from lib.tables.database import Database
from lib.tables.files import listed, text_literal
from lib.tables.raw import RawTables, levels_of

LANGUAGE = {"us": "en", "es": "es", "jp": "ja"}  # of a locale's queries
INLINE = re.compile(r"</?(?:a|b|big|em|font|i|small|span|strong|sub|sup|u)(?:\s[^<>]*)?>", re.IGNORECASE)
MARKUP = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[a-z][^<>]*>", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Settings:
    """What of the dataset is used, and as what."""

    source: Positional[Path]  # folder with the two files
    out: Path = ROOT / "data" / "esci"  # dataset folder
    version: Literal["small", "large"] = "small"  # small: of task 1, large: of task 2
    locales: tuple[Literal["us", "es", "jp"], ...] = ("us", "es", "jp")  # that are used
    train_locales: tuple[Literal["us", "es", "jp"], ...] = ("us",)  # whose labels train
    levels: str = "E=5,S=4,C=3,I=1"  # what the four labels mean
    share: float = 1.0  # of the queries, by a hash of their text
    memory: str = "4GB"  # DuckDB's memory limit


EXAMPLES = """
    CREATE TABLE examples AS
    SELECT query_id::VARCHAR AS query_id, query, product_locale || '-' || product_id AS pin_id,
           MAP {languages}[product_locale] AS language, CASE esci_label {levels} ELSE NULL END AS label,
           CASE WHEN split = 'test' THEN 'eval'
                WHEN product_locale IN {trains} AND NOT is_evaluated THEN 'train' END AS split
    FROM (SELECT *, bool_or(split = 'test') OVER (PARTITION BY query_key(query)) AS is_evaluated
          FROM {examples} WHERE {version}_version = 1 AND product_locale IN {locales}
          AND md5_number_lower(query_key(query)) % 1000000 < {share} * 1000000) ORDER BY example_id"""
TABLES = {
    "pins": """SELECT product_locale || '-' || product_id AS pin_id, product_title AS title,
            product_brand AS brand, product_color AS color,
            concat_ws(' ', brand, color, product_bullet_point, product_description) AS description
        FROM {products} WHERE pin_id IN (SELECT pin_id FROM examples)""",
    "queries": "SELECT DISTINCT query_id, query, language FROM examples ORDER BY ALL",
    "labels": "SELECT query_id, pin_id, label, split FROM examples WHERE split IS NOT NULL",
    "impressions": "SELECT query_id, pin_id FROM examples WHERE split IS NULL",
}


def plain_text(text):
    """A text without HTML, on one line. A tag parts words, but for those that stand inside of one (<b>)."""
    if "<" in text or "&" in text:
        text = html.unescape(MARKUP.sub(" ", INLINE.sub("", text)))
    return " ".join(text.split())


def without_html(batch):
    """An Arrow batch with plain titles and descriptions, where it has any."""
    for name in {"title", "description"} & set(batch.schema.names):
        texts = pa.array([plain_text(text or "") for text in batch[name].to_pylist()])
        batch = batch.set_column(batch.schema.get_field_index(name), name, texts)
    return batch


def convert(raw, settings):
    """The two files -> tables in settings.out."""
    told = {"version": settings.version, "share": settings.share, "languages": LANGUAGE}
    told |= {"locales": [*settings.locales], "trains": [*settings.train_locales]}  # written as in SQL
    for name in ("examples", "products"):
        path = settings.source / f"shopping_queries_dataset_{name}.parquet"
        path = conversion.source_file(path, "github.com/amazon-science/esci-data")
        told[name] = f"read_parquet({listed([path])})"
    levels = (levels_of(settings.levels) or {}).items()
    told["levels"] = " ".join(f"WHEN {text_literal(label)} THEN {level}" for label, level in levels)
    raw.ask(EXAMPLES.format(**told))
    for name, sql in TABLES.items():
        if not raw.ask(f"SELECT 1 FROM ({sql.format(**told)}) LIMIT 1"):
            raise Stop(f"{name}: no rows; of --locales some must be in --train-locales, and some must not")
        batches = map(without_html, raw.batches(sql.format(**told), 20_000))
        write_stream(settings.out / f"{name}.parquet", batches)


def main(argv=None):
    settings = flags_read(Settings, None, argv, __doc__.split("\n")[0])
    settings.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".spill", dir=settings.out) as spill:
        convert(Database(settings.source, settings.memory, spill), settings)
        made = RawTables(settings.out, settings.memory, spill=spill)
        made.check()
        print(f"wrote {settings.out}: {made.count_rows()} rows")


if __name__ == "__main__":
    run_main(main)
