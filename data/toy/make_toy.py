"""Render the toy dataset: a small made-up world with pictures, logs and relevance labels in four languages.

    python data/toy/make_toy.py                               # 2,000 pins, 600 queries; ten seconds
    python data/toy/make_toy.py --scale 0.05 --out /tmp/tiny  # a tiny world for tests; under a second

Every pin and every query has a hidden meaning (object, colour, material, style, scene). The five levels
follow from the two meanings by `relevance()`, plus annotator noise; pins show their meaning only in part,
each text source another part. data/toy/README.md describes the world and its traps.

Reads   world.toml (words and phrases), shapes.txt (pictures)
Writes  data/toy/tables/: the tables of data/README.md, images/*.png, and toy.json (sizes)
"""

import datetime
import itertools
import json
import shutil
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import toy_images
import tyro

HERE = Path(__file__).resolve().parent
WORLD = tomllib.loads((HERE / "world.toml").read_text(encoding="utf-8"))
PHRASES = WORLD["phrases"]
LANGUAGES = ["en", "es", "fr", "de"]
ATTRIBUTES = ["colour", "material", "style", "scene"]
OBJECTS, FAMILY_OF = {}, {}
for _family, _objects in WORLD["objects"].items():
    OBJECTS |= _objects
    FAMILY_OF |= dict.fromkeys(_objects, _family)
WORDS = {  # of a kind and concept: a text for each of LANGUAGES
    "object": OBJECTS,
    "colour": WORLD["colours"],
    "material": WORLD["materials"],
    "style": WORLD["styles"],
    "scene": WORLD["rooms"] | WORLD["occasions"],
    "family": WORLD["families"],
}
COMPLEMENTS = defaultdict(set)
for _pair in WORLD["together"]["pairs"].split():
    for _one, _other in itertools.permutations(_pair.split("-")):
        COMPLEMENTS[_one].add(_other)


# ------------------------------------------------------------------------------------------------------------
# Language: from a meaning to words


def pick(rng, options):
    """One of the options, each as likely."""
    return options[rng.integers(len(options))]


def say(name, lang, rng):
    """A phrase of a kind."""
    return pick(rng, PHRASES[lang][name])


def word(kind, concept, lang, rng, gender=""):
    """The first of a concept's words with 60 %, else any of them; an adjective with the ending of its noun's
    gender. An object's word ends in its own: "silla.f"."""
    text = WORDS[kind][concept][LANGUAGES.index(lang)]
    words = text.split()
    chosen = words[0] if rng.random() < 0.6 else pick(rng, words)
    if chosen.endswith("+"):
        endings = {"m": "er", "f": "e", "n": "es"}
        return chosen[:-1] + endings.get(gender, "")
    masculine, _, feminine = chosen.partition("/")
    return feminine if feminine and gender == "f" else masculine


def phrase(lang, meaning, rng):
    """Words for some of an object's properties in the language's own order; any of them may be missing.

    {"object": "chair", "colour": "red", "scene": "kitchen"} → "red chair for kitchen", "chaise rouge pour
    cuisine"
    """
    noun = word("object", meaning["object"], lang, rng) if "object" in meaning else ".m"
    name, _, gender = noun.partition(".")
    style, colour, material, scene = (
        word(kind, meaning[kind], lang, rng, gender) if kind in meaning else ""
        for kind in ("style", "colour", "material", "scene")
    )
    for_scene = scene and f"{PHRASES[lang]['for']} {scene}"
    if lang == "en":
        parts = [style, colour, material, name]
        parts = [scene, *parts] if rng.random() < 0.4 else [*parts, for_scene]
    else:
        parts = [style, colour, name] if lang == "de" else [name, colour, style]
        of_material = material and f"{PHRASES[lang]['of']} {material}"
        parts += [of_material, for_scene]
    return " ".join(filter(None, parts))


def near_language(lang, rng):
    """The language of somebody who meets a pin: mostly English or the pin's own."""
    if rng.random() < 0.35:
        return lang
    return rng.choice(LANGUAGES, p=[0.46, 0.18, 0.18, 0.18]).item()


# ------------------------------------------------------------------------------------------------------------
# Pins, queries and the five levels


