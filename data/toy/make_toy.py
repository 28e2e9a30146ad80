"""Render the toy dataset: a small made-up world with images, logs and relevance labels in four languages.

Every pin and every query has a hidden meaning (object, colour, material, style, scene). The five relevance
levels follow from the two meanings by `relevance()`, plus annotator noise; pins show their meaning only in
part, each text source another part. data/toy/README.md describes the world and its traps.

Reads   world.toml (words and phrases), shapes.txt (pictures)
Writes  data/toy/tables/: pins.parquet, queries.csv, labels.csv, impressions/part-*.parquet,
        engagements.parquet, boards.parquet, link_visits.jsonl, images/*.png (the contract of data/README.md),
        and toy.json (sizes)

    python data/toy/make_toy.py                                   # 2,000 pins, 600 queries; about 10 s
    python data/toy/make_toy.py --scale 0.05 --out /tmp/tiny  # a tiny world for tests; under a second
"""

import argparse
import datetime
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

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import toy_images  # noqa: E402

LANGUAGES = ["en", "es", "fr", "de"]
WORLD = tomllib.loads((HERE / "world.toml").read_text(encoding="utf-8"))


def words_of_concepts(section):
    """{concept: {language: [word, …]}} in the order of the file."""
    table = {}
    for concept, by_language in section.items():
        table[concept] = {lang: words.split() for lang, words in zip(LANGUAGES, by_language)}
    return table


OBJECTS, FAMILY_OF = {}, {}
for _family, _objects in WORLD["objects"].items():
    OBJECTS |= words_of_concepts(_objects)
    FAMILY_OF |= dict.fromkeys(_objects, _family)
COLOURS, STYLES, MATERIALS, FAMILIES = (
    words_of_concepts(WORLD[name]) for name in ("colours", "styles", "materials", "families")
)
SCENES = words_of_concepts(WORLD["rooms"] | WORLD["occasions"])
ATTRIBUTES = {"colour": COLOURS, "material": MATERIALS, "style": STYLES, "scene": SCENES}
MATERIALS_OF, SHOPPING_INTEREST, PHRASES = WORLD["materials_of"], WORLD["shopping_interest"], WORLD["phrases"]
COMPLEMENTS = defaultdict(set)
for _pair in WORLD["together"]["pairs"].split():
    _one, _other = _pair.split("-")
    COMPLEMENTS[_one].add(_other)
    COMPLEMENTS[_other].add(_one)


# ------------------------------------------------------------------------------------------------------------
# Language: from a meaning to words


def pick(rng, options):
    """One of the options, each as likely."""
    return options[rng.integers(len(options))]


def other(rng, options, not_this):
    """One of the options that is not `not_this`."""
    return pick(rng, [option for option in options if option != not_this])


def usual(rng, words):
    """The first of a concept's words with 60 %, else any of them."""
    if rng.random() < 0.6:
        return words[0]
    return pick(rng, words)


def noun(obj, lang, rng):
    """A word for an object, and its grammatical gender."""
    word, _, gender = usual(rng, OBJECTS[obj][lang]).partition(".")
    return word, gender


def adjective(table, concept, lang, gender, rng):
    """An adjective for a colour or style, with the ending of the noun's gender."""
    word = usual(rng, table[concept][lang])
    if word.endswith("+"):
        return word[:-1] + {"m": "er", "f": "e", "n": "es"}.get(gender, "")
    masculine, _, feminine = word.partition("/")
    return feminine if feminine and gender == "f" else masculine


def say(name, lang, rng):
    """A phrase of a kind."""
    return pick(rng, PHRASES[lang][name])


def plain(table, concept, lang, rng):
    """A noun for a material, room, occasion or family."""
    return usual(rng, table[concept][lang])


