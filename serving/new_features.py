"""Features of queries and pins that stage 01 has not seen, from what it left in features/."""

import copy
import io
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix, vstack

from lib.inputs.bm25 import PairBM25, count_terms, saved_statistics, tokenize
from lib.inputs.match import ENGAGEMENTS, MatchFeatures, pin_text, pin_texts
from lib.inputs.student_inputs import StudentInputs
from lib.levels import FIELDS, side_of
from lib.stages.streams import matrix_of
from lib.stages.terminal import Stop, first_line, stop_on_error
from lib.tables.splits import query_key
from serving.text_encoder import model_of_01, saved_encoder

LARGEST = 1e30  # a number beyond is not known, as in the raw tables


@dataclass(frozen=True, eq=False)
class Query:
    """A query as it comes in. What is not given of one that the run has is as stage 01 found it."""

    text: str
    columns: dict = field(default_factory=dict)  # interest, … as in the raw table; None: unknown
    embeddings: dict = field(default_factory=dict)  # the user's own, {name: [D]}; not given: zeros

    def __post_init__(self):
        if not text_of(self.text, "the query").strip():
            raise Stop("the query: empty")


@dataclass(frozen=True, eq=False)
class Pin:
    """A pin that the run does not have."""

    title: str = ""
    description: str = ""
    image: object = None  # a file's path, its content as bytes, an open file, or a PIL image
    boards: tuple = ()  # titles of the boards that it is saved on
    columns: dict = field(default_factory=dict)  # as in the raw table; not given: unknown
    embeddings: dict = field(default_factory=dict)  # the user's own, {name: [D]}; not given: zeros

    def __post_init__(self):
        boards = [self.boards] if is_missing(self.boards) or isinstance(self.boards, str) else self.boards
        boards = tuple(text_of(title, "a board's title") for title in boards if not is_missing(title))
        object.__setattr__(self, "boards", boards)
        for name in ("title", "description"):
            object.__setattr__(self, name, text_of(getattr(self, name), f"the pin's {name}"))


@dataclass(frozen=True)
class Side:
    """N queries or N pins, as the features of pairs are made of them. columns: {input of the student: [N] or
    [N, D]}; counts [N, terms], sparse, and length [N], both int32: the text, for BM25; known: row number of a
    query that the run has."""

    columns: dict
    counts: csr_matrix
    length: np.ndarray
    known: int | None = None


class SavedBM25(PairBM25):
    """Stage 01's BM25 with the statistics that it saved."""

    def __init__(self, path):
        numbers, idf = saved_statistics(path)
        self.k1, self.b, self.avgdl = numbers["k1"], numbers["b"], numbers["mean_length"]
        self.term_idf = np.array([*idf.values()])
        self.column_of = {term: column for column, term in enumerate(idf)}

    def count(self, texts):
        """N texts -> counts of the known terms [N, terms] and lengths [N] in tokens."""
        return count_terms(self.column_of, texts)[:2]

    def between(self, query, pins):
        """The same, to score a query (Side of one) and pins (Side)."""
        pairs = copy.copy(self)  # what is set here belongs to one call: a service has several threads
        pairs.queries, pairs.query_length = query.counts, query.length
        pairs.pins, pairs.doc_len = pins.counts, pins.length
        return pairs


class KnownQueries:
    """The run's queries by their text: columns and engagement that stage 01 gave them. columns: {input of the
    student: [Q] or [Q, D]}."""

    def __init__(self, folder, columns):
        self.columns = columns
        self.texts = pq.read_table(folder / "queries.parquet", columns=["query"])["query"].to_pylist()
        backwards = [*enumerate(self.texts)][::-1]  # the first of several stays
        self.row_of = {spaced_key(text): row for row, text in backwards} | {t: row for row, t in backwards}
        self.pins = pq.read_metadata(folder / "pins.parquet").num_rows
        pairs = pq.read_table(folder / ENGAGEMENTS)
        names = ("query_index", "pin_index", "engaged")
        self.query, self.pin, self.engaged = (pairs[name].to_numpy() for name in names)

    def row(self, text):
        """Row number of a query with this text, or its key; None: there is none."""
        return self.row_of.get(text, self.row_of.get(spaced_key(text)))

    def events(self, row, pins):
        """Engagement events of the query `row` (None: no known one) on pins, row numbers [B] -> [B]."""
        events = np.zeros(self.pins)
        if row is not None:
            found = slice(*np.searchsorted(self.query, [row, row + 1]))
            events[self.pin[found]] = self.engaged[found]
        return events[pins]


def spaced_key(text):
    """A query's key, with one space for several: BM25 and encoders see no difference."""
    return query_key(" ".join(text.split()))


