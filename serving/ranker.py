"""A run's student at work, for a service: it ranks pins for queries never seen, and scores new pins.

    from serving.ranker import Pin, Query, Ranker
    ranker = Ranker("outputs/toy")
    best = ranker.rank("red chair", top=20)
    best.pins, best.expected_level, best.probabilities, best.match["bm25"]
    ranker.score([("red chair", "p00153"), ("red chair", Pin(title="Chair", image=Path("chair.jpg")))])

A query that the run has gets the columns and engagement that stage 01 gave it, unless the caller gives
others. All that another one needs is made new, with the models and statistics that stage 01 left; the student
runs in onnxruntime.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lib.inputs.match import ENGAGEMENTS
from lib.levels import NUM_LEVELS, expected_level
from lib.results.contract import ONNX_ONE_QUERY, OUTPUTS, input_names, open_onnx, sources_of
from lib.stages.files import read_json
from lib.stages.finished import remake, require_finished
from lib.stages.terminal import Stop
from serving.new_features import NewFeatures, Pin, Query, text_of

READS = ("pins.parquet", "queries.parquet", "bm25.parquet", "graph.parquet", "*_embedding.npy", ENGAGEMENTS)
CHUNK = 16_384  # pins that go through the student at once


@dataclass(frozen=True)
class Scores:
    """B pairs. pins: ids, or Pin objects; probabilities [B, C] of levels 1 to 5; expected_level [B]; match:
    {feature: [B]}."""

    pins: list
    probabilities: np.ndarray
    expected_level: np.ndarray
    match: dict

    def in_turn(self):
        """Rows as they are, which from rank() is the student's order, and by BM25, in turn, each once."""
        by_bm25 = np.argsort(-self.match["bm25"], kind="stable").tolist()
        return list(dict.fromkeys(chain.from_iterable(enumerate(by_bm25))))

    def take(self, rows):
        """Those of some rows."""
        pins = [self.pins[row] for row in rows.tolist()]
        match = {name: column[rows] for name, column in self.match.items()}
        return Scores(pins, self.probabilities[rows], self.expected_level[rows], match)