def phrase(lang, meaning, rng):
    """Words for some of an object's properties in the language's own order; any of them may be missing.

    {"object": "chair", "colour": "red", "scene": "kitchen"} → "red chair for kitchen", "chaise rouge pour
    cuisine"
    """
    name, gender = noun(meaning["object"], lang, rng) if "object" in meaning else ("", "m")
    word = dict.fromkeys(ATTRIBUTES, "")
    for kind in ("style", "colour"):
        if kind in meaning:
            word[kind] = adjective(ATTRIBUTES[kind], meaning[kind], lang, gender, rng)
    for kind in ("material", "scene"):
        if kind in meaning:
            word[kind] = plain(ATTRIBUTES[kind], meaning[kind], lang, rng)
    style, colour, material, scene = word["style"], word["colour"], word["material"], word["scene"]
    for_scene = scene and f"{PHRASES[lang]['for']} {scene}"
    if lang == "en":
        parts = [style, colour, material, name]
        parts = [scene, *parts] if rng.random() < 0.4 else [*parts, for_scene]
    else:
        of_material = material and f"{PHRASES[lang]['of']} {material}"
        parts = [style, colour, name] if lang == "de" else [name, colour, style]
        parts += [of_material, for_scene]
    return " ".join(filter(None, parts))


def pin_language(rng):
    """A pin's language: English with 73 %, the three others with 9 % each."""
    return rng.choice(LANGUAGES, p=[0.73, 0.09, 0.09, 0.09]).item()


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
        return MATERIALS_OF[FAMILY_OF[obj]]
    return list(ATTRIBUTES[kind])


def make_pins(count, objects, rng):
    """Meanings of pins. Some objects are more popular than others, and an object has its usual properties."""
    popularity = (rng.permutation(len(objects)) + 4) ** -0.5
    often = {}
    for obj in objects:
        often[obj] = {}
        for kind in ATTRIBUTES:
            size = 4 if kind == "colour" else 3
            often[obj][kind] = rng.choice(values_of(kind, obj), size, replace=False).tolist()
    pins = []
    for obj in rng.choice(objects, count, p=popularity / popularity.sum()).tolist():
        pin = {"object": obj}
        for kind in ATTRIBUTES:
            pin[kind] = pick(rng, often[obj][kind] if rng.random() < 0.88 else values_of(kind, obj))
        pins.append(pin)
    return pins


def make_query(lang, use, pins, rng):
    """A query for a random pin: its object, and one or two of its properties."""
    pin = pick(rng, pins)
    count = 1 + (rng.random() < 0.45)
    kinds = rng.choice(list(ATTRIBUTES), count, replace=False, p=[0.32, 0.22, 0.18, 0.28])
    meaning = {"object": pin["object"]}
    for kind in ATTRIBUTES:
        if kind in kinds:
            meaning[kind] = pin[kind]
    text = phrase(lang, meaning, rng)
    return {"language": lang, "use": use, "query": text, "meaning": meaning}


def make_queries(sizes, pins, rng):
    """`sizes`: (language, use, count), use = train, eval or log. No eval query asks for what a train query
    asks for."""
    queries, texts, trained = [], set(), []
    for lang, use, count in sizes:
        made = 0
        while made < count:
            query = make_query(lang, use, pins, rng)
            if (lang, query["query"]) in texts or (use == "eval" and query["meaning"] in trained):
                continue
            texts.add((lang, query["query"]))
            if use == "train":
                trained.append(query["meaning"])
            family = FAMILY_OF[query["meaning"]["object"]]
            query["interest"] = family if rng.random() < 0.9 else None
            query["shopping_interest"] = SHOPPING_INTEREST[family] if rng.random() < 0.8 else None
            queries.append(query)
            made += 1
    return [queries[i] for i in rng.permutation(len(queries))]


def without(numbers, others):
    """The numbers that are not among the others, in their order."""
    return numbers[~np.isin(numbers, others)]