class NewFeatures:
    """Makes Sides of new queries and pins, and the match features of pairs. Loads the text encoder at once,
    the captioner at the first picture. Needs PyTorch for pictures, and for texts if text_encoder.py has not
    saved the encoder beside the features."""

    def __init__(self, folder, about, spec, models=None):
        """folder: RUN/features; about: its stage.json; spec: the student's; models: {"text encoder": …,
        "caption model": …}, where they are if they have moved."""
        self.folder, self.about, self.spec, self.models = folder, about, spec, models or {}
        self.bm25, self.graph = SavedBM25(folder / "bm25.parquet"), None
        if (folder / "graph.parquet").exists():
            self.graph = pq.read_table(folder / "graph.parquet")
            self.board_row = {title: row for row, title in enumerate(self.graph["board_title"].to_pylist())}
        self.locks = {kind: threading.Lock() for kind in ("text", "caption")}  # tokenizers take one thread
        self.captioner, self.text_encoder = None, None
        if "text encoder" in about["models"]:
            self.text_encoder = saved_encoder(folder.parent, about) or self.load("text encoder")
        inputs, sides = StudentInputs(folder, spec), {"query": {}, "pin": {}}
        for name, column in {**inputs.embeddings, **inputs.codes, **inputs.values}.items():
            sides[side_of(name)][name] = column
        self.known, self.pin_columns = KnownQueries(folder, sides["query"]), sides["pin"]

    def load(self, kind):
        """The "text encoder" or the "caption model" of stage 01, in PyTorch."""
        command = f"python -m serving.text_encoder --run {self.folder.parent}"
        advice = f"where they are, {command} saves the text encoder for services without"
        with stop_on_error(f"the {kind} needs PyTorch and transformers", advice):
            import torch

            from lib.inputs.encoders import Captioner, TextEncoder
        name, told = model_of_01(self.about, kind, self.models.get(kind)), self.about["arguments"]
        dtype = getattr(torch, self.about["inputs"]["precision"].split()[0])
        if kind == "caption model":
            return Captioner(name, told["caption_tokens"], "cpu", dtype)
        return TextEncoder(name, told["text_tokens"], told["token_batch"], "cpu", dtype)

    def is_own(self, name):
        """Does the user bring this embedding?"""
        return f"embeddings/{name}" in self.about["inputs"]

    # Sides

    def known_pins(self):
        """Side of the run's pins, in index order. Embeddings stay memory-mapped."""
        counts, lengths = zip(*map(self.bm25.count, pin_texts(self.folder / "pins.parquet")))
        return Side(self.pin_columns, vstack(counts, format="csr"), np.concatenate(lengths))

    def query(self, query):
        """Side of one Query, or text: of one that the run has with what stage 01 gave it, unless the caller
        gives others."""
        query = query if isinstance(query, Query) else Query(query)
        row, text = self.known.row(query.text), query.text
        if row is None:
            made = self.embed("query_text", [text])
        else:
            text = self.known.texts[row]
            made = {name: column[row : row + 1] for name, column in self.known.columns.items()}
        return Side(self.columns("query", [query], made), *self.bm25.count([text]), row)

    def pins(self, pins):
        """Side of N Pins."""
        captions, made = self.caption(pins)
        texts = []
        for pin, caption in zip(pins, captions):
            text = {"title": pin.title, "description": pin.description, "caption": caption}
            text["boards"] = self.top_tokens(pin.boards)
            texts.append(pin_text({name: [text.get(name)] for name in FIELDS}, 0))
        made |= self.embed("pin_text", texts)
        if self.graph is not None and not self.is_own("pin_graph"):
            made["pin_graph"] = np.stack([self.graph_embedding(pin.boards) for pin in pins])
        return Side(self.columns("pin", pins, made), *self.bm25.count(texts))

    def columns(self, side, items, made):
        """Inputs of N queries or pins: what is given, else `made` {input: [N] or [N, D]}, else zeros, or not
        known."""
        sizes = {name: size for name, size in self.spec["embeddings"].items() if side_of(name) == side}
        names = [name for name in (*self.spec["categories"], *self.spec["numbers"]) if side_of(name) == side]
        raw_name = {name: name.removeprefix(f"{side}_") for name in names}
        for item in items:
            refuse_unknown(item.columns, raw_name.values(), f"column of a {side}")
            refuse_unknown(item.embeddings, sizes, f"embedding of a {side}")
        columns = {}
        for name, size in sizes.items():
            columns[name] = np.array(made.get(name, np.zeros((len(items), size))), np.float32)
            for row, item in enumerate(items):
                if name in item.embeddings:
                    columns[name][row] = finite_vector(name, item.embeddings[name], size)
        for name, column in raw_name.items():
            given = [item.columns.get(column) for item in items]
            if name in made and column not in items[0].columns:  # of a known query
                columns[name] = made[name]
            else:
                columns[name] = np.array([self.value(name, value) for value in given])
        return columns

    def value(self, name, given):
        """What the student takes for a value of a column, as stage 01 does: a category's code, or a number;
        NaN: not known."""
        values = self.spec["categories"].get(name)
        if values is None:
            return number(name, given)
        if not isinstance(given, str) and not is_missing(given):
            given = str(given).lower() if isinstance(given, bool) else str(given)
        text = text_of(given, name)
        return values.index(text) + 1 if text in values else 0

    def embed(self, name, texts):
        """Text embeddings {name: [N, D]}; {}: the user brings them."""
        if self.is_own(name):
            return {}
        with self.locks["text"]:
            return {name: self.text_encoder(texts)}

    def caption(self, pins):
        """Captions of N Pins ("": no picture), and their visual embeddings {"pin_visual": [N, D]}."""
        captions = [""] * len(pins)
        rows = [row for row, pin in enumerate(pins) if pin.image is not None]
        if not rows:
            return captions, {}
        with self.locks["caption"]:
            self.captioner = self.captioner or self.load("caption model")
            found, vectors = self.captioner([open_picture(pins[row].image) for row in rows])
        visual = np.zeros((len(pins), vectors.shape[1]), vectors.dtype)
        visual[rows] = vectors
        for row, caption in zip(rows, found):
            captions[row] = caption
        return captions, {} if self.is_own("pin_visual") else {"pin_visual": visual}

    def top_tokens(self, boards):
        """The text field `boards`: the most frequent tokens of board titles, ties by token."""
        counted = Counter(token for board in boards for token in set(tokenize(board, False)))
        ranked = sorted(counted, key=lambda token: (-counted[token], token))
        return " ".join(ranked[: self.about["arguments"]["top_tokens"]])

    def graph_embedding(self, boards):
        """TF-IDF of board titles (1 + log count, to length 1) on the axes of stage 01's SVD: [D] float16."""
        counted = Counter(self.board_row[board] for board in boards if board in self.board_row)
        known = self.graph.take(list(counted)) if counted else self.graph.slice(0, 0)
        weights = (1 + np.log(np.array([*counted.values()], np.float32))) * known["idf"].to_numpy()
        weights /= max(np.linalg.norm(weights), 1e-12)
        return (weights @ matrix_of(known["axes"])).astype(np.float16)

    # Pairs

    def match(self, query, pins, rows, engaged):
        """Match features of a query (Side of one) and the pins `rows` [B] of a Side: {feature: [B]}. engaged:
        events [B]. Numbers that pairs have in the raw tables are not known (NaN)."""
        vectors = query.columns["query_text"], pins.columns["pin_text"]
        features = MatchFeatures(self.bm25.between(query, pins), *vectors)
        made = features(np.zeros(len(rows), np.int64), rows, engaged)
        return {name: made.get(name, np.full(len(rows), np.nan, np.float32)) for name in self.spec["match"]}


