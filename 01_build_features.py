"""Stage 01: raw tables -> the features of queries, pins and (query, pin) pairs.

Paper: "Pin Text Representations" (the six text sources) and "Distill LLM into Servable Student Model" (the student's features).

Reads   --data DIR      raw tables, see data/README.md
Writes  RUN/features/   pins.parquet, queries.parquet (row number = index), *_embedding.npy, labelled.parquet,
                        impressions/part-*.parquet, skipped_images.csv, stage.json

Toy     python data/make_toy.py && python 01_build_features.py
Paper   python 01_build_features.py --preset paper --data /data/search --run /runs/search --as-of 2024-07-01
"""

import argparse
import concurrent.futures
import contextlib
import csv
import hashlib
import io
import multiprocessing
import os
import unicodedata
import warnings
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import regex
import torch
from PIL import Image, ImageOps
from rank_bm25 import BM25Okapi
from tqdm import tqdm

import common
from common import FIELDS, MATCH_FEATURES, ROOT, RawTables, Stage, Stop, write_parquet

PRESETS = {
    "toy": dict(data=ROOT / "data/toy", caption_model=str(ROOT / "data/toy_models/blip"), text_encoder=str(ROOT / "data/toy_models/bert"),
                precision="fp32", caption_tokens=12, text_tokens=64, top_tokens=6, graph_dim=32, shard_rows=8_192, image_batch=64, token_batch=4_096),
    "paper": dict(
        data=ROOT / "data/search",
        caption_model="Salesforce/blip-image-captioning-large",  # BLIP: stated in the paper; this size: our choice
        text_encoder="sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",  # our choice; the paper has SearchSage
        precision="auto", caption_tokens=30,  # not stated in the paper; our choice
        text_tokens=128,  # not stated in the paper; our choice
        top_tokens=20,  # "top tokens": stated; how many: our choice
        graph_dim=256,  # the size of PinSage-like embeddings in Pinterest's public code
        shard_rows=250_000,  # our choice
        image_batch=64, token_batch=65_536,  # our choice
    ),
}
WINDOW_YEARS = 2  # paper: engaged queries of the past two years
MIN_DWELL = 10  # paper: link visits that stayed 10 seconds or more
EVAL_SHARE = 0.1  # the paper has 30 thousand evaluation labels beside 280 thousand for training
CHUNK = 4_096  # pins captioned, or rows embedded, between two files of the resumable cache


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--data", type=Path, metavar="DIR", help="dataset folder with the raw tables")
    p.add_argument("--caption-model", metavar="PATH_OR_HUB_ID", help="a BLIP captioner; its vision tower also gives the visual embedding")
    p.add_argument("--text-encoder", metavar="PATH_OR_HUB_ID", help="mean-pooled encoder for query and pin text embeddings")
    p.add_argument("--as-of", type=date.fromisoformat, metavar="YYYY-MM-DD", help="end of the two-year engagement window (default: the newest date in the log)")
    p.add_argument("--top-tokens", type=int, metavar="N", help="tokens kept a pin from engaged queries, and as many from board titles")
    p.add_argument("--graph-dim", type=int, metavar="D", help="size of the pin-board graph embedding")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="of captioner and text encoder (auto: bf16 where the hardware has it)")
    p.add_argument("--caption-tokens", type=int, metavar="N", help="longest caption, in tokens")
    p.add_argument("--text-tokens", type=int, metavar="N", help="longest text the text encoder sees, in tokens")
    p.add_argument("--image-batch", type=int, metavar="N", help="images a captioning batch")
    p.add_argument("--token-batch", type=int, metavar="N", help="tokens a text-encoder batch, padding included")
    p.add_argument("--shard-rows", type=int, metavar="N", help="impressions a shard")
    p.add_argument("--memory", default="4GB", help="DuckDB's memory limit; beyond it, it spills to RUN/features (default: 4GB)")
    p.add_argument("--workers", type=int, default=2, metavar="N", help="processes that tokenise the pin text (default: 2)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--seed", type=int, default=0)
    return common.parse(p, PRESETS, argv)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens, for BM25 and for the top tokens

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TOKEN = regex.compile(rf"(?P<run>[{_UNSPACED}ー]+)|(?:(?![{_UNSPACED}])[\p{{L}}\p{{N}}\p{{M}}])+")
_ASCII = regex.compile(r"[a-z0-9]+")


def tokenize(text):
    """Runs of Unicode letters and digits, case-folded; a run of a script written without spaces as its character bigrams."""
    if text.isascii():
        return _ASCII.findall(text.lower())
    tokens = []
    for match in _TOKEN.finditer(unicodedata.normalize("NFKC", text).casefold()):
        word = match.group()
        if match.group("run") and len(word) > 2:
            tokens += [word[i:i + 2] for i in range(len(word) - 1)]
        else:
            tokens.append(word)
    return tokens


def pin_text(columns, i):
    """All text of pin i, the document BM25 and the text encoder see."""
    return " ".join(columns[name][i] for name in FIELDS if columns[name][i])