def relevance(query, pin):
    """The level that a careful annotator gives: the rule that every label of the toy follows.

    5 the object asked for, with every property asked for      4 one property is off
    3 an object that goes together with it, or the object itself with two properties off
    2 only of the same family                                  1 unrelated
    """
    asked, shown = query["object"], pin["object"]
    if asked == shown:
        return 5 - sum(query[kind] != pin[kind] for kind in query)
    if shown in COMPLEMENTS[asked]:
        return 3
    return 2 if FAMILY_OF[asked] == FAMILY_OF[shown] else 1


def choose_objects(count):
    """The first `count` objects of a walk along the pairs that go together, so that level 3 exists at every
    scale."""
    chosen = ["chair"]
    for obj in chosen:
        chosen += [c for c in OBJECTS if c in COMPLEMENTS[obj] and c not in chosen]
    return [obj for obj in OBJECTS if obj in chosen[:count]]


def values_of(kind, obj):
    """What a property of an object may be."""
    if kind == "material":
        return WORLD["materials_of"][FAMILY_OF[obj]]
    return list(WORDS[kind])


def make_pins(count, objects, rng):
    """Meanings of pins. Some objects are more popular than others, and an object has its usual properties."""
    popularity = (rng.permutation(len(objects)) + 4) ** -0.5
    usual = {}
    for obj, kind in itertools.product(objects, ATTRIBUTES):
        size = 4 if kind == "colour" else 3
        usual[obj, kind] = rng.choice(values_of(kind, obj), size, replace=False).tolist()
    pins = []
    for obj in rng.choice(objects, count, p=popularity / popularity.sum()).tolist():
        pin = {"object": obj}
        for kind in ATTRIBUTES:
            pin[kind] = pick(rng, usual[obj, kind] if rng.random() < 0.88 else values_of(kind, obj))
        pins.append(pin)
    return pins


def shuffled(rows, rng):
    return [rows[i] for i in rng.permutation(len(rows))]


def make_queries(sizes, pins, rng):
    """Each asks for a random pin's object and one or two of its properties; with its `levels` of all pins.
    `sizes`: (language, use, count), use = train, eval or log. No eval query asks for what a train query asks
    for."""
    queries, texts, trained = [], set(), []
    for lang, use, count in sizes:
        enough = len(queries) + count
        while len(queries) < enough:
            pin = pick(rng, pins)
            size = 2 if rng.random() < 0.45 else 1
            kinds = ["object", *rng.choice(ATTRIBUTES, size, replace=False, p=[0.32, 0.22, 0.18, 0.28])]
            meaning = {kind: value for kind, value in pin.items() if kind in kinds}
            text = phrase(lang, meaning, rng)
            if (lang, text) in texts or (use == "eval" and meaning in trained):
                continue
            texts.add((lang, text))
            if use == "train":
                trained.append(meaning)
            query = {"query": text, "language": lang, "use": use, "meaning": meaning, "taken": set()}
            query["levels"] = np.array([relevance(meaning, pin) for pin in pins])
            family = FAMILY_OF[meaning["object"]]
            query["interest"] = family if rng.random() < 0.9 else None
            query["shopping_interest"] = WORLD["shopping_interest"][family] if rng.random() < 0.8 else None
            queries.append(query)
    return shuffled(queries, rng)


