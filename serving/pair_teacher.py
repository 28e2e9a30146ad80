"""A run's teacher on single pairs, beside the student that serves."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from common import LEVELS, PairText, Teacher, pad_rows, token_batches
from lib.inputs.rows import tokenize_pairs
from lib.models import load_config, load_tokenizer
from lib.stages.terminal import Stop

TOKENS = 4_096  # in a forward pass


class PairTeacher:
    """Loaded at the first pair; LoRA stays beside the model."""

    def __init__(self, run):
        self.run, self.teacher, self.lock = run, None, threading.Lock()

    def load(self):
        """Teacher and text of the pairs. Stop without a teacher."""
        folder = self.run / "teacher"
        if not (folder / "teacher.json").exists():
            raise Stop(f"{folder}: no teacher here")
        self.teacher, about = Teacher.load(folder)
        config = load_config(folder / "backbone" if about["finetuning"] == "full" else about["model"])
        tokenizer = load_tokenizer(folder / "tokenizer", config)
        self.text = PairText(tokenizer, about["kind"], about["fields"], about["max_tokens"], cut_queries=True)
        self.pins = pq.read_table(self.run / "features" / "pins.parquet", columns=list(about["fields"]))

    def read_pins(self, rows):
        """{field: texts} of pins."""
        return self.pins.take(rows).to_pydict()

    @torch.inference_mode()
    def __call__(self, query, pins):
        """A query's text and row numbers of pins [B] -> probabilities [B, C]."""
        with self.lock:
            if self.teacher is None:
                self.load()
            of_query, texts = np.zeros(len(pins), np.int64), pa.chunked_array([[query]])
            rows = tokenize_pairs(self.text, texts, self.read_pins, of_query, pins)
            p = np.empty((len(rows), len(LEVELS)))
            for batch in token_batches([len(row) for row in rows], TOKENS):
                ids, mask = pad_rows([rows[row] for row in batch], self.text.tokenizer.pad_token_id)
                p[batch] = self.teacher.probabilities(self.teacher(ids, mask)).numpy()
            return p