def pin_texts(path, rows=20_000):
    """The text of every pin of a pins.parquet in index order, in lists of `rows`."""
    for table in tables_of(path, rows, list(FIELDS)):
        columns = table.to_pydict()
        yield [pin_text(columns, i) for i in range(len(table))]


# ---------------------------------------------------------------------------------------------------------------------
# Images: caption and visual embedding from one pass of the vision tower


def load_image(root, path):
    """An image of the dataset as RGB. Raises ValueError with the reason: outside the dataset, missing, broken, or too large."""
    full = common.inside(root, path)
    try:
        raw = full.read_bytes()
        image = Image.open(io.BytesIO(raw))
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow only warns up to twice that
            raise OverflowError(f"{image.width * image.height} pixels, at most {Image.MAX_IMAGE_PIXELS}")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bit and more: scale to 8, convert() would clip
            values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(0)
            image = Image.fromarray((values / max(values.max(), 255) * 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return hashlib.blake2b(raw, digest_size=16).digest(), image.convert("RGB")
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Exception as e:  # Pillow's decoders raise many kinds for broken data
        raise ValueError(f"{type(e).__name__}: {common.first_line(e)}") from None


class Captioner:
    """BLIP (Li et al., 2022), called directly."""

    def __init__(self, model, tokens, device, dtype):
        from transformers import AutoProcessor, BlipForConditionalGeneration

        if common.load_config(model).model_type != "blip":
            raise Stop(f"{model}: --caption-model must be a BLIP captioning model")
        try:
            self.processor = AutoProcessor.from_pretrained(model, use_fast=False, trust_remote_code=False)
            self.model = BlipForConditionalGeneration.from_pretrained(
                model, dtype=dtype, use_safetensors=True, trust_remote_code=False).to(device).eval()
        except Exception as e:  # transformers and safetensors raise many kinds for a broken folder
            raise Stop(f"{model}: cannot be loaded as a BLIP captioner ({common.first_line(e)})") from e
        self.tokens, self.device = tokens, device
        self.dim = self.model.config.vision_config.hidden_size

    @torch.inference_mode()
    def __call__(self, images):
        """RGB images -> captions (list) and the vision tower's pooled output [B, D] float16, seen by a hook on the one pass."""
        seen = []
        hook = self.model.vision_model.register_forward_hook(lambda module, args, out: seen.append(out.pooler_output))
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        ids = self.model.generate(pixels.to(self.device, self.model.dtype), max_new_tokens=self.tokens, num_beams=1, do_sample=False)
        hook.remove()
        captions = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [c.strip() for c in captions], seen[0].float().cpu().numpy().astype(np.float16)


def caption_pins(raw, args, folder, device, model_id):
    """Captions every pin's image, CHUNK pins at a time; each distinct image (by the hash of its bytes) once.

    Writes work/captions.parquet (pin order), pin_visual_embedding.npy, skipped_images.csv. The cache captions/MODEL/part-*.parquet
    survives --overwrite: it is keyed by image and model. Returns (captioned, skipped), or None when no pin has an image."""
    images = raw.db.sql("SELECT pin_id, image FROM pin_rows ORDER BY pin_index").to_arrow_table()
    total = len(images)
    if images["image"].null_count == total:
        return None
    cache = folder / "captions" / model_id[:16]
    cache.mkdir(parents=True, exist_ok=True)
    known = {}  # image hash -> (part, row)
    for path in sorted(cache.glob("part-*.parquet")):
        part = int(path.stem.split("-")[1])
        known.update({h: (part, row) for row, h in enumerate(pq.read_table(path, columns=["hash"])["hash"].to_pylist())})
    next_part = 1 + max((part for part, _ in known.values()), default=-1)

    captioner, skipped, places = None, [], np.full((total, 2), -1, dtype=np.int64)  # places: each pin's (part, row) in the cache
    with concurrent.futures.ThreadPoolExecutor(8) as pool, tqdm(total=total, desc="captions", unit=" pins") as bar:
        for start in range(0, total, CHUNK):
            rows = images.slice(start, CHUNK).to_pylist()

            def load(row):
                try:
                    return load_image(args.data, row["image"]) if row["image"] else None
                except ValueError as e:
                    return str(e)

            new = {"hash": [], "caption": [], "visual": []}
            for at in range(0, len(rows), args.image_batch):
                batch = rows[at:at + args.image_batch]
                todo = {}
                for pin, (row, got) in enumerate(zip(batch, pool.map(load, batch)), start + at):
                    if isinstance(got, str):
                        skipped.append((row["pin_id"], row["image"], got))
                    if not isinstance(got, tuple):
                        continue
                    digest, image = got
                    if digest not in known:
                        known[digest] = (next_part, len(new["hash"]) + len(todo))
                        todo[digest] = image
                    places[pin] = known[digest]
                if todo:
                    captioner = captioner or Captioner(args.caption_model, args.caption_tokens, device, common.pick_dtype(args.precision, device))
                    captions, visual = captioner(list(todo.values()))
                    new["hash"] += todo
                    new["caption"] += captions
                    new["visual"] += list(visual)
                bar.update(len(batch))
            if new["hash"]:
                visual = np.stack(new["visual"])
                write_parquet(cache / f"part-{next_part:05d}.parquet", {
                    "hash": pa.array(new["hash"], pa.binary()), "caption": new["caption"],
                    "visual": pa.FixedSizeListArray.from_arrays(pa.array(visual.ravel()), visual.shape[1])})
                next_part += 1

    write_captions(cache, places, folder)
    with common.atomic(folder / "skipped_images.csv") as tmp, open(tmp, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("pin_id", "image", "reason"), *skipped])
    return int((places[:, 0] >= 0).sum()), len(skipped)


def write_captions(cache, places, folder):
    """Cache parts and each pin's (part, row) in them, -1 for none -> captions and visual embeddings in pin order."""
    captions = np.full(len(places), "", dtype=object)
    visual = None
    with common.atomic(folder / "pin_visual_embedding.npy") as tmp:
        for part in np.unique(places[places[:, 0] >= 0, 0]):
            table = pq.read_table(cache / f"part-{part:05d}.parquet")
            vectors = np.stack(table["visual"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)) if len(table) else None
            if visual is None:
                visual = np.lib.format.open_memmap(tmp, mode="w+", dtype=np.float16, shape=(len(places), vectors.shape[1]))
            here = np.flatnonzero(places[:, 0] == part)
            captions[here] = np.array(table["caption"].to_pylist(), dtype=object)[places[here, 1]]
            visual[here] = vectors[places[here, 1]]
        if visual is None:  # every image is broken: a width of one zero keeps the layout
            visual = np.lib.format.open_memmap(tmp, mode="w+", dtype=np.float16, shape=(len(places), 1))
        visual.flush()
    write_parquet(folder / "work" / "captions.parquet", {"pin_index": np.arange(len(places)), "caption": pa.array(captions, pa.string())})


# ---------------------------------------------------------------------------------------------------------------------
# Text from logs, in SQL


def index_rows(raw):
    """Tables pin_rows and query_rows: the raw tables with a row number, the index by which everything else refers to them."""
    for name in ("pin", "query"):
        table = {"pin": "pins", "query": "queries"}[name]
        raw.db.execute(f"CREATE TABLE {name}_rows AS SELECT (row_number() OVER () - 1)::INTEGER AS {name}_index, * FROM raw_{table}")
    taken = sorted(set(raw.columns("pins")) & set(FIELDS) - {"title", "description"})
    if taken:
        raise Stop(f"{raw.name['pins']}: column {taken[0]!r} has the name of a text field that stage 01 makes: rename it")


def tokens_of(raw, texts, name):
    """Table `name`(text, token) for the distinct strings that the query `texts` gives: our tokenize(), streamed through Arrow."""
    raw.db.execute(f"CREATE OR REPLACE TABLE {name} (text VARCHAR, token VARCHAR)")
    reader = raw.db.cursor().sql(f"SELECT DISTINCT text FROM ({texts}) WHERE text IS NOT NULL").to_arrow_reader(100_000)
    for batch in reader:
        rows = [(text, token) for text in batch.column(0).to_pylist() for token in set(tokenize(text))]
        if rows:
            arrow = pa.table({"text": [r[0] for r in rows], "token": [r[1] for r in rows]})
            raw.db.register("arrow", arrow)
            raw.db.execute(f"INSERT INTO {name} SELECT * FROM arrow")
            raw.db.unregister("arrow")


def engaged_queries(raw, as_of):
    """Table engaged(pin_id, text, n): events by pin and lower-cased query in the WINDOW_YEARS up to and including `as_of`. Returns as_of."""
    if not raw.has("engagements"):
        raw.db.execute("CREATE TABLE engaged (pin_id VARCHAR, text VARCHAR, n BIGINT)")
        return as_of
    as_of = as_of or raw.db.execute("SELECT max(date) FROM raw_engagements").fetchall()[0][0]
    raw.db.execute(f"""
        CREATE TABLE engaged AS
        SELECT pin_id, lower(trim(query)) AS text, sum(count)::BIGINT AS n
        FROM raw_engagements
        WHERE date > DATE '{as_of}' - INTERVAL {WINDOW_YEARS} YEAR AND date <= DATE '{as_of}'
        GROUP BY ALL""")
    return as_of


def top_tokens(raw, source, tokens, out, k):
    """Table `out`(pin_id, text): the k tokens with the largest counts over source(pin_id, text, n), ties by token."""
    raw.db.execute(f"""
        CREATE TABLE {out} AS
        WITH counted AS (SELECT pin_id, token, sum(n) AS n FROM {source} JOIN {tokens} USING (text) GROUP BY ALL),
             ranked AS (SELECT *, row_number() OVER (PARTITION BY pin_id ORDER BY n DESC, token) AS rank FROM counted)
        SELECT pin_id, string_agg(token, ' ' ORDER BY rank) AS text FROM ranked WHERE rank <= {k} GROUP BY pin_id""")


def text_from_logs(raw, args):
    """Tables pin_queries, pin_boards, pin_links (pin_id, text). Returns the end of the engagement window."""
    as_of = engaged_queries(raw, args.as_of)
    tokens_of(raw, "SELECT text FROM engaged", "query_tokens")
    top_tokens(raw, "engaged", "query_tokens", "pin_queries", args.top_tokens)

    boards = "SELECT pin_id, board_title AS text, count(*) AS n FROM raw_boards WHERE board_title IS NOT NULL GROUP BY ALL"
    raw.db.execute(f"CREATE TABLE saves AS {boards if raw.has('boards') else 'SELECT * FROM engaged LIMIT 0'}")
    tokens_of(raw, "SELECT text FROM saves", "board_tokens")
    top_tokens(raw, "saves", "board_tokens", "pin_boards", args.top_tokens)

    # Of a pin's links the one with the most visits that stayed, ties by text.
    links = f"""
        WITH stayed AS (SELECT pin_id, concat_ws(' ', link_title, link_description) AS text, count(*) AS n
                        FROM raw_link_visits WHERE dwell_seconds >= {MIN_DWELL} GROUP BY ALL)
        SELECT pin_id, text FROM stayed QUALIFY row_number() OVER (PARTITION BY pin_id ORDER BY n DESC, text) = 1"""
    raw.db.execute(f"CREATE TABLE pin_links AS {links if raw.has('link_visits') else 'SELECT pin_id, text FROM saves LIMIT 0'}")
    return as_of


def write_pins_and_queries(raw, folder):
    """queries.parquet and pins.parquet, rows in index order."""
    extra = [f"pin_rows.{common.quoted(c)}" for c in raw.columns("pins") if c not in ("pin_id", "title", "description", "image")]
    captions = folder / "work" / "captions.parquet"
    caption = f"read_parquet('{str(captions).replace(chr(39), chr(39) * 2)}')" if captions.exists() else "(SELECT 0 AS pin_index, '' AS caption LIMIT 0)"
    pins = f"""
        SELECT pin_id, {", ".join(f"coalesce({source}, '') AS {name}" for name, source in
                                  zip(FIELDS, ("title", "description", "c.caption", "q.text", "b.text", "l.text")))}, {', '.join(['image', *extra])}
        FROM pin_rows LEFT JOIN {caption} c USING (pin_index) LEFT JOIN pin_queries q USING (pin_id)
        LEFT JOIN pin_boards b USING (pin_id) LEFT JOIN pin_links l USING (pin_id) ORDER BY pin_index"""
    columns = ", ".join("coalesce(language, 'en') AS language" if c == "language" else common.quoted(c) for c in raw.columns("queries"))
    for name, sql in (("pins", pins), ("queries", f"SELECT {columns} FROM query_rows ORDER BY query_index")):
        reader = raw.db.sql(sql).to_arrow_reader(50_000)
        with common.atomic(folder / f"{name}.parquet") as tmp, pq.ParquetWriter(tmp, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)


def tables_of(path, rows, columns=None):
    """A Parquet file as tables of `rows` rows each, the last one what is left. One row group at a time: iter_batches would keep all that it has read."""
    file, held = pq.ParquetFile(path), None
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=columns)
        held = pa.concat_tables([held, table]) if held is not None else table
        while len(held) >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if held is not None and len(held):
        yield held


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings: the user's own, else open counterparts of SearchSage and PinSage (see DESIGN's table in data/README.md)


