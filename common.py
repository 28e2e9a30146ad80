"""What two or more stages share, and nothing else.

    1  levels and the text the teacher reads    02, 03
    2  the teacher, a cross-encoder             02, 03
    3  the student, a feed-forward network      04, 05
    4  raw tables and their checks              01 and the converters in data/
    5  plumbing: presets, stage.json, locks, atomic writes (may be skipped: no method in it)

Shape letters used everywhere: B rows, T tokens, C = 5 relevance levels, D embedding size, F match features.
The paper: Wang et al., 2024, "Improving Pinterest Search Relevance Using Large Language Models" (arXiv 2410.17152).
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
import warnings
from array import array
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).resolve().parent

# On a CPU, oneDNN and PyTorch's layer over it each keep up to 1,024 compiled matrix products, one a shape, about 0.7 MB each. Batches of a bounded
# number of tokens come in ever new shapes, but all layers of a batch share a few. Read at the first product; both limits are needed.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")


class Stop(Exception):
    """Ends a stage with one line: what is wrong, where, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# 1  Levels and the text the teacher reads  (paper: "Pin Text Representations")

LEVELS = {5: "excellent", 4: "good", 3: "complementary", 2: "poor", 1: "highly irrelevant"}
C = len(LEVELS)

# The six text sources of the paper in the order they are read. Each is a column of features/pins.parquet.
FIELDS = ("title", "description", "caption", "queries", "boards", "links")


