"""A run's student behind FastAPI, as small as it can be.

pip install fastapi uvicorn
RUN=outputs/toy uvicorn serving.service:app --port 8000
curl localhost:8000/rank --json '{"query": "red chair", "top": 3}'
"""

import os

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from lib.stages.terminal import Stop
from serving.ranker import Query, Ranker

app = FastAPI()
ranker = Ranker(os.environ["RUN"])


class Search(BaseModel):
    query: str
    columns: dict[str, str] = {}  # interest, … where a query classifier gives them
    candidates: list[str] | None = None  # pin ids (default: all pins of the run)
    top: int = 20


@app.post("/rank")
def rank(search: Search):
    try:
        found = ranker.rank(Query(search.query, search.columns), search.candidates, top=search.top)
    except Stop as error:
        raise HTTPException(422, str(error)) from None
    rows = zip(found.pins, found.expected_level.tolist(), found.probabilities.tolist())
    return [{"pin_id": pin, "expected_level": level, "probabilities": p} for pin, level, p in rows]
