"""What two or more stages share of the method, and nothing else.

    1  the text of a (query, pin) pair and its tokens    02, 03 (batches also 01)
    2  the teacher, a cross-encoder                      02, 03
    3  the student, a feed-forward network               04, 05

Shape letters used everywhere: B rows, T tokens, C = NUM_LEVELS = 5 levels, D embedding size, F match
features. The paper: Wang et al., 2024, "Improving Pinterest Search Relevance Using Large Language Models"
(arXiv 2410.17152).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lib.levels import CHARACTERS, FIELDS, LEVELS, NUM_LEVELS, RELEVANT, at_least, expected_level, side_of
from lib.models import load_backbone, load_lora
from lib.stages.files import read_json, write_json
from lib.stages.finished import command_of_student, remake
from lib.stages.terminal import Stop, stop_on_error

# ------------------------------------------------------------------------------------------------------------
# 1  The text of a pair and its tokens  (paper: "Pin Text Representations")


def share_budget(lengths, budget):
    """Token allowance of each field when all must fit into `budget`: max-min fair, so that a short field is
    kept whole and only the longest are cut. [12, 300, 8], budget 60 -> [12, 40, 8]."""
    allowed = [0] * len(lengths)
    left = max(budget, 0)
    shortest_first = sorted(range(len(lengths)), key=lengths.__getitem__)
    for rank, field in enumerate(shortest_first):
        allowed[field] = min(lengths[field], left // (len(lengths) - rank))
        left -= allowed[field]
    return allowed


def at_temperature(p, temperature):
    """Probabilities [B, C] -> p^(1/T), normalized: the softmax of the logits divided by T (Hinton et al.,
    2015, section 2; Guo et al., 2017, section 4.2)."""
    return (p.log() / temperature).softmax(dim=1)


class PairText:
    """Turns (query, pin) into the token ids of `[CLS] query [SEP] title: … description: … [SEP]`.

    The query is never cut, unless `cut_queries` says so; the fields share what is left of `max_tokens`
    (share_budget). A tokenizer without [CLS] opens with its beginning-of-text token (Llama) or nothing (T5).
    One without [SEP] separates with end-of-text for an encoder-decoder, as T5 does for sentence pairs, and
    with a line break for a decoder, and both close with end-of-text: the token a decoder is read out at is
    then always the same one (our choice; RepLLaMA, Ma et al., 2023, does so)."""

    def __init__(self, tokenizer, kind, fields, max_tokens, cut_queries=False):
        """cut_queries: a query too long for max_tokens is cut to half of the room; else it is a Stop."""
        self.tokenizer, self.fields, self.max_tokens = tokenizer, tuple(fields), max_tokens
        self.cut_queries = cut_queries
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.open = [] if first is None else [first]
        if tokenizer.sep_token_id is not None:
            self.separator = self.close = [tokenizer.sep_token_id]
        elif kind == "encoder-decoder":
            self.separator = self.close = end
        else:
            self.separator, self.close = tokenizer.encode("\n", add_special_tokens=False), end

    def describe(self):
        """The template's identity, part of every label shard's: a change of it is a change of the labels."""
        parts = {"open": self.open, "separator": self.separator, "close": self.close}
        template = "open query sep (name: text)* close"
        return {"fields": list(self.fields), "max_tokens": self.max_tokens, "template": template, **parts}

    @stop_on_error("the model's tokenizer fails")
    def token_ids(self, texts, chunk=8_192):
        """Token ids of each text. What a user writes never becomes a special token: "[SEP]" in a query is
        brackets and letters. By chunks: a tokenizer's record of a text is much larger than its ids."""
        ids = []
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is not None:
            fast.no_truncation()
            fast.no_padding()
            fast.encode_special_tokens = True
        for start in range(0, len(texts), chunk):
            some = texts[start : start + chunk]
            if fast is not None:
                ids += [record.ids for record in fast.encode_batch_fast(some, add_special_tokens=False)]
            else:
                options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
                ids += self.tokenizer(some, **options)["input_ids"]
        # To some SentencePiece models "</s>" is a piece like any other.
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        for row, tokens in enumerate(ids):
            if not special.isdisjoint(tokens):
                ids[row] = [token for token in tokens if token not in special]
        return ids

    def queries(self, texts):
        """Token ids of each query. Stop if one does not fit, unless queries are cut."""
        ids = self.token_ids(list(texts))
        room = self.max_tokens - len(self.open) - len(self.separator) - len(self.close)
        if room < 2:
            raise Stop(f"--max-tokens {self.max_tokens}: no room for a query between the model's own tokens")
        too_long = [row for row, tokens in enumerate(ids) if len(tokens) > room]
        if too_long and not self.cut_queries:
            first = too_long[0]
            wrong = f"{len(too_long)} of {len(ids)} queries do not fit into {room} tokens, the first has"
            ways = "raise --max-tokens of stage 02, shorten it, or --long-queries cut"
            raise Stop(f"{wrong} {len(ids[first])}: {texts[first][:60]!r}…; {ways}")
        for row in too_long:
            ids[row] = ids[row][: room // 2]
        return ids

    def pins(self, columns):
        """Token ids of every field of every pin: for each pin a list of one list a non-empty field.
        columns: {field: list of texts}."""
        names, texts, owners = self.fields, [], []
        for pin, pin_texts in enumerate(zip(*(columns[name] for name in names))):
            for name, text in zip(names, pin_texts):
                if text:
                    owners.append(pin)
                    texts.append(f"{name}: {text[: self.max_tokens * CHARACTERS]}")
        pins = [[] for _ in range(len(columns[names[0]]))]
        for pin, tokens in zip(owners, self.token_ids(texts)):
            pins[pin].append(tokens)
        return pins

    def pair(self, query, pin):
        """Token ids [T] int32 of one element of queries() and one of pins(); at most max_tokens."""
        ids = self.open + query + self.separator
        room = self.max_tokens - len(ids) - len(self.close)
        lengths = [len(field) for field in pin]
        if sum(lengths) > room:
            pin = [field[:allowed] for field, allowed in zip(pin, share_budget(lengths, room))]
        for field in pin:
            ids = ids + field
        return np.array(ids + self.close, dtype=np.int32)


def pad_rows(rows, pad_id, side="right"):
    """Token ids of B rows (a list of int arrays) -> input_ids [B, T] and attention_mask [B, T], int64."""
    ids = [torch.from_numpy(row).long() for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side)
    return padded, pad_sequence(ones, batch_first=True, padding_value=0, padding_side=side)


def token_batches(lengths, token_budget):
    """Row numbers in batches of at most `token_budget` padded tokens, of at least one row. Sorted `lengths`
    leave hardly any padding: a batch that is half full ends where the length changes."""
    batch, longest = [], 0
    for row, length in enumerate(lengths):
        too_large = max(longest, length) * (len(batch) + 1) > token_budget
        half_full = 2 * longest * len(batch) >= token_budget
        if batch and (too_large or (half_full and length != lengths[row - 1])):
            yield batch
            batch, longest = [], 0
        batch.append(row)
        longest = max(longest, length)
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------------------
# 2  The teacher  (paper: "LLM as Relevance Model")


def pooling(hidden, mask, which):
    """Hidden states [B, T, D] and attention mask [B, T] -> [B, D]: the `first` ([CLS]) or `last` non-padding
    token. Found by the mask, never by token id (pad may equal eos), whatever the padding side."""
    if which == "first":
        position = mask.argmax(dim=1)
    else:
        position = (torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


class Teacher(nn.Module):
    """Cross-encoder: backbone -> first or last token -> fully connected head -> logits of the five levels.

    The head ("several fully connected layers", the paper; two hidden ones of at most 1,024, our choice) is
    built outside the backbone, always fp32, never quantized, and saved in a file of its own."""

    def __init__(self, backbone, kind, dtype=torch.float32, dropout=0.1):
        """dtype: of the backbone's computation; its weights may have another."""
        super().__init__()
        self.backbone, self.kind, self.dtype = backbone, kind, dtype
        self.pooling = "last" if kind == "decoder" else "first"
        text = backbone.config.get_text_config()
        D = getattr(text, "word_embed_proj_dim", None) or text.hidden_size  # of the vectors that come out
        H = min(D, 1024)
        self.head = nn.Sequential(
            nn.Linear(D, H),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(H, H),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(H, NUM_LEVELS),
        ).float()

    def represent(self, input_ids, attention_mask):
        """Token ids and mask [B, T] -> the vectors [B, D] that stand for the pairs."""
        options = {"use_cache": False} if self.kind == "decoder" else {}  # there is no second pass
        device = input_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options)
        return pooling(output.last_hidden_state, attention_mask, self.pooling).float()

    def forward(self, input_ids, attention_mask):
        """Token ids and mask [B, T] -> logits [B, C], fp32."""
        return self.head(self.represent(input_ids, attention_mask))

    @staticmethod
    def loss(logits, level):
        """Point-wise cross-entropy (paper), summed: logits [B, C], levels [B], 0 for level 1 -> scalar."""
        return F.cross_entropy(logits, level, reduction="sum")

    @staticmethod
    def probabilities(logits):
        """Logits [B, C] -> probabilities of the levels [B, C], float64."""
        return logits.double().softmax(dim=1)

    def save(self, folder, about):
        """Writes adapter/ or backbone/, head.safetensors and teacher.json.
        about: model, kind, fields, max_tokens, finetuning, …"""
        folder = Path(folder)
        part = "backbone" if about["finetuning"] == "full" else "adapter"
        for adapter in getattr(self.backbone, "peft_config", {}).values():
            adapter.target_modules = sorted(adapter.target_modules)  # a set: its order changes
        self.backbone.save_pretrained(folder / part)
        (folder / part / "README.md").unlink(missing_ok=True)  # an empty form that peft writes
        head = {name: tensor.float().contiguous().cpu() for name, tensor in self.head.state_dict().items()}
        save_file(head, folder / "head.safetensors")
        write_json(folder / "teacher.json", about)

    @classmethod
    def load(cls, folder, dtype=torch.float32, device="cpu", model=None):
        """The teacher that 02 wrote, in evaluation mode, and its `about`. LoRA is left beside the backbone.
        model: where that is now, if not where it was; a teacher trained in full holds its own."""
        folder = Path(folder)
        about = read_json(folder / "teacher.json")
        if about["finetuning"] == "full":
            backbone = load_backbone(folder / "backbone", dtype, device=device)
        else:
            quantized = about["finetuning"] == "qlora"
            base = load_backbone(model or about["model"], dtype, quantize=quantized, device=device)
            backbone = load_lora(base, folder / "adapter")
        teacher = cls(backbone, about["kind"], dtype)
        teacher.head.load_state_dict(load_file(folder / "head.safetensors"))
        teacher.head.to(device)
        return teacher.eval(), about


def linear_warmup_decay(progress, warmup):
    """Learning rate as a share of its peak at `progress` in [0, 1): linear rise over `warmup`, then linear
    fall to 0. Of teacher and student alike (our choice)."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return (1 - progress) / (1 - warmup)


# ------------------------------------------------------------------------------------------------------------
# 3  The student  (paper: "Distill LLM into Servable Student Model")


class Student(nn.Module):
    """Feed-forward network over a query's and a pin's precomputed embeddings, embedding tables for
    categories, numbers of query and pin, and match features of the pair; plus a linear function of the match
    features (ours: with few rows a network alone is worse than that). Numbers and match features beyond the
    range of those in training count as its end. spec: {"embeddings": {name: D}, "categories": {column:
    [values]}, "category_dim", "numbers": {column: [mean, std, low, high]}, "match": [names], "mean" [F],
    "std" [F], "low" [F], "high" [F], "hidden": [widths], "dropout", "input_dropout"}."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        sizes = spec["embeddings"]
        queries, pins = ([name for name in sizes if side_of(name) == side] for side in ("query", "pin"))
        # Embeddings of a query and of a pin that have the same size.
        self.alike = [(query, pin) for query in queries for pin in pins if sizes[query] == sizes[pin]]
        self.input_dropout = nn.Dropout(spec["input_dropout"])
        tables = []
        for values in spec["categories"].values():
            # Row 0 of every table is "unknown": null, or a value not seen when the spec was made.
            tables.append(nn.Embedding(len(values) + 1, spec["category_dim"]))
        self.tables = nn.ModuleList(tables)
        for name in ("mean", "std", "low", "high"):
            self.register_buffer(name, torch.tensor(spec[name], dtype=torch.float32))
        numbers = torch.tensor([*spec["numbers"].values()], dtype=torch.float32).reshape(-1, 4)
        self.register_buffer("number_moments", numbers)
        self.widths = {**spec["embeddings"]}  # of the parts that forward() puts together
        self.widths |= {f"{pin} * {query}": self.widths[pin] for query, pin in self.alike}
        self.widths |= dict.fromkeys(spec["categories"], spec["category_dim"])
        self.widths |= {**dict.fromkeys(spec["numbers"], 1), "match": len(spec["match"])}
        width, layers = sum(self.widths.values()), []
        for hidden in spec["hidden"]:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(spec["dropout"])]
            width = hidden
        self.mlp = nn.Sequential(*layers, nn.Linear(width, NUM_LEVELS))
        self.linear = nn.Linear(len(spec["match"]), NUM_LEVELS)  # 04 starts it at a regression

    def forward(self, inputs):
        """{name: tensor}: embeddings [B, D], category codes [B] int64, numbers and match features [B] ->
        logits [B, C]. Inputs of the query may have one row: B pins of one query. A number that is not known
        is NaN, and counts as the mean."""
        parts, spec = {}, self.spec
        for name, size in spec["embeddings"].items():
            # To mean 0 and variance 1 a row, so that sources of different scale start out equal (our choice).
            parts[name] = F.layer_norm(inputs[name].float(), (size,))
        # Products say how alike query and pin are, which few rows do not teach a network to compute; dropout
        # keeps it from learning queries by heart (both our choice).
        parts |= {f"{pin} * {query}": parts[query] * parts[pin] for query, pin in self.alike}
        parts = {name: self.input_dropout(part) for name, part in parts.items()}
        for name, table in zip(spec["categories"], self.tables):
            parts[name] = table(inputs[name].clamp(min=0))  # below 0: unknown, as features.json says
        for name, moments in zip(spec["numbers"], self.number_moments):
            parts[name] = normalized(inputs[name], *moments)[:, None]
        match = torch.stack([inputs[name] for name in spec["match"]], dim=1)
        parts["match"] = normalized(match, self.mean, self.std, self.low, self.high)
        hidden = self.first_layer(parts)
        for layer in self.mlp[1:]:
            hidden = layer(hidden)
        return self.linear(parts["match"]) + hidden

    def first_layer(self, parts):
        """{part: [B, width], or of one query [1, width]} -> [B, H]: the sum of parts times weights."""
        first = self.mlp[0]
        weights = dict(zip(self.widths, first.weight.split([*self.widths.values()], dim=1)))
        folded = {}
        for query, pin in self.alike:
            if len(parts[query]) == 1 and not self.training:
                # (p * q) W is p (diag(q) W): for one query and B pins half of the work.
                weights[pin] = weights[pin] + parts[query] * weights[f"{pin} * {query}"]
                del parts[f"{pin} * {query}"]
                folded[pin] = [pin]
        of_query = [name for name in parts if side_of(name) == "query"]
        others = [name for name in parts if name not in (*of_query, *folded)]
        hidden = first.bias
        for names in (of_query, others, *folded.values()):
            if names:
                part, weight = (torch.cat([of[name] for name in names], dim=1) for of in (parts, weights))
                hidden = hidden + part @ weight.T
        return hidden

    def save(self, folder):
        """Writes model.safetensors and features.json (the feature spec with its normalization)."""
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        save_file(weights, Path(folder) / "model.safetensors")
        write_json(Path(folder) / "features.json", self.spec)

    @classmethod
    def load(cls, folder):
        """The student that 04 wrote, in evaluation mode."""
        try:
            student = cls(read_json(Path(folder) / "features.json"))
            student.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            folder = Path(folder)
            how = remake(folder, command_of_student(folder))
            raise Stop(f"{folder}: no student of this version; {how}") from error
        return student.eval()


def normalized(values, mean, std, low, high):
    """Numbers, within `low` to `high` -> mean 0 and variance 1; NaN, not known -> 0, the mean."""
    return ((torch.minimum(torch.maximum(values, low), high) - mean) / std).nan_to_num()
