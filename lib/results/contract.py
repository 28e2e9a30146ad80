"""features.json: what the student takes, for a service and for somebody without this code; opens its ONNX.
Needs no PyTorch."""

import os

from lib.inputs.bm25 import PATTERNS
from lib.inputs.match import MATCH_FEATURES, WINDOW_YEARS
from lib.levels import FIELDS, NUM_LEVELS, OUTPUTS, side_of
from lib.stages.files import public_name
from lib.stages.terminal import Stop

ONNX, ONNX_ONE_QUERY = "student.onnx", "student_one_query.onnx"
LEVELS = {"name": OUTPUTS[0], "shape": ["B", NUM_LEVELS], "unit": "probability of levels 1 to 5"}
EXPECTED = {"name": OUTPUTS[1], "shape": ["B"], "unit": "level, 1 to 5: rank by it"}
LEVELS["dtype"] = EXPECTED["dtype"] = "float32"

# How stage 01 computes embeddings that are not the user's own: (how, what it comes from).
TEXT = "mean of the text encoder's last hidden states over the tokens of {}, to length 1, in float16"
EMBEDDINGS = {
    "query_text": (TEXT.format("the query"), "text encoder"),
    "pin_text": (TEXT.format("all text of the pin"), "text encoder"),
    "pin_visual": ("pooled output of the captioner's vision tower; zeros without a picture", "caption model"),
    "pin_graph": ("TF-IDF of the titles of the pin's boards, on axes of a truncated SVD", "graph.parquet"),
}
HOW = {  # what more must be known to compute the inputs of new texts
    "tokens": "NFKC, then case folding, then without matches of `invisible`; tokens are the matches of "
    "`token` (Python's package regex). A match of its group `run` that has several characters is instead "
    "all pairs of neighbouring characters, and each character that is no mark (Unicode category M)",
    "pin_text": f"{', '.join(FIELDS)} of pins.parquet, those that are not empty, joined by a space",
    "bm25": "sum over the query's tokens (one that stands twice counts twice) of idf * f * (k1 + 1) / (f + "
    "k1 * (1 - b + b * length / mean_length)); f: how often it is in the pin's text, length: tokens of that "
    "text; idf (0 if not there) and, in the metadata, k1, b, mean_length: bm25.parquet",
    "terms_matched": "tokens of the query, counted likewise, that the pin's text has, over all of them",
    "text_cosine": "of the float16 vectors as float32; 0 if one is all zeros",
    "engagement": f"count summed over {WINDOW_YEARS} years up to and including `as_of`, of log rows of this "
    "pin whose query has the key of this one: NFC, without spaces around it, lower case, final sigma as "
    "sigma, dotted capital I as i; engagements.parquet has the sums of the run's own queries",
    "pin_graph": "(1 + ln(saves)) * idf of each title in graph.parquet, that vector to length 1, times axes",
    "float16": "embeddings are rounded to float16, then given as float32; the user's own keep their type",
    "not known": "NaN in a number or match feature counts as its mean, a code below 0 as 0. Numbers and "
    "match features beyond low and high count as these. An embedding with NaN gives NaN; a code beyond the "
    "list is an error of onnxruntime",
}
SETTINGS = ("text_tokens", "caption_tokens", "top_tokens")  # of stage 01, that a new text needs too


def input_names(spec):
    """Names of a student's inputs, in the order of student.onnx; Stop if two have the same."""
    names = [*spec["embeddings"], *spec["categories"], *spec["numbers"], *spec["match"]]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise Stop(f"two inputs of the student are called {name!r}: rename that column of the raw tables")
    return names


def is_query(name, spec):
    """Is this an input of the query alone?"""
    return name not in spec["match"] and side_of(name) == "query"


def open_onnx(path, threads=1):
    """An onnxruntime session of an ONNX file on `threads` cores. From 1.29 on onnxruntime reports to its
    maker what it loads (names and hashes of models, …); here it does not, unless the environment says so."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sources_of(features):
    """{kind of model: {name, fingerprint}, file: {fingerprint}} of the inputs. features: 01's stage.json."""
    sources = {}
    for kind, model in features.get("models", {}).items():
        sources[kind] = {"name": public_name(model["name"]), "fingerprint": model["fingerprint"]}
    for file in ("bm25.parquet", "graph.parquet"):
        if file in features["outputs"]:
            sources[file] = {"fingerprint": features["outputs"][file]["hash"]}
    return sources


def described(name, spec, own):
    """An input of the contract. own: is it an embedding of the user's own?"""
    kind, of, dtype, shape, source = "number", side_of(name), "float32", ["B"], None
    unit, how = "as brought", f"column {name} of the raw table; NaN: not known, counts as the mean"
    if name in spec["embeddings"]:
        kind, shape = "embedding", ["B", spec["embeddings"][name]]
        how = "the user's own vector; zeros where there is none"
        if not own:
            unit, (how, source) = "none", EMBEDDINGS[name]
    elif name in spec["categories"]:
        kind, dtype, unit = "category", "int64", "row number"
        how = "1 + place of the value in `categories`; 0: null, or a value not in the list"
    elif name in spec["match"]:
        of = "pair"
        if name in MATCH_FEATURES:
            _, unit, how, source = MATCH_FEATURES[name]
    about = {"name": name, "of": of, "kind": kind, "dtype": dtype, "shape": shape}
    return {**about, "unit": unit, "how": how, "source": source}


def contract(spec, features):
    """Of features.json: inputs and outputs of student.onnx in order. features: stage.json of stage 01."""
    inputs = [described(name, spec, f"embeddings/{name}" in features["inputs"]) for name in input_names(spec)]
    settings = {name: features["arguments"].get(name) for name in SETTINGS}
    settings |= {"as_of": features.get("as_of"), **PATTERNS}
    about = {"how": HOW, "sources": sources_of(features), "settings": settings}
    return {"inputs": inputs, "outputs": [LEVELS, EXPECTED], **about}
