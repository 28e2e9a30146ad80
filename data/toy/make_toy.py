"""Render the toy dataset: a small made-up world with images, logs and relevance labels in four languages.

Every pin and every query has a hidden meaning (object, colour, material, style, scene). The five relevance
levels follow from the two meanings by `relevance()`, plus annotator noise; pins show their meaning only in
part, each text source another part. data/toy/README.md describes the world and its traps.

Reads   nothing
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
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import toy_images  # noqa: E402

LANGUAGES = ["en", "es", "fr", "de"]

# ---------------------------------------------------------------------------------------------------------
# Words. One line a concept: English synonyms | Spanish | French | German; synonyms are split by "/".
# Nouns carry their gender (.m .f .n), because adjectives agree with it: "silla roja", "rotes Kleid".

OBJECT_WORDS = """
chair: chair seat armchair | silla.f | chaise.f siège.m | stuhl.m sessel.m
table: table desk | mesa.f | table.f | tisch.m
sofa: sofa couch settee | sofá.m | canapé.m | sofa.n
bed: bed | cama.f | lit.m | bett.n
lamp: lamp light lantern | lámpara.f | lampe.f | lampe.f leuchte.f
shelf: shelf bookcase rack | estante.m repisa.f | étagère.f | regal.n
mirror: mirror | espejo.m | miroir.m | spiegel.m
clock: clock timepiece | reloj.m | horloge.f pendule.f | uhr.f
dress: dress gown | vestido.m | robe.f | kleid.n
shirt: shirt blouse tee | camisa.f | chemise.f | hemd.n
boot: boot boots | bota.f | botte.f | stiefel.m
hat: hat cap | sombrero.m gorra.f | chapeau.m | hut.m
bag: bag purse handbag | bolso.m | sac.m | tasche.f
scarf: scarf shawl | bufanda.f | écharpe.f foulard.m | schal.m
jacket: jacket coat | chaqueta.f abrigo.m | veste.f manteau.m | jacke.f
skirt: skirt | falda.f | jupe.f | rock.m
cake: cake cupcake | pastel.m tarta.f | gâteau.m | kuchen.m torte.f
cup: cup mug | taza.f | tasse.f | tasse.f becher.m
bowl: bowl dish | cuenco.m | bol.m | schüssel.f
teapot: teapot kettle | tetera.f | théière.f | teekanne.f
pizza: pizza | pizza.f | pizza.f | pizza.f
salad: salad greens | ensalada.f | salade.f | salat.m
bread: bread loaf | pan.m | pain.m | brot.n
soup: soup stew broth | sopa.f | soupe.f | suppe.f
rose: rose | rosa.f | rose.f | rose.f
tree: tree sapling | árbol.m | arbre.m | baum.m
cactus: cactus succulent | cactus.m | cactus.m | kaktus.m
tulip: tulip | tulipán.m | tulipe.f | tulpe.f
pot: pot planter | maceta.f | pot.m | topf.m
fern: fern | helecho.m | fougère.f | farn.m
bench: bench | banco.m | banc.m | bank.f
fountain: fountain | fuente.f | fontaine.f | brunnen.m
candle: candle | vela.f | bougie.f | kerze.f
wreath: wreath | corona.f | couronne.f | kranz.m
balloon: balloon | globo.m | ballon.m | luftballon.m
card: card notecard | tarjeta.f | carte.f | karte.f
garland: garland bunting | guirnalda.f | guirlande.f | girlande.f
kite: kite | cometa.f | cerfvolant.m | drachen.m
quilt: quilt blanket | colcha.f manta.f | couette.f | decke.f
necklace: necklace pendant | collar.m | collier.m | halskette.f
ball: ball | pelota.f | balle.f | ball.m
guitar: guitar | guitarra.f | guitare.f | gitarre.f
bicycle: bicycle bike | bicicleta.f | vélo.m | fahrrad.n
boat: boat sailboat | barco.m | bateau.m | schiff.n
drum: drum | tambor.m | tambour.m | trommel.f
skateboard: skateboard longboard | monopatín.m | planche.f | skateboard.n
book: book novel | libro.m | livre.m | buch.n
umbrella: umbrella parasol | paraguas.m | parapluie.m | regenschirm.m
"""

# Adjectives: es and fr "masculine/feminine"; de a stem, with "+" where it takes -er, -e, -es.
COLOUR_WORDS = """
red: red crimson | rojo/roja | rouge | rot+
orange: orange | naranja | orange | orange
yellow: yellow golden | amarillo/amarilla | jaune | gelb+
green: green emerald | verde | vert/verte | grün+
blue: blue navy | azul | bleu/bleue | blau+
purple: purple violet | morado/morada | violet/violette | lila
pink: pink blush | rosado/rosada | rosé/rosée | pink
brown: brown tan | marrón | brun/brune | braun+
black: black | negro/negra | noir/noire | schwarz+
white: white ivory | blanco/blanca | blanc/blanche | weiß+
grey: grey gray | gris | gris/grise | grau+
"""

STYLE_WORDS = """
modern: modern contemporary | moderno/moderna | moderne | modern+
rustic: rustic farmhouse | rústico/rústica | rustique | rustikal+
boho: boho bohemian | bohemio/bohemia | bohème | boho
vintage: vintage antique | antiguo/antigua | ancien/ancienne | antik+
minimalist: minimalist minimal | minimalista | minimaliste | schlicht+
elegant: elegant classy | elegante | élégant/élégante | elegant+
cosy: cosy cozy | acogedor/acogedora | douillet/douillette | gemütlich+
playful: playful whimsical | divertido/divertida | ludique | verspielt+
tropical: tropical | tropical | tropical/tropicale | tropisch+
luxury: luxury luxurious | lujoso/lujosa | luxueux/luxueuse | luxuriös+
"""

# Nouns: "de madera", "en bois", "aus Holz".
MATERIAL_WORDS = """
wood: wooden wood oak | madera | bois | holz
metal: metal steel | metal | métal | metall
glass: glass crystal | vidrio | verre | glas
ceramic: ceramic porcelain | cerámica | céramique | keramik
paper: paper | papel | papier | papier
cotton: cotton linen | algodón | coton | baumwolle
leather: leather suede | cuero | cuir | leder
wool: wool knitted | lana | laine | wolle
silk: silk satin | seda | soie | seide
plastic: plastic acrylic | plástico | plastique | kunststoff
"""

# Nouns: "for kitchen", "para cocina", "pour cuisine", "für Küche".
ROOM_WORDS = """
kitchen: kitchen | cocina | cuisine | küche
bedroom: bedroom | dormitorio | chambre | schlafzimmer
office: office study | oficina | bureau | büro
balcony: balcony terrace | balcón | balcon | balkon
hallway: hallway entryway | pasillo | couloir | flur
library: library | biblioteca | bibliothèque | bibliothek
lounge: lounge parlour | salón | salon | wohnzimmer
attic: attic loft | desván | grenier | dachboden
cellar: cellar basement | sótano | cave | keller
garage: garage carport | garaje | garage | garage
"""

OCCASION_WORDS = """
wedding: wedding bridal | boda | mariage | hochzeit
christmas: christmas xmas | navidad | noël | weihnachten
birthday: birthday | cumpleaños | anniversaire | geburtstag
carnival: carnival | carnaval | carnaval | karneval
easter: easter | pascua | pâques | ostern
graduation: graduation | graduación | diplôme | abschluss
party: party | fiesta | fête | feier
autumn: autumn fall | otoño | automne | herbst
baptism: baptism christening | bautizo | baptême | taufe
picnic: picnic | merienda | goûter | picknick
"""

FAMILY_WORDS = """
furniture: furniture | muebles | meubles | möbel
clothing: clothing fashion | ropa moda | vêtements mode | kleidung mode
food: food | comida | nourriture | essen
garden: garden gardening | jardín | jardin | garten
celebration: celebration | celebración | célébration | feste
leisure: leisure hobby | ocio | loisirs | freizeit
"""


def _read(text):
    """{concept: {language: [word, …]}} in the order of the lines."""
    table = {}
    for line in text.strip().splitlines():
        name, words = line.split(": ")
        table[name] = dict(zip(LANGUAGES, (w.split() for w in words.split(" | "))))
    return table


OBJECTS, COLOURS, STYLES, MATERIALS, ROOMS, OCCASIONS, FAMILIES = map(
    _read, (OBJECT_WORDS, COLOUR_WORDS, STYLE_WORDS, MATERIAL_WORDS, ROOM_WORDS, OCCASION_WORDS, FAMILY_WORDS)
)
SCENES = ROOMS | OCCASIONS
ATTRIBUTES = {"colour": COLOURS, "material": MATERIALS, "style": STYLES, "scene": SCENES}

FAMILY_OF = {obj: family for i, family in enumerate(FAMILIES) for obj in list(OBJECTS)[8 * i : 8 * i + 8]}
MATERIALS_OF = {
    "furniture": ["wood", "metal", "glass", "leather", "plastic"],
    "clothing": ["cotton", "leather", "wool", "silk"],
    "food": ["ceramic", "glass", "wood", "paper"],
    "garden": ["ceramic", "metal", "wood", "plastic", "glass"],
    "celebration": ["paper", "silk", "glass", "metal", "wool"],
    "leisure": ["wood", "metal", "leather", "plastic", "paper"],
}
SHOPPING_INTEREST = {
    "furniture": "home",
    "garden": "home",
    "clothing": "fashion",
    "food": "dining",
    "celebration": "gifts",
    "leisure": "gifts",
}

# What goes together with what; symmetric.
PAIRS = """
table-chair table-bowl table-candle chair-book chair-lamp sofa-lamp sofa-quilt sofa-shelf bed-quilt bed-clock
bed-mirror lamp-book shelf-book shelf-clock mirror-necklace mirror-dress clock-teapot dress-necklace dress-hat
shirt-jacket shirt-skirt shirt-bag boot-jacket boot-scarf boot-skirt hat-scarf hat-boat bag-skirt bag-umbrella
scarf-jacket necklace-card cake-candle cake-balloon cake-cup cup-teapot cup-bread bowl-soup bowl-salad
teapot-rose pizza-salad pizza-bread pizza-ball bread-soup soup-pot salad-bench rose-card rose-fountain
tree-bench tree-kite tree-garland cactus-pot cactus-fern cactus-guitar tulip-pot tulip-fountain tulip-wreath
fern-fountain fern-bench candle-wreath wreath-garland balloon-card balloon-garland kite-ball kite-boat
quilt-book guitar-drum guitar-boat drum-ball bicycle-umbrella bicycle-skateboard skateboard-ball
"""
COMPLEMENTS = {obj: set() for obj in OBJECTS}
for _pair in PAIRS.split():
    _a, _b = _pair.split("-")
    COMPLEMENTS[_a].add(_b)
    COMPLEMENTS[_b].add(_a)


# ---------------------------------------------------------------------------------------------------------
# Language: from a meaning to words


def noun(obj, lang, rng):
    """A word for an object, and its grammatical gender."""
    words = OBJECTS[obj][lang]
    word = words[0] if rng.random() < 0.6 else words[rng.integers(len(words))]
    word, _, gender = word.partition(".")
    return word, gender


def adjective(forms, lang, gender, rng):
    """An adjective in a language: the usual word with 60 %, else any of its words, with the ending of the
    noun's gender."""
    word = forms[lang][0] if rng.random() < 0.6 else forms[lang][rng.integers(len(forms[lang]))]
    if lang == "de":
        stem = word.rstrip("+")
        return stem + {"m": "er", "f": "e", "n": "es"}.get(gender, "") if word.endswith("+") else word
    masculine, _, feminine = word.partition("/")
    return feminine if feminine and gender == "f" else masculine


