"""Pre-train the toy stand-ins for what a hub gives a real user: Llama, BERT, T5, DeBERTa and one
tokenizer."""

import argparse
import collections
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import make_toy as toy  # noqa: E402

PAGES = 40000
SHORT_PAGES = 0.5  # of the steps

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FIELDS = ["title:", "description:", "caption:", "queries:", "boards:", "links:"]


# ---------------------------------------------------------------------------------------------------------
# Pages: a heading, then a body that shows the same thing through fields


def words_of(text):
    """Lower-case words of a text."""
    return re.findall(r"[^\W_]+", text.casefold())


def top_tokens(weighted_texts, count=12):
    """The words with the largest weights over (text, weight), as one text."""
    total = collections.Counter()
    for text, weight in weighted_texts:
        for word in words_of(text):
            total[word] += weight
    return " ".join(word for word, _ in total.most_common(count))


def make_thing(rng):
    """A random object with one value of every property."""
    obj = toy.pick(rng, list(toy.OBJECTS))
    return {
        "object": obj,
        "colour": toy.pick(rng, list(toy.COLOURS)),
        "material": toy.pick(rng, toy.MATERIALS_OF[toy.FAMILY_OF[obj]]),
        "style": toy.pick(rng, list(toy.STYLES)),
        "scene": toy.pick(rng, list(toy.SCENES)),
    }


def thing_page(rng):
    thing, lang = make_thing(rng), toy.pick(rng, toy.LANGUAGES)
    kinds = rng.choice(list(toy.ATTRIBUTES), rng.integers(1, 4), replace=False)
    heading = toy.phrase(
        toy.pick(rng, toy.LANGUAGES), {"object": thing["object"]} | {k: thing[k] for k in kinds}, rng
    )
    name, _ = toy.noun(thing["object"], "en", rng)
    searches = [
        (t, c) for t, ago, c in toy.engagements_of(thing, lang, list(toy.OBJECTS), rng) if ago < toy.TWO_YEARS
    ]
    links = {
        f"{t} {d or ''}".strip(): 0
        for t, d, s in toy.link_visits_of(thing, lang, list(toy.OBJECTS), rng)
        if s >= 10
    }
    fields = [
        toy.title_of(thing, lang, rng),
        toy.description_of(thing, lang, rng),
        f"a {thing['colour']} {thing['object']}" if rng.random() < 0.8 else "",
        top_tokens(searches),
        top_tokens([(t, 1) for t in toy.boards_of(thing, lang, rng)]),
        " ".join(links),
    ]
    body = " ".join(f"{name} {text}" for name, text in zip(FIELDS, fields) if text and rng.random() < 0.9)
    return heading, body


def parallel_page(rng):
    """The heading once more or twice, in other words or another language."""
    thing = make_thing(rng)
    kinds = rng.choice(list(toy.ATTRIBUTES), rng.integers(1, 4), replace=False)
    meaning = {"object": thing["object"]} | {k: thing[k] for k in toy.ATTRIBUTES if k in kinds}
    names = sorted(rng.choice(len(FIELDS), rng.choice([1, 2], p=[0.7, 0.3]), replace=False))
    body = " ".join(f"{FIELDS[i]} {toy.phrase(toy.pick(rng, toy.LANGUAGES), meaning, rng)}" for i in names)
    return toy.phrase(toy.pick(rng, toy.LANGUAGES), meaning, rng), body


def list_page(rng):
    """Facts: the words of four languages for one thing, what goes together, what belongs to a family."""
    kind = rng.random()
    obj = toy.pick(rng, list(toy.OBJECTS))

    def word(o):
        return toy.noun(o, toy.pick(rng, toy.LANGUAGES), rng)[0]

    if kind < 0.4:
        name = toy.pick(rng, ["object", *toy.ATTRIBUTES])
        thing = make_thing(rng)
        phrases = [toy.phrase(lang, {name: thing[name]}, rng) for lang in rng.permutation(toy.LANGUAGES)]
        return phrases[0], " ".join(phrases[1:])
    if kind < 0.75:
        return word(obj), " ".join(word(o) for o in rng.permutation(sorted(toy.COMPLEMENTS[obj])))
    family = toy.FAMILY_OF[obj]
    members = [o for o in toy.OBJECTS if toy.FAMILY_OF[o] == family]
    heading = (
        word(obj)
        if rng.random() < 0.5
        else toy.plain(toy.FAMILIES, family, toy.pick(rng, toy.LANGUAGES), rng)
    )
    return heading, " ".join(
        [toy.plain(toy.FAMILIES, family, toy.pick(rng, toy.LANGUAGES), rng)]
        + [word(o) for o in rng.choice(members, 4, replace=False)]
    )


