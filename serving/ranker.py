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

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lib.inputs.match import ENGAGEMENTS
from lib.levels import NUM_LEVELS, OUTPUTS, expected_level
from lib.results.contract import ONNX_ONE_QUERY, input_names, open_onnx, sources_of
from lib.stages.files import read_json
from lib.stages.finished import command_of_student, remake, require_finished
from lib.stages.terminal import Stop
from serving.new_features import NewFeatures, Pin, Query

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


class Ranker:
    """The student of a run at work. Loaded once; then any thread may call rank() and score()."""

    def __init__(self, run, student="student", threads=1, models=None, temperature=1.0):
        """threads: cores that onnxruntime uses for a call; models: {"text encoder": …, "caption model": …},
        where they are if they have moved since stage 01; temperature: of the probabilities, such as the one
        in report/temperatures.json."""
        if not 0.01 <= temperature < 100:
            raise Stop(f"temperature {temperature}: must be at least 0.01 and below 100")
        folder, features = Path(run) / student, Path(run) / "features"
        command = command_of_student(folder)
        self.made = require_finished(features, f"01_build_features.py --run {run}", READS)
        self.trained = require_finished(folder, command, ("features.json", ONNX_ONE_QUERY))
        self.spec = read_json(folder / "features.json")
        here = sources_of(self.made)
        for name, there in self.spec["sources"].items():
            if here.get(name, {}).get("fingerprint") != there["fingerprint"]:
                problem = f"trained on features of another {name} than those here"
                raise Stop(f"{folder}: {problem}; {remake(folder, command)}")
        self.temperature = temperature
        self.width = NUM_LEVELS + 1 + len(self.spec["match"])  # of table_of()
        self.session = open_onnx(folder / ONNX_ONE_QUERY, threads)
        self.new = NewFeatures(features, self.made, self.spec, models)
        self.pins = self.new.known_pins()
        self.table = features / "pins.parquet"
        self.ids = pq.read_table(self.table, columns=["pin_id"])["pin_id"].to_pylist()
        self.row_of = {pin_id: row for row, pin_id in enumerate(self.ids)}

    @cached_property
    def texts(self):
        """Title, description, caption and image of the run's pins (Arrow), in index order."""
        return pq.read_table(self.table, columns=["title", "description", "caption", "image"])

    def rows(self, pin_ids):
        """Row numbers of pins by id."""
        try:
            return np.array([self.row_of[pin_id] for pin_id in pin_ids], np.int64)
        except KeyError as error:
            raise Stop(f"no pin of this run has the id {error}") from None

    def feed(self, query, pins, rows, match):
        """A query (Side of one), pins `rows` [B] of a Side, and their match features -> the student's inputs
        {name: array}, as features.json says; those of the query have one row."""
        columns = query.columns | {name: column[rows] for name, column in pins.columns.items()} | match
        kinds = dict.fromkeys(self.spec["categories"], np.int64)
        return {name: columns[name].astype(kinds.get(name, np.float32)) for name in input_names(self.spec)}

    def predict(self, feed):
        """The student on B pins of one query: probabilities [B, C] and expected level [B]."""
        p, level = self.session.run(OUTPUTS, feed)
        if self.temperature != 1:
            p = np.maximum(p, np.finfo(np.float32).tiny).astype(np.float64) ** (1 / self.temperature)
            p /= p.sum(axis=1, keepdims=True)
            level = expected_level(p)
        return p, level

    def table_of(self, query, pins, rows, events):
        """A query (Side of one), the pins `rows` [B] of a Side, and events [B] -> the columns of Scores, side
        by side: float32 [B, C + 1 + match features]."""
        table = np.zeros((len(rows), self.width), np.float32)
        for start in range(0, len(rows), CHUNK):
            chunk = slice(start, start + CHUNK)
            match = self.new.match(query, pins, rows[chunk], events[chunk])
            p, level = self.predict(self.feed(query, pins, rows[chunk], match))
            table[chunk] = np.column_stack([p, level, *match.values()])
        return table

    def scores(self, pins, table):
        """Scores of B pins from what table_of() gives."""
        match = dict(zip(self.spec["match"], table[:, NUM_LEVELS + 1 :].T))
        return Scores(pins, table[:, :NUM_LEVELS], table[:, NUM_LEVELS], match)

    def rank(self, query: str | Query, candidates=None, engaged=None, top=None, exclude=()):
        """Pins of the run, best first, the first `top` of them. candidates: pin ids, anything to iterate over
        (default: all pins); engaged: {pin id: engagement events of this query}, 0 where it has none (default:
        stage 01's of a query that the run has); exclude: pin ids to leave out."""
        ids, exclude = self.ids, {*listed("exclude", exclude)}
        if candidates is not None:
            ids = listed("candidates", candidates)
        ids = [pin_id for pin_id in ids if pin_id not in exclude]
        rows = self.rows(ids)
        side = self.new.query(query)
        events = self.new.events(side.known, rows)
        if engaged is not None:
            for pin_id, _ in engaged.items():
                if not isinstance(pin_id, str):
                    raise Stop("engaged: must be {pin id: events}, an id is a text")
            events = np.array([engaged.get(pin_id, 0) for pin_id in ids], np.float64)
        if not (np.isfinite(events) & (events >= 0)).all():
            raise Stop("engaged: must be finite numbers of events, none below 0")
        table = self.table_of(side, self.pins, rows, events)
        best_first = np.argsort(-table[:, NUM_LEVELS], kind="stable")[:top]
        return self.scores([ids[row] for row in best_first.tolist()], table[best_first])

    def score(self, pairs):
        """B pairs, anything to iterate over, in their order: (query, pin), of a text or a Query, and an id of
        the run or a Pin."""
        pairs, at = [*pairs], {}  # at: places of a query's known pins, and of its new ones
        for place, (query, pin) in enumerate(pairs):
            at.setdefault((query, isinstance(pin, Pin)), []).append(place)
        table = np.zeros((len(pairs), self.width), np.float32)
        for (query, are_new), places in at.items():
            side = self.new.query(query)
            pins = [pairs[place][1] for place in places]
            if are_new:
                rows = np.arange(len(pins))
                table[places] = self.table_of(side, self.new.pins(pins), rows, np.zeros(len(pins)))
            else:
                rows = self.rows(pins)
                table[places] = self.table_of(side, self.pins, rows, self.new.events(side.known, rows))
        return self.scores([pin for _, pin in pairs], table)


def listed(what, ids):
    """Ids in an order of their own, of a set sorted. Stop for a text, which is a list of letters."""
    if isinstance(ids, (str, bytes)):
        raise Stop(f"{what}: one text, not a list of ids")
    return sorted(ids) if isinstance(ids, (set, frozenset)) else ids