def sample_pins(levels, query, pins, count, mix, exclude, rng):
    """Indices of `count` pins as a search engine might return them: of every level, in shares `mix` (1…5).

    Half of the pins of levels 1 and 2 share a property that was asked for, so that a shared word alone says
    little.
    """
    order = without(rng.permutation(len(pins)), list(exclude))
    asked = query.items()
    shares = np.array([not asked.isdisjoint(pins[i].items()) for i in order], bool)
    chosen = []
    for level in (5, 4, 3, 2, 1):
        of_level = levels[order] == level
        here = order[of_level]
        want = int(round(mix[level - 1] * count))
        if level <= 2:
            alike = order[of_level & shares][: want // 2]
            here = np.concatenate([alike, without(here, alike)])
        chosen.extend(here[:want])
    chosen.extend(without(order, chosen))
    return rng.permutation(np.array(chosen[:count], int))


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
        family = plain(FAMILIES, FAMILY_OF[pin["object"]], lang, rng)
        return f"{family} {PHRASES[lang]['ideas']}"
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
    material = plain(MATERIALS, pin["material"], lang, rng)
    style = adjective(STYLES, pin["style"], lang, "", rng)
    form = rng.choice(["descriptions", "material_only", "style_only"], p=[0.4, 0.35, 0.25])
    text = say(form, lang, rng).format(m=material, s=style)
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
            about = plain(SCENES, pin["scene"], near, rng)
        elif kind < 0.75:  # somebody has other plans with it
            about = plain(SCENES, pick(rng, list(SCENES)), near, rng)
        elif kind < 0.9:
            about = adjective(STYLES, pin["style"], near, "", rng)
        else:
            about = plain(FAMILIES, FAMILY_OF[pin["object"]], near, rng)
        titles.append(say("boards", near, rng).format(x=about).title())
    return titles


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
        wrong = {"object": other(rng, objects, pin["object"])}
        wrong["material"] = pick(rng, list(MATERIALS))
        title = f"{say('shop', 'en', rng)} {phrase('en', wrong, rng)}"
        for _ in range(rng.integers(1, 4)):
            seconds = rng.uniform(0.5, 9.9)
            visits.append((title, None, round(seconds, 1)))
    return visits


NEWEST = datetime.date(2024, 6, 30)
SPAN = 913  # days: two and a half years
TWO_YEARS = 731


def recent_event(rng):
    """(days ago, count) of an event within two years."""
    ago = rng.integers(0, TWO_YEARS - 10)
    return int(ago), int(rng.integers(5, 60))


def old_event(rng):
    """Likewise of one before: it counts much more."""
    ago = rng.integers(TWO_YEARS + 10, SPAN)
    return int(ago), int(rng.integers(200, 900))


def engagements_of(pin, lang, objects, rng):
    """(query, days ago, count): people's own words within two years; before that, a pin stood where it did
    not belong."""
    rows = []
    for _ in range(rng.choice(4, p=[0.1, 0.35, 0.35, 0.2])):
        near = near_language(lang, rng)
        kind = rng.choice(list(ATTRIBUTES), p=[0.25, 0.25, 0.3, 0.2])
        said = {"object": pin["object"], kind: pin[kind]}
        if rng.random() < 0.08:
            said[kind] = pick(rng, list(ATTRIBUTES[kind]))
        text = phrase(near, said, rng)
        rows += [(text, *recent_event(rng)) for _ in range(rng.integers(1, 4))]
    for _ in range(rng.choice(3, p=[0.4, 0.4, 0.2])):
        said = {"object": other(rng, objects, pin["object"])}
        kind = rng.choice(list(ATTRIBUTES))
        said[kind] = pick(rng, list(ATTRIBUTES[kind]))
        text = phrase(near_language(lang, rng), said, rng)
        rows += [(text, *old_event(rng)) for _ in range(rng.integers(1, 3))]
    return rows


def query_engagements(queries, levels, rng):
    """(query, pin, days ago, count) of the results of the queries themselves: seldom and with good pins;
    before two years ago, bad ones."""
    rows = []
    for query, of_query in zip(queries, levels):
        for level, chance in ((5, 0.15), (4, 0.015), (3, 0.003)):
            for pin in np.flatnonzero(of_query == level).tolist():
                if rng.random() < chance:
                    rows.append((query["query"], pin, *recent_event(rng)))
        for pin in rng.choice(np.flatnonzero(of_query == 1), 2, replace=False).tolist():
            rows.append((query["query"], pin, *old_event(rng)))
    return rows


# ------------------------------------------------------------------------------------------------------------
# The world and its tables

LABEL_MIX = [0.18, 0.18, 0.21, 0.25, 0.18]  # of levels 1…5, where there are enough pins
IMPRESSION_MIX = [0.21, 0.21, 0.22, 0.22, 0.14]
LABEL_NOISE = 0.08


def shuffled(rows, rng):
    return [rows[i] for i in rng.permutation(len(rows))]


def sample_rows(counts, mix, exclude, world, rng):
    """(query, pin) for `counts` [(query, how many pins), …], numbers all; exclude: {query: pins}."""
    rows = []
    for i, count in counts:
        of_query, meaning = world["levels"][i], world["queries"][i]["meaning"]
        drawn = sample_pins(of_query, meaning, world["pins"], int(count), mix, exclude.get(i, ()), rng)
        rows += [(i, pin) for pin in drawn.tolist()]
    return rows


def make_labels(rows_a_query, world, rng):
    """(query, pin, level, use): what people say. rows_a_query: {use: of its queries, on average}."""
    labels = []
    for use, average in rows_a_query.items():
        which = [i for i, query in enumerate(world["queries"]) if query["use"] == use]
        edges = np.round(np.arange(len(which) + 1) * average).astype(int)
        counts = np.diff(edges)
        for count in zip(which, counts):
            for i, pin in sample_rows([count], LABEL_MIX, {}, world, rng):
                level = world["levels"][i, pin]
                if rng.random() < LABEL_NOISE:
                    level = np.clip(level + rng.choice([-1, 1]), 1, 5)
                labels.append((i, pin, int(level), use))
    return shuffled(labels, rng)


def make_impressions(size, taken, world, rng):
    """About `size` (query, pin) that are not in `taken`, to which they are added ({query: pins}): all
    queries, fewer of those with labels for training."""
    weight = np.array([0.6 if query["use"] == "train" else 1.0 for query in world["queries"]])
    ends = np.round(np.cumsum(weight / weight.sum() * size)).astype(int)
    counts = np.diff(ends, prepend=0)
    rows = sample_rows(enumerate(counts), IMPRESSION_MIX, taken, world, rng)
    for i, pin in rows:
        taken[i].add(pin)
    return shuffled(rows, rng)


def make_world(scale=1.0, seed=0, total=None):
    """The whole world as plain Python and numpy: pins, queries, labels, impressions, logs.

    `total`: that many impressions; all else, and the impressions that there are anyway, stay the same."""
    rng = np.random.default_rng(seed)

    def n(count):
        return max(1, round(count * scale))

    # 1. What is searched for, and how well it fits
    objects = choose_objects(int(np.clip(round(48 * scale**0.5), 12, 48)))
    sizes = [("en", "train", n(260))]
    sizes += [(lang, use, n(count)) for lang in LANGUAGES for use, count in (("eval", 70), ("log", 15))]
    pins = make_pins(n(2000), objects, rng)
    queries = make_queries(sizes, pins, rng)
    levels = [[relevance(query["meaning"], pin) for pin in pins] for query in queries]
    levels = np.array(levels)
    world = {"pins": pins, "queries": queries, "levels": levels}

    # 2. Human labels: 6,000 English ones to train on, 3,360 in four languages; never a labelled pair is shown
    world["labels"] = make_labels({"train": n(6000) / n(260), "eval": 12}, world, rng)
    taken = defaultdict(set)
    for i, pin, *_ in world["labels"]:
        taken[i].add(pin)
    world["impressions"] = make_impressions(n(40000), taken, world, rng)
    if total:
        missing = max(0, total - len(world["impressions"]))
        world["impressions"] += make_impressions(missing, taken, world, np.random.default_rng([seed, 1]))

    # 3. What is seen of the pins
    spoken = [(i, pin, pin_language(rng)) for i, pin in enumerate(pins)]
    world["shown"] = []  # title, description, is there a picture
    for _, pin, lang in spoken:
        texts = title_of(pin, lang, rng), description_of(pin, lang, rng)
        world["shown"].append((*texts, bool(rng.random() > 0.02)))
    world["boards"] = [(i, title) for i, pin, lang in spoken for title in boards_of(pin, lang, rng)]
    world["visits"] = []
    for i, pin, lang in spoken:
        world["visits"] += [(i, *visit) for visit in link_visits_of(pin, lang, objects, rng)]
    engagements = []
    for i, pin, lang in spoken:
        for text, *event in engagements_of(pin, lang, objects, rng):
            engagements.append((text, i, *event))
    engagements += query_engagements(queries, levels, rng)
    text, pin, _, count = engagements[0]
    engagements[0] = (text, pin, 0, count)  # the log ends on its newest date
    return world | {"engagements": engagements}


def pin_ids(numbers):
    return [f"p{i:05d}" for i in numbers]


def query_ids(numbers):
    return [f"q{i:04d}" for i in numbers]


def write_table(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    write = pa.csv.write_csv if path.suffix == ".csv" else pa.parquet.write_table
    write(pa.table(columns), path)


def write_pins(world, folder, seed):
    """The pins, and a picture of each that has one."""
    columns = {"pin_id": pin_ids(range(len(world["pins"]))), "image": []}
    columns["title"], columns["description"], pictured = zip(*world["shown"])
    (folder / "images").mkdir(parents=True)
    for i, pin in enumerate(world["pins"]):
        path = f"images/{columns['pin_id'][i]}.png" if pictured[i] else None
        columns["image"].append(path)
        if path:
            image = toy_images.render(pin["object"], pin["colour"], np.random.default_rng([seed, i]))
            image.save(folder / path, compress_level=1)
    names = ("pin_id", "title", "description", "image")
    write_table(folder / "pins.parquet", {name: columns[name] for name in names})


def write_queries(world, folder):
    """The queries, their labels and impressions."""
    queries = world["queries"]
    columns = {"query_id": query_ids(range(len(queries)))}
    for name in ("query", "language", "interest", "shopping_interest"):
        columns[name] = [query[name] for query in queries]
    write_table(folder / "queries.csv", columns)
    query, pin, level, split = zip(*world["labels"])
    columns = {"query_id": query_ids(query), "pin_id": pin_ids(pin), "label": level, "split": split}
    write_table(folder / "labels.csv", columns)
    for part, rows in enumerate(np.array_split(np.array(world["impressions"]), 4)):
        query, pin = rows.T
        columns = {"query_id": query_ids(query), "pin_id": pin_ids(pin)}
        write_table(folder / "impressions" / f"part-{part:05d}.parquet", columns)


def write_logs(world, folder):
    """Engagements, board saves and link visits."""
    text, pin, ago, count = zip(*world["engagements"])
    dates = [NEWEST - datetime.timedelta(days=days) for days in ago]
    columns = {"query": text, "pin_id": pin_ids(pin), "date": dates, "count": count}
    write_table(folder / "engagements.parquet", columns)
    pin, title = zip(*world["boards"])
    write_table(folder / "boards.parquet", {"pin_id": pin_ids(pin), "board_title": title})
    pin, *visits = zip(*world["visits"])
    names = ("pin_id", "link_title", "link_description", "dwell_seconds")
    with open(folder / "link_visits.jsonl", "w", encoding="utf-8") as file:
        for values in zip(pin_ids(pin), *visits):
            row = dict(zip(names, values))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def summary_of(world):
    """Sizes of the tables, and labels by level 1…5."""
    names = ("pins", "queries", "impressions", "engagements", "boards", "visits")
    summary = {name: len(world[name]) for name in names}
    for split in ("train", "eval"):
        levels = [level for _, _, level, use in world["labels"] if use == split]
        summary[f"{split}_labels_by_level"] = np.bincount(levels, minlength=6)[1:].tolist()
    return summary


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--out", type=Path, default=HERE / "tables", help="dataset folder (data/toy/tables)")
    p.add_argument("--scale", type=float, default=1.0, help="size of the world; 1.0 = 2,000 pins")
    p.add_argument("--impressions", type=int, metavar="N", help="of the same world (40,000 times the scale)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--overwrite", action="store_true", help="replace a dataset made with other arguments")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    asked = {"scale": args.scale, "seed": args.seed, "asked_impressions": args.impressions}
    if args.out.exists() and not args.overwrite:
        made = args.out / "toy.json"
        if not made.exists():
            sys.exit(f"{args.out} exists and was not made by make_toy.py; another --out, or --overwrite")
        if not asked.items() <= json.loads(made.read_text()).items():
            sys.exit(f"{args.out} was made with other arguments (see {made}); --overwrite replaces it")
        print(f"{args.out} is complete already; nothing to do (--overwrite makes it again)")
        return

    world = make_world(args.scale, args.seed, args.impressions)
    unfinished = args.out.with_name(args.out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_pins(world, unfinished, args.seed)
    write_queries(world, unfinished)
    write_logs(world, unfinished)
    summary = asked | summary_of(world)
    (unfinished / "toy.json").write_text(json.dumps(summary, indent=2) + "\n")
    if args.out.exists():
        shutil.rmtree(args.out)
    unfinished.rename(args.out)
    for key, value in summary.items():
        print(f"{key:24} {value}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
