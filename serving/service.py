"""A run's student behind FastAPI.

pip install fastapi uvicorn prometheus-client
RUN=outputs/toy uvicorn serving.service:app --port 8000
curl localhost:8000/rank --json '{"query": "red chair", "top": 3}'

The port opens when the student is loaded and has answered once. /docs shows what each address takes. /reload
and /metrics are for the operator: keep others from them. serving/Dockerfile has it without PyTorch.

Settings are in the environment, as `Settings` says: RUN, which must be there; STUDENT, TEMPERATURE, THREADS,
EXCLUDE; TEXT_ENCODER and CAPTION_MODEL if they have moved; limits MAX_BYTES, MAX_TOKENS, MAX_CANDIDATES.
"""

import json
import os
import sys
import threading
import time
from typing import Annotated

import prometheus_client as prometheus
from fastapi import FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, FilePath, ValidationError

from lib.inputs.bm25 import tokenize
from lib.stages.terminal import Stop, first_line
from serving.ranker import Pin, Query, Ranker

CHARACTERS = 50  # of a text, for every token that it may have: a longer one is not even tokenized


class Settings(BaseModel):
    """What the environment tells the service, in capitals."""

    run: str  # run directory, through stage 04
    student: str = "student"  # folder of the student below RUN
    temperature: float = Field(1.0, ge=0.01, lt=100)  # of the probabilities: report/temperatures.json
    threads: int = Field(1, ge=1, le=1024)  # cores for the student, a request
    text_encoder: str | None = None  # where stage 01's is now (default: where it was)
    caption_model: str | None = None  # likewise
    exclude: FilePath | None = None  # file of pin ids, one a line, that no ranking has
    max_bytes: int = Field(4_000_000, ge=1)  # of a request; beyond: 413
    max_tokens: int = Field(100, ge=1)  # of a query; a pin's texts may have ten times as many; beyond: 422
    max_candidates: int = Field(100_000, ge=1)  # pairs of a request; beyond: 422


