"""The student as a service takes it: two ONNX files; contract.py has what they take.

Each file holds the network with its normalization and a softmax; inputs are raw, one a name.

    student.onnx              B pairs of any queries and pins
    student_one_query.onnx    B pins of one query: inputs of the query have one row; less to compute
"""

import copy
import warnings

import numpy as np
import onnx
import torch
from torch import nn

from common import expected_level
from lib.results.contract import ONNX, ONNX_ONE_QUERY, OUTPUTS, input_names, is_query, open_onnx
from lib.stages.files import whole_file
from lib.stages.terminal import Stop

OPSET = 17  # the first with layer normalization; onnxruntime reads it since 1.12
TOLERANCE = 1e-4  # of a probability, between PyTorch and onnxruntime
CHECKED_ROWS = 4_096


class Served(nn.Module):
    """A student whose inputs come one by one, as input_names() -> probabilities [B, C], level [B]."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, *inputs):
        p = self.student(dict(zip(input_names(self.student.spec), inputs))).softmax(dim=1)
        return p, expected_level(p)


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
    options = {"input_names": names, "output_names": list(OUTPUTS), "dynamic_axes": rows, "dynamo": False}
    with whole_file(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's exporter would need one more package, and writes paths
        module = Served(student).eval()
        torch.onnx.export(module, tuple(examples), temporary, **options, opset_version=OPSET)
        model = onnx.load(temporary)
        onnx.helper.set_model_props(model, {"contract": "features.json"})
        onnx.save(model, temporary)


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


def compare(expected, found, path):
    """Greatest difference between probabilities [B, C] and those of an ONNX file's outputs."""
    p, level = found
    difference = float(np.abs(p - expected).max())
    level_difference = float(np.abs(level - expected_level(expected)).max())
    if not (difference <= TOLERANCE and level_difference <= 10 * TOLERANCE):
        advice = "install the versions in requirements.txt, then run 04 again"
        raise Stop(f"{path}: off by up to {difference:.2g} from PyTorch's probabilities: {advice}")
    return difference