def plain(table, concept, lang, rng):
    """A noun for a material, room, occasion or family."""
    words = table[concept][lang]
    return words[0] if rng.random() < 0.6 else words[rng.integers(len(words))]


def phrase(lang, meaning, rng):
    """Words for some of an object's properties in the language's own order; any of them may be missing.

    {"object": "chair", "colour": "red", "scene": "kitchen"} → "red chair for kitchen", "chaise rouge pour
    cuisine"
    """
    name, gender = noun(meaning["object"], lang, rng) if "object" in meaning else ("", "m")
    style = adjective(STYLES[meaning["style"]], lang, gender, rng) if "style" in meaning else ""
    colour = adjective(COLOURS[meaning["colour"]], lang, gender, rng) if "colour" in meaning else ""
    material = plain(MATERIALS, meaning["material"], lang, rng) if "material" in meaning else ""
    scene = plain(SCENES, meaning["scene"], lang, rng) if "scene" in meaning else ""
    if lang == "en":
        parts = [style, colour, material, name]
        parts = [scene] + parts if rng.random() < 0.4 else parts + [scene and f"for {scene}"]
    elif lang == "de":
        parts = [style, colour, name, material and f"aus {material}", scene and f"für {scene}"]
    else:
        of, to = {"es": ("de", "para"), "fr": ("en", "pour")}[lang]
        parts = [name, colour, style, material and f"{of} {material}", scene and f"{to} {scene}"]
    return " ".join(p for p in parts if p)