class Strict(BaseModel):
    """Fields that are known, of the type that is said."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Columns = dict[str, str | int | float | bool | None]
Vectors = dict[str, list[float]]


class About(Strict):
    query: str
    columns: Columns = {}  # interest, … where a query classifier gives them; a known query has its own
    embeddings: Vectors = {}  # your own of the query
    match: bool = False  # also the match features: why


class Search(About):
    candidates: list[str] | None = None  # pin ids (default: all pins of the run)
    engaged: dict[str, float] | None = None  # events by pin id (default: stage 01's of a known query)
    exclude: list[str] = []  # pin ids to leave out
    top: Annotated[int, Field(ge=1)] = 20
    titles: bool = False


class Searches(Strict):
    searches: Annotated[list[Search], Field(max_length=100)]


class NewPin(Strict):
    title: str = ""
    description: str = ""
    image: Base64Bytes | None = Field(None, strict=False)  # the content of its file
    boards: list[str] = []
    columns: Columns = {}
    embeddings: Vectors = {}


class NewPins(About):
    pins: Annotated[list[NewPin], Field(max_length=100)]


class Found(BaseModel):
    """A pin for a query; of a new pin, pin_id is its place in the request."""

    pin_id: str | int
    expected_level: float
    probabilities: list[float]
    title: str | None = None
    match: dict[str, float | None] | None = None


class Service:
    """The ranker at work. Methods without _ answer requests."""

    def __init__(self, settings):
        self.settings, self.loading, self.exclude = settings, threading.Lock(), []
        if settings.exclude:
            self.exclude = settings.exclude.read_text(encoding="utf-8").splitlines()
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)  # its memory and processor
        labels = ["address", "status"]
        self.requests = prometheus.Counter("requests", "answers given", labels, registry=registry)
        about = "until the answer"
        self.seconds = prometheus.Histogram("request_seconds", about, labels[:1], registry=registry)
        self.pairs = prometheus.Counter("scored_pairs", "of a query and a pin", registry=registry)
        self._load()

    def _load(self):
        """Loads the run that RUN is now; the one before serves until this one has answered."""
        with self.loading:
            told = self.settings
            models = {"text encoder": told.text_encoder, "caption model": told.caption_model}
            ranker = Ranker(told.run, told.student, told.threads, models, told.temperature)
            ranker.rank("warm up", ranker.ids[:1000])
            self.ranker, self.loaded = ranker, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def _refuse(self, texts, tokens, pairs=0):
        """422 for texts of too many tokens, or too many pairs."""
        for text in texts:
            if len(text) > CHARACTERS * tokens or len(tokenize(text)) > tokens:
                raise HTTPException(422, f"a text of more than {tokens:,} tokens")
        if pairs > self.settings.max_candidates:
            raise HTTPException(422, f"{pairs:,} pairs, at most {self.settings.max_candidates:,} a request")
        self.pairs.inc(pairs)

    def _ranked(self, searches):
        """Searches -> JSON of each, a list of Found."""
        ranker = self.ranker
        pairs = sum(len(ranker.ids if one.candidates is None else one.candidates) for one in searches)
        self._refuse([one.query for one in searches], self.settings.max_tokens, pairs)
        for one in searches:
            query = Query(one.query, one.columns, one.embeddings)
            exclude = [*self.exclude, *one.exclude]
            found = ranker.rank(query, one.candidates, one.engaged, one.top, exclude)
            titles = None
            if one.titles:
                titles = ranker.texts["title"].take(ranker.rows(found.pins)).to_pylist()
            yield answer(found, found.pins, titles, one.match)

    def rank(self, search: Search):
        return as_json(*self._ranked([search]))

    def rank_several(self, asked: Searches):
        return as_json(f"[{', '.join(self._ranked(asked.searches))}]")

    def score(self, asked: NewPins):
        ranker, most = self.ranker, self.settings.max_tokens
        self._refuse([asked.query], most, len(asked.pins))
        texts = [text for pin in asked.pins for text in (pin.title, pin.description, *pin.boards)]
        self._refuse(texts, 10 * most)
        query = Query(asked.query, asked.columns, asked.embeddings)
        found = ranker.score([(query, Pin(**dict(pin))) for pin in asked.pins])
        return as_json(answer(found, range(len(asked.pins)), None, asked.match))

    def reload(self) -> dict:
        self._load()
        return self.version()

    async def ready(self) -> dict:
        return {"ready": True}

    def version(self) -> dict:
        ranker, told = self.ranker, self.settings
        prints = {"features": ranker.made["identity"], "student": ranker.trained["identity"]}
        prints |= {name: source["fingerprint"] for name, source in ranker.spec["sources"].items()}
        names = {"run": told.run, "student": told.student, "loaded": self.loaded}
        return {**names, "pins": len(ranker.ids), "fingerprints": prints}

    def metrics(self):
        text = prometheus.generate_latest(self.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)


def answer(found, names, titles, match):
    """Scores -> JSON, row by row: other threads may run in between."""
    rows = []
    for row, (name, level) in enumerate(zip(names, found.expected_level.tolist())):
        one = {"pin_id": name, "expected_level": level, "probabilities": found.probabilities[row].tolist()}
        if titles:
            one["title"] = titles[row]
        if match:
            why = {feature: float(column[row]) for feature, column in found.match.items()}
            one["match"] = {feature: None if x != x else x for feature, x in why.items()}
        rows.append(json.dumps(one))
    return f"[{', '.join(rows)}]"


def as_json(text, status=200):
    return Response(text, status, media_type="application/json")


async def refused(request, error, status=422):
    """What is wrong, as JSON that can be written whatever stood in the request."""
    detail = str(error)
    if isinstance(error, RequestValidationError):
        detail = [{name: one[name] for name in ("loc", "msg", "type")} for one in error.errors()]
    return as_json(json.dumps({"detail": detail}), status)


class Around:
    """ASGI: counts requests and their seconds; 413 for a body that is too large, before it is read."""

    def __init__(self, app, service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most, read, started, status = self.service.settings.max_bytes, 0, time.perf_counter(), 500
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = f"more than {most:,} bytes"

        async def bounded():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise HTTPException(413, too_large)
            return message

        async def noting(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if length.isdigit() and int(length) > most:
                answer = await refused(None, too_large, 413)
                await answer(scope, receive, noting)
            else:
                await self.app(scope, bounded, noting)
        finally:  # an answer 500 is an exception here
            address = getattr(scope.get("route"), "path", "other")
            self.service.requests.labels(address, status).inc()
            self.service.seconds.labels(address).observe(time.perf_counter() - started)


def application(settings):
    """The FastAPI application of Settings, loaded. Stop for a run that cannot be served."""
    service = Service(settings)
    app = FastAPI(title="Search relevance", version=service.ranker.trained["identity"])
    app.add_middleware(Around, service=service)
    app.add_exception_handler(RequestValidationError, refused)
    app.add_exception_handler(Stop, refused)
    app.post("/rank", response_model=list[Found])(service.rank)
    app.post("/rank_several", response_model=list[list[Found]])(service.rank_several)
    app.post("/score", response_model=list[Found])(service.score)
    app.post("/reload")(service.reload)
    app.get("/health")(service.ready)
    app.get("/ready")(service.ready)
    app.get("/version")(service.version)
    app.get("/metrics")(service.metrics)
    return app


def __getattr__(name):
    """`uvicorn serving.service:app` asks for it; an import alone loads nothing."""
    if name == "app":
        return from_environment(os.environ)
    raise AttributeError(name)


def from_environment(environment):
    """The application as the environment says; ends with one line where that is wrong."""
    told = {name: environment.get(name.upper()) for name in Settings.model_fields}
    try:
        return application(Settings(**{name: value for name, value in told.items() if value}))
    except ValidationError as error:
        first = error.errors()[0]
        sys.exit(f"error: {first['loc'][0].upper()}, in the environment: {first['msg']}")
    except (Stop, OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {first_line(error)}")
