"""Captions and visual embeddings of pictures, from one pass of the captioner's vision tower: each picture
once, kept by its content.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from lib.inputs.encoders import Captioner
from lib.stages.files import link_whole, write_parquet
from lib.stages.finished import is_as_made, read_about
from lib.stages.streams import (
    ahead,
    keep_chunks,
    kept_rows,
    matrix_of,
    new_matrix,
    slices,
    vector_column,
    without_kept,
)
from lib.tables.images import load_image


def caption_chunk(chunk, captioner, root, image_batch):
    """Pictures of the dataset (table: digest, image) -> columns digest, caption, visual [B, D], and reason
    (why a picture cannot be captioned; null: it is). While a batch is captioned the next one is decoded."""
    paths, captions, visual, reasons = chunk["image"].to_pylist(), [], [], []

    def seen(path):
        try:
            image = load_image(root, path)
        except ValueError as error:
            return str(error)
        return captioner.pixels([image])

    def batches():
        with ThreadPoolExecutor(8) as pool:
            for start in range(0, len(paths), image_batch):
                yield list(pool.map(seen, paths[start : start + image_batch]))

    for batch in ahead(batches(), depth=1):
        readable = [pixels for pixels in batch if not isinstance(pixels, str)]
        made = iter(zip(*captioner.caption(torch.cat(readable)))) if readable else None
        for pixels in batch:
            broken = isinstance(pixels, str)
            caption, vector = ("", np.zeros(captioner.dim, np.float16)) if broken else next(made)
            captions.append(caption)
            visual.append(vector)
            reasons.append(pixels if broken else None)
    columns = {"digest": chunk["digest"], "caption": captions, "visual": vector_column(np.stack(visual))}
    return {**columns, "reason": pa.array(reasons, pa.string())}


def plan_captions(pictures, cache, plan):
    """Writes the file `plan`: each distinct picture that `cache`, a folder of caption_chunk's columns, does
    not have, and in its metadata the number of the first file they go into. One that is there is kept if it
    has all that is to do: whatever of it was made before a kill, chunks and numbers stay the same."""
    todo = without_kept(pictures, cache, "digest")
    if plan.exists() and pc.all(pc.is_in(todo["digest"], pq.read_table(plan)["digest"])).as_py() is not False:
        return
    kept = [int(path.stem.removeprefix("part-")) for path in cache.glob("part-*")]
    write_parquet(plan, todo.replace_schema_metadata({"first": str(1 + max(kept, default=-1))}))


def caption_pictures(settings, hardware, part, plan, cache, chunk):
    """Captions this process's part of a plan, `chunk` pictures a file of the cache. hardware: device, dtype.
    Returns all of the plan's files."""
    model = settings.caption_model, settings.caption_tokens
    captioner = functools.cache(lambda: Captioner(*model, *hardware))

    def make(some):
        return caption_chunk(some, captioner(), settings.data, settings.image_batch)

    todo = pq.read_table(plan)
    first, chunks = int(todo.schema.metadata[b"first"]), slices([todo], chunk)
    return list(keep_chunks(cache, chunks, make, len(todo), "captions", first, part))


def captions_of(pictures, cache, out):
    """The cache's rows in pin order. Writes pin_visual_embedding.npy; returns captions ("": none) and reasons
    (null: captioned, or no picture), Arrow columns."""
    captions = np.full(len(pictures), "", dtype=object)
    reasons = np.array(pictures["reason"].to_pylist(), dtype=object)
    dim = pq.read_schema(next(cache.glob("part-*"))).field("visual").type.list_size
    with new_matrix(out / "pin_visual_embedding.npy", len(pictures), dim) as visual:
        for pins, rows in kept_rows(pictures["digest"], cache, "digest"):
            visual[pins] = matrix_of(rows["visual"])
            captions[pins] = np.array(rows["caption"].to_pylist(), dtype=object)
            reasons[pins] = np.array(rows["reason"].to_pylist(), dtype=object)
    return pa.array(captions, pa.string()), pa.array(reasons, pa.string())


def reuse_captions(folders, out):
    """Brings the captions of the first of some folders of features (None: none) that has any into the folder
    `out`, by hard links if possible; without files that are not what stage 01 wrote. Those that are there
    stay: a process that was killed made them, under later numbers."""
    for old in [folder for folder in folders if folder]:
        outputs = read_about(old, damaged_is_fine=True).get("outputs", {}).items()
        names = [n for n, made in outputs if n.startswith("captions/") and is_as_made(old / n, made)]
        for name in [name for name in names if not (out / name).exists()]:
            link_whole(old / name, out / name)
        if names:
            return
