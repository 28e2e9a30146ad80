"""Stage 01: raw tables -> the features of queries, pins and (query, pin) pairs.

Paper: "Pin Text Representations" (the six text sources) and "Distill LLM into Servable Student Model" (the
student's features).

    1  the raw tables, checked; their rows numbered
    2  the text of a pin: its own, BLIP's caption, and what logs of queries, boards and link visits say
    3  embeddings, once a query and once a pin
    4  match features of every labelled and unlabelled pair: BM25, cosine, engagement
    5  a summary

Reads   --data DIR      raw tables, see data/README.md
Writes  RUN/features/   pins.parquet, queries.parquet (row number = index), *_embedding.npy,
                        labelled.parquet, impressions/part-*.parquet, skipped_images.csv, stage.json;
                        for new texts: bm25.parquet, graph.parquet; engagements.parquet of engaged pairs

Toy     python data/toy/make_toy.py && python 01_build_features.py
Yours   python 01_build_features.py --check --data DIR      in seconds: all that is wrong or odd in the tables
Paper   accelerate launch 01_build_features.py --preset paper --data /data/search --run /runs/search
        captions and text embeddings are dealt to processes; any number of them continues
Later   the same with --base /runs/search --run /runs/tuesday: the next day
"""

import functools
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from common import FIELDS
from lib import models
from lib.inputs.base import open_base
from lib.inputs.bm25 import tokenize
from lib.inputs.captions import caption_pictures, captions_of, plan_captions, reuse_captions
from lib.inputs.encoders import captioner_config, embed_texts, encoder_config, gather_embeddings
from lib.inputs.graph import graph_embedding
from lib.inputs.match import (
    ENGAGEMENTS,
    MATCH_FEATURES,
    RULES,
    WINDOW_YEARS,
    open_match_features,
    pin_texts,
    query_texts,
)
from lib.stages.files import hashed, write_parquet
from lib.stages.processes import lead, start_processes
from lib.stages.settings import ROOT, Count, ModelSettings, Share, Size, Width, parse
from lib.stages.stage import Stage
from lib.stages.streams import keep_chunks, slices, write_stream
from lib.stages.terminal import Stop, run_main
from lib.tables import look
from lib.tables.embeddings import own_embeddings, own_fingerprint, users_embedding
from lib.tables.images import pictures_fingerprint, read_pictures, write_skipped
from lib.tables.indexed import index_pairs, number_rows, pair_numbers, refuse_names, refuse_twice
from lib.tables.raw import REQUIRED, RawTables, levels_of
from lib.tables.splits import split_of


@dataclass(frozen=True)
class Settings(ModelSettings):
    """Settings of stage 01; the defaults are the toy's."""

    base: Path | None = None  # run to build on: its statistics, so that its student reads these features
    data: Path = ROOT / "data" / "toy" / "tables"  # dataset folder with the raw tables
    check: bool = False  # look at the tables alone: what is wrong or odd, what becomes of each column
    levels: str = ""  # what labels other than 1 to 5 mean: E=5,S=4,C=3,I=1, or 0=1,1=2,2=4,3=5 (no level 3)
    eval_share: Share = 0.1  # share of the queries that evaluate, by a hash, where labels have no split
    caption_model: str = str(ROOT / "data/toy/models/blip")  # BLIP; its vision tower also embeds the image
    caption_tokens: Count = 12  # longest caption, in tokens
    image_batch: Count = 64  # images a captioning batch
    text_encoder: str = str(ROOT / "data/toy/models/bert")  # mean-pooled encoder of query and pin texts
    text_tokens: Count = 64  # longest text the text encoder sees, in tokens
    token_batch: Count = 4_096  # tokens a text-encoder batch, padding included
    as_of: date | None = None  # end of the two-year engagement window (default: the log's newest date)
    top_tokens: Count = 6  # tokens kept a pin from engaged queries, and as many from board titles
    graph_dim: Width = 32  # size of the pin-board graph embedding
    shard_rows: Count = 8_192  # impressions a shard
    memory: str = "4GB"  # DuckDB's memory limit; beyond it, it spills to disk
    workers: Count = 2  # processes that tokenize pins' texts, if these are more than 200,000
    seed: Size = 0  # of the pin graph's embedding


