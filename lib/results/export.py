"""The student as a service takes it: two ONNX files, and features.json, the contract of their inputs.

The files hold the network with its normalization and a softmax:
inputs are raw, one a name, any number of rows (B) at once.

    student.onnx              B pairs of any queries and pins
    student_one_query.onnx    B pins of one query: inputs of the query have one row; less to compute
"""

import copy
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import NUM_LEVELS, side_of
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


def expected_level(p):
    """Probabilities [B, C] -> expected level [B]; a product with a vector is slow in onnxruntime."""
    return (p * torch.arange(1.0, NUM_LEVELS + 1)).sum(dim=1)


class NamedInputs(nn.Module):
    """A student whose inputs come one by one, in the order of input_names(): embeddings [B, D], category
    codes [B] int64, numbers and match features [B] -> probabilities [B, C] and expected level [B]."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        spec = student.spec
        self.counts = [len(spec[kind]) for kind in ("embeddings", "categories", "numbers", "match")]

    def forward(self, *inputs):
        parts, start = [], 0
        for count in self.counts:
            parts.append(inputs[start : start + count])
            start += count
        embeddings, columns = torch.cat(parts[0], dim=1), []
        for part in parts[1:]:
            columns.append(torch.stack(part, dim=1) if part else embeddings[:, :0])
        p = self.student(embeddings, *columns).softmax(dim=1)
        return p, expected_level(p)


class OneQuery(nn.Module):
    """The same network for B pins of one query: inputs of the query have one row.

    With the query's part q and a pin's p the first layer is W_q q + W_p p + W_x (q * p) + …. For one q that
    is W_q q, the same for all pins, plus (W_p + W_x diag(q)) p: about half of the work."""

    def __init__(self, student):
        super().__init__()
        self.student, spec = student, student.spec
        sizes, tables = spec["embeddings"], dict.fromkeys(spec["categories"], spec["category_dim"])
        names = list(sizes)
        self.products = [(names[query], names[pin]) for query, pin in student.alike]
        widths = {**sizes, **{pair: sizes[pair[0]] for pair in self.products}, **tables}
        self.widths = {**widths, **dict.fromkeys([*spec["numbers"], *spec["match"]], 1)}

    def forward(self, *inputs):
        student, spec = self.student, self.student.spec
        part = dict(zip(input_names(spec), inputs))
        for name, size in spec["embeddings"].items():
            part[name] = F.layer_norm(part[name], (size,))
        for name, table in zip(spec["categories"], student.tables):
            part[name] = table(part[name])
        means, stds = (student.number_mean, student.mean), (student.number_std, student.std)
        for name, mean, std in zip([*spec["numbers"], *spec["match"]], torch.cat(means), torch.cat(stds)):
            part[name] = ((part[name] - mean) / std).nan_to_num()[:, None]

        first, *others = student.mlp
        weight = dict(zip(self.widths, first.weight.T.split([*self.widths.values()])))  # {part: [size, H]}
        for query, pin in self.products:
            weight[pin] = weight[pin] + part[query].T * weight[query, pin]
        of_query = [name for name in part if is_query(name, spec)]
        of_pins = [name for name in part if not is_query(name, spec)]
        same_for_all = first.bias
        for name in of_query:
            same_for_all = same_for_all + part[name] @ weight[name]
        pins = torch.cat([part[name] for name in of_pins], dim=1)
        hidden = pins @ torch.cat([weight[name] for name in of_pins]) + same_for_all
        p = nn.Sequential(*others)(hidden).softmax(dim=1)
        return p, expected_level(p)


def is_query(name, spec):
    """Is this an input of the query alone?"""
    return name not in spec["match"] and side_of(name) == "query"


def write_onnx(network, spec, one_row, path):
    """A network of the inputs of input_names() -> ONNX. one_row: names of inputs that have one row only. The
    same weights give the same bytes."""
    names, examples = input_names(spec), []
    for name in names:
        shape = [1 if name in one_row else 2]
        if name in spec["embeddings"]:
            shape.append(spec["embeddings"][name])
        dtype = torch.int64 if name in spec["categories"] else torch.float32
        examples.append(torch.zeros(shape, dtype=dtype))
    with whole_file(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's exporter would need one more package, and writes paths
        torch.onnx.export(
            network.eval(),
            tuple(examples),
            temporary,
            input_names=names,
            output_names=list(OUTPUTS),
            dynamic_axes={name: {0: "B"} for name in (*names, *OUTPUTS) if name not in one_row},
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


def named_arrays(spec, embeddings, *columns):
    """What Student.forward takes (tensors: embeddings [B, sum of D], then each [B, K]) -> {input: array}, the
    feed of student.onnx."""
    parts = [*embeddings.float().split(list(spec["embeddings"].values()), dim=1)]
    for tensor in columns:
        parts += tensor.unbind(dim=1)
    return {name: np.ascontiguousarray(part) for name, part in zip(input_names(spec), parts)}


@torch.inference_mode()
def save_onnx(student, inputs, folder):
    """Writes both files. inputs: what the student's forward() takes, of real rows, on the CPU. Returns the
    greatest difference of a probability between them and the student there; Stop if it is not small."""
    student = copy.deepcopy(student).cpu().eval()
    spec = student.spec
    one_row = [name for name in input_names(spec) if is_query(name, spec)]
    write_onnx(NamedInputs(student), spec, (), folder / ONNX)
    write_onnx(OneQuery(student), spec, one_row, folder / ONNX_ONE_QUERY)

    inputs = [tensor[:CHECKED_ROWS] for tensor in inputs]
    feed = named_arrays(spec, *inputs)
    expected = student(*inputs).softmax(dim=1).numpy()
    pairs = open_onnx(folder / ONNX)
    difference = compare(expected, pairs.run(OUTPUTS, feed), folder / ONNX)
    first = {name: feed[name][:1] for name in one_row}  # the pins of all rows for the query of the first
    repeated = {name: np.repeat(value, len(inputs[0]), axis=0) for name, value in first.items()}
    expected, _ = pairs.run(OUTPUTS, feed | repeated)
    found = open_onnx(folder / ONNX_ONE_QUERY).run(OUTPUTS, feed | first)
    return max(difference, compare(expected, found, folder / ONNX_ONE_QUERY))


def save_for_serving(student, features, inputs, folder):
    """Writes model.safetensors, features.json and the ONNX files. features: stage.json of stage 01; inputs:
    of save_onnx()."""
    student.spec |= contract(student.spec, features)
    student.save(folder)
    difference = save_onnx(student, inputs, folder)
    print(f"student.onnx: as PyTorch on {len(inputs[0]):,} rows, probabilities to {difference:.0e}")


def compare(expected, found, path):
    """Greatest difference between probabilities [B, C] and those of an ONNX file's outputs."""
    p, level = found
    difference = float(np.abs(p - expected).max())
    level_difference = float(np.abs(level - expected @ np.arange(1, NUM_LEVELS + 1)).max())
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
        kind, shape = "embedding", ["B", spec["embeddings"][name]]
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