def users_embedding(raw, name, rows, folder):
    """Aligns embeddings/NAME.npy (float16/32 [rows, D]) to our row numbers by NAME.ids; a row without one gets zeros. Returns how many."""
    path = raw.folder / "embeddings" / f"{name}.npy"
    ids_path = path.with_suffix(".ids")
    if not ids_path.exists():
        raise Stop(f"{ids_path}: missing; it holds the id of every row of {path.name}, one a line")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as e:
        raise Stop(f"{path}: no NumPy array ({common.first_line(e)})") from e
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype not in (np.float16, np.float32):
        raise Stop(f"{path}: must be float16 or float32 [rows, dim], is {array.dtype} {list(array.shape)}")
    try:
        ids = pa.array([line.rstrip("\n") for line in open(ids_path, encoding="utf-8")], pa.string())
    except UnicodeDecodeError as e:
        raise Stop(f"{ids_path}: not UTF-8 ({e})") from e
    if len(ids) != len(array):
        raise Stop(f"{ids_path}: {len(ids):,} ids for {len(array):,} rows of {path.name}")
    different = pc.count_distinct(ids).as_py()
    if different != len(ids):
        counts = ids.value_counts()
        most = counts.field("values")[pc.index(counts.field("counts"), pc.max(counts.field("counts"))).as_py()]
        raise Stop(f"{ids_path}: {len(ids) - different:,} ids stand more than once, the first: {most.as_py()!r}")
    place = pc.index_in(rows, ids).fill_null(-1).to_numpy().astype(np.int64)
    with common.atomic(folder / f"{name}_embedding.npy") as tmp:
        out = np.lib.format.open_memmap(tmp, mode="w+", dtype=array.dtype, shape=(len(rows), array.shape[1]))
        for start in range(0, len(rows), 65_536):
            at = place[start:start + 65_536]
            block = np.where((at >= 0)[:, None], array[np.maximum(at, 0)], 0)
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                raise Stop(f"{path}: {(~finite).sum():,} rows (of those up to {start + len(at):,}) with NaN or infinity, the first: {rows[start + int(finite.argmin())].as_py()!r}")
            out[start:start + 65_536] = block
        out.flush()
    return int((place < 0).sum())


