"""A query never seen, ranked over a run's pins by its student, as a service would; or one new pin, scored.

    python -m serving.search "red chair" --run outputs/toy
    python -m serving.search "roter stuhl" --language de --top 10 --picture found.png
    python -m serving.search "red chair" --pin-title "Chair" --pin-image chair.jpg --pin-boards "Living room"

The class behind it, for a service: serving/ranker.py.
"""

import csv
import json
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from common import LEVELS
from lib.models import quiet_libraries
from lib.results import pictures
from lib.stages.settings import ROOT, Count, Temperature, parse
from lib.stages.terminal import Stop, run_main
from lib.tables.files import plain_cell
from serving.new_features import open_picture
from serving.ranker import Pin, Query, Ranker

GRID = 5  # pictures side by side
HEAD = "      level     p1     p2     p3     p4     p5   BM25  pin           title, or caption"


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

    pin_title: str = ""  # a new pin: it is scored, and the table says where it would stand
    pin_description: str = ""
    pin_image: Path | None = None  # its picture, for caption and visual embedding
    pin_boards: tuple[str, ...] = ()  # titles of the boards that it is saved on
    pin_columns: tuple[str, ...] = ()  # its further columns: NAME=VALUE


def named_values(texts):
    """("interest=garden", …) -> {"interest": "garden", …}"""
    for text in texts:
        if "=" not in text:
            raise Stop(f"{text}: write NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def asked(settings):
    """The Query, and the Pin or None, that the flags describe. Stop for what cannot come to a good end."""
    query, columns = Query(settings.query, named_values(settings.query_columns)), settings.pin_columns
    pin = settings.pin_title, settings.pin_description, settings.pin_image, settings.pin_boards
    pin = Pin(*pin, named_values(columns)) if any((*pin, columns)) else None
    if settings.pin_image:
        open_picture(settings.pin_image)
    picture = settings.picture
    if picture and picture.suffix.lower() != ".png":
        raise Stop(f"--picture {picture}: a PNG file, NAME.png")
    if picture and not (picture.parent.is_dir() and os.access(picture.parent, os.W_OK)):
        raise Stop(f"--picture {picture}: no folder that can be written to")
    return query, pin


def escaped(text):
    r"""A text with what does not print, such as line breaks and terminal sequences, as \n, \x1b, …"""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_pins(scores, texts, output, first=1):
    """A line a pin of scores, for people or as JSON or CSV. texts: titles or captions of the pins that are
    shown; first: place of the first."""
    for row, text in enumerate(texts):
        cells = {"place": first + row, "pin_id": scores.pins[row], "text": text or ""}
        numbers = {"expected_level": float(scores.expected_level[row])}
        for level, p in enumerate(scores.probabilities[row].tolist(), 1):
            numbers[f"p{level}"] = p
        numbers["bm25"] = float(scores.match["bm25"][row])
        if output == "json":
            print(json.dumps(cells | numbers, ensure_ascii=False))
        elif output == "csv":
            writer = csv.writer(sys.stdout)
            writer.writerows([[*cells, *numbers]] * (first + row == 1))
            writer.writerow(plain_cell(str(cell)) for cell in (cells | numbers).values())
        else:
            digits = "  ".join(f"{number:5.2f}" for number in numbers.values())
            words = escaped(" ".join(cells["text"].split()))[:40]
            print(f"{cells['place']:>4}  {digits}  {escaped(cells['pin_id']):<12}  {words}")


def draw_grid(scores, pins, dataset, title, path):
    """Pins as a grid of pictures, best first; the frame's color is the most probable level. pins: rows of
    pins.parquet, those that are shown."""
    levels, shown = scores.probabilities.argmax(axis=1) + 1, []
    for row, pin in enumerate(pins):
        text = pictures.drawable(pin["title"] or pin["caption"] or "no text")
        words = textwrap.fill(textwrap.shorten(text, 50, placeholder=" …"), 24)
        score = f"{row + 1}.  {scores.expected_level[row]:.2f}  {LEVELS[levels[row]]}"
        shown.append((pin, levels[row], f"{score}\n{words}"))
    lines = [("", shown[start : start + GRID]) for start in range(0, len(shown), GRID)]
    pictures.draw_pins(lines, dataset, title, path)


def main(argv=None):
    # 1. Settings, and what stages 01 and 04 left
    settings = parse({"toy": Settings(query=tyro.MISSING)}, argv, __doc__)
    query, pin = asked(settings)
    is_table, head = settings.output == "table", f"“{escaped(query.text)}” ({escaped(settings.language)})"
    quiet_libraries()
    models = {"text encoder": settings.text_encoder, "caption model": settings.caption_model}
    ranker = Ranker(settings.run, settings.student, models=models, temperature=settings.temperature)

    # 2. The run's pins for the query
    found = ranker.rank(query)
    best = ranker.texts.take(ranker.rows(found.pins[: settings.top])).to_pylist()
    if is_table:
        print(f"{head}: {len(found.pins):,} pins, best first\n\n{HEAD}")
    print_pins(found, [about["title"] or about["caption"] for about in best], settings.output)

    # 3. The new pin
    if pin is not None:
        scored = ranker.score([(query, pin)])
        place = 1 + int((found.expected_level > scored.expected_level[0]).sum())
        if is_table:
            print(f"\nthe new pin would be number {place:,}:")
        scored.pins[0] = "new"
        print_pins(scored, [pin.title], settings.output, place)

    # 4. Picture
    if settings.picture:
        dataset = settings.data or Path(ranker.made["dataset"])
        title = f"{head}: expected level; frame and word: most probable level"
        draw_grid(found, best, dataset, title, settings.picture)
        print(f"\nwrote {settings.picture}", file=sys.stdout if is_table else sys.stderr)


if __name__ == "__main__":
    run_main(main)