GENERIC_TITLES = {
    "en": ["love this!", "so pretty", "must have", "save for later", "great find"],
    "es": ["me encanta!", "qué bonito", "para guardar"],
    "fr": ["trop beau!", "coup de coeur", "à garder"],
    "de": ["so schön!", "muss ich haben", "zum merken"],
}
IDEAS = {"en": "ideas", "es": "ideas", "fr": "idées", "de": "ideen"}
DESCRIPTIONS = {  # material, style
    "en": ["made of {m}, {s} look", "{s} style in {m}", "{m}, very {s}"],
    "es": ["hecho de {m}, estilo {s}", "estilo {s} en {m}"],
    "fr": ["fait en {m}, style {s}", "style {s} en {m}"],
    "de": ["aus {m}, {s} gemacht", "{s} und aus {m}"],
}
MATERIAL_ONLY = {"en": "made of {m}", "es": "hecho de {m}", "fr": "fait en {m}", "de": "aus {m} gemacht"}
STYLE_ONLY = {"en": "{s} look", "es": "estilo {s}", "fr": "style {s}", "de": "{s} gemacht"}
NOISE = {
    "en": [
        "found it last week and saved it here with all the best things, follow us for more every day",
        "more on our page",
        "photo by a friend",
    ],
    "es": [
        "lo encontré la semana pasada y lo guardo aquí, más cada día en nuestra página",
        "más en nuestra página",
    ],
    "fr": [
        "trouvé la semaine dernière et gardé ici, encore plus chaque jour sur notre page",
        "plus sur notre page",
    ],
    "de": [
        "letzte woche gefunden und hier gemerkt, jeden tag mehr auf unserer seite",
        "mehr auf unserer seite",
    ],
}
BOARDS = {
    "en": ["{x}", "{x} ideas", "my {x}"],
    "es": ["{x}", "ideas {x}", "mi {x}"],
    "fr": ["{x}", "idées {x}", "{x} à faire"],
    "de": ["{x}", "{x} ideen", "schöne {x}"],
}
JUNK_BOARDS = {
    "en": ["my saves", "pretty things"],
    "es": ["mis cosas"],
    "fr": ["mes envies"],
    "de": ["alles schöne"],
}
SHOP = {"en": ["buy", "shop"], "es": ["comprar"], "fr": ["acheter"], "de": ["kaufen"]}
SHOP_NOTE = {
    "en": ["free shipping", "handmade to order"],
    "es": ["envío gratis"],
    "fr": ["livraison gratuite"],
    "de": ["kostenloser versand"],
}


