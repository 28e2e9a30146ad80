"""A run's student behind FastAPI.

pip install fastapi uvicorn prometheus-client
RUN=outputs/toy uvicorn serving.service:app --port 8000
curl localhost:8000/rank --json '{"query": "red chair", "top": 3}'

The port opens when the student is loaded and has answered once. /docs shows what each address takes. /reload
reads RUN and EXCLUDE again; it and /metrics are for the operator: keep others from them. serving/Dockerfile
has it without PyTorch.

Settings are in the environment, as `Settings` says: RUN, which must be there; STUDENT, TEMPERATURE, THREADS,
EXCLUDE; TEXT_ENCODER and CAPTION_MODEL if they have moved; limits MAX_BYTES, MAX_TOKENS, MAX_CANDIDATES.
"""

import os
import sys
import threading
import time
from codecs import BOM_UTF8
from typing import Annotated

import prometheus_client as prometheus
from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, FilePath, ValidationError
from pydantic_core import from_json, to_json
from starlette.requests import ClientDisconnect

from lib.inputs.bm25 import tokenize
from lib.stages.terminal import Stop, first_line, stop_on_error
from serving.ranker import Pin, Query, Ranker

CHARACTERS = 50  # of a text, for every token that it may have: a longer one is not even tokenized


class Settings(BaseModel):
    """What the environment tells the service, in capitals."""

    run: str  # run directory, through stage 04
    student: str = "student"  # folder of the student below RUN
    temperature: float = 1.0  # of the probabilities: report/temperatures.json
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


class Given(Strict):
    columns: dict[str, str | int | float | bool | None] = {}  # as in the raw tables; not given: unknown
    embeddings: dict[str, list[float]] = {}  # your own


class About(Given):
    query: str  # one that the run has brings its own columns and engagement
    match: bool = False  # also the match features: why


class Search(About):
    candidates: list[str] | None = None  # pin ids (default: all pins of the run)
    engaged: dict[str, float] | None = None  # events by pin id (default: stage 01's of a known query)
    exclude: list[str] = []  # pin ids to leave out
    top: Annotated[int, Field(ge=1)] = 20
    titles: bool = False


class Searches(Strict):
    searches: Annotated[list[Search], Field(max_length=100)]