class TextEncoder:
    """Mean-pooled, L2-normalised sentence embeddings of an off-the-shelf encoder."""

    def __init__(self, model, max_tokens, token_batch, device, dtype):
        config = common.load_config(model)
        if common.backbone_kind(config) == "decoder":
            raise Stop(f"{model}: --text-encoder must be an encoder")
        self.tokenizer = common.load_tokenizer(model, config)
        self.model = common.load_backbone(model, dtype, device=device).eval()
        self.max_tokens, self.token_batch, self.device = max_tokens, token_batch, device
        self.dim = config.hidden_size

    @torch.inference_mode()
    def __call__(self, texts):
        """Texts -> float16 [B, D]. Batches hold `token_batch` tokens, from rows sorted by length."""
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_tokens, return_attention_mask=False)["input_ids"]
        packed = common.PackedRows(ids)
        order = np.argsort(packed.lengths, kind="stable")
        out = np.empty((len(ids), self.dim), dtype=np.float16)
        for rows in common.token_batches(packed.lengths[order], self.token_batch):
            rows = order[rows]
            x, mask = (t.to(self.device) for t in packed.batch(rows, self.tokenizer.pad_token_id))
            hidden = self.model(input_ids=x, attention_mask=mask).last_hidden_state.float()
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            out[rows] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return out


