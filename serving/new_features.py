"""Features of queries and pins that stage 01 has not seen, from what it left in features/."""

import copy
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from scipy.sparse import csr_matrix, vstack

from common import FIELDS, side_of
from lib.inputs.bm25 import PairBM25, count_terms, saved_statistics, tokenize
from lib.inputs.encoders import Captioner, TextEncoder
from lib.inputs.match import MatchFeatures, pin_text, pin_texts
from lib.inputs.student_inputs import StudentInputs
from lib.models import model_fingerprint
from lib.stages.streams import matrix_of
from lib.stages.terminal import Stop
from lib.tables.images import decode_image, image_bytes


@dataclass(frozen=True, eq=False)
class Query:
    """A query as it comes in."""

    text: str
    columns: dict = field(default_factory=dict)  # interest, … as in the raw table; not given: unknown
    embeddings: dict = field(default_factory=dict)  # the user's own, {name: [D]}; not given: zeros


@dataclass(frozen=True, eq=False)
class Pin:
    """A pin that the run does not have."""

    title: str = ""
    description: str = ""
    image: Path | bytes | None = None  # a file, or its content
    boards: tuple = ()  # titles of the boards that it is saved on
    columns: dict = field(default_factory=dict)  # as in the raw table; not given: unknown
    embeddings: dict = field(default_factory=dict)  # the user's own, {name: [D]}; not given: zeros


@dataclass(frozen=True)
class Side:
    """N queries or N pins, as the features of pairs are made of them. columns: {input of the student: [N] or
    [N, D]}; counts [N, terms], sparse, and length [N], both int32: the text, for BM25."""

    columns: dict
    counts: csr_matrix
    length: np.ndarray


class SavedBM25(PairBM25):
    """Stage 01's BM25 with the statistics that it saved."""

    def __init__(self, path):
        numbers, idf = saved_statistics(path)
        self.k1, self.b, self.avgdl = numbers["k1"], numbers["b"], numbers["mean_length"]
        self.term_idf = np.array([*idf.values()])
        self.column_of = {term: column for column, term in enumerate(idf)}

    def count(self, texts):
        """N texts -> counts of the known terms [N, terms] and lengths [N] in tokens."""
        counts, length, _ = count_terms(self.column_of, texts)
        return counts, length

    def between(self, query, pins):
        """The same, to score a query (Side of one) and pins (Side)."""
        pairs = copy.copy(self)  # what is set here belongs to one call: a service has several threads
        pairs.queries, pairs.query_length = query.counts, query.length
        pairs.pins, pairs.doc_len = pins.counts, pins.length
        return pairs