class Ranker:
    """The student of a run at work. Loaded once; then any thread may call rank() and score()."""

    def __init__(self, run, student="student", threads=1, models=None, temperature=1.0):
        """threads: cores that onnxruntime uses for a call; models: {"text encoder": …, "caption model": …},
        where they are if they have moved since stage 01; temperature: of the probabilities, such as the one
        in report/temperatures.json."""
        if not 0.01 <= temperature < 100:
            raise Stop(f"temperature {temperature}: must be at least 0.01 and below 100")
        self.temperature = temperature
        folder, features = Path(run) / student, Path(run) / "features"
        command = f"04_train_student.py --run {run} --name {student}"
        self.made = require_finished(features, f"01_build_features.py --run {run}", READS)
        if ENGAGEMENTS not in self.made["outputs"]:
            how = remake(features, f"01_build_features.py --run {run}")
            raise Stop(f"{features / ENGAGEMENTS}: missing, of an earlier version; {how}")
        self.trained = require_finished(folder, command, ("features.json", ONNX_ONE_QUERY))
        self.spec = read_json(folder / "features.json")
        problem = unfit(self.spec, self.made)
        if problem:
            raise Stop(f"{folder}: {problem}; {remake(folder, command)}")
        self.session = open_onnx(folder / ONNX_ONE_QUERY, threads)
        self.table = features / "pins.parquet"
        self.ids = pq.read_table(self.table, columns=["pin_id"])["pin_id"].to_pylist()
        self.row_of = {pin_id: row for row, pin_id in enumerate(self.ids)}
        self.new = NewFeatures(features, self.made, self.spec, models)
        self.pins = self.new.known_pins()

    @cached_property
    def texts(self):
        """Title, description, caption and image of the run's pins (Arrow), in index order."""
        return pq.read_table(self.table, columns=["title", "description", "caption", "image"])

    def rows(self, pin_ids):
        """Row numbers of pins by id."""
        odd = [pin_id for pin_id in pin_ids if not isinstance(pin_id, str)]
        if odd:
            raise Stop(f"a pin's id is a text, not {type(odd[0]).__name__}")
        unknown = [pin_id for pin_id in pin_ids if pin_id not in self.row_of]
        if unknown:
            raise Stop(f"no pin of this run has the id {unknown[0]!r} ({len(unknown):,} such ids)")
        return np.array([self.row_of[pin_id] for pin_id in pin_ids], np.int64)

    def feed(self, query, pins, rows, match):
        """A query (Side of one), pins `rows` [B] of a Side, and their match features -> the student's inputs
        {name: array}, as features.json says; those of the query have one row."""
        columns = query.columns | {name: column[rows] for name, column in pins.columns.items()} | match
        feed = {}
        for name in input_names(self.spec):
            is_code = name in self.spec["categories"]
            feed[name] = columns[name].astype(np.int64 if is_code else np.float32)
        return feed

    def predict(self, feed):
        """The student on B pins of one query: probabilities [B, C] and expected level [B]."""
        p, level = self.session.run(OUTPUTS, feed)
        if self.temperature != 1:
            p = np.maximum(p, np.finfo(np.float32).tiny).astype(np.float64) ** (1 / self.temperature)
            p /= p.sum(axis=1, keepdims=True)
            level = expected_level(p)
        return p, level

    def fill(self, scores, at, query, pins, rows, engaged):
        """Scores a query (Side of one) and the pins `rows` [B] of a Side; fills the places `at` [B] of
        `scores`. engaged: events [B]."""
        for start in range(0, len(rows), CHUNK):
            chunk = slice(start, start + CHUNK)
            match = self.new.match(query, pins, rows[chunk], engaged[chunk])
            p, level = self.predict(self.feed(query, pins, rows[chunk], match))
            scores.probabilities[at[chunk]] = p
            scores.expected_level[at[chunk]] = level
            for name, column in match.items():
                scores.match[name][at[chunk]] = column

    def no_scores(self, pins):
        """Scores of B pins, to be filled."""
        p = np.zeros((len(pins), NUM_LEVELS), np.float32)
        level = np.zeros(len(pins), np.float32)
        match = {name: level.copy() for name in self.spec["match"]}
        return Scores(pins, p, level, match)

    def rank(self, query, candidates=None, engaged=None, top=None, exclude=()):
        """Pins of the run, best first, the first `top` of them. query: a text or a Query; candidates: pin
        ids, any sequence (default: all pins); engaged: {pin id: engagement events of this query}, 0 where it
        has none (default: stage 01's of a query that the run has); exclude: pin ids to leave out."""
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 0):
            raise Stop(f"top: {top!r} is no number of pins")
        exclude = {*listed(exclude, "exclude")}
        ids = self.ids if candidates is None else listed(candidates, "candidates")
        if exclude:
            ids = [pin_id for pin_id in ids if pin_id not in exclude]
        rows = np.arange(len(ids)) if ids is self.ids else self.rows(ids)
        scores, side = self.no_scores(ids), self.new.query(query)
        events = self.new.known.events(side.known, rows) if engaged is None else events_of(engaged, ids)
        self.fill(scores, np.arange(len(ids)), side, self.pins, rows, events)
        best_first = np.argsort(-scores.expected_level, kind="stable")
        return scores.take(best_first[:top])

    def score(self, pairs, engaged=None):
        """B pairs (query, pin), any sequence, in their order. query: a text or a Query; pin: an id of the
        run, or a Pin; engaged: events [B] (default: as in rank()). What a query or a new pin needs is made
        once."""
        pairs = listed(pairs, "pairs")
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise Stop("pairs: each must be (query, pin)")
        pins = [pin for _, pin in pairs]
        scores = self.no_scores(pins)
        events = np.zeros(len(pairs)) if engaged is None else checked_events(engaged, len(pairs))
        new = list(dict.fromkeys(pin for pin in pins if isinstance(pin, Pin)))
        new_row = {pin: row for row, pin in enumerate(new)}
        new_pins = self.new.pins(new) if new else None
        places = {}  # of each query: those of known pins, and of new ones
        for place, (query, pin) in enumerate(pairs):
            query = query if isinstance(query, Query) else text_of(query, "the query")
            places.setdefault(query, ([], []))[isinstance(pin, Pin)].append(place)
        for query, (known, unknown) in places.items():
            side = self.new.query(query)
            rows = self.rows([pins[place] for place in known])
            if engaged is None:
                events[known] = self.new.known.events(side.known, rows)
            self.fill(scores, np.array(known), side, self.pins, rows, events[known])
            rows = np.array([new_row[pins[place]] for place in unknown])
            self.fill(scores, np.array(unknown), side, new_pins, rows, events[unknown])
        return scores


def listed(items, what):
    """Any sequence as a list: a Series by position, a dict its keys, a set sorted."""
    if isinstance(items, (str, bytes)):
        raise Stop(f"{what}: one text, not a list")
    try:
        return sorted(items) if isinstance(items, (set, frozenset)) else list(items)
    except TypeError as error:
        raise Stop(f"{what}: no list ({error})") from None


def events_of(engaged, ids):
    """{pin id: events} -> events [B] of pins by id."""
    if not all(hasattr(engaged, name) for name in ("keys", "get")):
        raise Stop("engaged: must be {pin id: events}")
    engaged = {text_of(pin_id, "an id in engaged"): events for pin_id, events in dict(engaged).items()}
    checked_events([*engaged.values()], len(engaged))
    return np.array([engaged.get(pin_id, 0) for pin_id in ids], np.float64)


def checked_events(engaged, rows):
    """Events of so many pairs as float64 [B]; Stop unless they are finite numbers from 0."""
    try:
        events = np.asarray(listed(engaged, "engaged"), np.float64)
    except (ValueError, TypeError, OverflowError):
        events = None
    named = isinstance(engaged, Mapping)
    if named or events is None or events.shape != (rows,) or not (np.isfinite(events) & (events >= 0)).all():
        raise Stop(f"engaged: must be {rows:,} finite numbers of events, none below 0")
    return events


def unfit(spec, made):
    """Why a student (its features.json) cannot be used on features (their stage.json), or None."""
    if "sources" not in spec:
        return "has no ONNX file"
    found = sources_of(made)
    for name, trained in spec["sources"].items():
        here = found.get(name)
        if here is None or here["fingerprint"] != trained["fingerprint"]:
            return f"trained on features of another {name} than those here"
    return None
