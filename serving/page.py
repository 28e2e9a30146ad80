"""A page in the browser: search, compare BM25, student and teacher, and label pairs.

    pip install fastapi uvicorn
    RUN=outputs/toy python -m serving.page                        # http://127.0.0.1:8000
    RUN=outputs/toy QUEUE=queue.csv RATERS=2 python -m serving.page

From the environment: RUN (through stage 04); QUEUE, a table with query_id and pin_id of pairs to label
(experiments/choose.py makes one); LABELS, the folder for labels_NAME.csv (default: the queue's); RATERS,
people a pair; PORT; HOST, 127.0.0.1 unless told. A file of labels is appended to, a line a pair, in the form
of the table `labels` (data/README.md): nothing is lost when the server is killed.
"""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Query as Bounded
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from common import LEVELS, expected_level
from lib.models import quiet_libraries
from lib.results.pictures import picture
from lib.stages.files import read_json
from lib.stages.terminal import Stop, run_main
from serving.labels import Labels
from serving.pair_teacher import PairTeacher
from serving.ranker import Query, Ranker

SLOW = 50  # pins that the teacher reads for a query


class Label(BaseModel):
    name: str
    query_id: str
    pin_id: str
    level: int = Field(ge=1, le=5)
    note: str = Field("", max_length=1000)


class Asked(BaseModel):
    name: str
    skipped: list[tuple[str, str]] = []


def human_labels(run, ids):
    """{(query text, pin id): level}"""
    queries = pq.read_table(run / "features" / "queries.parquet", columns=["query"])["query"]
    rows = pq.read_table(run / "features" / "labelled.parquet", columns=["query_index", "pin_index", "label"])
    texts = queries.take(rows["query_index"]).to_pylist()
    pins = [ids[pin] for pin in rows["pin_index"].to_pylist()]
    return dict(zip(zip(texts, pins), rows["label"].to_pylist()))


class Page:
    """What the page shows: the run's ranker, teacher and people's labels."""

    def __init__(self, run, queue=None, labels=None, raters=1):
        self.run, features = run, run / "features"
        self.ranker, self.teacher = Ranker(run), PairTeacher(run)
        of_query = (item for item in self.ranker.spec["categories"].items() if item[0].startswith("query_"))
        self.columns = {name.removeprefix("query_"): values for name, values in of_query}
        self.pins = pq.read_table(features / "pins.parquet", columns=["title", "caption", "image"])
        self.dataset = Path(read_json(features / "stage.json")["dataset"])
        self.human = human_labels(run, self.ranker.ids)
        queries = pq.read_table(features / "queries.parquet", columns=["query_id", "query", "language"])
        self.queries = {row.pop("query_id"): row for row in queries.to_pylist()}
        folder = Path(labels) if labels else Path(queue).parent if queue else run
        self.labels = Labels(queue and Path(queue), folder, raters)

    def column(self, query, found, order):
        """Pins of a column, best first, as the page shows them. found: Scores; order: rows of it."""
        shown = []
        for row in order:
            pin_id = found.pins[row]
            [about] = self.pins.slice(self.ranker.row_of[pin_id], 1).to_pylist()
            why = {name: round(float(x[row]), 3) for name, x in found.match.items() if np.isfinite(x[row])}
            p = [round(float(x), 4) for x in found.probabilities[row]]
            text = about["title"] or about["caption"] or "no text"
            one = {"pin_id": pin_id, "text": text, "has_image": bool(about["image"]), "why": why, "p": p}
            shown.append(one | {"human": self.human.get((query, pin_id))})
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
        pair, done, left = self.labels.next(name, [list(one) for one in skipped])
        about = {"done": done, "left": left, "agreement": self.labels.agreement()}
        if pair is None:
            return about
        query, pin = self.queries.get(pair[0]), self.ranker.row_of.get(pair[1])
        if query is None or pin is None:
            raise Stop(f"{pair}: not in this run")
        [of_pin] = self.pins.slice(pin, 1).to_pylist()
        return {**about, "query_id": pair[0], "pin_id": pair[1], **query, **of_pin}


def application(page):
    """The FastAPI application of a Page."""
    app = FastAPI(title="Search relevance")
    app.add_middleware(
        TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", os.environ.get("HOST", "::1")]
    )

    @app.exception_handler(Stop)
    async def stopped(request, error):
        return JSONResponse({"detail": str(error)}, 422)

    @app.get("/")
    def index():
        return FileResponse(Path(__file__).with_suffix(".html"))

    @app.get("/about")
    def about():
        queue = len(page.labels.pairs)
        return {"levels": LEVELS, "columns": page.columns, "queue": queue, "slow": SLOW}

    @app.get("/search")
    def search(request: Request, query: str, teacher: bool = False, top: int = Bounded(10, ge=1, le=50)):
        known = {*request.query_params} - {"query", "teacher", "top", "language"}
        return page.search(query, {name: request.query_params[name] for name in known}, teacher, top)

    @app.get("/image/{pin_id:path}")
    def image(pin_id: str):
        row = page.ranker.row_of.get(pin_id, -1)
        found = row >= 0 and picture(page.dataset, page.pins["image"][row].as_py(), size=240)
        if not found:
            raise HTTPException(404)
        with io.BytesIO() as file:
            found.save(file, "PNG")
            return Response(file.getvalue(), media_type="image/png")

    @app.post("/next")
    def next_pair(asked: Asked):
        page.labels.path(asked.name)
        return page.pair(asked.name, asked.skipped)

    @app.post("/label")
    def label(said: Label):
        page.labels.add(said.name, (said.query_id, said.pin_id), said.level, said.note)

    @app.post("/undo")
    def undo(asked: Asked):
        return page.labels.undo(asked.name)

    return app


def main():
    quiet_libraries()
    told = os.environ
    if "RUN" not in told:
        raise Stop("RUN=DIR says which run; RUN=outputs/toy python -m serving.page")
    page = Page(Path(told["RUN"]), told.get("QUEUE"), told.get("LABELS"), int(told.get("RATERS", "1")))
    host, port = told.get("HOST", "127.0.0.1"), int(told.get("PORT", "8000"))
    print(f"http://{host}:{port}")
    uvicorn.run(application(page), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    run_main(main)