# Our choice; the paper's embeddings are SearchSage's.
MINILM = "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"
# Not stated in the paper, our choice; of the tokens it says "top", not how many.
SIZES = dict(text_tokens=128, caption_tokens=30, top_tokens=20, shard_rows=250_000, precision="auto")
REAL = replace(Settings(), data=ROOT / "data" / "search", text_encoder=MINILM, **SIZES)
# BLIP: stated; its size: our choice, of base a laptop captions some images a second. token_batch: our choice.
BASE, LARGE = (f"Salesforce/blip-image-captioning-{size}" for size in ("base", "large"))
SMALL = replace(REAL, preset="small", caption_model=BASE, token_batch=8_192, graph_dim=64)
# graph_dim: the size of PinSage-like embeddings in Pinterest's public code.
PAPER = replace(REAL, preset="paper", caption_model=LARGE, token_batch=65_536, graph_dim=256)
PRESETS = {"toy": Settings(), "small": SMALL, "paper": PAPER}
MIN_DWELL = 10  # paper: link visits that stayed 10 seconds or more
CHUNK = 4_096  # images captioned, or texts embedded, between two files of a resumable cache
WORTH_PROCESSES = 200_000  # pins; the text of fewer is counted faster by one process


# ------------------------------------------------------------------------------------------------------------
# Text from logs, in SQL


def top_tokens(raw, source, target, k):
    """Makes the table `target`(pin_id, text): of every pin the k tokens with the largest counts over
    source(pin_id, text, n), ties by token."""
    raw.ask(f"CREATE TABLE {source}_tokens (text VARCHAR, token VARCHAR)")
    for batch in raw.batches(f"SELECT DISTINCT text FROM {source}"):
        tokens = [[*{*tokenize(text, False)}] for text in batch["text"].to_pylist()]
        found = pa.table({"text": batch["text"], "tokens": pa.array(tokens, pa.list_(pa.string()))})
        raw.ask(f"INSERT INTO {source}_tokens SELECT text, unnest(tokens) FROM found", found=found)
    raw.ask(f"""
        CREATE TABLE {target} AS
        SELECT pin_id, string_agg(token, ' ' ORDER BY total DESC, token) AS text FROM (
            SELECT pin_id, token, sum(n) AS total FROM {source} JOIN {source}_tokens USING (text)
            GROUP BY pin_id, token
            QUALIFY row_number() OVER (PARTITION BY pin_id ORDER BY total DESC, token) <= {k})
        GROUP BY pin_id""")


def top_links(raw, target):
    """Makes the table `target`(pin_id, text): title and description of the link with the most visits that
    stayed, ties by text; links that say nothing do not count."""
    raw.ask(f"""
        CREATE TABLE {target} AS
        WITH stayed AS (
            SELECT pin_id, concat_ws(' ', link_title, link_description) AS text, count(*) AS n
            FROM raw_link_visits WHERE dwell_seconds >= {MIN_DWELL} GROUP BY ALL)
        SELECT pin_id, text FROM stayed WHERE NOT is_blank(text)
        QUALIFY row_number() OVER (PARTITION BY pin_id ORDER BY n DESC, text) = 1""")


def text_from_logs(raw, as_of, k):
    """What the logs say of a pin: makes the tables pin_queries, pin_boards, pin_links (pin_id, text), from
    engaged(pin_id, text, n), events of a pin and a query (its key) in the WINDOW_YEARS up to and including
    `as_of` or the newest date, and saves(pin_id, text, n), n saves on boards of a title. Returns the end of
    the window; None: there is no log."""
    as_of = as_of or raw.ask("SELECT max(date) FROM raw_engagements")[0][0]
    end = f"DATE '{as_of}'" if as_of else "NULL::DATE"
    raw.ask(f"""
        CREATE TABLE engaged AS
        SELECT pin_id, query_key(query) AS text, sum(count)::DOUBLE AS n FROM raw_engagements
        WHERE date > {end} - INTERVAL {WINDOW_YEARS} YEAR AND date <= {end} GROUP BY ALL""")
    raw.ask("""
        CREATE TABLE saves AS
        SELECT pin_id, board_title AS text, count(*) AS n
        FROM raw_boards WHERE board_title IS NOT NULL GROUP BY ALL""")
    top_tokens(raw, "engaged", "pin_queries", k)
    top_tokens(raw, "saves", "pin_boards", k)
    top_links(raw, "pin_links")
    return as_of


