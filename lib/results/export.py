"""The student as a service takes it: two ONNX files, and features.json, the contract of their inputs.

Each file holds the network with its normalization and a softmax; inputs are raw, one a name.

    student.onnx              B pairs of any queries and pins
    student_one_query.onnx    B pins of one query: inputs of the query have one row; less to compute
"""

import copy
import os
import warnings

import numpy as np
import torch
from torch import nn

from common import NUM_LEVELS, expected_level, side_of
from lib.inputs.match import MATCH_FEATURES
from lib.models import public_name
from lib.stages.files import whole_file
from lib.stages.terminal import Stop

OPSET = 17  # the first with layer normalization; onnxruntime reads it since 1.12
ONNX, ONNX_ONE_QUERY = "student.onnx", "student_one_query.onnx"
OUTPUTS = ("probabilities", "expected_level")
TOLERANCE = 1e-4  # of a probability, between PyTorch and onnxruntime
CHECKED_ROWS = 4_096

# How stage 01 computes embeddings that are not the user's own: (unit, how, what it comes from).
TEXT = "mean of the text encoder's last hidden states over the tokens of {}, to length 1, in float16"
VISUAL = "pooled output of the captioner's vision tower; zeros without a picture"
GRAPH = "TF-IDF of the titles of the boards the pin is saved on, on the axes of a truncated SVD"
EMBEDDINGS = {
    "query_text": ("none", TEXT.format("the query"), "text encoder"),
    "pin_text": ("none", TEXT.format("all text of the pin"), "text encoder"),
    "pin_visual": ("none", VISUAL, "caption model"),
    "pin_graph": ("none", GRAPH, "graph.parquet"),
}
OWN = ("as brought", "the user's own vector; zeros where there is none", None)
COLUMN = ("as brought", "column {} of the raw table; NaN: not known, counts as the mean", None)
SETTINGS = ("text_tokens", "caption_tokens", "top_tokens")  # of stage 01, that a new text needs too
CODE = ("row number", "1 + place of the value in `categories`; 0: null, or a value not in the list", None)


def input_names(spec):
    """Names of a student's inputs, in the order of student.onnx; Stop if two have the same."""
    names = [*spec["embeddings"], *spec["categories"], *spec["numbers"], *spec["match"]]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise Stop(f"two inputs of the student are called {name!r}: rename that column of the raw tables")
    return names


class Served(nn.Module):
    """A student whose inputs come one by one, in the order of input_names() -> probabilities [B, C] and
    expected level [B]."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, *inputs):
        p = self.student(dict(zip(input_names(self.student.spec), inputs))).softmax(dim=1)
        return p, expected_level(p)


def is_query(name, spec):
    """Is this an input of the query alone?"""
    return name not in spec["match"] and side_of(name) == "query"


def write_onnx(student, path, one_query):
    """A student -> ONNX; one_query: the query has one row. The same weights give the same bytes."""
    spec, examples, rows = student.spec, [], dict.fromkeys(OUTPUTS, {0: "B"})
    names = input_names(spec)
    for name in names:
        one_row = one_query and is_query(name, spec)
        size = [spec["embeddings"][name]] if name in spec["embeddings"] else []
        dtype = torch.int64 if name in spec["categories"] else torch.float32
        examples.append(torch.zeros([1 if one_row else 2, *size], dtype=dtype))
        if not one_row:
            rows[name] = {0: "B"}
    with whole_file(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's exporter would need one more package, and writes paths
        torch.onnx.export(
            Served(student).eval(),
            tuple(examples),
            temporary,
            input_names=names,
            output_names=list(OUTPUTS),
            dynamic_axes=rows,
            opset_version=OPSET,
            dynamo=False,
        )


def open_onnx(path, threads=1):
    """An onnxruntime session of an ONNX file on `threads` cores. From 1.29 on onnxruntime reports to its
    maker what it loads (names and hashes of models, …); here it does not, unless the environment says so."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def save_onnx(student, inputs, folder):
    """Writes both files. inputs: what the student's forward() takes, of B real rows, on the CPU. Returns the
    greatest difference of a probability between them and the student on these rows (of the second: on the
    pins of all for the query of the first); Stop if it is not small."""
    student, differences = copy.deepcopy(student).cpu().eval(), []
    inputs = {name: tensor[:CHECKED_ROWS] for name, tensor in inputs.items()}
    first = {name: tensor[:1] for name, tensor in inputs.items() if is_query(name, student.spec)}
    repeated = {name: tensor.expand_as(inputs[name]) for name, tensor in first.items()}
    for file, given, same in ((ONNX, {}, {}), (ONNX_ONE_QUERY, first, repeated)):
        write_onnx(student, folder / file, one_query=file == ONNX_ONE_QUERY)
        feed = {name: tensor.numpy() for name, tensor in (inputs | given).items()}
        found = open_onnx(folder / file).run(OUTPUTS, feed)
        expected = student(inputs | same).softmax(dim=1).numpy()
        differences.append(compare(expected, found, folder / file))
    return max(differences)