def embed_texts(encoder, parquet, side, folder):
    """{side}_text_embedding.npy for every row of a Parquet table, by chunks that survive a kill."""
    total, parts = pq.read_metadata(parquet).num_rows, []
    columns = ["query"] if side == "query" else list(FIELDS)
    with tqdm(total=total, desc=f"{side} text embeddings", unit=" rows") as bar:
        for number, batch in enumerate(tables_of(parquet, CHUNK, columns)):
            part = folder / "work" / f"{side}_text-{number:05d}.npy"
            if not part.exists():
                table = batch.to_pydict()
                texts = table["query"] if side == "query" else [pin_text(table, i) for i in range(len(batch))]
                with common.atomic(part) as tmp, open(tmp, "wb") as f:
                    np.save(f, encoder(texts))
            parts.append(part)
            bar.update(len(batch))
    with common.atomic(folder / f"{side}_text_embedding.npy") as tmp:
        out = np.lib.format.open_memmap(tmp, mode="w+", dtype=np.float16, shape=(total, encoder.dim))
        at = 0
        for part in parts:
            block = np.load(part, allow_pickle=False)
            out[at:at + len(block)] = block
            at += len(block)
        out.flush()


def graph_embedding(raw, rows, dim, seed, folder, fit_rows=200_000, max_boards=200_000):
    """pin_graph_embedding.npy: truncated SVD of the TF-IDF-weighted pin x board matrix, the open counterpart of PinSage.
    Fitted on at most `fit_rows` pins with boards and the `max_boards` most saved board titles, then applied to all pins."""
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    pairs = raw.db.execute(f"""
        WITH board AS (SELECT text, row_number() OVER (ORDER BY sum(n) DESC, text) - 1 AS board FROM saves GROUP BY text)
        SELECT pin_index, board::INTEGER AS board, n::FLOAT AS n FROM saves JOIN board USING (text) JOIN (SELECT pin_id, pin_index FROM pin_rows) USING (pin_id)
        WHERE board < {max_boards} ORDER BY pin_index, board""").fetchnumpy()
    if len(pairs["n"]) == 0:
        return False
    matrix = csr_matrix((pairs["n"], (pairs["pin_index"], pairs["board"])), shape=(rows, int(pairs["board"].max()) + 1))
    matrix = TfidfTransformer(sublinear_tf=True).fit_transform(matrix)
    used = np.flatnonzero(np.diff(matrix.indptr))
    sample = np.sort(np.random.default_rng(seed).permutation(used)[:fit_rows])
    components = max(1, min(dim, matrix.shape[1] - 1, len(sample) - 1))
    with common.atomic(folder / "pin_graph_embedding.npy") as tmp:
        out = np.lib.format.open_memmap(tmp, mode="w+", dtype=np.float16, shape=(rows, components))
        if min(matrix.shape[1], len(sample)) > 1:
            svd = TruncatedSVD(components, random_state=seed).fit(matrix[sample])
            for start in range(0, rows, 65_536):
                out[start:start + 65_536] = svd.transform(matrix[start:start + 65_536])
        out.flush()
    return True