def share_budget(lengths, budget):
    """Token allowance of each field when all must fit into `budget`: max-min fair, so that a short field is kept whole
    and only the longest are cut. [12, 300, 8], budget 60 -> [12, 40, 8]."""
    allowed = [0] * len(lengths)
    left = max(budget, 0)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for rank, i in enumerate(order):
        allowed[i] = min(lengths[i], left // (len(order) - rank))
        left -= allowed[i]
    return allowed


class PairText:
    """Turns (query, pin) into the token ids of `[CLS] query [SEP] title: … description: … [SEP]`.

    The query is never truncated; the fields share what is left of `max_tokens` (share_budget). A tokenizer without
    [CLS] opens with its beginning-of-text token (Llama) or nothing (T5). One without [SEP] separates with end-of-text for an encoder-decoder, as T5 does
    for sentence pairs, and with a line break for a decoder, and both close with end-of-text: the token a decoder is read
    out at is then always the same one (our choice; RepLLaMA, Ma et al., 2023, does so)."""

    def __init__(self, tokenizer, kind, fields, max_tokens):
        self.tokenizer, self.fields, self.max_tokens = tokenizer, tuple(fields), max_tokens
        ids = lambda token: [] if token is None else [token]
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        self.open = ids(first)
        if tokenizer.sep_token_id is not None:
            self.separator = self.close = [tokenizer.sep_token_id]
        elif kind == "encoder-decoder":
            self.separator = self.close = ids(tokenizer.eos_token_id)
        else:
            self.separator, self.close = tokenizer.encode("\n", add_special_tokens=False), ids(tokenizer.eos_token_id)

    def describe(self):
        """The template's identity, part of every label shard's: a change of it is a change of the labels."""
        return {"fields": list(self.fields), "max_tokens": self.max_tokens, "template": "open query sep (name: text)* close",
                "open": self.open, "separator": self.separator, "close": self.close}

    def _ids(self, texts):
        """Token ids of each text: what tokenizer(texts, add_special_tokens=False) gives, without the records that it makes in Python."""
        ids, fast = [], getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is not None:
            fast.no_truncation()
            fast.no_padding()
        for i in range(0, len(texts), 8_192):  # the record of a text is much larger than its ids
            some = texts[i:i + 8_192]
            if fast is not None:
                ids += [record.ids for record in fast.encode_batch_fast(some, add_special_tokens=False)]
            else:
                ids += self.tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return ids

    def queries(self, texts):
        """Token ids of each query. Stop if one does not fit: it is never cut."""
        ids = self._ids(list(texts))
        room = self.max_tokens - len(self.open) - len(self.separator) - len(self.close)
        for text, tokens in zip(texts, ids):
            if len(tokens) > room:
                raise Stop(f"the query {text[:60]!r}… has {len(tokens)} tokens, room is for {room}: raise --max-tokens or shorten the query")
        return ids

    def pins(self, table):
        """Token ids of every field of every pin: a list of (one list a non-empty field) a pin. `table`: dict of columns."""
        rows = len(table[self.fields[0]]) if self.fields else 0
        where, texts = [], []
        for i in range(rows):
            for name in self.fields:
                if table[name][i]:
                    where.append(i)
                    texts.append(f"{name}: {table[name][i]}")
        pins = [[] for _ in range(rows)]
        for i, tokens in zip(where, self._ids(texts)):
            pins[i].append(tokens)
        return pins

    def pair(self, query, pin):
        """Token ids of one pair, from one element of queries() and one of pins(); at most max_tokens long."""
        head = self.open + query + self.separator
        room = self.max_tokens - len(head) - len(self.close)
        lengths = [len(tokens) for tokens in pin]
        if sum(lengths) > room:
            pin = [tokens[:n] for tokens, n in zip(pin, share_budget(lengths, room))]
        return head + [t for tokens in pin for t in tokens] + self.close


class PackedRows:
    """Token ids of many rows in one flat int32 array; batch() pads the rows asked for."""

    def __init__(self, rows):
        """rows: an iterable of lists of token ids, read once and not kept."""
        flat, lengths = array("i"), array("q")
        for row in rows:
            flat.extend(row)
            lengths.append(len(row))
        self.flat, self.lengths = np.array(flat, dtype=np.int32), np.array(lengths, dtype=np.int64)
        self.start = np.cumsum(self.lengths) - self.lengths

    def __len__(self):
        return len(self.lengths)

    def batch(self, rows, pad_id, side="right"):
        """Row numbers [B] -> input_ids [B, T] and attention_mask [B, T], int64."""
        n = self.lengths[rows][:, None]
        T = int(n.max())
        column = np.arange(T)[None, :] - (T - n if side == "left" else 0)
        mask = (column >= 0) & (column < n)
        at = np.where(mask, self.start[rows][:, None] + column, 0)
        return torch.from_numpy(np.where(mask, self.flat[at], pad_id).astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


def token_batches(lengths, budget):
    """Row numbers in batches of at most `budget` padded tokens (at least one row each). `lengths` should be sorted: a batch that
    is half full ends where the length changes, so that with enough rows no batch has padding."""
    batch, longest = [], 0
    for row, n in enumerate(lengths):
        longest, before = max(longest, n), longest
        if batch and (longest * (len(batch) + 1) > budget or n != lengths[row - 1] and 2 * before * len(batch) >= budget):
            yield batch
            batch, longest = [], n
        batch.append(row)
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# 2  The teacher  (paper: "LLM as Relevance Model")


def pool(hidden, mask, how):
    """Hidden states [B, T, D] and attention mask [B, T] -> [B, D]: the `first` ([CLS]) or `last` non-padding token.
    Found by the mask, never by token id (pad may equal eos), whatever the padding side."""
    if how == "first":
        at = mask.argmax(dim=1)
    else:
        at = (torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), at]


def backbone_kind(config):
    """'encoder' (BERT, DeBERTa, XLM-R), 'encoder-decoder' (T5: its encoder is used) or 'decoder' (Llama), from the model's config."""
    from transformers.models.auto import modeling_auto as auto

    name = config.model_type
    if config.is_encoder_decoder or name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:  # a T5 encoder saved alone says it is none
        return "encoder-decoder"
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "decoder"
    if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    raise Stop(f"a model of type {name!r} is no text encoder, encoder-decoder or decoder: give --model a BERT-, DeBERTa-, T5- or Llama-like model")


def load_config(model):
    """The config of a model folder or hub id; Stop with one line when there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as e:  # transformers raises many kinds for a folder that will not do
        raise Stop(f"{model}: no usable model config here ({first_line(e)}); give a folder written by save_pretrained, or a hub id") from e


def fit_length(max_tokens, config):
    """max_tokens if the model has as many positions, else Stop."""
    limit = getattr(config, "max_position_embeddings", None) or max_tokens
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        limit -= config.pad_token_id + 1  # these count positions from there
    if max_tokens > limit:
        raise Stop(f"--max-tokens {max_tokens}: this model reads at most {limit}")
    return max_tokens


def load_backbone(model, dtype, quantise=False, device="cpu", config=None):
    """A pre-trained model without its language-model head. Safetensors only, no remote code. On the device "meta": its shapes alone.

    quantise: NF4 with double quantisation and `dtype` as compute type (QLoRA, Dettmers et al., 2023), loaded straight into 4 bit."""
    from transformers import AutoModel, AutoModelForTextEncoding, BitsAndBytesConfig

    config = config or load_config(model)
    cls = AutoModelForTextEncoding if backbone_kind(config) == "encoder-decoder" else AutoModel
    extra = {}
    if quantise:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
        extra["device_map"] = {"": str(device)}
    try:
        if str(device) == "meta":
            with torch.device("meta"):
                return without_pooler(cls.from_config(config, dtype=dtype))
        backbone, found = cls.from_pretrained(model, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **extra)
    except Exception as e:  # transformers, safetensors and bitsandbytes raise many kinds for a folder or machine that will not do
        if quantise:
            raise Stop(f"{model} cannot be loaded in 4 bit here ({first_line(e)}); --no-qlora trains plain LoRA instead") from e
        raise Stop(f"{model}: cannot be loaded ({first_line(e)}); it must hold safetensors weights (pickled ones are refused)") from e
    missing = sorted(k for k in found["missing_keys"] if not k.startswith("pooler."))
    if missing:  # transformers would begin with random ones
        raise Stop(f"{model}: {len(missing)} weights of a {config.model_type} model are missing, the first: {missing[0]}; are these the weights of another model?")
    without_pooler(backbone)
    for module in backbone.modules() if quantise else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights at the first evaluation on such a CPU: training after it has no gradients, merge_lora no weights
            module.support_avx512bf16_for_cpu = False
    return backbone if quantise else backbone.to(device)


def without_pooler(backbone):
    """Drops an extra layer that some encoders carry: not read here, and unused weights stall data-parallel training."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone


def load_tokenizer(model, config):
    """The tokenizer, with a pad token: its own, else the config's, else end-of-text (pooling goes by the mask, so that is safe)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as e:  # as above
        raise Stop(f"{model}: its tokenizer cannot be loaded ({first_line(e)})") from e
    if tokenizer.pad_token_id is None:
        known = getattr(config, "pad_token_id", None)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known) if known is not None else tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise Stop(f"{model}: its tokenizer has neither a pad nor an end-of-text token")
    config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


class Teacher(nn.Module):
    """Cross-encoder: backbone -> first or last token -> fully connected head -> logits of the five levels.

    The head ("several fully connected layers", the paper; two hidden ones of at most 1,024, our choice) is built outside
    the backbone, always fp32, never quantised, and saved in a file of its own: the classic ways to lose it are closed."""

    def __init__(self, backbone, kind, dropout=0.1):
        super().__init__()
        self.backbone, self.kind = backbone, kind
        self.how = "last" if kind == "decoder" else "first"
        D = backbone.config.hidden_size
        H = min(D, 1024)
        self.head = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(dropout),
                                  nn.Linear(H, H), nn.GELU(), nn.Dropout(dropout), nn.Linear(H, C)).float()

    def mask_matters(self, attention_mask):
        """Does attention need to be told where the padding is? Not without padding, and not if it stands right of the text in a
        decoder: no token looks to its right. Asked of the mask before it goes to the device; without a mask, attention runs on its fastest kernels."""
        return not bool((attention_mask[:, 0] if self.kind == "decoder" else attention_mask).all())

    def forward(self, input_ids, attention_mask, mask_matters=True):
        """Token ids and mask [B, T] -> logits [B, C], fp32. mask_matters=False: attention goes without, pooling still reads it."""
        cache = {"use_cache": False} if self.kind == "decoder" else {}  # keys and values are of no use after one pass
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask if mask_matters else None, **cache).last_hidden_state
        with torch.autocast(input_ids.device.type, enabled=False):
            return self.head(pool(hidden, attention_mask, self.how).float())

    def save(self, folder, about):
        """Writes adapter/ or backbone/, head.safetensors and teacher.json (`about`: model, fields, max_tokens, lora, qlora, …)."""
        folder = Path(folder)
        self.backbone.save_pretrained(folder / ("adapter" if about["lora"] else "backbone"))
        save_file({k: v.float().contiguous().cpu() for k, v in self.head.state_dict().items()}, folder / "head.safetensors")
        write_json(folder / "teacher.json", about)

    @classmethod
    def load(cls, folder, dtype=torch.float32, device="cpu"):
        """The teacher that 02 wrote, in evaluation mode, and its `about`. LoRA is left beside the backbone: merge_lora() adds it in."""
        folder = Path(folder)
        about = read_json(folder / "teacher.json")
        if about["lora"]:
            from peft import PeftModel

            backbone = load_backbone(about["model"], dtype, quantise=about["qlora"], device=device)
            backbone = PeftModel.from_pretrained(backbone, folder / "adapter")
        else:
            backbone = load_backbone(folder / "backbone", dtype, device=device)
        teacher = cls(backbone, about["kind"])
        teacher.head.load_state_dict(load_file(folder / "head.safetensors"))
        teacher.head.to(device)
        return teacher.eval(), about


class OneDnnLinear(nn.Linear):
    """A linear layer for inference on a CPU by oneDNN, which can apply GELU to its result on the way. PyTorch gives fp32 products to MKL,
    which on AMD's CPUs takes two to three times as long."""

    then = "none"

    def forward(self, x):  # to the weight's type, as autocast does for nn.Linear
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, self.then, [], "none" if self.then == "gelu" else "")


