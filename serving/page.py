"""A page in the browser: search, compare BM25, student and teacher, and label pairs.

    RUN=outputs/toy python -m serving.page                        # http://127.0.0.1:8000
    RUN=outputs/toy QUEUE=queue.csv RATERS=2 python -m serving.page

From the environment: RUN (through stage 04); QUEUE, a table with query_id and pin_id of pairs to label
(experiments/choose.py makes one); LABELS, the folder for labels_NAME.csv (default: the queue's); RATERS,
people a pair; PORT; HOST, 127.0.0.1 unless told. A file of labels has the form of the table `labels`
(data/README.md) and is whole on the disk at each label: nothing is lost when the server is killed.
"""

import io
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Query as Bounded
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from common import LEVELS, PairText, Teacher, expected_level, pad_rows, token_batches
from lib.models import load_config, load_tokenizer, quiet_libraries
from lib.results.pictures import picture
from lib.stages.terminal import Stop, run_main
from serving.labels import Labels
from serving.new_features import spaced_key
from serving.ranker import Query, Ranker
from serving.service import refused

SLOW = 50  # pins that the teacher reads for a query
TOKENS = 4_096  # in a forward pass of it


class Asked(BaseModel):
    name: str
    skipped: list[tuple[str, str]] = []


class Label(Asked):
    query_id: str
    pin_id: str
    level: int = Field(ge=1, le=5)
    note: str = Field("", max_length=1000)


class PairTeacher:
    """A run's teacher on single pairs. Loaded at the first; LoRA stays beside the model."""

    def __init__(self, run):
        self.run, self.teacher, self.lock = run, None, threading.Lock()

    def load(self):
        """Teacher and text of the pairs. Stop without a teacher."""
        folder = self.run / "teacher"
        if not (folder / "teacher.json").exists():
            raise Stop(f"{folder}: no teacher here")
        self.teacher, about = Teacher.load(folder)
        config = load_config(folder / "backbone" if about["finetuning"] == "full" else about["model"])
        tokenizer = load_tokenizer(folder / "tokenizer", config)
        self.text = PairText(tokenizer, about["kind"], about["fields"], about["max_tokens"], cut_queries=True)
        self.pins = pq.read_table(self.run / "features" / "pins.parquet", columns=list(about["fields"]))

    @torch.inference_mode()
    def __call__(self, query, pins):
        """A query's text and row numbers of pins [B] -> probabilities [B, C]."""
        with self.lock:
            if self.teacher is None:
                self.load()
            pin_ids = self.text.pins(self.pins.take(pins).to_pydict())
            [query_ids] = self.text.queries([query])
            rows = [self.text.pair(query_ids, ids) for ids in pin_ids]
            p = np.empty((len(rows), len(LEVELS)))
            for batch in token_batches([len(row) for row in rows], TOKENS):
                ids, mask = pad_rows([rows[row] for row in batch], self.text.tokenizer.pad_token_id)
                p[batch] = self.teacher.probabilities(self.teacher(ids, mask)).numpy()
            return p