def make_pages(count, rng):
    """About `count` pages of three kinds, (heading, body); those without a body are left out."""
    kinds = rng.choice([list_page, parallel_page, thing_page], count, p=[0.2, 0.35, 0.45])
    pages = [kind(rng) for kind in kinds]
    return [page for page in pages if page[1]]


# ---------------------------------------------------------------------------------------------------------
# Tokenizer


def concept_words():
    """{word: (kind, concept)} for every word with one meaning."""
    meanings = collections.defaultdict(set)
    tables = {"object": toy.OBJECTS, **toy.ATTRIBUTES}
    for kind, table in tables.items():
        for concept, by_language in table.items():
            for words in by_language.values():
                for word in words:
                    forms = [word.partition(".")[0]] if kind == "object" else word.split("/")
                    if word.endswith("+"):
                        forms = [word[:-1] + ending for ending in ("", "er", "e", "es")]
                    for form in forms:
                        meanings[form.casefold()].add((kind, concept))
    return {word: m.pop() for word, m in meanings.items() if len(m) == 1}


def make_tokenizer(pages):
    """Unigram: every word of the world is one token, anything else falls to letters, then to bytes."""
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("ß", "ss")]
    )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace("▁", prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"▁?[\p{L}\p{N}]+:?|▁?[^\p{L}\p{N}▁]"), "isolated"),
        ]
    )
    count = collections.Counter()
    for heading, body in pages:
        for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(f"{heading} {body}")):
            count[piece] += 1
    for word in concept_words():
        count["▁" + normalizer.normalize_str(word)] += 2
    for name in FIELDS:
        count["▁" + name] += 2
    words = sorted(w for w, c in count.items() if c >= 2 and len(w) > 1)
    letters = sorted(
        set("abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-()/&%+\"▁") | {c for w in words for c in w}
    )
    vocab = [(s, 0.0) for s in SPECIAL] + [(f"<0x{b:02X}>", -30.0) for b in range(256)]
    vocab += [(c, -12.0) for c in letters] + [(w, -6.0) for w in words]
    tokenizer = Tokenizer(models.Unigram(vocab, UNK, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=256,
        padding_side="right",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )


# ---------------------------------------------------------------------------------------------------------
# Batches: pages as token ids, some words in another language, some words wrong, some bodies from another page


class Corpus:
    """Pages as token ids, and what each token means, so that words can be swapped quickly."""

    def __init__(self, pages, tokenizer, topical=0.5):
        self.heads = [
            np.array(x) for x in tokenizer([h for h, _ in pages], add_special_tokens=False)["input_ids"]
        ]
        self.bodies = [
            np.array(x) for x in tokenizer([b for _, b in pages], add_special_tokens=False)["input_ids"]
        ]
        self.vocab = len(tokenizer)
        self.concept = np.zeros(self.vocab, int)  # 0: means nothing in particular
        self.kind = np.zeros(self.vocab, int)
        concepts, kinds = {}, {}
        for word, (kind, concept) in concept_words().items():
            token = tokenizer(word, add_special_tokens=False)["input_ids"][0]
            self.concept[token] = concepts.setdefault((kind, concept), len(concepts) + 1)
            self.kind[token] = kinds.setdefault(kind, len(kinds) + 1)
        first = np.array([next((self.concept[t] for t in h if self.kind[t] == 1), 0) for h in self.heads])
        where = {c: np.flatnonzero(first == c) for c in set(first)}
        self.neighbours = [where[c] for c in first]
        self.topical = topical
        groups = [np.flatnonzero(self.concept == c) for c in range(len(concepts) + 1)]
        self.same_concept = [groups[c] for c in self.concept]
        self.same_kind = [np.flatnonzero(self.kind == k) for k in self.kind]

    def swap(self, ids, share, table, rng):
        """Replace a share of the meaningful words by one from `table`: same_concept or same_kind."""
        out = ids.copy()
        for i in np.flatnonzero((self.concept[ids] > 0) & (rng.random(len(ids)) < share)):
            out[i] = toy.pick(rng, table[ids[i]])
        return out

    def word_vectors(self, rng, dim=128, swapped=0.7):
        """[V, dim] word vectors: the SVD of the positive pointwise mutual information of words on a page."""
        count = np.zeros((self.vocab, self.vocab))
        for head, body in zip(self.heads, self.bodies):
            words = np.unique(self.swap(np.concatenate([head, body]), swapped, self.same_concept, rng))
            count[np.ix_(words, words)] += 1
        np.fill_diagonal(count, 0)
        total = count.sum(1) + 1e-9
        information = np.log(np.maximum(count * total.sum() / np.outer(total, total), 1))
        left, singular, _ = np.linalg.svd(information)
        return left[:, :dim] * np.sqrt(singular[:dim])

    def batch(self, rows, rng, swapped=0.5, wrong=0.2, apart=0.3):
        """ids, mask [B, T]; body [B, T] marks body tokens; same [B] page; intact [B, T] 1/0, -1 where not
        judged."""
        heads = [self.swap(self.heads[i], swapped, self.same_concept, rng) for i in rows]
        bodies = [self.swap(self.bodies[i], swapped, self.same_concept, rng) for i in rows]
        same = rng.random(len(rows)) >= apart
        seqs, intact, body = [], [], []
        for k in range(len(rows)):
            away = self.neighbours[rows[k]] if rng.random() < self.topical else rows
            right = (
                bodies[k]
                if same[k]
                else self.swap(self.bodies[toy.pick(rng, away)], swapped, self.same_concept, rng)
            )
            shown = self.swap(right, wrong, self.same_kind, rng) if same[k] and rng.random() < 0.5 else right
            judged = np.where(self.concept[right] > 0, self.concept[right] == self.concept[shown], -1)
            end = [SEP] if rng.random() < 0.7 else []
            pre = len(heads[k]) + 2
            seqs.append(np.concatenate([[CLS], heads[k], [SEP], shown, end]))
            intact.append(
                np.concatenate(
                    [np.full(pre, -1), judged if same[k] else np.full(len(shown), -1), [-1] * len(end)]
                )
            )
            body.append(np.arange(len(seqs[-1])) >= pre)
        T = -(-max(map(len, seqs)) // 4) * 4  # few different shapes: oneDNN prepares each one

        def pad(xs, value):
            return torch.from_numpy(
                np.stack([np.pad(x, (0, T - len(x)), constant_values=value) for x in xs]).astype(np.int64)
            )

        return (
            pad(seqs, PAD),
            pad([np.ones(len(s)) for s in seqs], 0),
            pad(body, 0),
            torch.from_numpy(same),
            pad(intact, -1),
        )


# ---------------------------------------------------------------------------------------------------------
# Models: what config.json will say

D = 128
SHAPE = {"hidden_size": D, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256}
IDS = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}


def make_llama(vocab):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            intermediate_size=256,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            **SHAPE,
            **IDS,
        )
    )


