"""A run's student behind FastAPI.

pip install fastapi uvicorn prometheus-client
RUN=outputs/toy uvicorn serving.service:app --port 8000 --limit-concurrency 64
curl localhost:8000/rank --json '{"query": "red chair", "top": 3}'

The port opens when the student is loaded and has answered once; of more requests at a time than uvicorn's
limit the rest get 503. /docs shows what each address takes. /metrics is for the operator: keep others from
it. serving/Dockerfile has the service without PyTorch.

Settings are in the environment, as `Settings` says: RUN, which must be there; STUDENT, TEMPERATURE, THREADS;
TEXT_ENCODER and CAPTION_MODEL if they have moved; limits MAX_BYTES and MAX_CANDIDATES.
"""

import json
import os
import sys
import time
from typing import Annotated

import prometheus_client as prometheus
from fastapi import FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

from lib.stages.terminal import Stop, first_line
from serving.ranker import Pin, Query, Ranker


class Settings(BaseModel):
    """What the environment tells the service, in capitals."""

    run: str  # run directory, through stage 04
    student: str = "student"  # folder of the student below RUN
    temperature: float = Field(1.0, ge=0.01, lt=100)  # of the probabilities: report/temperatures.json
    threads: int = Field(1, ge=1, le=1024)  # cores for the student, a request
    text_encoder: str | None = None  # where stage 01's is now (default: where it was)
    caption_model: str | None = None  # likewise
    max_bytes: int = Field(4_000_000, ge=1)  # of a request; beyond: 413
    max_candidates: int = Field(100_000, ge=1)  # pins of a ranking; beyond: 422


class Strict(BaseModel):
    """Fields that are known, of the type that is said."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


QueryText = Annotated[str, Field(max_length=1_000)]
PinText = Annotated[str, Field(max_length=10_000)]
Columns = dict[str, str | int | float | bool | None]
Vectors = dict[str, list[float]]


class About(Strict):
    query: QueryText
    columns: Columns = {}  # interest, … where a query classifier gives them; a known query has its own
    embeddings: Vectors = {}  # your own of the query
    match: bool = False  # also the match features: why


class Search(About):
    candidates: list[str] | None = None  # pin ids (default: all pins of the run)
    engaged: dict[str, float] | None = None  # events by pin id (default: stage 01's of a known query)
    top: Annotated[int, Field(ge=1)] = 20


class NewPin(Strict):
    title: PinText = ""
    description: PinText = ""
    image: Base64Bytes | None = Field(None, strict=False)  # the content of its file
    boards: Annotated[list[PinText], Field(max_length=1_000)] = []
    columns: Columns = {}
    embeddings: Vectors = {}


class NewPins(About):
    pins: Annotated[list[NewPin], Field(max_length=100)]


class Found(BaseModel):
    """A pin for a query; of a new pin, pin_id is its place in the request."""

    pin_id: str | int
    expected_level: float
    probabilities: list[float]
    match: dict[str, float] | None = None  # null: not known


def answer(found, names, match):
    """Scores -> a list of Found. names: of the pins; match: with the match features?"""
    rows = []
    for row, name in enumerate(names):
        p, level = found.probabilities[row].tolist(), found.expected_level[row]
        why = {feature: column[row] for feature, column in found.match.items()} if match else None
        rows.append(Found(pin_id=name, expected_level=level, probabilities=p, match=why))
    return rows


class Service:
    """The ranker at work: what answers requests."""

    def __init__(self, settings):
        self.settings = settings
        models = {"text encoder": settings.text_encoder, "caption model": settings.caption_model}
        options = settings.student, settings.threads, models, settings.temperature
        self.ranker = Ranker(settings.run, *options)
        self.ranker.rank("warm up", self.ranker.ids[:1000])
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)  # its memory and processor
        about = "requests", "seconds until the answer", ["address", "status"]
        self.requests = prometheus.Histogram(*about, registry=self.registry)

    def rank(self, search: Search):
        pins, most = search.candidates, self.settings.max_candidates
        n = len(self.ranker.ids if pins is None else pins)
        if n > most:
            raise HTTPException(422, f"{n:,} candidates, at most {most:,}")
        query = Query(search.query, search.columns, search.embeddings)
        found = self.ranker.rank(query, pins, search.engaged, search.top)
        return answer(found, found.pins, search.match)

    def score(self, asked: NewPins):
        query = Query(asked.query, asked.columns, asked.embeddings)
        found = self.ranker.score([(query, Pin(**dict(pin))) for pin in asked.pins])
        return answer(found, range(len(asked.pins)), asked.match)

    async def health(self) -> dict:
        ranker = self.ranker
        prints = {"features": ranker.made["identity"], "student": ranker.trained["identity"]}
        prints |= {name: source["fingerprint"] for name, source in ranker.spec["sources"].items()}
        names = {"run": self.settings.run, "student": self.settings.student}
        return {**names, "pins": len(ranker.ids), "fingerprints": prints}

    def metrics(self):
        text = prometheus.generate_latest(self.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def around(self, request, call_next):
        """Around every request: notes its seconds; refuses a body that is too large, or of a size that
        nobody tells, before it is read."""
        started, status, most = time.perf_counter(), 500, self.settings.max_bytes
        try:
            if "transfer-encoding" in request.headers:
                answer = await refused(request, "no content-length", 411)
            elif int(request.headers.get("content-length", 0)) > most:
                answer = await refused(request, f"more than {most:,} bytes", 413)
            else:
                answer = await call_next(request)
            status = answer.status_code
            return answer
        finally:  # an answer 500 is an exception here
            address = getattr(request.scope.get("route"), "path", "other")
            self.requests.labels(address, status).observe(time.perf_counter() - started)


async def refused(request, error, status=422):
    """What is wrong, as JSON that can be written whatever stood in the request."""
    detail = str(error)
    if isinstance(error, RequestValidationError):
        detail = [{name: one[name] for name in ("loc", "msg", "type")} for one in error.errors()]
    return Response(json.dumps({"detail": detail}), status, media_type="application/json")


def application(settings):
    """The FastAPI application of Settings, loaded. Stop for a run that cannot be served."""
    service = Service(settings)
    app = FastAPI(title="Search relevance", version=service.ranker.trained["identity"])
    app.middleware("http")(service.around)
    app.add_exception_handler(RequestValidationError, refused)
    app.add_exception_handler(Stop, refused)
    for address in (service.rank, service.score):
        options = {"response_model": list[Found], "response_model_exclude_none": True}
        app.post(f"/{address.__name__}", **options)(address)
    app.get("/health")(service.health)
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
    except (Stop, OSError) as error:
        sys.exit(f"error: {first_line(error)}")
