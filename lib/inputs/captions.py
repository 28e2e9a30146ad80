"""Captions and visual embeddings of pictures, from one pass of the captioner's vision tower: each picture
once, kept by its content."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from lib.inputs.encoders import Captioner
from lib.stages.files import link, write_parquet
from lib.stages.finished import is_as_made, read_about
from lib.stages.streams import ahead, keep_chunks, matrix_of, new_matrix, slices, vector_column
from lib.tables.images import load_image


def caption_chunk(chunk, captioner, root, image_batch):
    """Pictures of the dataset (table: digest, image) -> columns digest, caption, visual [B, D], and reason
    (why a picture cannot be captioned; null: it is). While a batch is captioned the next one is decoded."""
    paths, rows, nothing = chunk["image"].to_pylist(), [], ("", np.zeros(captioner.dim, np.float16))

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
            is_broken = isinstance(pixels, str)
            rows.append((*nothing, pixels) if is_broken else (*next(made), None))
    captions, visual, reasons = zip(*rows)
    columns = {"digest": chunk["digest"], "caption": captions, "visual": vector_column(np.stack(visual))}
    return {**columns, "reason": pa.array(reasons, pa.string())}


def cached(cache):
    """The files of a folder of caption_chunk's columns, and their digests (Arrow, a chunk a file)."""
    parts = sorted(cache.glob("part-*.parquet"))
    digests = [pq.read_table(part, columns=["digest"])["digest"].combine_chunks() for part in parts]
    return parts, pa.chunked_array(digests, pa.binary(16))


def plan_captions(pictures, cache, plan):
    """Writes the file `plan`: each distinct picture that `cache` does not have, and the number of the first
    file they go into. One that has all that is to do stays: chunks and numbers are those before a kill."""
    parts, known = cached(cache)
    new = pc.unique(pictures["digest"]).drop_null()
    new = new.filter(pc.invert(pc.is_in(new, known)))
    todo = pictures.take(pc.index_in(new, pictures["digest"]))
    if plan.exists():
        planned = pc.is_in(todo["digest"], pq.read_table(plan)["digest"])
        if pc.all(planned, min_count=0).as_py():
            return
    first = 1 + int(parts[-1].stem.removeprefix("part-")) if parts else 0
    write_parquet(plan, todo.replace_schema_metadata({"first": str(first)}))


def caption_pictures(settings, hardware, part, plan, cache, chunk):
    """Captions this process's part of a plan, `chunk` pictures a file. Returns all files of the plan."""
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
    reasons = pictures["reason"].to_numpy().copy()
    parts, known = cached(cache)
    place, start = pc.index_in(pictures["digest"], known).fill_null(-1).to_numpy(), 0
    dim = pq.read_schema(parts[0]).field("visual").type.list_size
    with new_matrix(out / "pin_visual_embedding.npy", len(pictures), dim) as visual:
        for part, digests in zip(parts, known.chunks):
            pins = np.flatnonzero((place >= start) & (place < start + len(digests)))
            rows = pq.read_table(part).take(place[pins] - start)
            start += len(digests)
            visual[pins] = matrix_of(rows["visual"])
            captions[pins] = rows["caption"].to_numpy()
            reasons[pins] = rows["reason"].to_numpy()
    return pa.array(captions, pa.string()), pa.array(reasons, pa.string())


def reuse_captions(folders, out):
    """Brings the captions of the first of some folders of features (None: none) that has any, and as stage 01
    wrote them, into the folder `out`. What is there stays: a process that was killed made it."""
    for old in filter(None, folders):
        outputs = read_about(old, damaged_is_fine=True).get("outputs", {}).items()
        names = [n for n, made in outputs if n.startswith("captions/") and is_as_made(old / n, made)]
        for name in names:
            if not (out / name).exists():
                link(old / name, out / name)
        if names:
            return
