"""The text encoder of a run as ONNX: a service on it needs neither PyTorch nor transformers.

    python -m serving.text_encoder --run outputs/toy

Reads   RUN/features
Writes  RUN/text_encoder/   text_encoder.onnx, tokenizer.json, text_encoder.json; serving/ranker.py takes it
                            if it is of the model that made the features
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lib.levels import CHARACTERS
from lib.results.contract import open_onnx
from lib.stages.files import read_json, whole_file, write_json
from lib.stages.finished import require_finished
from lib.stages.terminal import Stop, run_main, stop_on_error

READS = ("queries.parquet",)
FOLDER, MODEL, ABOUT = "text_encoder", "text_encoder.onnx", "text_encoder.json"
OPSET = 17  # as the student's
TOLERANCE = 1e-4  # of a number of a vector of length 1, between PyTorch and onnxruntime
CHECKED = 256  # queries


class OnnxTextEncoder:
    """Texts -> what stage 01's text encoder says of them, by onnxruntime. Any thread may call it."""

    def __init__(self, folder, about):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(about["max_tokens"], direction=about["cut"])
        self.session, self.dim = open_onnx(folder / MODEL), about["dim"]
        self.characters = about["max_tokens"] * CHARACTERS  # read of a text

    def vector(self, text):
        """A text -> float32 [D]; zeros for one without tokens."""
        ids = np.array([self.tokenizer.encode(text[: self.characters]).ids], np.int64)
        return self.session.run(None, {"ids": ids})[0][0] if ids.size else np.zeros(self.dim, np.float32)

    def __call__(self, texts):
        """B texts -> float16 [B, D]."""
        return np.stack([self.vector(text) for text in texts]).astype(np.float16)


def saved_encoder(run, made):
    """The OnnxTextEncoder of a run, or None if there is none of the model that made its features (`made`:
    their stage.json)."""
    folder = Path(run) / FOLDER
    with stop_on_error(f"{folder}: cannot be read", "remove it"):
        about = read_json(folder / ABOUT) if (folder / ABOUT).exists() else {}
        is_same = about.get("fingerprint") == made["models"]["text encoder"]["fingerprint"]
        return OnnxTextEncoder(folder, about) if is_same else None


def model_of_01(made, kind, told=None):
    """Where the "text encoder" or "caption model" is that stage 01 used (`made`: its stage.json), or `told`;
    Stop if its content is not the same."""
    from lib.models import is_model

    used = made["models"].get(kind)
    if used is None:
        raise Stop(f"stage 01 used no {kind} for these features")
    name = str(told or used["name"])
    if not is_model(name, used["fingerprint"]):
        where = f"{kind.replace(' ', '_').upper()} of a service, models of a Ranker"
        where += ", --text-encoder of serving.text_encoder" * (kind == "text encoder")
        raise Stop(f"{name}: not the {kind} that made these features; say where that one is: {where}")
    return name


def export(encoder, folder):
    """A TextEncoder -> text_encoder.onnx and tokenizer.json, for one text at a time."""
    import torch

    class Pooled(torch.nn.Module):
        """Token ids [1, T] -> the mean of the last hidden states, to length 1: [1, D]."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            hidden = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            return torch.nn.functional.normalize(hidden.float().mean(dim=1), dim=1)

    if getattr(encoder.tokenizer, "backend_tokenizer", None) is None:
        raise Stop("this text encoder has no fast tokenizer: no service without PyTorch can have it")
    with whole_file(folder / "tokenizer.json") as temporary:
        encoder.tokenizer.backend_tokenizer.save(str(temporary))
    names = {"input_names": ["ids"], "output_names": ["vector"], "dynamic_axes": {"ids": {1: "T"}}}
    model, example = Pooled(encoder.model).eval(), torch.ones((1, 7), dtype=torch.long)
    with whole_file(folder / MODEL) as temporary, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lengths that differ are compared below
        torch.onnx.export(model, (example,), str(temporary), **names, opset_version=OPSET, dynamo=False)


def main(argv=None):
    # 1. The text encoder that made the features, in fp32
    import torch

    from lib import models
    from lib.inputs.encoders import TextEncoder

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, help="run directory, through stage 01")
    parser.add_argument("--text-encoder", help="where stage 01's is now (default: where it was)")
    settings = parser.parse_args(argv)
    models.quiet_libraries()
    made = require_finished(settings.run / "features", f"01_build_features.py --run {settings.run}", READS)
    name = model_of_01(made, "text encoder", settings.text_encoder)
    max_tokens = made["arguments"]["text_tokens"]
    encoder = TextEncoder(name, max_tokens, max_tokens, "cpu", torch.float32)

    # 2. As ONNX, compared on queries
    folder = settings.run / FOLDER
    (folder / ABOUT).unlink(missing_ok=True)
    export(encoder, folder)
    about = {"max_tokens": max_tokens, "dim": encoder.dim, "cut": encoder.tokenizer.truncation_side}
    about |= {"fingerprint": made["models"]["text encoder"]["fingerprint"]}
    texts = pq.read_table(settings.run / "features" / "queries.parquet", columns=["query"])["query"]
    texts = [*texts.slice(0, CHECKED).to_pylist(), " ".join(texts.slice(0, 100).to_pylist())]
    ours, same = OnnxTextEncoder(folder, about), np.float32(encoder(texts))
    difference = float(np.abs(np.stack([ours.vector(text) for text in texts]) - same).max())
    if not difference <= TOLERANCE + np.abs(same).max() * 2**-11:  # float16 rounds what PyTorch said
        raise Stop(f"{folder / MODEL}: off by up to {difference:.2g} from PyTorch")
    write_json(folder / ABOUT, about)
    print(f"{folder}: {len(texts):,} texts as in PyTorch to {difference:.0e}, float16 included")


if __name__ == "__main__":
    run_main(main)