def is_missing(value):
    """None, or NaN as pandas gives for a cell without a value."""
    return value is None or (isinstance(value, float) and value != value)


def text_of(value, what):
    """A text; "": there is none. Stop for what is no text, or has halves of characters."""
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        raise Stop(f"{what}: {type(value).__name__}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Stop(f"{what}: has halves of characters (surrogates)") from None
    return value


def number(name, given):
    """A number as stage 01 takes it; NaN: not known, or too large. Stop for what is none."""
    if is_missing(given) or (isinstance(given, str) and not given.strip()):
        return np.float32(np.nan)
    try:
        value = float(given if not isinstance(given, str) or given.isascii() else "a text")
    except (ValueError, TypeError, OverflowError):
        raise Stop(f"{name}: {given!r} is not a number") from None
    return np.float32(value if abs(value) <= LARGEST else np.nan)


def refuse_unknown(given, known, what):
    """Stop if a name is given that the student does not know."""
    for name in given:
        if name not in known:
            raise Stop(f"{name!r}: no {what} that the student knows; it knows {', '.join(known) or 'none'}")


def finite_vector(name, vector, size):
    """A vector as given -> float32 [size], or Stop."""
    try:
        with np.errstate(over="ignore"):
            made = np.asarray(vector, np.float32)
    except (ValueError, TypeError, OverflowError):
        made = np.empty(0)
    if made.shape != (size,) or not np.isfinite(made).all():
        raise Stop(f"{name}: must be {size} finite numbers")
    return made


def open_picture(image):
    """A picture's path, its content (bytes), an open file or a PIL image -> RGB; Stop if it is none."""
    from PIL import Image

    from lib.tables.images import decode_image, image_bytes, upright_rgb

    name = image if isinstance(image, (str, Path)) else "the picture"
    try:
        if isinstance(image, Image.Image):
            return upright_rgb(image.copy())
        if isinstance(image, io.IOBase):
            image = image.read()
        if isinstance(image, bytes):
            return decode_image(image)
        path = Path(image)
        return decode_image(image_bytes(path.parent, path.name))
    except (ValueError, TypeError, OSError) as error:
        raise Stop(f"{name}: cannot be read ({first_line(error)})") from error
