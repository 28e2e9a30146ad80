"""Off-the-shelf models behind the features: BLIP's captions and vision tower, a text encoder."""

import functools
import itertools

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from common import pad_rows
from lib import models
from lib.inputs.match import pin_texts, query_texts
from lib.levels import CHARACTERS
from lib.stages.streams import keep_chunks, matrix_of, new_matrix, vector_column
from lib.stages.terminal import Stop, stop_on_error


class Captioner:
    """BLIP (Li et al., 2022), called directly."""

    def __init__(self, model, tokens, device, dtype):
        from transformers import AutoProcessor, BlipForConditionalGeneration

        options = {"config": captioner_config(model), "use_safetensors": True, "trust_remote_code": False}
        models.weights_of(model)
        models.refuse_endless(model)
        with stop_on_error(f"{model}: cannot be loaded as a BLIP captioner"):
            self.processor = AutoProcessor.from_pretrained(model, use_fast=False, trust_remote_code=False)
            self.model = BlipForConditionalGeneration.from_pretrained(model, dtype=dtype, **options)
            self.model.to(device).eval()
        self.name, self.tokens, self.device = model, tokens, device
        side = self.model.config.vision_config.image_size
        with stop_on_error(f"{model}: its image processor fails"):
            shape = tuple(self.pixels([Image.new("RGB", (40, 30))]).shape)
        if shape != (1, 3, side, side):
            raise Stop(f"{model}: its image processor makes {shape}, the model sees {side} x {side}")
        for weights in self.model.parameters():  # of the text decoder a caption would show none
            refuse_nan(f"--caption-model {model}", weights)
        self.dim = self.model.config.vision_config.hidden_size

    def pixels(self, images):
        """RGB images -> what the vision tower sees [B, 3, side, side]."""
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]

    def __call__(self, images):
        """RGB images -> captions (list) and the vision tower's pooled output [B, D] float16."""
        return self.caption(self.pixels(images))

    @torch.inference_mode()
    def caption(self, pixels):
        """Likewise, of pixels(); the pooled output is seen by a hook on the one pass."""
        pooled, pixels = [], pixels.to(self.device, self.model.dtype)
        seen = self.model.vision_model.register_forward_hook(lambda *passed: pooled.append(passed[-1]))
        ids = self.model.generate(pixels, max_new_tokens=self.tokens, num_beams=1, do_sample=False)
        seen.remove()
        captions = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        vectors = pooled[0].pooler_output
        refuse_nan(f"--caption-model {self.name}", vectors)
        return [c.strip() for c in captions], vectors.half().cpu().numpy()


def refuse_nan(what, vectors):
    """Stop if what a model computes, or computes with, is not finite: 04 would blame its learning rate."""
    if not torch.isfinite(vectors).all():
        raise Stop(f"{what}: it computes no numbers (NaN, or beyond its precision): are its weights whole?")


def captioner_config(model):
    """The config of a captioner, or Stop."""
    config = models.load_config(model)
    if config.model_type != "blip":
        raise Stop(f"{model}: --caption-model must be a BLIP captioning model")
    return config


def encoder_config(model, max_tokens):
    """The config of a text encoder that reads `max_tokens` tokens, or Stop."""
    config = models.load_config(model)
    if models.backbone_kind(config) == "decoder":
        raise Stop(f"{model}: --text-encoder must be an encoder")
    models.fit_length(max_tokens, config, "--text-tokens")
    return config


class TextEncoder:
    """Mean-pooled, L2-normalized sentence embeddings of an off-the-shelf encoder."""

    def __init__(self, model, max_tokens, token_batch, device, dtype):
        config = encoder_config(model, max_tokens)
        self.tokenizer = models.load_tokenizer(model, config)
        self.model = models.load_backbone(model, dtype, device=device).eval()
        self.max_tokens, self.token_batch, self.device, self.name = max_tokens, token_batch, device, model
        self.dim = config.hidden_size

    @torch.inference_mode()
    def __call__(self, texts, multiple=1):
        """B texts -> float16 [B, D]. A batch holds texts of one length, `token_batch` tokens of them, filled
        up to a multiple of rows. With 8 a vector depends on its text alone, to the last bit (seen on CPUs, in
        fp32): a matrix product adds up in another order where only a few rows are left."""
        options = {"truncation": True, "max_length": self.max_tokens, "return_attention_mask": False}
        texts = [text[: self.max_tokens * CHARACTERS] for text in texts]
        with stop_on_error(f"--text-encoder {self.name}: its tokenizer fails"):
            rows = [np.array(ids) for ids in self.tokenizer(texts, **options)["input_ids"]]
        lengths = np.array(list(map(len, rows)))
        out = np.zeros((len(texts), self.dim), dtype=np.float16)
        for batch in one_length_batches(lengths, self.token_batch, multiple):
            if not lengths[batch[0]]:
                continue  # a text without tokens, of a tokenizer that adds none, is zeros
            ids, mask = pad_rows([rows[row] for row in batch], self.tokenizer.pad_token_id)
            ids, mask = ids.to(self.device), mask.to(self.device)
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            refuse_nan(f"--text-encoder {self.name}", mean)
            out[batch] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return out


def one_length_batches(lengths, token_budget, multiple):
    """Row numbers of texts of such lengths, in batches of one length, about `token_budget` tokens and a
    multiple of so many rows: the last row of a length is repeated for that."""
    order = np.argsort(lengths, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        size = max(token_budget // (multiple * max(lengths[rows[0]], 1)), 1) * multiple
        rows = np.append(rows, np.repeat(rows[-1:], -len(rows) % multiple))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def embed_texts(settings, hardware, part, table, folder, new, chunk):
    """Embeds this process's part of those texts of a table that `new` [N] says, `chunk` a file of `folder`.
    hardware: device, dtype. Returns all files."""
    size = settings.text_tokens, settings.token_batch
    encoder = functools.cache(lambda: TextEncoder(settings.text_encoder, *size, *hardware))

    def make(some):
        return {"vector": vector_column(encoder()(some, multiple=8))}

    texts = query_texts if table.stem == "queries" else pin_texts
    wanted = itertools.compress(itertools.chain.from_iterable(texts(table)), new)
    chunks = iter(lambda: list(itertools.islice(wanted, chunk)), [])
    return list(keep_chunks(folder, chunks, make, int(new.sum()), folder.name, part=part))


def gather_embeddings(files, path, dim, place, vectors=None):
    """Vectors of embed_texts' files for the rows where `place` [N] is -1, and rows `place` of known `vectors`
    [M, D] for the others -> `path` [N, D]."""
    rows, start = np.flatnonzero(place < 0), 0
    with new_matrix(path, len(place), dim) as out:
        for first in range(0, 0 if vectors is None else len(place), 65_536):
            some = place[first : first + 65_536]
            is_known = some >= 0
            out[first : first + 65_536][is_known] = vectors[some[is_known]]
        for file in files:
            made = matrix_of(pq.read_table(file)["vector"])
            out[rows[start : start + len(made)]] = made
            start += len(made)