class Page:
    """What the page shows: the run's ranker, teacher and people's labels."""

    def __init__(self, run, queue=None, labels=None, raters=1):
        self.ranker, self.teacher = Ranker(run), PairTeacher(run)
        of_query = (item for item in self.ranker.spec["categories"].items() if item[0].startswith("query_"))
        self.columns = {name.removeprefix("query_"): values for name, values in of_query}
        self.dataset, texts, ids = Path(self.ranker.made["dataset"]), self.ranker.new.texts, self.ranker.ids
        names = ["query_index", "pin_index", "label"]
        labelled = pq.read_table(run / "features" / "labelled.parquet", columns=names)
        labelled = zip(*(labelled[name].to_pylist() for name in names))
        self.human = {(spaced_key(texts[query]), ids[pin]): level for query, pin, level in labelled}
        names = ["query_id", "query", "language"]
        queries = pq.read_table(run / "features" / "queries.parquet", columns=names).to_pylist()
        self.queries = {row["query_id"]: row for row in queries}
        folder = Path(labels) if labels else Path(queue).parent if queue else run
        self.labels = Labels(queue and Path(queue), folder, raters)
        known, unknown = [], []
        for query, pin in self.labels.pairs:
            is_known = query in self.queries and pin in self.ranker.row_of
            (known if is_known else unknown).append((query, pin))
        self.labels.pairs = known
        if unknown:
            said = f"{len(unknown):,} pairs of a query or a pin that the run does not have are left out"
            print(f"{queue}: {said}, the first: {unknown[0]}")

    def pin(self, pin_id):
        """A pin of the run: its id, title, description, caption, image."""
        [row] = self.ranker.rows([pin_id])
        return {"pin_id": pin_id} | self.ranker.texts.slice(row, 1).to_pylist()[0]

    def column(self, query, found, order):
        """Pins of a column, best first, as the page shows them. found: Scores; order: rows of it."""
        shown, key = [], spaced_key(query)
        for row in order:
            about = self.pin(found.pins[row])
            about["text"] = about["title"] or about["caption"] or "no text"
            why = {name: round(float(x[row]), 3) for name, x in found.match.items() if np.isfinite(x[row])}
            p = [round(float(x), 4) for x in found.probabilities[row]]
            shown.append(about | {"why": why, "p": p, "human": self.human.get((key, about["pin_id"]))})
        return shown

    def search(self, query, columns, teacher, top):
        """{column: pins}: the `top` by BM25 and by the student; by the teacher of the SLOW best of both."""
        found = self.ranker.rank(Query(query, columns))
        by_bm25 = np.argsort(-found.match["bm25"], kind="stable")
        made = {"BM25": self.column(query, found, by_bm25[:top])}
        made["student"] = self.column(query, found, range(min(top, len(found.pins))))
        if teacher:
            rows = found.in_turn()[:SLOW]
            p = self.teacher(query, self.ranker.rows([found.pins[row] for row in rows]))
            found.probabilities[rows] = p
            best = np.argsort(-expected_level(p), kind="stable")[:top]
            made["teacher"] = self.column(query, found, [rows[place] for place in best])
        return made

    def pair(self, name, skipped):
        """The next pair of a person, and how far things are."""
        pair, done, left = self.labels.next(name, skipped)
        about = {"done": done, "left": left, "agreement": self.labels.agreement()}
        if pair is None:
            return about
        return {**about, **self.queries[pair[0]], **self.pin(pair[1])}


def application(page):
    """The FastAPI application of a Page."""
    app = FastAPI(title="Search relevance")
    host = (os.environ.get("HOST") or "::1").lower()  # of all addresses no name is a wrong one
    hosts = ["*"] if host in ("0.0.0.0", "::") else ["127.0.0.1", "localhost", host]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_exception_handler(Stop, refused)

    @app.get("/")
    def index():
        return FileResponse(Path(__file__).with_suffix(".html"))

    @app.get("/about")
    def about():
        about = {"levels": LEVELS, "columns": page.columns, "slow": SLOW}
        return about | {"queue": len(page.labels.pairs)}

    @app.get("/search")
    def search(request: Request, query: str, teacher: bool = False, top: int = Bounded(10, ge=1, le=50)):
        known = {*request.query_params} - {"query", "teacher", "top"}
        return page.search(query, {name: request.query_params[name] for name in known}, teacher, top)

    @app.get("/image/{pin_id:path}")
    def image(pin_id: str):
        found = picture(page.dataset, page.pin(pin_id)["image"], size=240)
        if not found:
            raise HTTPException(404)
        with io.BytesIO() as file:
            found.save(file, "PNG")
            return Response(file.getvalue(), media_type="image/png")

    @app.post("/next")
    def next_pair(asked: Asked):
        return page.pair(asked.name, asked.skipped)

    @app.post("/label")
    def label(said: Label):
        page.labels.add(said.name, (said.query_id, said.pin_id), said.level, said.note)

    @app.post("/undo")
    def undo(asked: Asked):
        return page.labels.undo(asked.name)

    return app


def whole_number(name, default):
    """A number in the environment, as people and ports have it. Stop for what is none."""
    text = os.environ.get(name) or default
    if not (text.isdecimal() and 0 < int(text) < 2**16):
        raise Stop(f"{name}={text}, in the environment: must be a whole number from 1 to 65535")
    return int(text)


def main():
    quiet_libraries()
    told = os.environ
    if "RUN" not in told:
        raise Stop("RUN=DIR says which run; RUN=outputs/toy python -m serving.page")
    raters, port = whole_number("RATERS", "1"), whole_number("PORT", "8000")
    page = Page(Path(told["RUN"]), told.get("QUEUE"), told.get("LABELS"), raters)
    host = told.get("HOST") or "127.0.0.1"
    print(f"http://{host}:{port}")
    uvicorn.run(application(page), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    run_main(main)