def to_fp8(x):
    """Rows of x [..., D] in 8-bit floating point (e4m3, at most 448) and their scales [..., 1], fp32: x is about their product."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """A linear layer for inference whose matrix product is in 8-bit floating point: a scale an output row for the weights, a scale a token for what comes in.
    For GPUs from Hopper on, whose data sheets promise twice bf16's speed (not measured here); a CPU emulates it. bf16 out."""

    def __init__(self, linear):
        super().__init__()
        weight, scale = to_fp8(linear.weight.data)
        self.register_buffer("weight8", weight)
        self.register_buffer("scale", scale)
        self.weight, self.bias = None, linear.bias  # T5 would cast what comes in to the weight's type

    def forward(self, x):
        rows, scale = to_fp8(x.flatten(0, -2))
        by_row = F.ScalingType.RowWise
        out = F.scaled_mm(rows, self.weight8.t(), scale, by_row, self.scale.t(), by_row, bias=self.bias, output_dtype=torch.bfloat16, use_fast_accum=x.is_cuda)
        return out.unflatten(0, x.shape[:-1])


def use_fp8(teacher):
    """Puts an Fp8Linear in the place of every linear layer of the backbone (its sizes must be multiples of 16). The head stays fp32."""
    for name, module in list(teacher.backbone.named_modules()):
        if type(module) is nn.Linear and module.in_features % 16 == 0 and module.out_features % 16 == 0:
            parent, _, child = name.rpartition(".")
            setattr(teacher.backbone.get_submodule(parent), child, Fp8Linear(module))


def first_token(module, inputs):
    """Hook: what a layer gets, cut to the first token. [B, T, D] -> [B, 1, D]"""
    return tuple(x[:, :1] for x in inputs)


def onednn_multiplies(dtype):
    """Can oneDNN multiply matrices of this type here? bf16 needs AVX-512 (or Arm's equivalent): on other CPUs the operator raises an error."""
    return torch.backends.mkldnn.is_available() and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def for_inference(teacher, device, dtype, compiled=False):
    """The teacher without work that nobody reads, for batches padded on the right: after attention, the last layer of an encoder of BERT's
    kind runs for the first token alone. And on a CPU with what is faster there and as exact (the compiler picks its own): linear layers by
    oneDNN, and attention of such an encoder in bf16 as two matrix products, which take half as long as PyTorch's fused kernel up to some 300 tokens."""
    from transformers.activations import GELUActivation

    layers = getattr(getattr(teacher.backbone, "encoder", None), "layer", None)
    like_bert = teacher.how == "first" and layers is not None and hasattr(layers[-1], "attention") and hasattr(layers[-1].attention, "output")
    if like_bert:
        layers[-1].attention.output.register_forward_pre_hook(first_token)
    if torch.device(device).type != "cpu" or compiled or not onednn_multiplies(dtype):
        return teacher.eval()
    for module in teacher.modules():
        if type(module) is nn.Linear and module.weight.dtype == dtype:  # in bf16 the head stays as it is, fp32
            module.__class__ = OneDnnLinear
    for layer in layers if like_bert else ():
        if type(layer.intermediate.dense) is OneDnnLinear and isinstance(layer.intermediate.intermediate_act_fn, GELUActivation):
            layer.intermediate.dense.then, layer.intermediate.intermediate_act_fn = "gelu", nn.Identity()
    if like_bert and dtype == torch.bfloat16:
        teacher.backbone.set_attn_implementation("eager")
    return teacher.eval()


@torch.inference_mode()
def soft_labels(teacher, rows, pad_id, token_budget, device, dtype=torch.float32, progress=None):
    """softmax(logits) of every row of `rows` (PackedRows): float32 [B, C] in the rows' order.

    Batches hold at most `token_budget` tokens, from rows sorted by length: almost no padding. `progress`: called with each batch's size."""
    order = np.argsort(rows.lengths, kind="stable")[::-1]  # longest first: if a batch does not fit into memory, the first one fails
    out = np.empty((len(rows), C), dtype=np.float32)
    for batch in token_batches(rows.lengths[order], token_budget):
        batch = order[batch]
        ids, mask = rows.batch(batch, pad_id)
        mask_matters = teacher.mask_matters(mask)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = teacher(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True), mask_matters)
        out[batch] = logits.double().softmax(dim=1).float().cpu().numpy()
        if progress:
            progress(len(batch))
    return out