def make_bert(vocab):
    return BertModel(
        BertConfig(
            vocab_size=vocab,
            intermediate_size=384,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **SHAPE,
            **IDS,
        )
    )


def make_t5(vocab):
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab,
            d_model=D,
            d_kv=32,
            d_ff=256,
            num_layers=4,
            num_decoder_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=64,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=PAD,
            **IDS,
        )
    )


def make_deberta(vocab):
    return DebertaV2Model(
        DebertaV2Config(
            vocab_size=vocab,
            intermediate_size=384,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            relative_attention=True,
            position_buckets=32,
            max_relative_positions=-1,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
            **SHAPE,
            **IDS,
        )
    )


def initialise(model, vectors):
    """Start from word vectors, and with equal query and key maps: every head begins by looking for words
    alike.

    T5 needs more: it does not scale its attention scores, it scales its logits down, and where a head looks
    is learnt from small numbers at first: the others know positions from the beginning."""
    t5 = model.config.model_type == "t5"
    spread, norm = (model.config.d_kv**-0.25, D**0.5) if t5 else (1.0, 0.5)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and re.search(
            r"proj|dense|query|key|value|SelfAttention\.[qkvo]|EncDecAttention|wi_|wo\.", name
        ):
            scale = 0.5 if re.search(r"o_proj|down_proj|output\.dense|\.o\.|wo\.", name) else 1.0
            scale = spread if re.search(r"\.[qk]\.weight", name) else scale
            nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)
        elif "relative_attention_bias" in name:
            nn.init.normal_(weight, std=2.0)
    parameters = dict(model.named_parameters())
    for name, weight in parameters.items():
        query = re.sub(
            r"key(_proj)?\.weight$", r"query\1.weight", name.replace("k_proj", "q_proj").replace(".k.", ".q.")
        )
        if query != name and query in parameters:
            weight.data.copy_(parameters[query].data)
    vectors = torch.tensor(vectors, dtype=torch.float32)
    size = vectors.norm(dim=1)
    vectors *= norm / size[size > 1e-3].mean()
    vectors[size < 1e-3] = torch.randn(int((size < 1e-3).sum()), D) * norm / D**0.5
    model.get_input_embeddings().weight.data.copy_(vectors)


