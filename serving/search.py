"""A query never seen, ranked over a run's pins by its student, as a service would; or one new pin, scored.

    python -m serving.search "red chair" --run outputs/toy
    python -m serving.search "roter stuhl" --language de --top 10 --picture found.png
    python -m serving.search "red chair" --pin-title "Chair" --pin-image chair.jpg --pin-boards "Living room"

The class behind it, for a service: serving/ranker.py.
"""

import csv
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import tyro

from common import LEVELS, NUM_LEVELS
from lib.models import quiet_libraries
from lib.results import pictures
from lib.stages.settings import ROOT, Count, Device, Temperature, parse
from lib.stages.terminal import Stop, run_main
from lib.tables.files import plain_cell
from lib.tables.images import load_image
from serving.ranker import Pin, Query, Ranker

GRID = 5  # pictures side by side
LEVEL_NAMES = [f"p{level}" for level in range(1, NUM_LEVELS + 1)]


@dataclass(frozen=True)
class Settings:
    """Settings of the search."""

    query: tyro.conf.Positional[str]  # what is searched
    run: Path = ROOT / "outputs" / "toy"  # run directory, through stage 04
    student: str = "student"  # folder of the student below RUN
    language: str = "en"  # of the query, for people: no feature is made of it
    query_columns: tuple[str, ...] = ()  # its further columns: NAME=VALUE, such as interest=garden
    top: Count = 20  # pins shown
    output: Literal["table", "json", "csv"] = "table"  # json: a line a pin; csv and json: all digits, no more
    picture: Path | None = None  # PNG file: the pins as a grid of pictures
    data: Path | None = None  # dataset folder with the pictures (default: where stage 01 found it)
    text_encoder: str | None = None  # where stage 01's text encoder is now (default: where it was)
    caption_model: str | None = None  # likewise the captioner
    temperature: Temperature = 1.0  # of the probabilities; report/temperatures.json has the student's
    threads: Count = 1  # cores for the student
    device: Device = "cpu"  # of text encoder and captioner

    pin_title: str = ""  # a new pin: it is scored, and the table says where it would stand
    pin_description: str = ""
    pin_image: Path | None = None  # its picture, for caption and visual embedding
    pin_boards: tuple[str, ...] = ()  # titles of the boards that it is saved on
    pin_columns: tuple[str, ...] = ()  # its further columns: NAME=VALUE


def named_values(texts):
    """("interest=garden", …) -> {"interest": "garden", …}"""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise Stop(f"{text}: write NAME=VALUE")
        values[name] = value
    return values


def new_pin(settings):
    """The Pin that the flags describe, or None."""
    columns = named_values(settings.pin_columns)
    title, description = settings.pin_title, settings.pin_description
    pin = Pin(title, description, settings.pin_image, settings.pin_boards, columns)
    given = (title, description, settings.pin_image, settings.pin_boards, columns)
    return pin if any(given) else None


def escaped(text):
    r"""A text with what does not print, such as line breaks and terminal sequences, as \n, \x1b, …"""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def check_flags(settings):
    """Stop for what cannot come to a good end, before the work."""
    texts = [settings.query, settings.pin_title, settings.pin_description, *settings.pin_boards]
    if any(re.search("[\ud800-\udfff]", text) for text in texts):
        raise Stop("the query, or a text of the pin, is not UTF-8")
    picture, image = settings.picture, settings.pin_image
    if picture and picture.suffix.lower() != ".png":
        raise Stop(f"--picture {picture}: a PNG file, NAME.png")
    if picture and not (picture.parent.is_dir() and os.access(picture.parent, os.W_OK)):
        raise Stop(f"--picture {picture}: no folder that can be written to")
    if image:
        try:
            load_image(image.parent, image.name)
        except ValueError as error:
            raise Stop(f"--pin-image {image}: {error}") from None


def print_rows(scores, shown, kind, first=1):
    """A row a pin of scores, as JSON or CSV. shown: [(id, text)] of the pins; first: place of the first."""
    writer = csv.DictWriter(sys.stdout, ["place", "pin_id", "text", "expected_level", *LEVEL_NAMES, "bm25"])
    if kind == "csv":
        writer.writeheader()
    for row, (pin_id, text) in enumerate(shown):
        cells = {"place": first + row, "pin_id": pin_id, "text": text or ""}
        cells["expected_level"] = float(scores.expected_level[row])
        cells |= dict(zip(LEVEL_NAMES, scores.probabilities[row].tolist()))
        cells["bm25"] = float(scores.match["bm25"][row])
        if kind == "json":
            print(json.dumps(cells, ensure_ascii=False))
        else:
            writer.writerow({name: plain_cell(str(value)) for name, value in cells.items()})


