"""Features of queries and pins that stage 01 has not seen, from what it left in features/."""

import copy
import functools
import math
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
from lib.stages.streams import MOST_NORM, matrix_of
from lib.stages.terminal import Stop, stop_on_error
from lib.tables.splits import query_key
from serving.text_encoder import model_of_01, saved_encoder

LARGEST = 1e30  # a number beyond is not known, as in the raw tables


@dataclass(eq=False)
class Query:
    """A query as it comes in. What is not given of one that the run has is as stage 01 found it."""

    text: str
    columns: dict = field(default_factory=dict)  # interest, … as in the raw table; None: unknown
    embeddings: dict = field(default_factory=dict)  # the user's own, {name: [D]}; not given: zeros

    def __post_init__(self):
        if not text_of(self.text).strip():
            raise Stop("the query: empty")


@dataclass(eq=False)
class Pin:
    """A pin that the run does not have."""

    title: str = ""
    description: str = ""
    image: object = None  # a file's path, its content as bytes, an open file, or a PIL image
    boards: tuple = ()  # titles of the boards that it is saved on
    columns: dict = field(default_factory=dict)  # as in the raw table; not given: unknown
    embeddings: dict = field(default_factory=dict)  # the user's own, {name: [D]}; not given: zeros

    def __post_init__(self):
        is_one = self.boards is None or isinstance(self.boards, (str, float))  # NaN: a cell without a value
        boards = [self.boards] if is_one else self.boards
        self.boards = [title for title in map(text_of, boards) if title]
        self.title, self.description = text_of(self.title), text_of(self.description)


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
    """Stage 01's BM25 with the statistics that it saved; of which queries and pins, each call says."""

    def __init__(self, path):
        numbers, idf = saved_statistics(path)
        self.k1, self.b = numbers["k1"], numbers["b"]
        self.avgdl = numbers["mean_length"]
        self.term_idf = np.array([*idf.values()])
        column_of = {term: column for column, term in enumerate(idf)}
        self.count = functools.partial(count_terms, column_of)


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
        self.locks = {kind: threading.Lock() for kind in ("text", "caption")}  # tokenizers take one thread
        self.captioner = self.text_encoder = self.graph = None
        if "text encoder" in about["models"]:
            self.text_encoder = saved_encoder(folder.parent, about) or self.load("text encoder")
        self.bm25 = SavedBM25(folder / "bm25.parquet")
        inputs = StudentInputs(folder, spec)
        self.stored = {"query": {}, "pin": {}}  # the run's own: {input: [N] or [N, D]}
        for name, column in {**inputs.embeddings, **inputs.codes, **inputs.values}.items():
            self.stored[side_of(name)][name] = column
        if (folder / "graph.parquet").exists():
            self.graph = pq.read_table(folder / "graph.parquet")
            self.board_row = {title: row for row, title in enumerate(self.graph["board_title"].to_pylist())}
        self.texts = pq.read_table(folder / "queries.parquet", columns=["query"])["query"].to_pylist()
        backwards = [*enumerate(self.texts)][::-1]  # the first of several stays
        self.row_of = {spaced_key(text): row for row, text in backwards} | {t: row for row, t in backwards}
        pins = pq.read_metadata(folder / "pins.parquet").num_rows
        pairs = pq.read_table(folder / ENGAGEMENTS)
        events, *at = (pairs[name].to_numpy() for name in ("engaged", "query_index", "pin_index"))
        self.engaged = csr_matrix((events.astype(np.float64), at), (len(self.texts), pins))

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

    # Sides

    def known_pins(self):
        """Side of the run's pins, in index order. Embeddings stay memory-mapped."""
        counts, lengths, _ = zip(*map(self.bm25.count, pin_texts(self.folder / "pins.parquet")))
        return Side(self.stored["pin"], vstack(counts, format="csr"), np.concatenate(lengths))

    def query(self, query):
        """Side of one Query, or text: of one that the run has with what stage 01 gave it, unless the caller
        gives others."""
        if not isinstance(query, Query):
            query = Query(query)
        text = query.text
        row = self.row_of.get(text, self.row_of.get(spaced_key(text)))
        if row is None:
            made = self.embed("query_text", text)
        else:
            text = self.texts[row]
            made = {name: column[row] for name, column in self.stored["query"].items()}
        return self.side("query", [query], [text], [made], row)

    def pins(self, pins):
        """Side of N Pins."""
        texts, made = zip(*map(self.look_at, pins))
        return self.side("pin", pins, texts, made)

    def look_at(self, pin):
        """The text of a Pin, and what of the student's inputs comes from its content: {input: [D]}."""
        made = {}
        texts = dict.fromkeys(FIELDS, [""])
        texts |= {"title": [pin.title], "description": [pin.description]}
        texts["boards"] = [self.top_tokens(pin.boards)]
        if pin.image is not None:
            with self.locks["caption"]:
                self.captioner = self.captioner or self.load("caption model")
                texts["caption"], (made["pin_visual"],) = self.captioner([open_picture(pin.image)])
        if self.graph is not None:
            made["pin_graph"] = self.graph_embedding(pin.boards)
        text = pin_text(texts, 0)
        made = {name: vector for name, vector in made.items() if not self.is_own(name)}
        return text, made | self.embed("pin_text", text)

    def is_own(self, name):
        """Does the user bring this embedding?"""
        return f"embeddings/{name}" in self.about["inputs"]

    def embed(self, name, text):
        """A text's embedding {name: [D]}; {}: the user brings it."""
        if self.is_own(name):
            return {}
        with self.locks["text"]:
            return {name: self.text_encoder([text])[0]}

    def side(self, side, items, texts, made, row=None):
        """Side of N queries or pins, of their texts [N], and what is made of each [N]."""
        inputs = [self.inputs(side, *one) for one in zip(items, made)]
        columns = {name: np.array([one[name] for one in inputs]) for name in self.stored[side]}
        return Side(columns, *self.bm25.count(texts)[:2], row)

    def inputs(self, side, item, made):
        """A query or a pin -> {input of the student: value}: what is given, else what is `made`, else zeros
        or not known. Stop for what the student does not know."""
        columns = {f"{side}_{name}": value for name, value in item.columns.items()}
        known, vectors = self.stored[side].keys(), self.spec["embeddings"].keys()
        for name in columns.keys() - (known - vectors) | item.embeddings.keys() - (known & vectors):
            further = sorted(name.removeprefix(f"{side}_") for name in known - vectors)
            own = ", ".join(sorted(known & vectors))
            there = f"columns {', '.join(further)}; embeddings {own}"
            raise Stop(f"{name!r}: no such column or embedding of a {side}; the student knows {there}")
        given = dict.fromkeys(known - made.keys()) | columns
        for name, vector in item.embeddings.items():
            given[name] = () if vector is None else vector
        taken = {name: self.value(name, value) for name, value in given.items()}
        return made | taken

    def value(self, name, given):
        """What the student takes for a vector, a category or a number as given; zeros, 0 or NaN: not known,
        as in stage 01. Stop for what is none."""
        if name in self.spec["embeddings"]:
            size = self.spec["embeddings"][name]
            what = f"{name}: must be {size} finite numbers, with a norm of at most {MOST_NORM:g}"
            with stop_on_error(what):
                vector = np.zeros(size) if given is None else np.asarray(given, np.float64)
            if vector.shape != (size,) or not math.hypot(*vector) <= MOST_NORM:
                raise Stop(what)
            return vector.astype(np.float32)
        if name not in self.spec["categories"]:
            return number(name, given)
        values = self.spec["categories"][name]
        if isinstance(given, (float, np.floating)) and given.is_integer():
            given = int(given)  # 1.0 is the text 1
        text = str(given).lower() if isinstance(given, (bool, np.bool_)) else str(given)
        return values.index(text) + 1 if text in values and given is not None else 0

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

    def events(self, row, pins):
        """Engagement events of a known query, its row (else None), on pins, row numbers [B] -> [B]."""
        return np.zeros(len(pins)) if row is None else self.engaged[row].toarray()[0, pins]

    def match(self, query, pins, rows, engaged):
        """Match features of a query (Side of one) and the pins `rows` [B] of a Side: {feature: [B]}. engaged:
        events [B]. Numbers that pairs have in the raw tables are not known (NaN)."""
        bm25 = copy.copy(self.bm25)  # what is set here belongs to one call: a service has several threads
        bm25.queries = query.counts
        bm25.query_length = query.length
        bm25.pins = pins.counts
        bm25.doc_len = pins.length
        features = MatchFeatures(bm25, query.columns["query_text"], pins.columns["pin_text"])
        made = features(np.zeros(len(rows), np.int64), rows, engaged)
        return {name: made.get(name, np.full(len(rows), np.nan, np.float32)) for name in self.spec["match"]}


def text_of(value):
    """A text; "" for None, or NaN as pandas gives for a cell without a value. Stop for what is no text."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        raise Stop(f"{value!r:.80}: not a text")
    return value


def number(name, given):
    """A number as stage 01 takes it; NaN: not known, or too large. Stop for what is none."""
    text = "" if given is None else str(given).strip()
    with stop_on_error(f"{name}: {given!r:.80} is not a number"):
        value = float(text.encode("ascii") or "nan")  # no digits of other scripts
    return np.float32(value if abs(value) <= LARGEST else np.nan)


def open_picture(image):
    """A picture's path, its content (bytes), an open file or a PIL image -> RGB; Stop if it is none."""
    from PIL import Image

    from lib.tables.images import decode_image, upright_rgb

    with stop_on_error("the picture cannot be read"):
        if isinstance(image, Image.Image):
            return upright_rgb(image.copy())
        if not isinstance(image, bytes):
            image = image.read() if hasattr(image, "read") else Path(image).read_bytes()
        return decode_image(image)