def make_embeddings(raw, args, folder, device):
    """Every *_embedding.npy. Returns {name: rows without a vector} of the user's own."""
    own = {p.stem for p in (raw.folder / "embeddings").glob("*.npy")}
    bad = sorted(n for n in own if not n.startswith(("query_", "pin_")))
    if bad:
        raise Stop(f"{raw.folder / 'embeddings' / bad[0]}.npy: the name must begin with query_ or pin_")
    ids = {side: pq.read_table(folder / file, columns=[f"{side}_id"])[f"{side}_id"].combine_chunks()
           for side, file in (("query", "queries.parquet"), ("pin", "pins.parquet"))}
    missing = {name: users_embedding(raw, name, ids[name.split("_")[0]], folder) for name in sorted(own)}
    encoder = None
    for side, file in (("query", "queries.parquet"), ("pin", "pins.parquet")):
        if f"{side}_text" not in own and not (folder / f"{side}_text_embedding.npy").exists():
            encoder = encoder or TextEncoder(args.text_encoder, args.text_tokens, args.token_batch, device, common.pick_dtype(args.precision, device))
            embed_texts(encoder, folder / file, side, folder)
    if "pin_graph" not in own and not graph_embedding(raw, len(ids["pin"]), args.graph_dim, args.seed, folder):
        print("no boards: no graph embedding")
    return missing


# ---------------------------------------------------------------------------------------------------------------------
# Match features of pairs


def count_terms(job):
    """(pin texts, {query term: column}) -> (terms a pin, columns, term frequencies) of the query terms, pin lengths, and the number
    of pins each term of any kind stands in."""
    texts, column = job
    sizes, columns, counts, lengths, pins_with = [], [], [], [], Counter()
    for text in texts:
        tokens = tokenize(text)
        frequency = Counter(tokens)
        lengths.append(len(tokens))
        pins_with.update(frequency.keys())
        here = sorted((column[t], n) for t, n in frequency.items() if t in column)
        sizes.append(len(here))
        columns += [c for c, _ in here]
        counts += [n for _, n in here]
    return np.array(sizes, np.int64), np.array(columns, np.int32), np.array(counts, np.int32), np.array(lengths, np.int32), pins_with


class PairBM25(BM25Okapi):
    """BM25 of given (query, pin) pairs. rank_bm25's BM25Okapi owns the formula: its k1, b, epsilon, and its _calc_idf, which
    raises a negative idf (a term in more than half of the pins) to epsilon x the mean idf. Its own scoring visits the whole corpus a query;
    this one keeps the counts of query terms as a compressed sparse matrix (pins x terms, columns sorted in a row)
    and finds each pair's terms in the pin's row by binary search. Scores equal BM25Okapi.get_scores."""

    def __init__(self, queries, pin_texts, workers=1, k1=1.5, b=0.75, epsilon=0.25):
        """queries: list of strings; pin_texts: iterable of lists of strings (chunks), pins in index order."""
        self.k1, self.b, self.epsilon, self.idf = k1, b, epsilon, {}
        query_tokens = [tokenize(q) for q in queries]
        column = {t: i for i, t in enumerate(sorted({t for tokens in query_tokens for t in tokens}))}
        self.query_start = np.concatenate([[0], np.cumsum([len(t) for t in query_tokens])])
        self.query_terms = np.array([column[t] for tokens in query_tokens for t in tokens], dtype=np.int32)

        parts, pins_with = [], Counter()
        jobs = ((texts, column) for texts in pin_texts)
        pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else None
        for *arrays, seen in (pool.imap(count_terms, jobs) if pool else map(count_terms, jobs)):
            parts.append(arrays)
            pins_with.update(seen)
        if pool:
            pool.close()
            pool.join()
        sizes, self.columns, self.counts, self.doc_len = (np.concatenate(a) for a in zip(*parts))
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        self.corpus_size = len(self.doc_len)
        self.avgdl = self.doc_len.mean() or 1.0
        if pins_with:
            self._calc_idf(pins_with)
        self.term_idf = np.array([self.idf.get(t, 0.0) for t in column])
        self.idf = None  # all terms of the corpus; only the queries' are needed from here on

    def score(self, query, pin):
        """Query and pin indices [B] -> BM25 [B] and the share of the query's terms that the pin's text has [B]."""
        n = self.query_start[query + 1] - self.query_start[query]
        pair = np.repeat(np.arange(len(query)), n)
        within = np.arange(len(pair)) - np.repeat(np.cumsum(n) - n, n)
        term = self.query_terms[self.query_start[query][pair] + within]
        low, end = self.start[pin][pair], self.start[pin + 1][pair]
        high = end.copy()
        while (open_ := low < high).any():  # first place in the pin's row whose column is not below the term
            middle = (low + high) // 2
            below = open_ & (self.columns[np.minimum(middle, len(self.columns) - 1)] < term)
            low, high = np.where(below, middle + 1, low), np.where(open_ & ~below, middle, high)
        found = low < end
        found[found] = self.columns[low[found]] == term[found]
        pair, term, at = pair[found], term[found], low[found]
        f = self.counts[at]
        length = self.doc_len[pin[pair]] / self.avgdl
        weight = self.term_idf[term] * f * (self.k1 + 1) / (f + self.k1 * (1 - self.b + self.b * length))
        return (np.bincount(pair, weight, minlength=len(query)),
                np.bincount(pair, minlength=len(query)) / np.maximum(n, 1))