def print_table(scores, shown, first=1):
    """A line a pin of scores. shown: [(id, text)] of the pins; first: place of the first."""
    for row, (pin_id, text) in enumerate(shown):
        numbers = [scores.expected_level[row], *scores.probabilities[row], scores.match["bm25"][row]]
        cells = "  ".join(f"{number:5.2f}" for number in numbers)
        words = "".join(c for c in " ".join(text.split()) if c.isprintable())
        print(f"{first + row:>4}  {cells}  {escaped(pin_id):<12}  {words[:40]}")


def draw_grid(scores, images, texts, title, path):
    """Pins as a grid of pictures, best first; the frame's color is the most probable level. images: their
    pictures (None: there is none)."""
    lines = -(-max(len(images), 1) // GRID)
    size = 1.9 * GRID, 2.25 * lines + 0.3
    levels = scores.probabilities.argmax(axis=1) + 1
    with pictures.picture_file(path, size, [title, *texts]) as figure:
        axes = figure.subplots(lines, GRID, squeeze=False).ravel()
        for ax in axes[len(images) :]:
            ax.axis("off")
        for row, (ax, image, text) in enumerate(zip(axes, images, texts)):
            if image is not None:
                ax.imshow(image)
            else:
                ax.text(0.5, 0.5, "no picture", ha="center", va="center", fontsize=7)
            ax.set(xticks=[], yticks=[])
            ax.set_box_aspect(1)
            ax.spines[:].set(color=pictures.LEVEL_COLORS[levels[row]], linewidth=4, visible=True)
            words = textwrap.shorten(pictures.drawable(text or "no text"), 50, placeholder=" …")
            score = f"{row + 1}.  {scores.expected_level[row]:.2f}  {LEVELS[levels[row]]}"
            ax.set_xlabel(f"{score}\n{textwrap.fill(words, 26)}", fontsize=7)
        figure.suptitle(pictures.drawable(title), fontsize=10)


def main(argv=None):
    # 1. Settings, and what stages 01 and 04 left
    settings = parse({"toy": Settings(query=tyro.MISSING)}, argv, __doc__)
    check_flags(settings)
    quiet_libraries()
    models = {"text encoder": settings.text_encoder, "caption model": settings.caption_model}
    cores, device = settings.threads, settings.device
    ranker = Ranker(settings.run, settings.student, cores, device, models, settings.temperature)
    query, pin = Query(settings.query, named_values(settings.query_columns)), new_pin(settings)

    # 2. The run's pins for the query
    found = ranker.rank(query)
    best = ranker.rows(found.pins[: settings.top])
    table = pq.read_table(settings.run / "features" / "pins.parquet", columns=["title", "caption", "image"])
    best = table.take(best).to_pylist()
    texts = [about["title"] or about["caption"] for about in best]
    head = f"“{escaped(settings.query)}” ({escaped(settings.language)})"
    if settings.output == "table":
        print(f"{head}: {len(found.pins):,} pins, best first\n")
        print("      level     p1     p2     p3     p4     p5   BM25  pin           title, or caption")
        print_table(found, zip(found.pins, texts))
    else:
        print_rows(found, zip(found.pins, texts), settings.output)

    # 3. The new pin
    if pin is not None:
        scored = ranker.score([(query, pin)])
        place = 1 + int((found.expected_level > scored.expected_level[0]).sum())
        if settings.output == "table":
            print(f"\nthe new pin would be number {place:,}:")
            print_table(scored, [("new", pin.title)], place)
        else:
            print_rows(scored, [("new", pin.title)], settings.output, place)

    # 4. Picture
    if settings.picture:
        dataset = settings.data or Path(ranker.made["dataset"])
        images = [pictures.picture(dataset, about["image"]) for about in best]
        title = f"{head}: expected level; frame and word: most probable level"
        draw_grid(found, images, texts, title, settings.picture)
        print(f"\nwrote {settings.picture}", file=sys.stderr if settings.output != "table" else sys.stdout)


if __name__ == "__main__":
    run_main(main)