@torch.no_grad()
def merge_lora(teacher, dtype):
    """Replaces every LoRA-wrapped linear layer by a plain one with weight W + (alpha / r) B A (Hu et al., 2022), W dequantised
    from NF4 where it is in 4 bit. peft's own merge would quantise the sum again, which moves the labels."""
    from peft.tuners.lora import LoraLayer

    base = teacher.backbone.get_base_model()
    for name, layer in [(n, m) for n, m in base.named_modules() if isinstance(m, LoraLayer)]:
        old = layer.get_base_layer()
        weight = old.weight
        if getattr(weight, "quant_state", None) is not None:
            import bitsandbytes.functional as bnb

            weight = bnb.dequantize_4bit(weight.data, weight.quant_state)
        weight = weight.float() + layer.get_delta_weight("default").float()
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None, device=weight.device, dtype=dtype)
        new.weight.copy_(weight)
        if old.bias is not None:
            new.bias.copy_(old.bias)
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, new)
    for p in base.parameters():  # embeddings and norms; not base.to(): it refuses a 4-bit model, and would round the rotary frequencies, which stay fp32
        p.data = p.data.to(dtype) if p.is_floating_point() else p.data
    teacher.backbone = base


# ---------------------------------------------------------------------------------------------------------------------
# 3  The student  (paper: "Distill LLM into Servable Student Model")

MATCH_FEATURES = ("bm25", "terms_matched", "text_cosine", "engagement")


class Student(nn.Module):
    """Feed-forward network over a query's and a pin's precomputed embeddings, embedding tables for categories, and match
    features. spec: {"embeddings": {name: D}, "categories": {column: [values]}, "mean", "std": [F], "hidden": [widths], …}."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.sizes = list(spec["embeddings"].values())
        # Row 0 of every table is "unknown": null, or a value not seen when the spec was made.
        self.tables = nn.ModuleList(nn.Embedding(len(values) + 1, spec["category_dim"]) for values in spec["categories"].values())
        self.register_buffer("mean", torch.tensor(spec["mean"], dtype=torch.float32))
        self.register_buffer("std", torch.tensor(spec["std"], dtype=torch.float32))
        widths = [sum(self.sizes) + spec["category_dim"] * len(self.tables) + len(spec["mean"]), *spec["hidden"]]
        layers = []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(spec["dropout"])]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], C))

    def forward(self, embeddings, categories, match):
        """embeddings [B, sum of D] side by side, categories [B, K] int64, match features [B, F] -> logits [B, C]."""
        # Each embedding is brought to mean 0 and variance 1 a row, so that sources of different scale start out equal (our choice).
        parts = [F.layer_norm(e, e.shape[-1:]) for e in embeddings.float().split(self.sizes, dim=1)] if self.sizes else []
        parts += [table(categories[:, k]) for k, table in enumerate(self.tables)]
        parts.append((match - self.mean) / self.std)
        return self.mlp(torch.cat(parts, dim=1))

    def save(self, folder):
        """Writes model.safetensors and features.json (the feature spec with its normalisation)."""
        save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()}, Path(folder) / "model.safetensors")
        write_json(Path(folder) / "features.json", self.spec)

    @classmethod
    def load(cls, folder):
        """The student that 04 wrote, in evaluation mode."""
        student = cls(read_json(Path(folder) / "features.json"))
        student.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return student.eval()


class StudentInputs:
    """Gathers the student's inputs by query and pin index. Embeddings stay memory-mapped: pairs are never widened on disk."""

    def __init__(self, features, spec=None, max_values=1000):
        features = Path(features)
        self.files = {p.name.removesuffix("_embedding.npy"): p for p in sorted(features.glob("*_embedding.npy"))}
        if spec is not None and set(spec["embeddings"]) != set(self.files):
            raise Stop(f"the student was trained on the embeddings {sorted(spec['embeddings'])}, {features} has {sorted(self.files)}: run 04 again with --overwrite")
        self.embeddings = {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in self.files.items()}
        self.categories, self.codes = {}, {}
        for side, file, known in (("query", "queries.parquet", {"query_id", "query", "language"}), ("pin", "pins.parquet", {"pin_id", "image", *FIELDS})):
            for name in (n for n in pq.read_schema(features / file).names if n not in known):
                key, column = f"{side}_{name}", pq.read_table(features / file, columns=[name])[name].cast(pa.string())
                if spec is not None:
                    values = spec["categories"].get(key, [])
                else:  # the most frequent values, ties by name
                    counts = sorted((-c.as_py(), v.as_py()) for v, c in ((x["values"], x["counts"]) for x in column.value_counts()) if v.is_valid)
                    values = [v for _, v in counts[:max_values]]
                self.categories[key] = values
                index = pa.compute.index_in(column, pa.array(values, pa.string()))
                self.codes[key] = (index.fill_null(-1).to_numpy() + 1).astype(np.int64)
        if spec is not None and list(spec["categories"]) != list(self.categories):
            raise Stop(f"the student was trained on the categories {list(spec['categories'])}, {features} has {list(self.categories)}: run 04 again with --overwrite")
        self.dims = {name: array.shape[1] for name, array in self.embeddings.items()}
        self.resident = None

    def to(self, device, share=0.5):
        """On a GPU: moves the embeddings there if they take at most `share` of its free memory; gathering is then done there."""
        if device.type == "cuda" and sum(a.nbytes for a in self.embeddings.values()) < share * torch.cuda.mem_get_info(device)[0]:
            self.resident = {name: torch.from_numpy(np.array(array)).to(device) for name, array in self.embeddings.items()}
        return self

    def gather(self, query_index, pin_index):
        """Row numbers [B] of queries and pins -> embeddings [B, sum of D] and categories [B, K] int64."""
        index = {"query": query_index, "pin": pin_index}
        codes = [code[index[key.split("_")[0]]] for key, code in self.codes.items()]
        codes = torch.from_numpy(np.stack(codes, 1) if codes else np.zeros((len(query_index), 0), np.int64))
        if self.resident is not None:
            device = next(iter(self.resident.values())).device
            index = {side: torch.from_numpy(rows).to(device) for side, rows in index.items()}
            return torch.cat([array[index[name.split("_")[0]]].float() for name, array in self.resident.items()], 1), codes.to(device)
        rows = np.empty((len(query_index), sum(self.dims.values())), dtype=np.float32)
        at = 0
        for name, array in self.embeddings.items():
            rows[:, at:at + self.dims[name]] = array[index[name.split("_")[0]]]
            at += self.dims[name]
        return torch.from_numpy(rows), codes