def sample_pins(query, pins, count, mix, rng):
    """Indices of `count` pins as a search engine might return them: of every level, in shares `mix` (1…5);
    none that is in query["taken"], to which they are added.

    Half of the pins of levels 1 and 2 share a property that was asked for, so that a shared word alone says
    little.
    """
    order = rng.permutation(len(pins))
    order = order[~np.isin(order, list(query["taken"]))]
    levels, asked = query["levels"][order], query["meaning"].items()
    chosen = []
    for level in (5, 4, 3, 2, 1):
        here = order[levels == level].tolist()
        want = round(mix[level - 1] * count)
        if level <= 2:
            alike = [i for i in here if not asked.isdisjoint(pins[i].items())]
            here = list(dict.fromkeys(alike[: want // 2] + here))
        chosen += here[:want]
    chosen = dict.fromkeys(chosen + order.tolist())
    chosen = list(chosen)[:count]
    query["taken"].update(chosen)
    return rng.permutation(chosen).tolist()


# ------------------------------------------------------------------------------------------------------------
# What is seen of a pin


def some(pin, rng, **chances):
    """The part of a pin's meaning that a source mentions: each property with its own chance."""
    said = {}
    for kind in ("object", *ATTRIBUTES):
        if rng.random() < chances.get(kind, 0):
            said[kind] = pin[kind]
    return said


def title_of(pin, lang, rng):
    """A pin's title, or None: some say nothing in particular, most name the object, few a property."""
    kind = rng.random()
    if kind < 0.03:
        return None
    if kind < 0.17:
        return say("generic_titles", lang, rng)
    if kind < 0.25:
        return f"{word('family', FAMILY_OF[pin['object']], lang, rng)} {PHRASES[lang]['ideas']}"
    said = some(pin, rng, object=0.8, colour=0.15, material=0.12, style=0.2, scene=0.12)
    title = phrase(lang, said, rng) or say("generic_titles", lang, rng)
    return title.capitalize()


def description_of(pin, lang, rng):
    """A pin's description, or None for two in five."""
    kind = rng.random()
    if kind < 0.4:
        return None
    if kind < 0.5:
        return say("noise", lang, rng)
    words = {"m": word("material", pin["material"], lang, rng), "s": word("style", pin["style"], lang, rng)}
    form = rng.choice(["descriptions", "material_only", "style_only"], p=[0.4, 0.35, 0.25])
    text = say(form, lang, rng).format(**words)
    return f"{text}. {say('noise', lang, rng)}" if rng.random() < 0.08 else text


def boards_of(pin, lang, rng):
    """Titles of the boards that people saved a pin to: mostly its room or occasion."""
    titles = []
    for _ in range(rng.poisson(2.6) if rng.random() > 0.05 else 0):
        near, kind = near_language(lang, rng), rng.random()
        if kind < 0.1:
            titles.append(say("junk_boards", near, rng).title())
            continue
        if kind < 0.7:
            about = "scene", pin["scene"]
        elif kind < 0.75:  # somebody has other plans with it
            about = "scene", pick(rng, list(WORDS["scene"]))
        elif kind < 0.9:
            about = "style", pin["style"]
        else:
            about = "family", FAMILY_OF[pin["object"]]
        topic = word(*about, near, rng)
        titles.append(say("boards", near, rng).format(x=topic).title())
    return titles


def wrong_object(pin, objects, rng):
    return pick(rng, [obj for obj in objects if obj != pin["object"]])


def link_visits_of(pin, lang, objects, rng):
    """(title, note, seconds) of visits of the page behind a pin. One that lasts under ten seconds went to a
    page about something else."""
    visits = []
    if rng.random() < 0.6:
        near = near_language(lang, rng)
        said = some(pin, rng, object=1, material=0.7, style=0.2)
        title = f"{say('shop', near, rng)} {phrase(near, said, rng)}"
        note = say("shop_note", near, rng) if rng.random() < 0.25 else None
        for _ in range(rng.integers(1, 4)):
            seconds = 10 + rng.exponential(40)
            visits.append((title, note, round(seconds, 1)))
    if rng.random() < 0.45:
        wrong = {"object": wrong_object(pin, objects, rng)}
        wrong["material"] = pick(rng, list(WORDS["material"]))
        title = f"{say('shop', 'en', rng)} {phrase('en', wrong, rng)}"
        for _ in range(rng.integers(1, 4)):
            seconds = rng.uniform(0.5, 9.9)
            visits.append((title, None, round(seconds, 1)))
    return visits


NEWEST = datetime.date(2024, 6, 30)
RECENT = (0, 721), (5, 60)  # an event is so many days before NEWEST, and counts so much
OLD = (741, 913), (200, 900)


def draw_event(age, rng):
    """(date, count) of an event, RECENT or OLD."""
    days, count = (int(rng.integers(*between)) for between in age)
    return NEWEST - datetime.timedelta(days), count


def engagements_of(pin, lang, objects, rng):
    """(query, date, count): people's own words within two years; before that, a pin stood where it did not
    belong."""
    rows = []
    for _ in range(rng.choice(4, p=[0.1, 0.35, 0.35, 0.2])):
        near = near_language(lang, rng)
        kind = rng.choice(ATTRIBUTES, p=[0.25, 0.25, 0.3, 0.2])
        said = {"object": pin["object"], kind: pin[kind]}
        if rng.random() < 0.08:
            said[kind] = pick(rng, list(WORDS[kind]))
        text = phrase(near, said, rng)
        rows += [(text, *draw_event(RECENT, rng)) for _ in range(rng.integers(1, 4))]
    for _ in range(rng.choice(3, p=[0.4, 0.4, 0.2])):
        said = {"object": wrong_object(pin, objects, rng)}
        kind = rng.choice(ATTRIBUTES)
        said[kind] = pick(rng, list(WORDS[kind]))
        text = phrase(near_language(lang, rng), said, rng)
        rows += [(text, *draw_event(OLD, rng)) for _ in range(rng.integers(1, 3))]
    return rows


def query_engagements(queries, rng):
    """(query, pin, date, count) of the results of the queries themselves: seldom and with good pins; before
    two years ago, bad ones."""
    rows = []
    for query in queries:
        text, levels = query["query"], query["levels"]
        for level, chance in ((5, 0.15), (4, 0.015), (3, 0.003)):
            for pin in np.flatnonzero(levels == level).tolist():
                if rng.random() < chance:
                    rows.append((text, pin, *draw_event(RECENT, rng)))
        for pin in rng.choice(np.flatnonzero(levels == 1), 2, replace=False).tolist():
            rows.append((text, pin, *draw_event(OLD, rng)))
    return rows


# ------------------------------------------------------------------------------------------------------------
# The world and its tables

LABEL_MIX = [0.18, 0.18, 0.21, 0.25, 0.18]  # of levels 1…5, where there are enough pins
IMPRESSION_MIX = [0.21, 0.21, 0.22, 0.22, 0.14]
LABEL_NOISE = 0.08


def draw_rows(weights, size, mix, queries, pins, rng):
    """Yields about `size` (query, pin), each pair once. weights: {use: the share of a query of this use}."""
    weight = np.array([weights.get(query["use"], 0) for query in queries])
    ends = np.cumsum(weight / weight.sum() * size)
    counts = np.diff(np.round(ends).astype(int), prepend=0)
    for i in np.flatnonzero(weight).tolist():
        for pin in sample_pins(queries[i], pins, counts[i], mix, rng):
            yield i, pin


def make_labels(sizes, queries, pins, rng):
    """(query, pin, level, use): what people say. sizes: {use: labels}."""
    labels = []
    for use, size in sizes.items():
        for i, pin in draw_rows({use: 1}, size, LABEL_MIX, queries, pins, rng):
            level = queries[i]["levels"][pin]
            if rng.random() < LABEL_NOISE:
                level = np.clip(level + rng.choice([-1, 1]), 1, 5)
            labels.append((i, pin, int(level), use))
    return shuffled(labels, rng)


def make_impressions(size, queries, pins, rng):
    """(query, pin), fewer of the queries with labels for training."""
    weights = {"train": 0.6, "eval": 1.0, "log": 1.0}
    rows = draw_rows(weights, size, IMPRESSION_MIX, queries, pins, rng)
    return shuffled(list(rows), rng)


def make_world(scale=1.0, seed=0, total=None):
    """The whole world as plain Python and numpy: {name: rows} of pins, queries, labels, impressions, logs.

    `total`: that many impressions; all else, and the impressions that there are anyway, stay the same."""
    rng = np.random.default_rng(seed)

    def n(count):
        return max(1, round(count * scale))

    # 1. What is searched for, and how well it fits
    count = round(48 * scale**0.5)
    objects = choose_objects(max(12, min(count, 48)))
    sizes = [("en", "train", n(260))]
    for lang in LANGUAGES:
        sizes += [(lang, "eval", n(70)), (lang, "log", n(15))]
    pins = make_pins(n(2000), objects, rng)
    queries = make_queries(sizes, pins, rng)

    # 2. Human labels: 6,000 English ones to train on, 3,360 in four languages; never a labelled pair is shown
    labels = make_labels({"train": n(6000), "eval": 48 * n(70)}, queries, pins, rng)
    impressions = make_impressions(n(40000), queries, pins, rng)
    if total and total > len(impressions):
        missing = total - len(impressions)
        impressions += make_impressions(missing, queries, pins, np.random.default_rng([seed, 1]))

    # 3. What is seen of the pins (title, description, is there a picture), and the logs
    languages = rng.choice(LANGUAGES, len(pins), p=[0.73, 0.09, 0.09, 0.09]).tolist()
    spoken = list(zip(range(len(pins)), pins, languages))
    shown, boards, visits, engagements = [], [], [], []
    for _, pin, lang in spoken:
        texts = title_of(pin, lang, rng), description_of(pin, lang, rng)
        shown.append((*texts, rng.random() > 0.02))
    for i, pin, lang in spoken:
        boards += [(i, title) for title in boards_of(pin, lang, rng)]
    for i, pin, lang in spoken:
        visits += [(i, *visit) for visit in link_visits_of(pin, lang, objects, rng)]
    for i, pin, lang in spoken:
        rows = engagements_of(pin, lang, objects, rng)
        engagements += [(text, i, *event) for text, *event in rows]
    engagements += query_engagements(queries, rng)
    text, pin, _, count = engagements[0]
    engagements[0] = (text, pin, NEWEST, count)  # the log ends on its newest date
    world = {"pins": pins, "queries": queries, "labels": labels, "impressions": impressions}
    return world | {"shown": shown, "boards": boards, "visits": visits, "engagements": engagements}


def write_table(path, columns, rows):
    """Rows, with numbers for ids, as .csv, .parquet or .jsonl."""
    table = dict(zip(columns.split(), zip(*rows)))
    for name, form in (("query_id", "q{:04d}"), ("pin_id", "p{:05d}")):
        if name in table:
            table[name] = [form.format(number) for number in table[name]]
    table = pa.table(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()]
        path.write_text("".join(lines), encoding="utf-8")


def write_tables(world, folder, seed):
    """The tables, and a picture of each pin that has one."""
    (folder / "images").mkdir(parents=True)
    pins = []
    for i, (pin, (*texts, is_pictured)) in enumerate(zip(world["pins"], world["shown"])):
        path = f"images/p{i:05d}.png" if is_pictured else None
        pins.append((i, *texts, path))
        if is_pictured:
            rng = np.random.default_rng([seed, i])
            image = toy_images.render(pin["object"], pin["colour"], rng)
            image.save(folder / path, compress_level=1)
    queries = []
    for i, query in enumerate(world["queries"]):
        interests = query["interest"], query["shopping_interest"]
        queries.append((i, query["query"], query["language"], *interests))
    write_table(folder / "pins.parquet", "pin_id title description image", pins)
    write_table(folder / "queries.csv", "query_id query language interest shopping_interest", queries)
    write_table(folder / "labels.csv", "query_id pin_id label split", world["labels"])
    for part, rows in enumerate(np.array_split(world["impressions"], 4)):
        path = folder / "impressions" / f"part-{part:05d}.parquet"
        write_table(path, "query_id pin_id", rows)
    write_table(folder / "engagements.parquet", "query pin_id date count", world["engagements"])
    write_table(folder / "boards.parquet", "pin_id board_title", world["boards"])
    visit = "pin_id link_title link_description dwell_seconds"
    write_table(folder / "link_visits.jsonl", visit, world["visits"])


def main(out: Path = HERE / "tables", scale: float = 1.0, impressions: int | None = None, seed: int = 0):
    """Render the toy dataset.

    Args:
        out: dataset folder
        scale: size of the world; 1.0 = 2,000 pins
        impressions: so many of the same world (40,000 times the scale)
        seed: of every random draw
    """
    asked = {"scale": scale, "seed": seed, "asked_impressions": impressions}
    made = out / "toy.json"
    if made.exists() and asked.items() <= json.loads(made.read_text()).items():
        print(f"{out} is complete already; nothing to do")
        return
    if out.exists():
        sys.exit(f"{out} exists and was not made with these arguments; another --out, or delete it")
    world = make_world(scale, seed, impressions)
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_tables(world, unfinished, seed)
    sizes = {name: len(rows) for name, rows in world.items()}
    made_as = json.dumps(asked | sizes, indent=2)
    (unfinished / "toy.json").write_text(made_as + "\n")
    unfinished.rename(out)
    print(f"wrote {out}: {len(world['pins']):,} pins, {len(world['impressions']):,} impressions")


if __name__ == "__main__":
    tyro.cli(main)