# ---------------------------------------------------------------------------------------------------------
# Objectives


def at(states, where, ids):
    """Rows of states [B, T, D] at a mask [B, T] and their ids, filled up to a multiple of 64 rows with id
    -100."""
    index = where.flatten().nonzero().squeeze(-1)
    fill = -len(index) % 64
    return (
        states.flatten(0, 1).index_select(0, F.pad(index, (0, fill))),
        F.pad(ids.flatten()[index], (0, fill), value=-100),
    )


def last_token(states, mask):
    """Hidden states [B, T, D] -> the last token that is no padding [B, D]."""
    last = (torch.arange(states.shape[1]) * mask).argmax(1)
    return states.flatten(0, 1).index_select(0, last + torch.arange(len(states)) * states.shape[1])


def judge(aux, states, readout, same, intact):
    """What every model is asked: which words are wrong; is this the heading's page, and is nothing wrong on
    it."""
    judged = intact >= 0
    rtd = F.binary_cross_entropy_with_logits(
        aux["rtd"](states).squeeze(-1).float()[judged], intact[judged].float()
    )
    page, whole = aux["page"](readout).float().unbind(-1)
    page = F.binary_cross_entropy_with_logits(page, same.float())
    whole = F.binary_cross_entropy_with_logits(whole[same], (intact != 0).all(1)[same].float())
    return {"rtd": 2 * rtd, "page": page, "whole": whole}


def llama_loss(model, aux, batch):
    """The next word, but no wrong word and no word of another page; what is judged is judged from the left
    alone."""
    ids, mask, body, same, intact = batch
    states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    told = F.pad(mask[:, 1:].bool() & same[:, None] & (intact[:, 1:] != 0), (0, 1))
    target = ids.roll(-1, 1).masked_fill(~told, -100)
    lm = F.cross_entropy(model.lm_head(states).flatten(0, 1).float(), target.flatten())
    return {"lm": lm} | judge(aux, states, last_token(states, mask), same, intact)


def hide(batch, share=0.15):
    """Hide words from an encoder: ids with [MASK], and where they stand. Not the wrong ones, not on
    another's page."""
    ids, mask, body, same, intact = batch
    hidden = (torch.rand(ids.shape) < share) & (ids > MASK) & same[:, None] & (intact != 0)
    return ids.masked_fill(hidden, MASK), hidden


def encoder_loss(model, aux, batch):
    ids, mask, body, same, intact = batch
    shown, hidden = hide(batch)
    states = model(input_ids=shown, attention_mask=mask).last_hidden_state
    found, target = at(states, hidden, ids)
    mlm = F.cross_entropy((aux["mlm"](found) @ model.get_input_embeddings().weight.T).float(), target)
    readout = model.pooler(states) if getattr(model, "pooler", None) else states[:, 0]
    return {"mlm": mlm} | judge(aux, states, readout, same, intact.masked_fill(hidden, -1))