def in_validation(query_ids, share, salt):
    """Boolean mask [B]: does the query belong to the held-out `share`? By a hash of its id, so that a query never stands on
    both sides and the answer is the same on every machine."""
    hashed = {q: int.from_bytes(hashlib.blake2b(f"{salt}:{q}".encode(), digest_size=8).digest(), "little") / 2**64 for q in set(query_ids)}
    return np.array([hashed[q] < share for q in query_ids], dtype=bool)


# ---------------------------------------------------------------------------------------------------------------------
# 4  Raw tables and their checks  (data/README.md is the contract)

TABLES = {  # table -> required columns, and what each column is cast to (others are kept as they are)
    "pins": (("pin_id",), {"pin_id": "VARCHAR", "title": "VARCHAR", "description": "VARCHAR", "image": "VARCHAR"}),
    "queries": (("query_id", "query"), {"query_id": "VARCHAR", "query": "VARCHAR", "language": "VARCHAR", "interest": "VARCHAR", "shopping_interest": "VARCHAR"}),
    "labels": (("query_id", "pin_id", "label"), {"query_id": "VARCHAR", "pin_id": "VARCHAR", "label": "DOUBLE", "split": "VARCHAR"}),
    "impressions": (("query_id", "pin_id"), {"query_id": "VARCHAR", "pin_id": "VARCHAR"}),
    "engagements": (("query", "pin_id", "date", "count"), {"query": "VARCHAR", "pin_id": "VARCHAR", "date": "DATE", "count": "BIGINT"}),
    "boards": (("pin_id", "board_title"), {"pin_id": "VARCHAR", "board_title": "VARCHAR"}),
    "link_visits": (("pin_id", "dwell_seconds"), {"pin_id": "VARCHAR", "link_title": "VARCHAR", "link_description": "VARCHAR", "dwell_seconds": "DOUBLE"}),
}
REQUIRED = ("pins", "queries", "labels", "impressions")


class RawTables:
    """The raw tables of a dataset folder as DuckDB views `raw_NAME`, every column of the contract cast to its type.

    NAME.parquet, NAME.csv, NAME.jsonl, or a folder NAME/ of files of one of these kinds. Logs are never read into memory:
    DuckDB scans them, and spills to `spill` beyond `memory`."""

    def __init__(self, folder, spill, memory="4GB", threads=None):
        self.folder, self.files = Path(folder), {}
        if not self.folder.is_dir():
            raise Stop(f"{folder}: no such dataset folder; make the toy one with: python data/make_toy.py")
        self.db = duckdb.connect(config={"memory_limit": memory, "temp_directory": str(spill), "preserve_insertion_order": True,
                                         **({"threads": threads} if threads else {})})
        with contextlib.suppress(duckdb.InvalidInputException):  # a notebook without ipywidgets: no bar there, and setting it is an error
            self.db.execute("SET enable_progress_bar = false")
        for name in TABLES:
            self._open(name)
        self.name = {name: (files[0].name if files[0].parent == self.folder else f"{name}/") for name, files in self.files.items()}
        for name in self.files:
            self._check_types(name)
        Path(spill).mkdir(parents=True, exist_ok=True)  # DuckDB makes the last folder of a path only

    def has(self, name):
        return name in self.files

    def columns(self, name):
        return [row[0] for row in self.db.execute(f"DESCRIBE raw_{name}").fetchall()]

    def _open(self, name):
        found = [p for p in (self.folder / f"{name}.{kind}" for kind in ("parquet", "csv", "jsonl")) if p.is_file()]
        inside = self.folder / name
        parts = sorted(p for p in inside.iterdir() if p.is_file() and p.suffix in (".parquet", ".csv", ".jsonl")) if inside.is_dir() else []
        if len(found) + bool(parts) > 1:
            raise Stop(f"{self.folder}: the table {name} is there more than once ({', '.join([p.name for p in found] + [name + '/'] * bool(parts))}): keep one")
        files = found or parts
        if not files:
            if name in REQUIRED:
                raise Stop(f"{self.folder / name}.parquet (or .csv, .jsonl, or a folder {name}/): missing; data/README.md says what it holds")
            return
        if len({p.suffix for p in files}) > 1:
            raise Stop(f"{inside}: files of different kinds; a table is of one kind")
        paths = "[" + ", ".join("'" + str(p).replace("'", "''") + "'" for p in files) + "]"
        reader = {".parquet": f"read_parquet({paths}, union_by_name=true)",
                  ".csv": f"read_csv({paths}, header=true, all_varchar=true, union_by_name=true, delim=',', quote='\"', escape='\"', null_padding=false)",
                  ".jsonl": f"{paths}, format='newline_delimited', maximum_object_size=67108864"}[files[0].suffix]
        required, types = TABLES[name]
        try:
            if files[0].suffix == ".jsonl":  # every value as text: DuckDB's own guesses would rewrite a title that looks like a date
                some = "" if name in ("pins", "queries") else "LIMIT 20_000"
                keys = self.db.execute(f"SELECT DISTINCT unnest(json_keys(json)) FROM (SELECT json FROM read_json_objects({reader}) {some})").fetchall()
                present = {row[0] for row in keys}
                columns = ", ".join(f"{quoted(c)}: 'VARCHAR'" for c in sorted(present | set(types)))
                reader = f"read_json({reader}, columns={{{columns}}})"
            self.db.execute(f"CREATE VIEW file_{name} AS SELECT * FROM {reader}")
            if files[0].suffix != ".jsonl":
                present = {row[0] for row in self.db.execute(f"DESCRIBE file_{name}").fetchall()}
        except duckdb.Error as e:
            raise Stop(f"{files[0]}: cannot be read as {files[0].suffix[1:]} ({first_line(e)})") from e
        for column in required:
            if column not in present:
                raise Stop(f"{files[0]}: column {column!r} is missing; it has {', '.join(sorted(present)) or 'none'}")
        cast = [f'TRY_CAST("{c}" AS {t}) AS "{c}"' if c in present else f'CAST(NULL AS {t}) AS "{c}"' for c, t in types.items()]
        extra = [f'CAST({quoted(c)} AS VARCHAR) AS {quoted(c)}' for c in sorted(present - set(types))] if name in ("pins", "queries") else []
        self.db.execute(f"CREATE VIEW raw_{name} AS SELECT {', '.join(cast + extra)} FROM file_{name}")
        self.files[name] = files

    def _check_types(self, name):
        """Required columns: no null, no value that is not of the column's type. Every table: at least one row."""
        required, types = TABLES[name]
        try:
            if self.db.execute(f"SELECT count(*) FROM (SELECT 1 FROM file_{name} LIMIT 1)").fetchall()[0][0] == 0:
                raise Stop(f"{self.name[name]}: the table is empty")
            present = {row[0] for row in self.db.execute(f"DESCRIBE file_{name}").fetchall()}
            for column, kind in types.items():
                if column not in present:
                    continue
                what = {"DOUBLE": "a number", "BIGINT": "a whole number", "DATE": "a date"}.get(kind, "text")
                bad = f'"{column}" IS NOT NULL AND TRY_CAST("{column}" AS {kind}) IS NULL'
                if column in required:
                    bad = f'TRY_CAST("{column}" AS {kind}) IS NULL OR trim(CAST("{column}" AS VARCHAR)) = \'\''
                self.refuse(name, column, f'SELECT "{column}" FROM file_{name} WHERE {bad}', f"empty or not {what}" if column in required else f"not {what}")
        except duckdb.Error as e:
            raise Stop(f"{self.name[name]}: cannot be read ({first_line(e)})") from e

    def refuse(self, name, column, bad_rows, problem):
        """Stop if the query `bad_rows` (its first column is shown) returns any row: file, column, how many, the first of them."""
        rows = self.db.execute(f"SELECT count(*), first(COLUMNS(*)) FROM ({bad_rows})").fetchall()[0]
        if rows[0]:
            first = ", ".join(repr(v)[:80] for v in rows[1:])
            raise Stop(f"{self.name[name]}: column {column!r}: {rows[0]:,} {'row' if rows[0] == 1 else 'rows'} {problem}, the first: {first}")

    def check(self):
        """Everything data/README.md promises that types alone do not. Logs of unlabelled impressions are checked where they are joined."""
        for name, key in (("pins", "pin_id"), ("queries", "query_id")):
            self.refuse(name, key, f"SELECT {key} FROM raw_{name} GROUP BY {key} HAVING count(*) > 1", "with an id that stands more than once")
        self.refuse("labels", "label", "SELECT label FROM raw_labels WHERE label NOT IN (1, 2, 3, 4, 5)", "outside 1, 2, 3, 4, 5")
        self.refuse("labels", "split", "SELECT split FROM raw_labels WHERE split IS NOT NULL AND split NOT IN ('train', 'eval')", "neither 'train' nor 'eval'")
        for name in ("labels", "impressions"):
            for table, key in (("queries", "query_id"), ("pins", "pin_id")):
                self.refuse(name, key, f"SELECT {key} FROM raw_{name} ANTI JOIN raw_{table} USING ({key})", f"with an id that {self.name[table]} does not have")
        self.refuse("labels", "label", "SELECT query_id, pin_id FROM raw_labels GROUP BY ALL HAVING count(DISTINCT label) > 1", "(pairs of query and pin) labelled twice with different labels")
        self.refuse("labels", "label", "SELECT query_id, pin_id FROM raw_labels GROUP BY ALL HAVING count(*) > 1", "(pairs of query and pin) labelled twice")
        self.refuse("labels", "split", "SELECT query_id FROM raw_labels GROUP BY query_id HAVING count(DISTINCT coalesce(split, '')) > 1", "(queries) with labels in more than one split")
        if self.has("engagements"):
            self.refuse("engagements", "count", "SELECT count FROM raw_engagements WHERE count < 0", "below 0")
        if self.has("link_visits"):
            self.refuse("link_visits", "dwell_seconds", "SELECT dwell_seconds FROM raw_link_visits WHERE NOT isfinite(dwell_seconds)", "not finite")