def save_for_serving(student, features, inputs, folder):
    """Writes model.safetensors, features.json and the ONNX files. features: stage.json of stage 01; inputs:
    of save_onnx()."""
    student.spec |= contract(student.spec, features)
    student.save(folder)
    difference = save_onnx(student, inputs, folder)
    print(f"student.onnx: its probabilities are PyTorch's to {difference:.0e}")


def compare(expected, found, path):
    """Greatest difference between probabilities [B, C] and those of an ONNX file's outputs."""
    p, level = found
    difference = float(np.abs(p - expected).max())
    level_difference = float(np.abs(level - expected_level(expected)).max())
    if not (difference <= TOLERANCE and level_difference <= 10 * TOLERANCE):
        raise Stop(
            f"{path}: onnxruntime's probabilities are off by up to {difference:.2g} from PyTorch's: "
            "install the versions in requirements.txt, then run 04 again"
        )
    return difference


# ------------------------------------------------------------------------------------------------------------
# The contract


def sources_of(features):
    """What the inputs come from: {kind of model: {"name", "fingerprint"}, file: {"fingerprint"}}.
    features: stage.json of stage 01."""
    sources = {}
    for kind, model in features.get("models", {}).items():
        sources[kind] = {"name": public_name(model["name"]), "fingerprint": model["fingerprint"]}
    for file in ("bm25.parquet", "graph.parquet"):
        if file in features["outputs"]:
            sources[file] = {"fingerprint": features["outputs"][file]["hash"]}
    return sources


def described(name, spec, own):
    """An input of the contract. own: is it an embedding of the user's own?"""
    unit, how, source = COLUMN[0], COLUMN[1].format(name), None
    kind, shape, side = "number", ["B"], side_of(name)
    if name in spec["embeddings"]:
        kind, shape = "embedding", [*shape, spec["embeddings"][name]]
        unit, how, source = OWN if own else EMBEDDINGS[name]
    elif name in spec["categories"]:
        kind, (unit, how, source) = "category", CODE
    elif name in spec["match"]:
        side = "pair"
        if name in MATCH_FEATURES:
            _, unit, how, source = MATCH_FEATURES[name]
    dtype = "int64" if kind == "category" else "float32"
    about = {"name": name, "of": side, "kind": kind, "dtype": dtype, "shape": shape}
    return {**about, "unit": unit, "how": how, "source": source}


def contract(spec, features):
    """Inputs and outputs of student.onnx in their order: names, sizes, units, how each is computed and from
    what. It goes into features.json. features: stage.json of stage 01."""
    own = {name.removeprefix("embeddings/") for name in features["inputs"] if name.startswith("embeddings/")}
    inputs = [described(name, spec, name in own) for name in input_names(spec)]
    levels = {"name": "probabilities", "shape": ["B", NUM_LEVELS], "unit": "probability of levels 1 to 5"}
    expected = {"name": "expected_level", "shape": ["B"], "unit": "level, 1 to 5: rank by it"}
    outputs = [{**output, "dtype": "float32"} for output in (levels, expected)]
    settings = {name: features["arguments"].get(name) for name in SETTINGS}
    return {"inputs": inputs, "outputs": outputs, "sources": sources_of(features), "settings": settings}