def mean_vector(model, ids):
    """Token ids [B, T] -> mean of the hidden states over the tokens that are no padding, of length 1 [B,
    D]."""
    mask = (ids != PAD).long()
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return F.normalize((states * mask[..., None]).sum(1).float() / mask.sum(1, keepdim=True), dim=-1)


def bert_loss(model, aux, batch):
    """As an encoder, and as a sentence encoder: a heading lies nearest to its own body (InfoNCE over the
    batch)."""
    ids, mask, body, same, intact = batch
    length = (mask - body).sum(1, keepdim=True)
    heads = ids.masked_fill(body.bool(), PAD)[:, : -(-length.max() // 4) * 4]
    after = torch.arange(ids.shape[1]) + length - 1
    bodies = ids.gather(1, after.clamp(max=ids.shape[1] - 1)).masked_fill(after >= ids.shape[1], PAD)
    bodies[:, 0] = CLS
    near = mean_vector(model, heads) @ mean_vector(model, bodies).T / 0.05
    own = torch.arange(len(near)).masked_fill(~same, -100)
    pair = (F.cross_entropy(near, own) + F.cross_entropy(near.T, own)) / 2
    return encoder_loss(model, aux, batch) | {"pair": pair}


def t5_loss(model, aux, batch):
    """The decoder writes the hidden words, in order; the encoder's first token is the readout."""
    ids, mask, body, same, intact = batch
    shown, hidden = hide(batch)
    states = model.encoder(input_ids=shown, attention_mask=mask).last_hidden_state
    order = (hidden.cumsum(1) - 1)[hidden]
    labels = torch.full((len(ids), max(4, -(-int(hidden.sum(1).max()) // 4) * 4)), -100)
    labels[hidden.nonzero()[:, 0], order] = ids[hidden]
    denoise = model(encoder_outputs=(states,), attention_mask=mask, labels=labels).loss
    return {"denoise": denoise} | judge(aux, states, states[:, 0], same, intact.masked_fill(hidden, -1))


MODELS = {
    "llama": (make_llama, llama_loss, 2000),
    "bert": (make_bert, bert_loss, 1500),
    "t5": (make_t5, t5_loss, 3000),
    "deberta": (make_deberta, encoder_loss, 2000),
}


def pretrain(model, loss_of, corpus, steps, tokens=1600, lr=3e-3, seed=0):
    """AdamW over batches of about `tokens` tokens; short pages alone for the first half. Returns the losses,
    smoothed."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    aux = nn.ModuleDict(
        {
            "rtd": nn.Linear(D, 1),
            "page": nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 2)),
            "mlm": nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D)),
        }
    )
    params = list(model.parameters()) + list(aux.parameters())
    unscaled = [
        p for name, p in model.named_parameters() if re.search(r"Attention\.[qk]\.", name)
    ]  # T5's: smaller weights, larger scores
    groups = [
        {"params": unscaled, "share": 0.2},
        {"params": [p for p in params if all(p is not q for q in unscaled)], "share": 1.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=lr, weight_decay=0.05, betas=(0.9, 0.98)
    )
    length = np.array([len(h) + len(b) for h, b in zip(corpus.heads, corpus.bodies)])
    model.set_attn_implementation(
        "eager"
    )  # 1.6 times as fast as flash attention's backward on a CPU at this length
    model.train()
    queue, start, running = [], time.time(), {}
    for step in range(steps):
        if not queue:
            order = rng.permutation(np.flatnonzero(length <= (14 if step < SHORT_PAGES * steps else 99)))[
                :6000
            ]
            order = order[np.argsort(length[order], kind="stable")]
            chunks = []
            while len(order) >= 160:  # rows in sixteens
                size = max(16, int(tokens / (length[order[-1]] + 3)) // 16 * 16)
                chunks, order = chunks + [order[-size:]], order[:-size]
            queue = [chunks[i] for i in rng.permutation(len(chunks))]
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * lr * min(1, (step + 1) / 100) * max(0.02, 1 - step / steps)
        data = corpus.batch(queue.pop(), rng)
        with torch.autocast("cpu", torch.bfloat16):
            losses = loss_of(model, aux, data)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for k, v in losses.items():
            running[k] = 0.98 * running.get(k, v.item()) + 0.02 * v.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(
                f"  step {step + 1}/{steps}  "
                + "  ".join(f"{k} {v:.3f}" for k, v in running.items())
                + f"  {time.time() - start:.0f} s",
                flush=True,
            )
    model.eval()
    return aux, {k: round(v, 3) for k, v in running.items()} | {"seconds": round(time.time() - start)}


@torch.no_grad()
def check(model, aux, corpus, pages, tokenizer, seed=1):
    """On fresh pages: AUROC of finding wrong words, by kind, and of telling a heading's page from one about
    a like object."""
    rng = np.random.default_rng(seed)
    fresh = Corpus(pages, tokenizer, topical=1.0)
    kinds, right, score, same, page = [], [], [], [], []
    for rows in np.arange(len(pages) // 100 * 100).reshape(-1, 100):
        ids, mask, _, together, intact = fresh.batch(rows, rng)
        run = {"llama": getattr(model, "model", model), "t5": getattr(model, "encoder", model)}
        states = run.get(model.config.model_type, model)(input_ids=ids, attention_mask=mask).last_hidden_state
        readout = last_token(states, mask) if model.config.model_type == "llama" else states[:, 0]
        readout = model.pooler(states) if getattr(model, "pooler", None) else readout
        kinds.append(fresh.kind[ids[intact >= 0]])
        right.append(intact[intact >= 0])
        score.append(aux["rtd"](states[intact >= 0]).squeeze(-1))
        same.append(together)
        page.append(aux["page"](readout)[:, 0])
    kinds, right, score, same, page = map(np.concatenate, (kinds, right, score, same, page))
    names = ["object", *toy.ATTRIBUTES]
    return {
        f"wrong {name}": round(roc_auc_score(right[kinds == k], score[kinds == k]), 3)
        for k, name in enumerate(names, 1)
    } | {"same page": round(roc_auc_score(same, page), 3)}


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    pages, fresh = make_pages(PAGES, rng), make_pages(1500, rng)
    tokenizer = make_tokenizer(pages)
    corpus = Corpus(pages, tokenizer)
    vectors = corpus.word_vectors(rng)
    print(
        f"{len(pages)} pages, {np.mean([len(b) for b in corpus.bodies]):.0f} tokens a body, "
        f"vocabulary {len(tokenizer)}"
    )
    figures_file = args.out / "figures.json"
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    for name in args.only or [*MODELS, "blip"]:
        if name == "blip":
            import make_toy_captioner

            figures[name] = make_toy_captioner.make_captioner(args.out / name, args.seed)
        else:
            make, loss_of, steps = MODELS[name]
            torch.manual_seed(args.seed)
            model = make(len(tokenizer))
            initialise(model, vectors)
            print(f"{name}: {model.num_parameters():,} parameters")
            aux, losses = pretrain(model, loss_of, corpus, max(1, int(steps * args.steps)), seed=args.seed)
            figures[name] = {
                "parameters": model.num_parameters(),
                "losses": losses,
                "auroc": check(model, aux, corpus, fresh, tokenizer),
            }
            model.half().save_pretrained(args.out / name)
            tokenizer.save_pretrained(args.out / name)
        size = sum(f.stat().st_size for f in (args.out / name).iterdir())
        if isinstance(figures[name], dict):
            figures[name]["megabytes"] = round(size / 1e6, 2)
        figures_file.write_text(json.dumps(figures, indent=2, default=str) + "\n")
        print(f"  {figures[name]}\nwrote {args.out / name} ({size / 1e6:.1f} MB)", flush=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "models",
        help="folder of the models (default: data/toy/models)",
    )
    parser.add_argument("--only", nargs="+", choices=[*MODELS, "blip"], help="remake these alone")
    parser.add_argument(
        "--steps", type=float, default=1.0, help="factor on every number of steps; 0.01 tries the script"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