def inside(folder, path):
    """Full path of a file of the dataset, links followed. ValueError if it leads out of the folder, or nowhere."""
    try:
        full = (Path(folder) / path).resolve()
    except (OSError, RuntimeError, ValueError) as e:
        raise ValueError(f"no usable path ({first_line(e)})") from None
    if not full.is_relative_to(Path(folder).resolve()):
        raise ValueError("path leaves the dataset folder")
    return full


# ---------------------------------------------------------------------------------------------------------------------
# 5  Plumbing (may be skipped)


def quoted(name):
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def first_line(error):
    """The first line of an exception's text, without control characters."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return "".join(c for c in text if c.isprintable())[:300]


def parse(parser, presets, argv=None):
    """Strict parsing; a flag not given takes its value from the preset. A default stands in one place: the preset's dict."""
    parser.add_argument("--preset", choices=list(presets), default="toy", help="settings for flags not given (default: toy)")
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "toy", metavar="DIR", help="run directory (default: outputs/toy)")
    parser.add_argument("--overwrite", action="store_true", help="throw away what this stage wrote before and begin anew")
    args = parser.parse_args(argv)
    for name, value in presets[args.preset].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def run(main):
    """Runs a stage's main(); what went wrong becomes one line on stderr and exit status 1."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        main()
    except Stop as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"error: the disk is full ({e.filename or 'while writing'}); earlier results are whole, the same command continues")
        if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            sys.exit(f"error: {e.filename}: cannot be written ({e.strerror})")
        raise
    except (duckdb.OutOfMemoryException, duckdb.IOException) as e:
        sys.exit(f"error: {first_line(e)}")


def quiet():
    """Turns off what libraries print beside the point (load reports, advisories, progress bars)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import logging
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="bitsandbytes|peft|torch.utils.checkpoint")


