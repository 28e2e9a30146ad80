"""Pictures of a dataset: read without trust in what a file says of itself."""

import contextlib
import hashlib
import io
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from lib.stages.terminal import first_line, progress_bar
from lib.tables.files import list_skipped, regular_file, spellings

# What Pillow decodes by itself: for others (EPS) it starts other programs.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
MAX_BYTES = 100_000_000  # of a picture's file
SIDES = 512, 2048  # a larger picture is reduced, its shorter side not below the first
# Large pictures are decoded one at a time, in one thread: every thread keeps memory that it has used.
LARGE = ThreadPoolExecutor(1)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # decode_image checks the size


def image_bytes(folder, path):
    """Content of a picture's file. ValueError with the reason if it cannot be had."""
    written = next((other for other in spellings(path) if os.path.exists(Path(folder) / other)), path)
    full = regular_file(folder, written)
    try:
        size = full.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes, at most {MAX_BYTES:,}")
        return full.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror) from None


def decode_image(content):
    """Content of a picture's file -> the picture, upright, as RGB; a large one reduced. ValueError with the
    reason if it is none: broken, or too large."""
    try:
        image = Image.open(io.BytesIO(content), formats=PICTURES)
        pixels = image.width * image.height
        if pixels > Image.MAX_IMAGE_PIXELS:  # Pillow only warns up to twice that
            raise OverflowError(f"{pixels} pixels, at most {Image.MAX_IMAGE_PIXELS}")
        return LARGE.submit(upright_rgb, image).result() if pixels > 4_000_000 else upright_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for broken data
        said = re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", first_line(error))  # an address differs every time
        raise ValueError(f"{type(error).__name__}: {said}") from None


def upright_rgb(image):
    """An opened picture -> RGB, without its transparency, turned as its EXIF data say."""
    factor = reduction(image)
    image.draft("RGB", (image.width // factor, image.height // factor))  # JPEG: decoded smaller
    image.load()
    with contextlib.suppress(Exception):  # broken EXIF data: the pixels are there
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;"):
        image = image.convert("I")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("I", "F", "L", "RGB"):
        image = image.convert("RGB")
    if reduction(image) > 1:
        image = image.reduce(reduction(image))
    if image.mode in ("I", "F"):  # convert() would clip; 0 stays black; white: 1, 255 or the largest value
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        black, high = min(values.min(), 0), values.max()
        white = max(high, 255) if high > 1 else 1
        image = Image.fromarray(((values - black) / (white - black) * 255).astype(np.uint8))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reduction(image):
    """The whole number by which a picture's sides are divided."""
    return max(min(image.size) // SIDES[0], max(image.size) // SIDES[1], 1)


def load_image(folder, path):
    """A picture of the dataset as RGB. ValueError with the reason if there is none."""
    return decode_image(image_bytes(folder, path))


def read_pictures(raw):
    """Reads the picture of every pin. Table, rows in pin order: pin_id, image (its path), digest (16 bytes,
    of the file's content; null: no picture), reason (why there is none though there is a path)."""

    def read(path):
        try:
            return hashlib.blake2b(image_bytes(raw.folder, path), digest_size=16).digest(), None
        except ValueError as error:
            return None, str(error)

    parts = []
    with ThreadPoolExecutor(8) as pool, progress_bar(desc="pictures read", unit=" pins") as bar:
        for batch in raw.batches("SELECT pin_id, nullif(image, '') AS image FROM raw_pins"):
            paths = batch["image"].to_pylist()
            there = list({path for path in paths if path})  # millions of pins may have none
            content = {None: (None, None), **dict(zip(there, pool.map(read, there)))}
            digests, reasons = zip(*(content[path] for path in paths))
            new = {"digest": pa.array(digests, pa.binary(16)), "reason": pa.array(reasons, pa.string())}
            parts.append(pa.table({"pin_id": batch["pin_id"], "image": batch["image"], **new}))
            bar.update(len(batch))
    return pa.concat_tables(parts)


def pictures_fingerprint(pictures):
    """Hash of the pictures' content, in pin order."""
    content = hashlib.blake2b(digest_size=16)
    for batch in pictures.to_batches(max_chunksize=100_000):
        for digest, reason in zip(batch["digest"].to_pylist(), batch["reason"].to_pylist()):
            content.update(digest or f"{reason}\n".encode())
    return content.hexdigest()


def write_skipped(path, pictures, reasons):
    """pin_id, image and reason of every picture that has a reason (Arrow column) -> CSV; a loud line if these
    are all. Returns how many."""
    skipped, names = pictures.set_column(3, "reason", reasons), ("pin_id", "image", "reason")
    skipped = [*zip(*(skipped.filter(reasons.is_valid())[name].to_pylist() for name in names))]
    list_skipped(path, names, skipped)
    if len(skipped) == len(pictures) - pictures["image"].null_count:
        first = f"the first: {skipped[0][1]!r} ({skipped[0][2]})"
        wrong = f"not one of {len(skipped):,} pictures can be read"
        print(f"warning: {wrong}: no captions, no embedding; {first}")
    return len(skipped)