class NewPin(Given):
    title: str = ""
    description: str = ""
    image: Base64Bytes | None = Field(None, strict=False)  # the content of its file
    boards: list[str] = []


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
        self.settings, self.loading = settings, threading.Lock()
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)  # its memory and processor
        self.requests = prometheus.Counter("requests", "answered", ["address", "status"], registry=registry)
        self.seconds = prometheus.Histogram("request_seconds", "each", ["address"], registry=registry)
        self.pairs = prometheus.Counter("scored_pairs", "of a query and a pin", registry=registry)
        self._load()

    def _load(self):
        """Loads the run that RUN is now, and EXCLUDE; those before serve until this run has answered."""
        with self.loading:
            told, lines = self.settings, []
            if told.exclude:
                with stop_on_error(f"EXCLUDE, {told.exclude}: cannot be read"):
                    lines = told.exclude.read_text(encoding="utf-8-sig").split("\n")
            models = {"text encoder": told.text_encoder, "caption model": told.caption_model}
            ranker = Ranker(told.run, told.student, told.threads, models, told.temperature)
            ranker.rank("warm up", ranker.ids[:1000])
            self.exclude = {*lines, *map(str.strip, lines)}  # nobody sees a space behind an id
            self.ranker, self.loaded = ranker, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def _refuse(self, texts, tokens, pairs=0):
        """Stop for texts of too many tokens, or too many pairs."""
        for text in texts:
            if len(text) > CHARACTERS * tokens or len(tokenize(text)) > tokens:
                raise Stop(f"a text of more than {tokens:,} tokens")
        if pairs > self.settings.max_candidates:
            raise Stop(f"{pairs:,} pairs, at most {self.settings.max_candidates:,} a request")
        self.pairs.inc(pairs)

    def _ranked(self, searches):
        """Rows of Found for each of the searches."""
        ranker = self.ranker
        pairs = sum(len(ranker.ids if one.candidates is None else one.candidates) for one in searches)
        self._refuse([one.query for one in searches], self.settings.max_tokens, pairs)
        for one in searches:
            query = Query(one.query, one.columns, one.embeddings)
            exclude = [*self.exclude, *one.exclude]
            found = ranker.rank(query, one.candidates, one.engaged, one.top, exclude)
            columns = {"pin_id": found.pins}
            if one.titles:
                columns["title"] = ranker.texts["title"].take(ranker.rows(found.pins)).to_pylist()
            yield rows_of(found, columns, one.match)

    def rank(self, search: Search):
        return as_json(*self._ranked([search]))

    def rank_several(self, asked: Searches):
        return as_json([*self._ranked(asked.searches)])

    def score(self, asked: NewPins):
        self._refuse([asked.query], self.settings.max_tokens, len(asked.pins))
        texts = [text for pin in asked.pins for text in (pin.title, pin.description, *pin.boards)]
        self._refuse(texts, 10 * self.settings.max_tokens)
        query = Query(asked.query, asked.columns, asked.embeddings)
        found = self.ranker.score([(query, Pin(**dict(pin))) for pin in asked.pins])
        return as_json(rows_of(found, {"pin_id": range(len(asked.pins))}, asked.match))

    def reload(self) -> dict:
        self._load()
        return self.version()

    async def ready(self) -> dict:
        return {"ready": True}

    health = ready

    def version(self) -> dict:
        ranker, told = self.ranker, self.settings
        prints = {"features": ranker.made["identity"], "student": ranker.trained["identity"]}
        prints |= {name: source["fingerprint"] for name, source in ranker.spec["sources"].items()}
        about = {"run": told.run, "student": told.student, "loaded": self.loaded, "pins": len(ranker.ids)}
        return about | {"fingerprints": prints}

    def metrics(self):
        text = prometheus.generate_latest(self.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def _around(self, request, answer_to):
        """Counts requests and their seconds; a body that is too large is refused before it is read."""
        started, status = time.perf_counter(), 500
        try:
            answer = await self._refused(request) or await answer_to(request)
            status = answer.status_code
            return answer
        finally:  # an answer 500 is an exception here
            address = getattr(request.scope.get("route"), "path", "other")
            self.requests.labels(address, status).inc()
            self.seconds.labels(address).observe(time.perf_counter() - started)

    async def _refused(self, request):
        """The answer to a body without a length, too large a one, or one that is no JSON; else None."""
        most, headers = self.settings.max_bytes, request.headers
        if "transfer-encoding" in headers:
            return await refused(request, "the content-length is missing", 411)
        if int(headers.get("content-length", 0)) > most:
            return await refused(request, f"more than {most:,} bytes", 413)
        try:  # Python's json takes NaN, and halves of characters
            body = await request.body()
            from_json(body.removeprefix(BOM_UTF8) or "null", allow_inf_nan=False)
        except ValueError as error:
            return await refused(request, f"no JSON: {error}")
        except ClientDisconnect:
            return await refused(request, "the connection has ended", 400)  # nobody reads it


def rows_of(found, columns, match):
    """Scores, and further columns {name: [B]} -> rows of Found."""
    columns["expected_level"] = found.expected_level.tolist()
    columns["probabilities"] = found.probabilities.tolist()
    if match:
        why = [column.tolist() for column in found.match.values()]
        columns["match"] = [dict(zip(found.match, row)) for row in zip(*why)]
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def as_json(rows):
    return Response(to_json(rows, inf_nan_mode="null"), media_type="application/json")


async def refused(request, error, status=422):
    """What is wrong, as JSON."""
    detail = str(error)
    if isinstance(error, RequestValidationError):  # not what was sent: JSON may have no way to write it
        detail = [{name: one[name] for name in ("loc", "msg", "type")} for one in error.errors()]
    return JSONResponse({"detail": detail}, status)


def __getattr__(name):
    """`uvicorn serving.service:app` asks for it; an import alone loads nothing."""
    if name == "app":
        return from_environment(os.environ)
    raise AttributeError(name)


def from_environment(environment):
    """The FastAPI application, loaded, as the environment says; ends with one line where that is wrong."""
    told = {name: environment.get(name.upper()) for name in Settings.model_fields}
    try:
        service = Service(Settings(**{name: value for name, value in told.items() if value}))
    except ValidationError as error:
        first = error.errors()[0]
        sys.exit(f"error: {first['loc'][0].upper()}, in the environment: {first['msg']}")
    except (Stop, OSError) as error:
        sys.exit(f"error: {first_line(error)}")
    app = FastAPI(title="Search relevance", version=service.ranker.trained["identity"])
    app.middleware("http")(service._around)
    app.add_exception_handler(RequestValidationError, refused)
    app.add_exception_handler(Stop, refused)
    answers = {"rank": list[Found], "rank_several": list[list[Found]], "score": list[Found], "reload": dict}
    for name, answer in answers.items():
        app.post(f"/{name}", response_model=answer)(getattr(service, name))
    for name in ("health", "ready", "version", "metrics"):
        app.get(f"/{name}")(getattr(service, name))
    return app