def write_texts(raw, captions, out):
    """query_rows -> queries.parquet; pin_rows, captions (Arrow) and pin_queries, pin_boards, pin_links ->
    pins.parquet; both in index order."""
    queries = """
        SELECT * EXCLUDE (query_index) REPLACE (coalesce(plain_tag(language), 'en') AS language)
        FROM query_rows ORDER BY query_index"""
    write_stream(out / "queries.parquet", raw.batches(queries, 50_000))
    captions = pa.table({"pin_index": np.arange(len(captions), dtype=np.int32), "caption": captions})
    pins = """
        SELECT pin_id, coalesce(title, '') AS title, coalesce(description, '') AS description, caption,
               coalesce(q.text, '') AS queries, coalesce(b.text, '') AS boards, coalesce(l.text, '') AS links,
               pin_rows.* EXCLUDE (pin_index, pin_id, title, description)
        FROM pin_rows JOIN captions USING (pin_index) LEFT JOIN pin_queries q USING (pin_id)
        LEFT JOIN pin_boards b USING (pin_id) LEFT JOIN pin_links l USING (pin_id) ORDER BY pin_index"""
    write_stream(out / "pins.parquet", raw.batches(pins, 50_000, captions=captions))


# ------------------------------------------------------------------------------------------------------------
# Match features of pairs


def write_labelled(raw, features_of, numbers, share, path):
    """labelled.parquet: label, split, features. numbers: {numeric column: SQL}. Returns {split: rows}."""
    columns = {"label": "label::TINYINT", "split": "split", **numbers}
    pairs = pa.concat_tables(index_pairs(raw, "labels", columns))
    keys = raw.table("SELECT query_key(query) AS key FROM query_rows ORDER BY query_index")["key"]
    keys = keys.take(pairs["query_index"]).to_pylist()
    split, counts = split_of(keys, pairs["split"].to_pylist(), share, raw.name["labels"])
    columns = features_of(pairs)
    indices = {name: columns.pop(name) for name in ("query_index", "pin_index")}
    write_parquet(path, {**indices, "label": pairs["label"].to_numpy(), "split": split, **columns})
    return counts


# ------------------------------------------------------------------------------------------------------------


def make_captions(pictures, settings, inputs, share, out):
    """Captions every pin's picture, by all processes. Writes pin_visual_embedding.npy and skipped_images.csv.
    Returns captions (Arrow, in pin order; "": none), and numbers of pins: {captioned, skipped}; None: no pin
    has a picture."""
    captions, reasons = pa.array([""] * len(pictures)), pictures["reason"]
    if pictures["image"].null_count == len(pictures):
        return captions, None
    if "caption model" in inputs:  # else no picture can be read
        key = hashed([inputs["caption model"], inputs["precision"], settings.caption_tokens])
        cache = out / "captions" / key[:16]
        plan_captions(pictures, cache, plan := out / "work" / "captions.parquet")
        share("captions", plan, cache, CHUNK)
        captions, reasons = captions_of(pictures, cache, out)
    skipped = write_skipped(out / "skipped_images.csv", pictures, reasons)
    captioned = len(pictures) - pictures["image"].null_count - skipped
    note = ", see features/skipped_images.csv" if skipped else ""
    print(f"captions: {captioned:,} pins; {skipped:,} images skipped{note}")
    return captions, {"captioned": captioned, "skipped": skipped}