THREADS = concurrent.futures.ThreadPoolExecutor(os.cpu_count())  # kept: every new thread would keep memory of its own


def match_features(bm25, vectors, query, pin, engaged, chunk=1 << 13):
    """The four match features of pairs [B]: BM25, share of query terms matched, cosine of the text embeddings (`vectors`: query and
    pin arrays, or None), and log(1 + engagement events of that query on that pin within the window). float32.
    Chunks that fit into a core's cache, one thread a core: NumPy and PyTorch release the interpreter lock."""
    out = {name: np.zeros(len(query), dtype=np.float32) for name in MATCH_FEATURES}
    out["engagement"] = np.log1p(engaged).astype(np.float32)

    def fill(start):
        at = slice(start, start + chunk)
        out["bm25"][at], out["terms_matched"][at] = bm25.score(query[at], pin[at])
        if vectors is not None:
            q, p = (torch.from_numpy(v[i]).float() for v, i in zip(vectors, (query[at], pin[at])))
            out["text_cosine"][at] = ((q * p).sum(1) / (q.norm(dim=1) * p.norm(dim=1)).clamp(min=1e-12)).numpy()

    list(THREADS.map(fill, range(0, len(query), chunk)))
    return out


def index_pairs(raw, table, path, chunk=500_000):
    """A raw table of pairs -> Parquet with query_index, pin_index, engaged (events in the window) and its other columns, in its order.
    Joined `chunk` rows at a time: a join does not keep the order, and to sort all rows afterwards would take memory that grows with them."""
    extra = ", label::TINYINT AS label, split" if table == "labels" else ""
    raw.db.execute("""CREATE TABLE IF NOT EXISTS engaged_pairs AS
        SELECT query_index, pin_index, n FROM engaged JOIN (SELECT query, query_index FROM query_rows) ON text = lower(trim(query))
        JOIN (SELECT pin_id, pin_index FROM pin_rows) USING (pin_id)""")
    reader = raw.db.cursor().sql(f"SELECT row_number() OVER () - 1 AS row, * FROM raw_{table}").to_arrow_reader(chunk)
    with common.atomic(path) as tmp, contextlib.ExitStack() as stack:
        writer, rows = None, 0
        for batch in reader:
            if (batch["row"].to_numpy() != np.arange(rows, rows + len(batch))).any():
                raise RuntimeError(f"rows of {table} do not come in their order")
            rows += len(batch)
            raw.db.register("some_pairs", pa.table(batch))
            out = raw.db.sql(f"""
                SELECT query_index, pin_index, coalesce(n, 0) AS engaged{extra} FROM some_pairs
                JOIN (SELECT query_id, query_index FROM query_rows) USING (query_id) JOIN (SELECT pin_id, pin_index FROM pin_rows) USING (pin_id)
                LEFT JOIN engaged_pairs USING (query_index, pin_index) ORDER BY row""").to_arrow_table()
            raw.db.unregister("some_pairs")
            writer = writer or stack.enter_context(pq.ParquetWriter(tmp, out.schema, compression="zstd"))
            writer.write_table(out, row_group_size=250_000)


def write_labelled(raw, folder, features_of):
    """labelled.parquet: label, split and match features. Without a split, EVAL_SHARE of the queries go to eval by a hash of the id."""
    table = pq.read_table(folder / "work" / "labels.parquet")
    query, pin = table["query_index"].to_numpy(), table["pin_index"].to_numpy()
    ids = np.array(pq.read_table(folder / "queries.parquet", columns=["query_id"])["query_id"].to_pylist(), dtype=object)[query]
    by_hash = np.where(common.in_validation(ids, EVAL_SHARE, "eval"), "eval", "train")
    split = np.array([given or hashed for given, hashed in zip(table["split"].to_pylist(), by_hash)])
    for side in ("train", "eval"):
        if not (split == side).any():
            raise Stop(f"{raw.name['labels']}: no row in the split {side!r}; both are needed")
    write_parquet(folder / "labelled.parquet", {"query_index": query, "pin_index": pin, "label": table["label"], "split": split,
                                                **features_of(query, pin, table["engaged"].to_numpy())})
    return {side: int((split == side).sum()) for side in ("train", "eval")}