def pick(rng, options):
    """One of the options, each as likely."""
    return options[rng.integers(len(options))]


def other(rng, options, *not_these):
    """One of the options that are not `not_these`."""
    return pick(rng, [o for o in options if o not in not_these])


def pin_language(rng):
    """A pin's language: English with 73 %, the three others with 9 % each."""
    return LANGUAGES[rng.choice(4, p=[0.73, 0.09, 0.09, 0.09])]


def near_language(lang, rng):
    """The language of somebody who meets a pin: mostly English or the pin's own."""
    return lang if rng.random() < 0.35 else LANGUAGES[rng.choice(4, p=[0.46, 0.18, 0.18, 0.18])]


# ---------------------------------------------------------------------------------------------------------
# Pins, queries and the five levels


def relevance(query, pin):
    """The level that a careful annotator gives: the rule that every label of the toy follows.

    5 the object asked for, with every property asked for      4 one property is off
    3 an object that goes together with it, or the object itself with two properties off
    2 only of the same family                                  1 unrelated
    """
    if query["object"] == pin["object"]:
        return 5 - sum(query[k] != pin[k] for k in ATTRIBUTES if k in query)
    if pin["object"] in COMPLEMENTS[query["object"]]:
        return 3
    return 2 if FAMILY_OF[query["object"]] == FAMILY_OF[pin["object"]] else 1


def choose_objects(count):
    """The first `count` objects of a walk along the pairs that go together, so that level 3 exists at every
    scale."""
    chosen = ["chair"]
    for obj in chosen:
        chosen += [c for c in OBJECTS if c in COMPLEMENTS[obj] and c not in chosen]
    return [obj for obj in OBJECTS if obj in chosen[:count]]