def make_embeddings(raw, settings, own, share, out, base):
    """Every *_embedding.npy: the user's own, else ours, by all processes. Prints which rows have none."""
    for side, table, texts in (("query", "queries", query_texts), ("pin", "pins", pin_texts)):
        ids = pq.read_table(out / f"{table}.parquet", columns=[f"{side}_id"])[f"{side}_id"].combine_chunks()
        for name in own:
            if name.startswith(side):
                source = raw.folder / "embeddings" / f"{name}.npy"
                missing = users_embedding(source, ids, out / f"{name}_embedding.npy")
                print(f"{source.name}: {missing:,} of {len(ids):,} {table} have no row there and get zeros")
        if f"{side}_text" not in own:
            vectors, place = base.known_texts(side, texts, out) if base else (None, np.full(len(ids), -1))
            config = encoder_config(settings.text_encoder, settings.text_tokens)
            files = share("texts", out / f"{table}.parquet", out / "work" / f"{side}_text", place < 0, CHUNK)
            gather_embeddings(files, out / f"{side}_text_embedding.npy", config.hidden_size, place, vectors)
    if "pin_graph" not in own:
        pins = pq.read_metadata(out / "pins.parquet").num_rows
        graph_embedding(raw, pins, settings.graph_dim, settings.seed, out, base)


def write_pairs(raw, match, numbers, settings, out):
    """All files of pairs, with match features and the user's `numbers`: of labelled ones, of impressions
    (`shard_rows` a shard; one that is there is complete and kept), and events of the engaged ones. Returns
    {split: labelled rows}."""
    features_of = functools.partial(match.columns, numbers=list(numbers))
    splits = write_labelled(raw, features_of, numbers, settings.eval_share, out / "labelled.parquet")
    shards = slices(index_pairs(raw, "impressions", numbers), settings.shard_rows)
    [[total]] = raw.ask("SELECT count(*) FROM raw_impressions")
    for _ in keep_chunks(out / "impressions", shards, features_of, total, "impressions"):
        pass
    engaged = "SELECT query_index, pin_index, engaged FROM engaged_pairs ORDER BY query_index, pin_index"
    if raw.ask(f"{engaged} LIMIT 1"):
        write_stream(out / ENGAGEMENTS, raw.batches(engaged))
    else:
        write_parquet(out / ENGAGEMENTS, raw.table(engaged))
    return splits


def inputs_of(raw, settings, own, pictures, hardware):
    """Fingerprints of everything that the result depends on. own: names of the user's embeddings."""
    found = raw.fingerprints() | {f"embeddings/{name}": own_fingerprint(raw.folder, name) for name in own}
    found["rules"] = {"version": RULES, "fields": [*FIELDS], "match features": [*MATCH_FEATURES]}
    if pictures["image"].null_count < len(pictures):
        found["images"] = pictures_fingerprint(pictures)
    if pictures["digest"].null_count < len(pictures):
        captioner_config(settings.caption_model)  # an error ends here, not hours later
        found["caption model"] = models.model_fingerprint(settings.caption_model)
        found["precision"] = hardware
    if not {"query_text", "pin_text"} <= set(own):
        encoder_config(settings.text_encoder, settings.text_tokens)  # likewise
        found["text encoder"] = models.model_fingerprint(settings.text_encoder)
        found["precision"] = hardware
    return found


def about_dataset(raw, settings, inputs, counts, splits, as_of):
    """Prints the engagement window. Returns what stage.json says of the dataset and the models used."""
    if as_of:
        print(f"engagement window: {WINDOW_YEARS} years up to {as_of}")
    names = {"text encoder": settings.text_encoder, "caption model": settings.caption_model}
    used = {kind: {"name": names[kind], "fingerprint": inputs[kind]} for kind in names if kind in inputs}
    facts = {"dataset": str(settings.data.resolve()), "as_of": as_of and str(as_of), "models": used}
    facts["levels"] = [int(level) for (level,) in raw.ask("SELECT DISTINCT label FROM raw_labels ORDER BY 1")]
    return {**facts, "rows": {**counts, **{f"labelled_{split}": n for split, n in splits.items()}}}