def pick_device(name):
    """'auto' -> cuda where there is one, else cpu."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def pick_dtype(name, device):
    """'auto' -> bf16 on a GPU and on a CPU with bf16 matrix products in hardware (AVX512-BF16, AMX), else fp32."""
    if name == "auto":
        fast = torch.device(device).type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def remove(path):
    """Removes a folder of intermediate results: renamed first, so that a kill leaves it whole or gone."""
    if Path(path).exists():
        gone = Path(path).with_name(f".{Path(path).name}.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone)


def read_json(path):
    """The value of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def lr_factor(progress, warmup):
    """Learning rate as a share of its peak at `progress` in [0, 1): linear rise over `warmup`, then linear fall to 0."""
    return (progress + 1e-3) / (warmup + 1e-3) if progress < warmup else (1 - progress) / (1 - warmup)


def save_checkpoint(path, model, optimiser, position):
    """Trainable weights, optimiser moments and `position` (a JSON value) in one safetensors file, written whole or not at all."""
    tensors = {f"weight.{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if optimiser is not None:
        for i, p in enumerate(p for g in optimiser.param_groups for p in g["params"]):
            tensors |= {f"optimiser.{i}.{k}": v for k, v in optimiser.state[p].items()}
    with atomic(path) as tmp:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, tmp, metadata={"position": json.dumps(position)})


def load_checkpoint(path, model, optimiser=None):
    """Puts a checkpoint's weights (and moments) in place; returns its position."""
    with safe_open(path, "pt") as f:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.requires_grad:
                    p.copy_(f.get_tensor(f"weight.{n}"))
        if optimiser is not None:
            names = set(f.keys())
            for i, p in enumerate(p for g in optimiser.param_groups for p in g["params"]):
                state = {k: f.get_tensor(f"optimiser.{i}.{k}") for k in ("step", "exp_avg", "exp_avg_sq") if f"optimiser.{i}.{k}" in names}
                optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
        return json.loads(f.metadata()["position"])


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary name beside `path`; renamed when the block ends well, so that `path` is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    yield tmp
    if tmp.is_file():
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
    elif path.is_dir():
        shutil.rmtree(path)
    os.replace(tmp, path)


def write_json(path, value):
    """A value -> a JSON file, written whole or not at all."""
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_parquet(path, columns, **options):
    """A dict of columns, or an Arrow table -> a Parquet file, written whole or not at all."""
    with atomic(path) as tmp:
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), tmp, compression="zstd", **options)


def fingerprint(path):
    """Hash of a file's content, or of a folder's files with their names. Of a file over 256 MiB: its size and 256 evenly spaced MiB."""
    path, digest, sample, block = Path(path), hashlib.blake2b(digest_size=16), 256, 1 << 20
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size};".encode())
        with open(file, "rb") as f:
            for i in range(sample if size > sample * block else -(-size // block)):
                if size > sample * block:
                    f.seek(i * (size - block) // (sample - 1))
                digest.update(f.read(block))
    return digest.hexdigest()


def fingerprint_model(model):
    """Of a model folder: its files. Of a hub id: the name and the commit the hub cache resolved it to."""
    if Path(model).is_dir():
        return fingerprint(model)
    commit = getattr(load_config(str(model)), "_commit_hash", None)
    return f"{model}@{commit}"


def hashed(value):
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


class Stage:
    """A stage's output folder: its lock, its stage.json, and whether there is anything left to do.

    stage.json holds `arguments` and `inputs` (fingerprints); together they are the folder's identity. Started again, a
    finished stage with the same identity is `done`; an unfinished one continues; another identity is refused, naming what
    changed, unless --overwrite. `keep`: names that --overwrite leaves (caches keyed by their own content)."""

    FREE = {"run", "overwrite", "device", "workers", "memory", "batch_tokens", "checkpoint_steps",
            "dry_run", "tokens_per_second", "expect_rows", "expect_tokens", "expect_model"}  # cannot change a result

    def __init__(self, folder, args, inputs, main=True, keep=()):
        self.folder, self.main, self.start = Path(folder), main, time.time()
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items()) if k not in self.FREE}
        given = {k: v for k, v in arguments.items() if v is not False}  # a switch that an earlier version did not have changes nothing while it is off
        self.about = {"stage": Path(sys.argv[0]).name if sys.argv[0].endswith(".py") else self.folder.name, "finished": False,
                      "arguments": arguments, "inputs": inputs, "identity": hashed([given, inputs]), "seed": getattr(args, "seed", None),
                      "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "numpy", "duckdb")}}
        self.done = False
        if not main:  # another process of the same launch holds the lock and has checked
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Stop(f"{self.folder}: another process is at work here; wait for it, or use another --run") from None
        path = self.folder / "stage.json"
        if args.overwrite:
            path.unlink(missing_ok=True)  # first: a folder that is half empty must not count as finished
            for p in self.folder.iterdir():
                if p.name not in {".lock", *keep}:
                    shutil.rmtree(p) if p.is_dir() else p.unlink()
        if path.exists():
            before = read_json(path)
            if before["identity"] != self.about["identity"]:
                changes = [f"{label(k)} was {before[group].get(k, absent)!r}, is {self.about[group].get(k, absent)!r}"
                           for group, absent, label in (("arguments", False, lambda k: "--" + k.replace("_", "-")), ("inputs", None, str))
                           for k in sorted({*before[group], *self.about[group]}) if before[group].get(k, absent) != self.about[group].get(k, absent)]
                raise Stop(f"{self.folder} was made with other settings or inputs ({'; '.join(changes)}); --overwrite makes it anew, another --run keeps both")
            if before["finished"]:
                self.done = True
                print(f"{self.folder}: finished before with the same arguments and inputs, nothing to do (--overwrite makes it anew)")
                return
        for p in self.folder.rglob(".*.tmp"):  # half-written by a killed process
            shutil.rmtree(p) if p.is_dir() else p.unlink()
        write_json(path, self.about)

    def finish(self, **facts):
        """Writes the final stage.json: `facts` are row counts and the like."""
        if self.main:
            write_json(self.folder / "stage.json", {**self.about, **facts, "finished": True, "seconds": round(time.time() - self.start, 1)})
            print(f"wrote {self.folder}  ({time.time() - self.start:.0f} s)")


# The shapes of the paper's teachers as published with their weights, for a plan made where the hub cannot be reached.
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": ("llama", dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                                                 intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192)),
    "google-bert/bert-base-multilingual-cased": ("bert", dict(vocab_size=119547)),  # the rest: BertConfig's defaults
    "google-t5/t5-base": ("t5", dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)),
    "microsoft/deberta-v3-base": ("deberta-v2", dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=128100, type_vocab_size=0,
                                                     relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
                                                     pos_att_type=["p2c", "c2p"], position_biased_input=False)),
}


