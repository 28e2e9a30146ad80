"""User Behavior Insights (UBI 1.x, OpenSearch and Elasticsearch) -> queries, impressions, engagements.

    python data/from_ubi.py EXPORT.ndjson.gz … --out data/mine

EXPORT     documents of ubi_queries and ubi_events, one a line, as they are, as a bulk request, or as hits
data/mine  a dataset that holds its pins, under the ids of the events' objects

    a search (ubi_queries, or an event's user_query,       queries: one a text, under the dataset's id, or one
      or the message of a QUERY event)                       made of the text
    an impression; a hit of query_response_hit_ids         a row of impressions
    an event whose action_name is in --actions             counted in engagements: query, pin and day (UTC)

What cannot be used is listed in skipped_events.csv, by action and reason, with the first search of each.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import conversion  # the project's folder is on the path with it
from tyro.conf import Positional

from lib.stages.settings import ROOT, flags_read
from lib.stages.terminal import Stop, run_main
from lib.tables.files import list_skipped, listed, table_name, text_literal
from lib.tables.raw import RawTables


@dataclass(frozen=True)
class Settings:
    """What is read, and which events count."""

    source: Positional[tuple[Path, ...]]  # files of JSON lines, each may be gzipped
    out: Path = ROOT / "data" / "search"  # dataset folder, with pins
    actions: tuple[str, ...] = ("click", "item_click", "add_to_cart", "purchase")  # action_names that engage
    shown: tuple[str, ...] = ("impression",)  # action_names of what was shown
    language: str = "en"  # of new queries
    memory: str = "4GB"  # DuckDB's memory limit


# A document's fields, however old its generation of the format; a bulk request's lines have none of them.
DOCUMENTS = """
    CREATE TABLE documents AS
    SELECT d ->> 'query_id' AS search, d ->> 'action_name' AS action, d ->> 'timestamp' AS stamp,
           nullif(d ->> '$.event_attributes.object.object_id', '') AS pin_id,
           TRY_CAST(d -> 'query_response_hit_ids' AS VARCHAR[]) AS hits, d ->> 'user_query' AS typed,
           coalesce(typed, CASE WHEN d ->> 'message_type' = 'QUERY' THEN d ->> 'message' END) AS text,
           (action IS NOT NULL)::INT + (typed IS NULL)::INT AS doubt,
           coalesce(TRY_CAST(stamp AS TIMESTAMPTZ) AT TIME ZONE 'UTC',
               epoch_ms(TRY_CAST(stamp AS BIGINT) * if(length(stamp) < 12, 1000, 1))) AS moment
    FROM (SELECT coalesce(json -> '_source', json) AS d
          FROM read_ndjson_objects({files}, maximum_object_size = 67108864))
    WHERE search IS NOT NULL OR action IS NOT NULL"""
# One text a search: rather that of ubi_queries than an event's, rather user_query than a message.
SEARCHES = """
    CREATE TABLE searches AS
    SELECT search, trim(text) AS text, query_key(text) AS key FROM documents
    WHERE search IS NOT NULL AND NOT is_blank(text)
    QUALIFY row_number() OVER (PARTITION BY search ORDER BY doubt, moment, text) = 1"""
QUERIES = """
    CREATE TABLE texts AS
    SELECT key, min(text) AS text, min(known.query_id) AS old, coalesce(old, md5(key)[:16]) AS query_id
    FROM searches LEFT JOIN (SELECT query_id, query_key(query) AS key FROM raw_queries) known USING (key)
    GROUP BY key"""
EVENTS = """
    CREATE TABLE events AS
    WITH each AS (
        SELECT search, action, pin_id, moment FROM documents WHERE action IS NOT NULL
        UNION ALL SELECT search, 'a hit', unnest(hits), moment FROM documents WHERE action IS NULL)
    SELECT each.*, texts.query_id, searches.text, CASE
        WHEN action NOT IN ({shown}, {actions}) THEN 'an action that does not count'
        WHEN query_id IS NULL THEN 'no text of its search' WHEN pin_id IS NULL THEN 'no object'
        WHEN pin_id NOT IN (SELECT pin_id FROM raw_pins) THEN 'no such pin'
        WHEN moment IS NULL AND action IN ({actions}) THEN 'no time' END AS problem
    FROM each LEFT JOIN searches USING (search) LEFT JOIN texts USING (key)"""
SKIPPED = """
    SELECT action, problem, count(*)::VARCHAR, coalesce(min(search), '') FROM events WHERE problem IS NOT NULL
    GROUP BY ALL ORDER BY ALL"""
TABLES = {  # what is added to the dataset; queries: those with a row in the others
    "queries": """SELECT query_id, text AS query, {language} AS language FROM texts
        WHERE old IS NULL AND query_id IN (SELECT query_id FROM events WHERE problem IS NULL)""",
    "impressions": "SELECT query_id, pin_id FROM events WHERE problem IS NULL AND action IN ({shown})",
    "engagements": """SELECT text AS query, pin_id, moment::DATE AS date, count(*) AS count FROM events
        WHERE problem IS NULL AND action IN ({actions}) GROUP BY ALL""",
}


def convert(raw, settings):
    """The documents -> tables of the dataset `raw`."""
    names = {"shown": ("a hit", *settings.shown), "actions": settings.actions}
    told = {name: ", ".join(map(text_literal, actions)) for name, actions in names.items()}
    told |= {"files": listed(settings.source), "language": text_literal(settings.language)}
    for sql in (DOCUMENTS, SEARCHES, QUERIES, EVENTS):
        raw.ask(sql.format(**told))
    skipped, skips = raw.ask(SKIPPED), settings.out / "skipped_events.csv"
    list_skipped(skips, ("action", "reason", "events", "first search"), skipped)
    tables = {}
    for name, sql in TABLES.items():
        if raw.ask(f"SELECT 1 FROM ({sql.format(**told)}) LIMIT 1"):
            tables[name] = raw.batches(sql.format(**told))
    if not tables:
        raise Stop(f"{settings.source[0]}: nothing in it can be used, see {skips}")
    rows = conversion.add_tables(settings.out, table_name(settings.source[0]), tables)
    print("\n".join(f"skipped: {events} times {action}: {problem}" for action, problem, events, _ in skipped))
    print(f"{settings.out}: " + ", ".join(f"{n:,} {name}" for name, n in rows.items()))


def main(argv=None):
    settings = flags_read(Settings, None, argv, __doc__.split("\n")[0])
    raw = RawTables(settings.out, settings.memory, required=("pins",))
    with TemporaryDirectory(prefix=".spill", dir=settings.out) as spill:
        raw.spill_to(spill)
        convert(raw, settings)


if __name__ == "__main__":
    run_main(main)