def open_tables(settings, faults=None):
    """The raw tables. faults: of RawTables."""
    if settings.data == PRESETS["toy"].data and not settings.data.exists():
        raise Stop(f"{settings.data}: missing; make the toy dataset with: python data/toy/make_toy.py")
    return RawTables(settings.data, settings.memory, levels_of(settings.levels), faults=faults)


def check_tables(settings):
    """--check: prints what is wrong or odd in the tables, and what becomes of each column."""
    raw = open_tables(settings, faults=[])
    labels = "SELECT query_key(q.query), l.split FROM raw_labels l JOIN raw_queries q USING (query_id)"

    def splits():
        if not raw.faults:
            split_of(*zip(*raw.ask(labels)), settings.eval_share, raw.name["labels"])

    numbers = functools.partial(pair_numbers, raw, MATCH_FEATURES)
    own = functools.cache(functools.partial(own_embeddings, raw.folder))  # all vectors are read
    checks = {
        "pins": lambda: refuse_names(raw, "pins", ("pin_index", *FIELDS)),
        "queries": lambda: refuse_names(raw, "queries", ("query_index",)),
        "labels impressions": numbers,
        "": own,
        " ".join(REQUIRED): lambda: refuse_twice(raw, own(), numbers()),
        "labels queries": splits,
    }
    if settings.base:
        print(f"--base {settings.base}: not looked at: --check is of the tables alone")
    look.check(raw, checks)


def main(argv=None):
    settings = parse(PRESETS, argv, __doc__)
    if settings.check:
        check_tables(settings)
        return
    models.quiet_libraries()
    accelerator, dtype, hardware = start_processes(settings)
    jobs = {"captions": caption_pictures, "texts": embed_texts}
    for name, job in jobs.items():
        jobs[name] = functools.partial(job, settings, (accelerator.device, dtype))
    lead(accelerator, functools.partial(build, settings, hardware), jobs)


def build(settings, hardware, share):
    """The stage in its main process. hardware: in words; share: of lead(), for what all processes do."""
    torch.manual_seed(settings.seed)

    # 1. Raw tables: open, check, before any model is looked for; number the rows
    raw = open_tables(settings)
    read, counts = raw.stamps(), raw.count_rows()
    print(f"{settings.data}: {', '.join(f'{n:,} {name}' for name, n in counts.items())}; {hardware}")
    raw.check()
    own, pictures = own_embeddings(raw.folder), read_pictures(raw)
    inputs = inputs_of(raw, settings, own, pictures, hardware)
    base = open_base(settings, inputs)
    stage = Stage(settings.run / "features", settings, inputs)
    if stage.done:
        return
    out = stage.folder
    reuse_captions([stage.old, base and base.folder], out)
    stage.made_from(read, spare="captions")
    raw.spill_to(out / "work" / "spill")
    number_rows(raw, "pins", "pin", reserved=FIELDS)
    number_rows(raw, "queries", "query")
    numbers = pair_numbers(raw, reserved=MATCH_FEATURES)
    refuse_twice(raw, own, numbers)
    look.show(raw)

    # 2. Pin text: captions, and what logs say of a pin  (paper: "Pin Text Representations")
    captions, images = make_captions(pictures, settings, inputs, share, out)
    as_of = text_from_logs(raw, settings.as_of, settings.top_tokens)
    write_texts(raw, captions, out)

    # 3. Embeddings, once a query and once a pin
    make_embeddings(raw, settings, own, share, out, base)
    if base:
        base.complete(out, numbers)

    # 4. Match features of every labelled and unlabelled pair
    match = open_match_features(out, settings.workers if counts["pins"] > WORTH_PROCESSES else 1, base)
    splits = write_pairs(raw, match, numbers, settings, out)

    # 5. Summary
    facts = about_dataset(raw, settings, inputs, counts, splits, as_of)
    facts |= base.report() if base else {}
    raw.db.close()
    stage.refuse_changed(read, raw.stamps())
    stage.finish(without=["work"], images=images, **facts)


if __name__ == "__main__":
    run_main(main)