def plan_flags(parser):
    """The flags of --dry-run. `plan_defaults` of a preset stand in for those not given."""
    group = parser.add_argument_group("plan")
    group.add_argument("--dry-run", action="store_true", help="print parameters, memory, steps and hours, and end: no weights are loaded, nothing is written")
    group.add_argument("--tokens-per-second", type=float, metavar="N", help="speed of one process that the plan reckons with")
    group.add_argument("--expect-rows", type=int, metavar="N", help="rows that the plan reckons with (default: those of RUN/features, or the preset's)")
    group.add_argument("--expect-tokens", type=float, metavar="T", help="mean tokens a row that the plan reckons with")


def plan_config(model):
    """A model's config, and where it is from; of the paper's teachers it is known without the hub."""
    try:
        return load_config(model), "its config"
    except Stop:
        if model not in PUBLISHED:
            raise
        from transformers import AutoConfig

        kind, shape = PUBLISHED[model]
        return AutoConfig.for_model(kind, **shape), "its config cannot be reached: published shape"


def plan_device(args):
    """Device and dtype that the plan is for: with --preset paper a GPU, whether this machine has one or not."""
    device = torch.device("cuda") if args.preset == "paper" and args.device == "auto" else pick_device(args.device)
    return device, pick_dtype(args.precision, device)


def plan_memory(teacher, device, dtype, quantised, tokens, train):
    """[(bytes, what for)] of a process. `teacher`: on the meta device; `tokens`: of a forward pass. Weights are counted, activations estimated."""
    linear = [m for name, m in teacher.backbone.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    packed = sum(m.weight.numel() for m in linear) if quantised else 0
    frozen = sum(p.numel() for p in teacher.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    size, gpu, config = dtype.itemsize, device.type == "cuda", teacher.backbone.config
    terms = [(packed * (0.5 + 1 / 64 + 4 / 64 / 256), "linear layers, NF4: 4 bit, and scales in 8 bit"),
             (size * max(m.weight.numel() for m in linear) if quantised else 0, f"one linear layer, unpacked to {dtype_name(dtype)}"),
             (size * (frozen - packed), f"{'other ' if quantised else ''}frozen weights, {dtype_name(dtype)}"),
             (16 * trained, "trained weights, gradients and both AdamW moments, fp32")]
    if train:
        # 4.7 bytes an input and output element of the linear layers are saved for backward in a Llama with LoRA dropout (counted on a small one); the rest: gradients
        activations = 6 * tokens * sum(m.in_features + m.out_features for m in linear)
        terms += [(size * tokens * config.hidden_size * config.num_hidden_layers, "layer inputs that activation checkpointing keeps"),
                  (activations / config.num_hidden_layers, "one layer, computed again, and its gradients")] if gpu else [(activations, "activations and their gradients")]
    else:
        terms.append((2 * size * tokens * max(m.in_features + m.out_features for m in linear), "activations of one layer"))
    return terms + [(1e9 if gpu else 0, "device context and fragmentation (allowance)")]


def plan_print(args, defaults, model, teacher, memory, rows, rows_from, epochs=None):
    """Prints the plan of 02 or 03. rows: those of the run's features, or None. epochs: None if nothing is trained. Returns the number of rows."""
    if args.expect_rows or rows is None:
        rows, rows_from = (args.expect_rows, "--expect-rows") if args.expect_rows else (defaults["rows"], "this preset's")
    mean, mean_from = (args.expect_tokens, "--expect-tokens") if args.expect_tokens else (defaults["tokens"], "an assumption")
    speed, speed_from = (args.tokens_per_second, "--tokens-per-second") if args.tokens_per_second else (defaults["tokens_per_second"], defaults["source"])
    trainable, every = sum(p.numel() for p in teacher.parameters() if p.requires_grad), sum(p.numel() for p in teacher.parameters())
    tokens = rows * mean * (epochs or 1)
    hours = tokens / speed / 3600
    print("plan; no weights are loaded, nothing is written")
    print(f"model:   {model[0]} ({model[1]}): {every / 1e6:,.1f} M parameters" + (f", {trainable / 1e6:,.1f} M trainable ({100 * trainable / every:.1f} %)" if epochs else ""))
    print(f"memory:  {sum(n for n, _ in memory) / 1e9:.1f} GB a process at its peak (estimate):")
    print("\n".join(f"         {n / 1e9:6.2f} GB  {what}" for n, what in memory if n))
    print(f"rows:    {rows:,} ({rows_from}), {mean:g} tokens a row ({mean_from})" + (f", {epochs} epochs" if epochs else "") + f": {tokens / 1e6:,.1f} M tokens")
    print(f"time:    {hours:,.2f} hours in one process, {hours / 8:,.2f} in eight if that scales evenly, at {speed:,.0f} tokens/s a process ({speed_from})")
    return rows


def dtype_name(dtype):
    """torch.bfloat16 -> 'bfloat16'"""
    return str(dtype).removeprefix("torch.")


def start(accelerator, folder, args, inputs):
    """Stage for a stage that may run as several processes: the main one takes the lock and decides for all. None: nothing to do."""
    from accelerate.utils import broadcast_object_list

    stage, verdict = None, ["go"]
    if accelerator.is_main_process:
        try:
            stage = Stage(folder, args, inputs)
            verdict = ["done" if stage.done else "go"]
        except (Stop, OSError) as e:
            stage, verdict = e, ["stopped"]
    broadcast_object_list(verdict)
    if isinstance(stage, Exception):
        raise stage
    if verdict[0] == "stopped":
        sys.exit(1)  # the main process says why
    return None if verdict[0] == "done" else stage or Stage(folder, args, inputs, main=False)


def need(folder, command):
    """stage.json of an earlier stage that must be finished; Stop names the command that makes it."""
    path = Path(folder) / "stage.json"
    if not path.exists() or not (about := read_json(path))["finished"]:
        raise Stop(f"{folder}: missing or unfinished; make it with: python {command}")
    return about