class NewFeatures:
    """Makes Sides of new queries and pins, and the match features of pairs. Loads the text encoder at once,
    the captioner at the first picture."""

    def __init__(self, folder, about, spec, device="cpu", models=None):
        """folder: RUN/features; about: its stage.json; spec: the student's; models: {"text encoder": …,
        "caption model": …}, where they are if they have moved."""
        self.folder, self.about, self.spec, self.device = folder, about, spec, device
        self.models, self.settings = models or {}, about["arguments"]
        self.bm25 = SavedBM25(folder / "bm25.parquet")
        self.graph = pq.read_table(folder / "graph.parquet") if (folder / "graph.parquet").exists() else None
        if self.graph is not None:
            self.board_row = {title: row for row, title in enumerate(self.graph["board_title"].to_pylist())}
        self.lock = threading.Lock()  # tokenizers are not for several threads
        self.captioner, self.text_encoder = None, None
        if "text encoder" in about["models"]:
            size = self.settings["text_tokens"], self.settings["token_batch"]
            model = self.model("text encoder")
            self.text_encoder = TextEncoder(model, *size, device, self.dtype())

    def model(self, kind):
        """The model that stage 01 used; Stop if its content is not the same."""
        used = self.about["models"].get(kind)
        if used is None:
            raise Stop(f"{self.folder}: stage 01 used no {kind} for these features")
        name = str(self.models.get(kind) or used["name"])
        if model_fingerprint(name) != used["fingerprint"]:
            flag = f"--{kind.replace(' ', '-')}"
            raise Stop(f"{name}: not the {kind} that made {self.folder}; {flag} says where that one is")
        return name

    def dtype(self):
        """Of the models' weights, as in stage 01."""
        return getattr(torch, self.about["inputs"]["precision"].split()[0])

    def is_own(self, name):
        """Does the user bring this embedding?"""
        return f"embeddings/{name}" in self.about["inputs"]

    # Sides

    def known_pins(self):
        """Side of the run's pins, in index order. Embeddings stay memory-mapped."""
        inputs = StudentInputs(self.folder, self.spec)
        columns = {**inputs.embeddings, **inputs.codes, **inputs.values}
        columns = {name: column for name, column in columns.items() if side_of(name) == "pin"}
        counts, lengths = zip(*map(self.bm25.count, pin_texts(self.folder / "pins.parquet")))
        return Side(columns, vstack(counts, format="csr"), np.concatenate(lengths))

    def query(self, query):
        """Side of one Query."""
        made = self.embed("query_text", [query.text])
        return Side(self.columns("query", [query], made), *self.bm25.count([query.text]))

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
        """Inputs of N queries or pins: embeddings `made` {name: [N, D]}, else given or zeros; category codes;
        numbers."""
        columns = {}
        for name, size in self.spec["embeddings"].items():
            if side_of(name) == side and name not in made:
                made[name] = np.zeros((len(items), size), np.float32)
                for row, item in enumerate(items):
                    made[name][row] = item.embeddings.get(name, 0)
        for name in (*self.spec["categories"], *self.spec["numbers"]):
            if side_of(name) == side:
                column = name.removeprefix(f"{side}_")
                columns[name] = np.array([self.value(name, item.columns.get(column)) for item in items])
        for item in items:
            for column in item.columns:
                if f"{side}_{column}" not in columns:
                    known = ", ".join(name.removeprefix(f"{side}_") for name in columns) or "none"
                    raise Stop(f"{column}: no column of a {side} that the student knows; it knows {known}")
        return {**made, **columns}

    def value(self, name, given):
        """What the student takes for a value of a column: a category's code, or a number."""
        values = self.spec["categories"].get(name)
        if values is not None:
            return values.index(given) + 1 if given in values else 0
        try:
            return np.float32(np.nan if given is None else given)
        except ValueError:
            raise Stop(f"{name}: {given!r} is not a number") from None

    def embed(self, name, texts):
        """Text embeddings {name: [N, D]}; {}: the user brings them."""
        if self.is_own(name):
            return {}
        with self.lock:
            return {name: self.text_encoder(texts)}

    def caption(self, pins):
        """Captions of N Pins ("": no picture), and their visual embeddings {"pin_visual": [N, D]}."""
        captions = [""] * len(pins)
        rows = [row for row, pin in enumerate(pins) if pin.image is not None]
        if not rows:
            return captions, {}
        images = [open_picture(pins[row].image) for row in rows]
        with self.lock:
            if self.captioner is None:
                model, tokens = self.model("caption model"), self.settings["caption_tokens"]
                self.captioner = Captioner(model, tokens, self.device, self.dtype())
            found, vectors = self.captioner(images)
        visual = np.zeros((len(pins), vectors.shape[1]), vectors.dtype)
        visual[rows] = vectors
        for row, caption in zip(rows, found):
            captions[row] = caption
        return captions, {} if self.is_own("pin_visual") else {"pin_visual": visual}

    def top_tokens(self, boards):
        """The text field `boards`: the most frequent tokens of board titles, ties by token."""
        counted = Counter(token for board in boards for token in set(tokenize(board, False)))
        ranked = sorted(counted, key=lambda token: (-counted[token], token))
        return " ".join(ranked[: self.settings["top_tokens"]])

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


def open_picture(image):
    """A picture's file, or its content (bytes) -> RGB; Stop if it is none."""
    try:
        if isinstance(image, bytes):
            return decode_image(image)
        path = Path(image)
        return decode_image(image_bytes(path.parent, path.name))
    except ValueError as error:
        name = "the picture" if isinstance(image, bytes) else image
        raise Stop(f"{name}: cannot be read ({error})") from error