def write_impressions(folder, shard_rows, features_of):
    """impressions/part-*.parquet, `shard_rows` each, streamed. Shards that exist are complete and kept."""
    source = folder / "work" / "impressions.parquet"
    total = pq.read_metadata(source).num_rows
    with tqdm(total=total, desc="impressions", unit=" rows", unit_scale=True) as bar:
        for number, table in enumerate(tables_of(source, shard_rows)):
            path = folder / "impressions" / f"part-{number:05d}.parquet"
            if not path.exists():
                query, pin, engaged = (table[c].to_numpy() for c in ("query_index", "pin_index", "engaged"))
                write_parquet(path, {"query_index": query, "pin_index": pin, **features_of(query, pin, engaged)})
            bar.update(len(table))
    return total


# ---------------------------------------------------------------------------------------------------------------------


def inputs_of(args, raw):
    """Fingerprints of everything the result depends on."""
    found = {f"table {name}": common.hashed([common.fingerprint(p) for p in files]) for name, files in raw.files.items()}
    found |= {f"embeddings/{p.name}": common.fingerprint(p) for p in sorted((raw.folder / "embeddings").glob("*.*"))}
    images, files = hashlib.blake2b(digest_size=16), 0  # every image's name and size
    for batch in raw.db.sql("SELECT DISTINCT image FROM raw_pins WHERE image IS NOT NULL ORDER BY image").to_arrow_reader(100_000):
        for image in batch.column(0).to_pylist():
            path = os.path.join(raw.folder, image)
            images.update(f"{image}\0{os.path.getsize(path) if os.path.isfile(path) else -1}\n".encode())
        files += len(batch)
    if files:
        found["image files"] = images.hexdigest()
        found["caption model"] = common.fingerprint_model(args.caption_model)
    own = {p.stem for p in (raw.folder / "embeddings").glob("*.npy")}
    if not {"query_text", "pin_text"} <= own:
        found["text encoder"] = common.fingerprint_model(args.text_encoder)
    return found


def main(argv=None):
    args = parse_args(argv)
    common.quiet()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # load_image checks the size
    torch.manual_seed(args.seed)
    device, folder = common.pick_device(args.device), args.run / "features"

    # 1. Raw tables: open, check, number the rows
    raw = RawTables(args.data, spill=folder / "work" / "spill", memory=args.memory)
    inputs = inputs_of(args, raw)
    stage = Stage(folder, args, inputs, keep={"captions"})
    if stage.done:
        common.remove(folder / "work")  # the spill folder of the checks above
        return
    (folder / "work" / "spill").mkdir(parents=True, exist_ok=True)  # --overwrite has emptied the folder
    raw.check()
    index_rows(raw)
    counts = {name: raw.db.execute(f"SELECT count(*) FROM raw_{name}").fetchall()[0][0] for name in raw.files}
    print(f"{args.data}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()) + f"; device {device}")

    # 2. Pin text: captions, and what logs say of a pin  (paper: "Pin Text Representations")
    captioned = caption_pins(raw, args, folder, device, inputs.get("caption model", ""))
    as_of = text_from_logs(raw, args)
    write_pins_and_queries(raw, folder)

    # 3. Embeddings, once a query and once a pin
    without = make_embeddings(raw, args, folder, device)

    # 4. Match features of every labelled and unlabelled pair
    queries = pq.read_table(folder / "queries.parquet", columns=["query"])["query"].to_pylist()
    bm25 = PairBM25(queries, pin_texts(folder / "pins.parquet"), workers=args.workers if counts["pins"] > 200_000 else 1)
    vectors = [np.load(folder / f"{side}_text_embedding.npy", mmap_mode="r", allow_pickle=False) for side in ("query", "pin")]
    vectors = vectors if vectors[0].shape[1] == vectors[1].shape[1] else None
    features_of = lambda query, pin, engaged: match_features(bm25, vectors, query, pin, engaged)
    for table in ("labels", "impressions"):
        if not (folder / "work" / f"{table}.parquet").exists():
            index_pairs(raw, table, folder / "work" / f"{table}.parquet")
    splits = write_labelled(raw, folder, features_of)
    impressions = write_impressions(folder, args.shard_rows, features_of)

    # 5. Summary
    if captioned:
        print(f"captions: {captioned[0]:,} pins; {captioned[1]:,} images skipped" + (f", see {folder / 'skipped_images.csv'}" if captioned[1] else ""))
    for name, n in without.items():
        print(f"embeddings/{name}.npy: {n:,} rows of the table have none, they get zeros")
    print(f"engagement window: {WINDOW_YEARS} years up to {as_of}; labelled: {splits['train']:,} train, {splits['eval']:,} eval; impressions: {impressions:,}")
    raw.db.close()
    common.remove(folder / "work")
    stage.finish(rows={**counts, **{f"labelled_{k}": v for k, v in splits.items()}}, dataset=str(args.data.resolve()), as_of=str(as_of),
                 images={"captioned": captioned[0], "skipped": captioned[1]} if captioned else None)


if __name__ == "__main__":
    common.run(main)