def make_pins(count, objects, rng):
    """Meanings of pins. Some objects are more popular than others, and an object has its usual properties."""
    popularity = (rng.permutation(len(objects)) + 4) ** -0.5
    usual = {}
    for obj in objects:
        usual[obj] = {
            "colour": rng.choice(list(COLOURS), 4, replace=False).tolist(),
            "material": rng.choice(MATERIALS_OF[FAMILY_OF[obj]], 3, replace=False).tolist(),
            "style": rng.choice(list(STYLES), 3, replace=False).tolist(),
            "scene": rng.choice(list(SCENES), 3, replace=False).tolist(),
        }
    pins = []
    for obj in rng.choice(objects, count, p=popularity / popularity.sum()).tolist():
        pin = {"object": obj}
        for kind, table in ATTRIBUTES.items():
            every = MATERIALS_OF[FAMILY_OF[obj]] if kind == "material" else list(table)
            pin[kind] = pick(rng, usual[obj][kind] if rng.random() < 0.88 else every)
        pins.append(pin)
    return pins


def make_queries(sizes, pins, rng):
    """`sizes`: (language, use, count), use = train, eval or log. No eval query asks for what a train query
    asks for."""
    queries, texts, asked = [], set(), {"train": set(), "eval": set(), "log": set()}
    for lang, use, count in sizes:
        made = 0
        while made < count:
            pin = pick(rng, pins)
            kinds = rng.choice(
                list(ATTRIBUTES), 1 + (rng.random() < 0.45), replace=False, p=[0.32, 0.22, 0.18, 0.28]
            ).tolist()
            meaning = {"object": pin["object"]} | {k: pin[k] for k in ATTRIBUTES if k in kinds}
            text, key = phrase(lang, meaning, rng), tuple(meaning.items())
            if (lang, text) in texts or (use == "eval" and key in asked["train"]):
                continue
            texts.add((lang, text))
            asked[use].add(key)
            family = FAMILY_OF[pin["object"]]
            queries.append(
                {
                    "language": lang,
                    "use": use,
                    "query": text,
                    "meaning": meaning,
                    "interest": family if rng.random() < 0.9 else None,
                    "shopping_interest": SHOPPING_INTEREST[family] if rng.random() < 0.8 else None,
                }
            )
            made += 1
    return [queries[i] for i in rng.permutation(len(queries))]


def sample_pins(levels, query, pins, count, mix, exclude, rng):
    """Indices of `count` pins as a search engine might return them: of every level, in shares `mix` (1…5).

    Half of the pins of levels 1 and 2 share a property that was asked for, so that a shared word alone says
    little.
    """
    order = rng.permutation(len(pins))
    order = order[~np.isin(order, list(exclude))] if exclude else order
    shares = np.array([any(pins[i].get(k) == v for k, v in query.items()) for i in order], bool)
    chosen = []
    for level in (5, 4, 3, 2, 1):
        here = order[levels[order] == level]
        want = int(round(mix[level - 1] * count))
        if level <= 2:
            alike = order[(levels[order] == level) & shares][: want // 2]
            here = np.concatenate([alike, np.setdiff1d(here, alike, assume_unique=True)])
        chosen.extend(here[:want].tolist())
    rest = order[~np.isin(order, chosen)]
    chosen.extend(rest[: max(0, count - len(chosen))].tolist())
    return rng.permutation(np.array(chosen[:count], int))


# ---------------------------------------------------------------------------------------------------------
# What is seen of a pin


def some(pin, rng, **chances):
    """The part of a pin's meaning that a source mentions: each property with its own chance."""
    return {k: pin[k] for k in ("object", *ATTRIBUTES) if rng.random() < chances.get(k, 0)}


def title_of(pin, lang, rng):
    """A pin's title, or None: some say nothing in particular, most name the object, few a property."""
    kind = rng.random()
    if kind < 0.03:
        return None
    if kind < 0.17:
        return pick(rng, GENERIC_TITLES[lang])
    if kind < 0.25:
        return f"{plain(FAMILIES, FAMILY_OF[pin['object']], lang, rng)} {IDEAS[lang]}"
    said = some(pin, rng, object=0.8, colour=0.15, material=0.12, style=0.2, scene=0.12)
    return (phrase(lang, said, rng) or pick(rng, GENERIC_TITLES[lang])).capitalize()


def description_of(pin, lang, rng):
    """A pin's description, or None for two in five."""
    kind = rng.random()
    if kind < 0.4:
        return None
    if kind < 0.5:
        return pick(rng, NOISE[lang])
    words = {
        "m": plain(MATERIALS, pin["material"], lang, rng),
        "s": adjective(STYLES[pin["style"]], lang, "", rng),
    }
    templates = (DESCRIPTIONS, MATERIAL_ONLY, STYLE_ONLY)[rng.choice(3, p=[0.4, 0.35, 0.25])]
    template = pick(rng, templates[lang]) if templates is DESCRIPTIONS else templates[lang]
    text = template.format(**words)
    return f"{text}. {pick(rng, NOISE[lang])}" if rng.random() < 0.08 else text


def boards_of(pin, lang, rng):
    """Titles of the boards that people saved a pin to: mostly its room or occasion."""
    titles = []
    for _ in range(rng.poisson(2.6) if rng.random() > 0.05 else 0):
        near, kind = near_language(lang, rng), rng.random()
        if kind < 0.1:
            titles.append(pick(rng, JUNK_BOARDS[near]).title())
            continue
        if kind < 0.7:
            about = plain(SCENES, pin["scene"], near, rng)
        elif kind < 0.75:  # somebody has other plans with it
            about = plain(SCENES, pick(rng, list(SCENES)), near, rng)
        elif kind < 0.9:
            about = adjective(STYLES[pin["style"]], near, "", rng)
        else:
            about = plain(FAMILIES, FAMILY_OF[pin["object"]], near, rng)
        titles.append(pick(rng, BOARDS[near]).format(x=about).title())
    return titles


def link_visits_of(pin, lang, objects, rng):
    """Visits of the page behind a pin. One that lasts under ten seconds went to a page about something
    else."""
    visits = []
    if rng.random() < 0.6:
        near = near_language(lang, rng)
        said = some(pin, rng, object=1, material=0.7, style=0.2)
        title = f"{pick(rng, SHOP[near])} {phrase(near, said, rng)}"
        note = pick(rng, SHOP_NOTE[near]) if rng.random() < 0.25 else None
        visits += [
            (title, note, round(float(10 + rng.exponential(40)), 1)) for _ in range(rng.integers(1, 4))
        ]
    if rng.random() < 0.45:
        wrong = {"object": other(rng, objects, pin["object"]), "material": pick(rng, list(MATERIALS))}
        title = f"{pick(rng, SHOP['en'])} {phrase('en', wrong, rng)}"
        visits += [(title, None, round(float(rng.uniform(0.5, 9.9)), 1)) for _ in range(rng.integers(1, 4))]
    return visits


NEWEST = datetime.date(2024, 6, 30)
SPAN = 913  # days: two and a half years
TWO_YEARS = 731


def engagements_of(pin, lang, objects, rng):
    """(query, date, count): people's own words within two years; before that, a pin stood where it did not
    belong."""
    rows = []
    for _ in range(rng.choice(4, p=[0.1, 0.35, 0.35, 0.2])):
        near = near_language(lang, rng)
        kind = rng.choice(list(ATTRIBUTES), p=[0.25, 0.25, 0.3, 0.2])
        said = {"object": pin["object"], kind: pin[kind]}
        if rng.random() < 0.08:
            said[kind] = pick(rng, list(ATTRIBUTES[kind]))
        text = phrase(near, said, rng)
        for _ in range(rng.integers(1, 4)):
            rows.append((text, int(rng.integers(0, TWO_YEARS - 10)), int(rng.integers(5, 60))))
    for _ in range(rng.choice(3, p=[0.4, 0.4, 0.2])):
        said = {"object": other(rng, objects, pin["object"])}
        kind = rng.choice(list(ATTRIBUTES))
        said[kind] = pick(rng, list(ATTRIBUTES[kind]))
        text = phrase(near_language(lang, rng), said, rng)
        for _ in range(rng.integers(1, 3)):
            rows.append((text, int(rng.integers(TWO_YEARS + 10, SPAN)), int(rng.integers(200, 900))))
    return rows


# ---------------------------------------------------------------------------------------------------------
# The world and its tables

LABEL_MIX = [0.18, 0.18, 0.21, 0.25, 0.18]  # of levels 1…5, where there are enough pins
IMPRESSION_MIX = [0.21, 0.21, 0.22, 0.22, 0.14]
LABEL_NOISE = 0.08


def make_world(scale=1.0, seed=0, total=None):
    """The whole world as plain Python and numpy: pins, queries, labels, impressions, logs.

    `total`: that many impressions; all else, and the impressions that there are anyway, stay the same."""
    rng = np.random.default_rng(seed)
    objects = choose_objects(int(np.clip(round(48 * scale**0.5), 12, 48)))

    def n(count):
        return max(1, round(count * scale))

    sizes = [("en", "train", n(260)), ("en", "eval", n(70)), ("en", "log", n(15))]
    sizes += [(lang, use, n(count)) for lang in LANGUAGES[1:] for use, count in (("eval", 70), ("log", 15))]
    pins = make_pins(n(2000), objects, rng)
    queries = make_queries(sizes, pins, rng)
    levels = np.array([[relevance(q["meaning"], p) for p in pins] for q in queries])

    # 1. human labels: 6,000 English ones to train on, 3,360 in four languages to evaluate on
    labels = []
    rows_a_query = {"train": n(6000) / n(260), "eval": 12}
    for use in ("train", "eval"):
        which = [i for i, q in enumerate(queries) if q["use"] == use]
        edges = np.round(np.arange(len(which) + 1) * rows_a_query[use]).astype(int)
        for i, count in zip(which, np.diff(edges)):
            for pin in sample_pins(levels[i], queries[i]["meaning"], pins, int(count), LABEL_MIX, (), rng):
                level = levels[i, pin]
                if rng.random() < LABEL_NOISE:
                    level = np.clip(level + rng.choice([-1, 1]), 1, 5)
                labels.append((i, int(pin), int(level), use))
    labels = [labels[i] for i in rng.permutation(len(labels))]

    # 2. impressions: all queries, fewer of those with human labels, never a labelled pair
    weight = np.array([0.6 if q["use"] == "train" else 1.0 for q in queries])

    def draw(size, exclude, rng):
        edges = np.round(np.concatenate([[0], np.cumsum(weight / weight.sum() * size)])).astype(int)
        rows = [
            (i, int(pin))
            for i, count in enumerate(np.diff(edges))
            for pin in sample_pins(
                levels[i], queries[i]["meaning"], pins, int(count), IMPRESSION_MIX, exclude.get(i, ()), rng
            )
        ]
        return [rows[i] for i in rng.permutation(len(rows))]

    taken = {}
    for i, pin, _, _ in labels:
        taken.setdefault(i, set()).add(pin)
    impressions = draw(n(40000), taken, rng)
    if total:
        for i, pin in impressions:
            taken.setdefault(i, set()).add(pin)
        impressions += draw(max(0, total - len(impressions)), taken, np.random.default_rng([seed, 1]))

    # 3. what is seen of the pins
    languages = [pin_language(rng) for _ in pins]
    shown = [
        {
            "title": title_of(p, lang, rng),
            "description": description_of(p, lang, rng),
            "has_image": bool(rng.random() > 0.02),
        }
        for p, lang in zip(pins, languages)
    ]
    boards = [
        (i, title) for i, (p, lang) in enumerate(zip(pins, languages)) for title in boards_of(p, lang, rng)
    ]
    visits = [
        (i, *v)
        for i, (p, lang) in enumerate(zip(pins, languages))
        for v in link_visits_of(p, lang, objects, rng)
    ]
    engagements = [
        (text, i, ago, count)
        for i, (p, lang) in enumerate(zip(pins, languages))
        for text, ago, count in engagements_of(p, lang, objects, rng)
    ]
    engagements += query_engagements(queries, levels, rng)
    engagements[0] = (*engagements[0][:2], 0, engagements[0][3])  # the log ends on its newest date
    return {
        "pins": pins,
        "languages": languages,
        "shown": shown,
        "queries": queries,
        "labels": labels,
        "impressions": impressions,
        "boards": boards,
        "visits": visits,
        "engagements": engagements,
    }


def query_engagements(queries, levels, rng):
    """Engagement with the results of the queries themselves: seldom and with good pins; before two years
    ago, bad ones."""
    rows = []
    for i, query in enumerate(queries):
        for level, chance in ((5, 0.15), (4, 0.015), (3, 0.003)):
            for pin in np.flatnonzero(levels[i] == level):
                if rng.random() < chance:
                    rows.append(
                        (
                            query["query"],
                            int(pin),
                            int(rng.integers(0, TWO_YEARS - 10)),
                            int(rng.integers(5, 60)),
                        )
                    )
        for pin in rng.choice(np.flatnonzero(levels[i] == 1), 2, replace=False):
            rows.append(
                (
                    query["query"],
                    int(pin),
                    int(rng.integers(TWO_YEARS + 10, SPAN)),
                    int(rng.integers(200, 900)),
                )
            )
    return rows


def pin_id(i):
    return f"p{i:05d}"


def query_id(i):
    return f"q{i:04d}"


def write_tables(world, folder, seed):
    """The raw tables, in a mixture of formats, and the images."""
    (folder / "images").mkdir(parents=True)
    (folder / "impressions").mkdir()
    pins, shown, queries = world["pins"], world["shown"], world["queries"]

    for i, (pin, seen) in enumerate(zip(pins, shown)):
        if seen["has_image"]:
            image = toy_images.render(pin["object"], pin["colour"], np.random.default_rng([seed, i]))
            image.save(folder / "images" / f"{pin_id(i)}.png", compress_level=1)
    pa.parquet.write_table(
        pa.table(
            {
                "pin_id": [pin_id(i) for i in range(len(pins))],
                "title": pa.array([s["title"] for s in shown], pa.string()),
                "description": pa.array([s["description"] for s in shown], pa.string()),
                "image": pa.array(
                    [f"images/{pin_id(i)}.png" if s["has_image"] else None for i, s in enumerate(shown)],
                    pa.string(),
                ),
            }
        ),
        folder / "pins.parquet",
    )
    pa.csv.write_csv(
        pa.table(
            {"query_id": [query_id(i) for i in range(len(queries))]}
            | {
                key: pa.array([q[key] for q in queries], pa.string())
                for key in ("query", "language", "interest", "shopping_interest")
            }
        ),
        folder / "queries.csv",
    )
    q, p, level, split = zip(*world["labels"])
    pa.csv.write_csv(
        pa.table(
            {
                "query_id": [query_id(i) for i in q],
                "pin_id": [pin_id(i) for i in p],
                "label": level,
                "split": split,
            }
        ),
        folder / "labels.csv",
    )
    for part, rows in enumerate(np.array_split(np.array(world["impressions"]), 4)):
        pa.parquet.write_table(
            pa.table(
                {"query_id": [query_id(i) for i in rows[:, 0]], "pin_id": [pin_id(i) for i in rows[:, 1]]}
            ),
            folder / "impressions" / f"part-{part:05d}.parquet",
        )
    text, p, ago, count = zip(*world["engagements"])
    pa.parquet.write_table(
        pa.table(
            {
                "query": text,
                "pin_id": [pin_id(i) for i in p],
                "date": pa.array([NEWEST - datetime.timedelta(days=d) for d in ago], pa.date32()),
                "count": count,
            }
        ),
        folder / "engagements.parquet",
    )
    p, title = zip(*world["boards"])
    pa.parquet.write_table(
        pa.table({"pin_id": [pin_id(i) for i in p], "board_title": title}), folder / "boards.parquet"
    )
    with open(folder / "link_visits.jsonl", "w", encoding="utf-8") as f:
        for i, title, note, dwell in world["visits"]:
            row = {"pin_id": pin_id(i), "link_title": title, "link_description": note, "dwell_seconds": dwell}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--out", type=Path, default=HERE / "tables", help="dataset folder to write (default: data/toy/tables)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="size of the world; 1.0 = 2,000 pins")
    parser.add_argument(
        "--impressions",
        type=int,
        metavar="N",
        help="impressions of the same world, if there are as many pairs (default: 40,000 times the scale)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset made with other arguments"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    asked = {"scale": args.scale, "seed": args.seed, "asked_impressions": args.impressions}
    if args.out.exists() and not args.overwrite:
        summary = args.out / "toy.json"
        if not summary.exists():
            sys.exit(
                f"{args.out} exists and was not made by make_toy.py; choose another --out, or --overwrite"
            )
        if {k: json.loads(summary.read_text()).get(k) for k in asked} != asked:
            sys.exit(
                f"{args.out} was made with other arguments (see {summary}); add --overwrite to replace it"
            )
        print(f"{args.out} is complete already; nothing to do (--overwrite makes it again)")
        return

    world = make_world(args.scale, args.seed, args.impressions)
    unfinished = args.out.with_name(args.out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_tables(world, unfinished, args.seed)
    levels = np.array([(level, use == "train") for _, _, level, use in world["labels"]])
    summary = asked | {
        name: len(world[name])
        for name in ("pins", "queries", "impressions", "engagements", "boards", "visits")
    }
    summary |= {
        f"{split}_labels_by_level": np.bincount(levels[levels[:, 1] == flag, 0], minlength=6)[1:].tolist()
        for split, flag in (("train", 1), ("eval", 0))
    }
    (unfinished / "toy.json").write_text(json.dumps(summary, indent=2) + "\n")
    if args.out.exists():
        shutil.rmtree(args.out)
    unfinished.rename(args.out)
    for key, value in summary.items():
        print(f"{key:24} {value}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
