"""Pre-train the toy stand-ins for what a hub gives a real user: Llama, BERT, T5, DeBERTa and one tokenizer;
and BLIP, which make_toy_captioner.py trains. data/toy/README.md says on what, and for what.

    python data/toy/make_toy_models.py                                        # forty minutes on two cores
    python data/toy/make_toy_models.py --only llama --steps 0.01 --out /tmp/models   # to try it

Writes  data/toy/models/NAME: weights in half precision, config, tokenizer; and figures.json
"""

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from sklearn.metrics import roc_auc_score
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import make_toy as toy  # noqa: E402
from make_toy_captioner import make_captioner  # noqa: E402

PAGES, FRESH_PAGES = 40_000, 1_500
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
    total = Counter()
    for text, weight in weighted_texts:
        for word in words_of(text):
            total[word] += weight
    return " ".join(word for word, _ in total.most_common(count))


def any_language(rng):
    return toy.pick(rng, toy.LANGUAGES)


def make_thing(rng):
    """A random object with one value of every property."""
    thing = {"object": toy.pick(rng, list(toy.OBJECTS))}
    for kind in toy.ATTRIBUTES:
        thing[kind] = toy.pick(rng, toy.values_of(kind, thing["object"]))
    return thing


def some_kinds(rng):
    """One to three kinds of properties."""
    return rng.choice(list(toy.ATTRIBUTES), rng.integers(1, 4), replace=False)


def thing_page(rng):
    """A heading, and the fields that a pin of the same thing has."""
    thing, lang, objects = make_thing(rng), any_language(rng), list(toy.OBJECTS)
    kinds = ["object", *some_kinds(rng)]
    heading = toy.phrase(any_language(rng), {kind: thing[kind] for kind in kinds}, rng)
    toy.noun(thing["object"], "en", rng)  # not used: without it the draws, and so the models, are others
    events = toy.engagements_of(thing, lang, objects, rng)
    links = {}
    for title, note, seconds in toy.link_visits_of(thing, lang, objects, rng):
        if seconds >= 10:
            links[f"{title} {note or ''}".strip()] = 0
    fields = [
        toy.title_of(thing, lang, rng),
        toy.description_of(thing, lang, rng),
        f"a {thing['colour']} {thing['object']}" if rng.random() < 0.8 else "",
        top_tokens([(text, count) for text, ago, count in events if ago < toy.TWO_YEARS]),
        top_tokens([(title, 1) for title in toy.boards_of(thing, lang, rng)]),
        " ".join(links),
    ]
    body = " ".join(f"{name} {text}" for name, text in zip(FIELDS, fields) if text and rng.random() < 0.9)
    return heading, body


def parallel_page(rng):
    """The heading once more or twice, in other words or another language."""
    thing = make_thing(rng)
    kinds = some_kinds(rng)
    meaning = {kind: value for kind, value in thing.items() if kind == "object" or kind in kinds}
    count = rng.choice([1, 2], p=[0.7, 0.3])
    body = []
    for i in sorted(rng.choice(len(FIELDS), count, replace=False)):
        text = toy.phrase(any_language(rng), meaning, rng)
        body.append(f"{FIELDS[i]} {text}")
    return toy.phrase(any_language(rng), meaning, rng), " ".join(body)


def list_page(rng):
    """Facts: the words of four languages for one thing, what goes together, what belongs to a family."""

    def word(obj):
        return toy.noun(obj, any_language(rng), rng)[0]

    def family_word():
        return toy.plain(toy.FAMILIES, family, any_language(rng), rng)

    kind = rng.random()
    obj = toy.pick(rng, list(toy.OBJECTS))
    if kind < 0.4:
        name = toy.pick(rng, ["object", *toy.ATTRIBUTES])
        thing = make_thing(rng)
        phrases = [toy.phrase(lang, {name: thing[name]}, rng) for lang in rng.permutation(toy.LANGUAGES)]
        return phrases[0], " ".join(phrases[1:])
    if kind < 0.75:
        return word(obj), " ".join(word(o) for o in rng.permutation(sorted(toy.COMPLEMENTS[obj])))
    family = toy.FAMILY_OF[obj]
    members = [o for o in toy.OBJECTS if toy.FAMILY_OF[o] == family]
    heading = word(obj) if rng.random() < 0.5 else family_word()
    facts = [family_word()]
    facts += [word(o) for o in rng.choice(members, 4, replace=False)]
    return heading, " ".join(facts)


def make_pages(count, rng):
    """About `count` pages of three kinds, (heading, body); those without a body are left out."""
    kinds = rng.choice([list_page, parallel_page, thing_page], count, p=[0.2, 0.35, 0.45])
    pages = [kind(rng) for kind in kinds]
    return [page for page in pages if page[1]]


# ---------------------------------------------------------------------------------------------------------
# Tokenizer


def forms_of(word):
    """A word of world.toml -> how it may be written: "rojo/roja", "rot+"."""
    if word.endswith("+"):
        return [word[:-1] + ending for ending in ("", "er", "e", "es")]
    return re.sub(r"\.[mfn]$", "", word).split("/")


def concept_words():
    """{word: (kind, concept)} for every word with one meaning."""
    meanings = defaultdict(set)
    for kind, table in {"object": toy.OBJECTS, **toy.ATTRIBUTES}.items():
        for concept, by_language in table.items():
            for word in sum(by_language.values(), []):
                for form in forms_of(word):
                    meanings[form.casefold()].add((kind, concept))
    return {word: found.pop() for word, found in meanings.items() if len(found) == 1}


def count_pieces(pages, normalizer, splitter):
    """How often each word of the pages stands there, as the tokenizer cuts them; every word of the world and
    every field's name at least twice."""
    count = Counter()
    for page in pages:
        for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(" ".join(page))):
            count[piece] += 1
    for word in concept_words():
        count["▁" + normalizer.normalize_str(word)] += 2
    for name in FIELDS:
        count["▁" + name] += 2
    return count


def make_tokenizer(pages):
    """Unigram: every word of the world is one token, anything else falls to letters, then to bytes."""
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("ß", "ss")]
    )
    metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    pieces = pre_tokenizers.Split(Regex(r"▁?[\p{L}\p{N}]+:?|▁?[^\p{L}\p{N}▁]"), "isolated")
    splitter = pre_tokenizers.Sequence([metaspace, pieces])
    count = count_pieces(pages, normalizer, splitter)
    words = sorted(word for word, n in count.items() if n >= 2 and len(word) > 1)
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-()/&%+\"▁"}.union(*words))
    scores = dict.fromkeys(SPECIAL, 0.0) | dict.fromkeys((f"<0x{b:02X}>" for b in range(256)), -30.0)
    scores |= dict.fromkeys(letters, -12.0) | dict.fromkeys(words, -6.0)
    tokenizer = Tokenizer(models.Unigram([*scores.items()], UNK, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=256,
        padding_side="right",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


# ---------------------------------------------------------------------------------------------------------
# Batches: pages as token ids, some words in another language, some words wrong, some bodies from another page


def token_ids(tokenizer, texts):
    return [np.array(ids, int) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def rows_alike(values):
    """For each row the numbers of the rows that have its value."""
    values = np.array(values)
    rows = {value: np.flatnonzero(values == value) for value in set(values.tolist())}
    return [rows[value] for value in values.tolist()]


class Corpus:
    """Pages as token ids, and what each token means, so that words can be swapped quickly."""

    def __init__(self, pages, tokenizer, topical=0.5):
        self.vocab = len(tokenizer)
        self.topical = topical  # share of the wrong bodies whose page has a heading of the same object
        self.heads = token_ids(tokenizer, [heading for heading, _ in pages])
        self.bodies = token_ids(tokenizer, [body for _, body in pages])
        lengths = [len(head) + len(body) for head, body in zip(self.heads, self.bodies)]
        self.length = np.array(lengths)
        self.concept = np.zeros(self.vocab, int)  # of a token; 0: means nothing in particular
        self.kind = np.zeros(self.vocab, int)
        numbers, kinds = {}, ["", "object", *toy.ATTRIBUTES]
        for word, meaning in concept_words().items():
            token = token_ids(tokenizer, [word])[0][0]
            self.concept[token] = numbers.setdefault(meaning, len(numbers) + 1)
            self.kind[token] = kinds.index(meaning[0])
        self.same_concept = rows_alike(self.concept)
        self.same_kind = rows_alike(self.kind)
        self.neighbours = rows_alike([self.object_of(head) for head in self.heads])

    def object_of(self, head):
        """The concept of a heading's first object, 0 if it has none."""
        objects = head[self.kind[head] == 1]
        return self.concept[objects[0]] if len(objects) else 0

    def swap(self, ids, share, table, rng):
        """Replace a share of the meaningful words by one from `table`: same_concept or same_kind."""
        out = ids.copy()
        swapped = (self.concept[ids] > 0) & (rng.random(len(ids)) < share)
        for i in np.flatnonzero(swapped):
            out[i] = toy.pick(rng, table[ids[i]])
        return out

    def word_vectors(self, rng, dim=128, swapped=0.7):
        """[V, dim] word vectors: the SVD of the positive pointwise mutual information of words on a page."""
        count = np.zeros((self.vocab, self.vocab))
        for head, body in zip(self.heads, self.bodies):
            page = np.concatenate([head, body])
            words = np.unique(self.swap(page, swapped, self.same_concept, rng))
            count[np.ix_(words, words)] += 1
        np.fill_diagonal(count, 0)
        total = count.sum(1) + 1e-9
        lift = count * total.sum() / np.outer(total, total)
        information = np.log(np.maximum(lift, 1))
        left, singular, _ = np.linalg.svd(information)
        return left[:, :dim] * np.sqrt(singular[:dim])

    def batch(self, rows, rng, swapped=0.5, wrong=0.2, apart=0.3):
        """ids, mask [B, T]; same [B] page; intact [B, T] 1/0, -1 where not judged."""

        def reworded(ids):
            return self.swap(ids, swapped, self.same_concept, rng)

        heads = [reworded(self.heads[i]) for i in rows]
        bodies = [reworded(self.bodies[i]) for i in rows]
        same = rng.random(len(rows)) >= apart
        sequences, intact = [], []
        for row, head, right, own in zip(rows, heads, bodies, same):
            away = self.neighbours[row] if rng.random() < self.topical else rows
            if not own:
                right = reworded(self.bodies[toy.pick(rng, away)])
            shown = right
            if own and rng.random() < 0.5:
                shown = self.swap(right, wrong, self.same_kind, rng)
            is_judged = own & (self.concept[right] > 0)
            judged = np.where(is_judged, self.concept[right] == self.concept[shown], -1)
            sequence = [CLS, *head, SEP, *shown]
            judged = [-1] * (len(head) + 2) + judged.tolist()
            if rng.random() < 0.7:
                sequence.append(SEP)
                judged.append(-1)
            sequences.append(sequence)
            intact.append(judged)
        ids = padded(sequences, PAD)
        mask = padded([[1] * len(sequence) for sequence in sequences], 0)
        return ids, mask, torch.from_numpy(same), padded(intact, -1)


def padded(rows, value):
    """Lists of integers -> [B, T], filled up at the right."""
    width = in_fours(max(map(len, rows)))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def in_fours(length):
    """The next multiple of four: few different shapes, since oneDNN prepares each one."""
    return -(-length // 4) * 4


# ---------------------------------------------------------------------------------------------------------
# Models: what config.json will say

D = 128
SHAPE = {"hidden_size": D, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256}
LLAMA = SHAPE | {"intermediate_size": 256, "num_key_value_heads": 4, "tie_word_embeddings": True}
LLAMA |= {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
BERT = SHAPE | {"intermediate_size": 384, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {"d_model": D, "d_kv": 32, "d_ff": 256, "num_layers": 4, "num_decoder_layers": 1, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 64, "dropout_rate": 0.0}
T5 |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": PAD}
DEBERTA = BERT | {"relative_attention": True, "position_buckets": 32, "max_relative_positions": -1}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm"}
DEBERTA |= {"position_biased_input": False, "type_vocab_size": 0}
IDS = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}


def initialise(model, vectors):
    """Start from word vectors, and with equal query and key maps: every head begins by looking for words
    alike.

    T5 needs more: it does not scale its attention scores, it scales its logits down, and where a head looks
    is learnt from small numbers at first: the others know positions from the beginning."""
    spread, norm = 1.0, 0.5
    if model.config.model_type == "t5":
        spread, norm = model.config.d_kv**-0.25, D**0.5
    linear = r"proj|dense|query|key|value|SelfAttention\.[qkvo]|EncDecAttention|wi_|wo\."
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and re.search(linear, name):
            scale = 0.5 if re.search(r"o_proj|down_proj|output\.dense|\.o\.|wo\.", name) else 1.0
            scale = spread if re.search(r"\.[qk]\.weight", name) else scale
            nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)
        elif "relative_attention_bias" in name:
            nn.init.normal_(weight, std=2.0)
    parameters = dict(model.named_parameters())
    for name, weight in parameters.items():
        query = name.replace("k_proj", "q_proj").replace(".k.", ".q.")
        query = re.sub(r"key(_proj)?\.weight$", r"query\1.weight", query)
        if query != name and query in parameters:
            weight.data.copy_(parameters[query].data)
    vectors = torch.tensor(vectors, dtype=torch.float32)
    size = vectors.norm(dim=1)
    unknown = size < 1e-3
    vectors *= norm / size[~unknown].mean()
    vectors[unknown] = torch.randn(int(unknown.sum()), D) * norm / D**0.5
    model.get_input_embeddings().weight.data.copy_(vectors)


# ---------------------------------------------------------------------------------------------------------
# Objectives


def at(states, where, ids):
    """Rows of states [B, T, D] at a mask [B, T] and their ids, filled up to a multiple of 64 rows with id
    -100."""
    index = where.flatten().nonzero().squeeze(-1)
    target = ids.flatten()[index]
    fill = (0, -len(index) % 64)
    found = states.flatten(0, 1).index_select(0, F.pad(index, fill))
    return found, F.pad(target, fill, value=-100)


def last_token(states, mask):
    """Hidden states [B, T, D] -> the last token that is no padding [B, D]."""
    rows, tokens = mask.shape
    last = (torch.arange(tokens) * mask).argmax(1)
    return states.flatten(0, 1).index_select(0, last + torch.arange(rows) * tokens)


def judge(aux, states, readout, same, intact):
    """What every model is asked: which words are wrong; is this the heading's page, and is nothing wrong on
    it."""
    judged = intact >= 0
    replaced = aux["rtd"](states).squeeze(-1).float()[judged]
    page, whole = aux["page"](readout).float().unbind(-1)
    nothing_wrong = (intact != 0).all(1)
    return {
        "rtd": 2 * F.binary_cross_entropy_with_logits(replaced, intact[judged].float()),
        "page": F.binary_cross_entropy_with_logits(page, same.float()),
        "whole": F.binary_cross_entropy_with_logits(whole[same], nothing_wrong[same].float()),
    }


def llama_loss(model, aux, batch):
    """The next word, but no wrong word and no word of another page; what is judged is judged from the left
    alone."""
    ids, mask, same, intact = batch
    states = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    told = mask.bool() & same[:, None] & (intact != 0)
    told = F.pad(told[:, 1:], (0, 1))
    target = ids.roll(-1, 1).masked_fill(~told, -100)
    logits = model.lm_head(states).flatten(0, 1)
    lm = F.cross_entropy(logits.float(), target.flatten())
    return {"lm": lm} | judge(aux, states, last_token(states, mask), same, intact)


def hide(batch, share=0.15):
    """Hide words from an encoder: ids with [MASK], and where they stand. Not the wrong ones, not on
    another's page."""
    ids, mask, same, intact = batch
    right = (ids > MASK) & same[:, None] & (intact != 0)
    hidden = right & (torch.rand(ids.shape) < share)
    return ids.masked_fill(hidden, MASK), hidden


def encoder_loss(model, aux, batch):
    ids, mask, same, intact = batch
    shown, hidden = hide(batch)
    states = model(input_ids=shown, attention_mask=mask).last_hidden_state
    found, target = at(states, hidden, ids)
    logits = aux["mlm"](found) @ model.get_input_embeddings().weight.T
    mlm = F.cross_entropy(logits.float(), target)
    readout = model.pooler(states) if getattr(model, "pooler", None) else states[:, 0]
    intact = intact.masked_fill(hidden, -1)
    return {"mlm": mlm} | judge(aux, states, readout, same, intact)


def mean_vector(model, ids):
    """Token ids [B, T] -> mean of the hidden states over the tokens that are no padding, of length 1 [B,
    D]."""
    mask = (ids != PAD).long()
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    total = (states * mask[..., None]).sum(1).float()
    return F.normalize(total / mask.sum(1, keepdim=True), dim=-1)


def bert_loss(model, aux, batch):
    """As an encoder, and as a sentence encoder: a heading lies nearest to its own body (InfoNCE over the
    batch)."""
    ids, mask, same, intact = batch
    width = ids.shape[1]
    place = torch.arange(width)
    end = (ids == SEP).int().argmax(1, keepdim=True)  # of the heading
    heads = ids.masked_fill(place > end, PAD)[:, : in_fours(int(end.max()) + 1)]
    after = place + end
    bodies = ids.gather(1, after.clamp(max=width - 1)).masked_fill(after >= width, PAD)
    bodies[:, 0] = CLS
    cosine = mean_vector(model, heads) @ mean_vector(model, bodies).T
    near = cosine / 0.05
    own = torch.arange(len(near)).masked_fill(~same, -100)
    of_heads, of_bodies = F.cross_entropy(near, own), F.cross_entropy(near.T, own)
    return encoder_loss(model, aux, batch) | {"pair": (of_heads + of_bodies) / 2}


def t5_loss(model, aux, batch):
    """The decoder writes the hidden words, in order; the encoder's first token is the readout."""
    ids, mask, same, intact = batch
    shown, hidden = hide(batch)
    states = model.encoder(input_ids=shown, attention_mask=mask).last_hidden_state
    order = (hidden.cumsum(1) - 1)[hidden]
    width = max(4, in_fours(int(hidden.sum(1).max())))
    labels = torch.full((len(ids), width), -100)
    labels[hidden.nonzero()[:, 0], order] = ids[hidden]
    denoise = model(encoder_outputs=(states,), attention_mask=mask, labels=labels).loss
    intact = intact.masked_fill(hidden, -1)
    return {"denoise": denoise} | judge(aux, states, states[:, 0], same, intact)


MODELS = {  # class, config, loss, steps
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, LLAMA, llama_loss, 2000),
    "bert": (hf.BertModel, hf.BertConfig, BERT, bert_loss, 1500),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, T5, t5_loss, 3000),
    "deberta": (hf.DebertaV2Model, hf.DebertaV2Config, DEBERTA, encoder_loss, 2000),
}


# ---------------------------------------------------------------------------------------------------------
# Training


def batches(corpus, steps, tokens, rng):
    """Of `steps` batches the rows, about `tokens` tokens each; short pages alone for the first half."""
    queue = []
    for step in range(steps):
        if not queue:
            longest = 14 if step < SHORT_PAGES * steps else 99
            order = rng.permutation(np.flatnonzero(corpus.length <= longest))[:6000]
            order = order[np.argsort(corpus.length[order], kind="stable")]
            chunks = []
            while len(order) >= 160:
                fitting = int(tokens / (corpus.length[order[-1]] + 3))
                size = max(16, fitting // 16 * 16)  # rows in sixteens
                chunks.append(order[-size:])
                order = order[:-size]
            queue = [chunks[i] for i in rng.permutation(len(chunks))]
        yield queue.pop()


def make_optimizer(model, aux, lr):
    """AdamW; each group has its `share` of the learning rate. T5's queries and keys, with their smaller
    weights and larger scores, have a fifth."""
    scores, others = [], []
    for name, weight in (*model.named_parameters(), *aux.named_parameters()):
        group = scores if re.search(r"Attention\.[qk]\.", name) else others
        group.append(weight)
    groups = [{"params": others, "share": 1.0}]
    if scores:
        groups.append({"params": scores, "share": 0.2})
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))


def pretrain(model, loss_of, corpus, steps, tokens=1600, lr=3e-3):
    """Trains a model in place. Returns the heads it was trained with, and the losses, smoothed."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rtd = nn.Linear(D, 1)
    page = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 2))
    mlm = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D))
    aux = nn.ModuleDict({"rtd": rtd, "page": page, "mlm": mlm})
    weights = [*model.parameters(), *aux.parameters()]
    optimizer = make_optimizer(model, aux, lr)
    model.set_attn_implementation("eager")  # 1.6 times as fast on a CPU at this length
    model.train()
    start, running = time.time(), {}
    for step, rows in enumerate(batches(corpus, steps, tokens, rng)):
        warmup, decay = min(1, (step + 1) / 100), max(0.02, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * lr * warmup * decay
        data = corpus.batch(rows, rng)
        with torch.autocast("cpu", torch.bfloat16):
            losses = loss_of(model, aux, data)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in losses.items():
            running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            said = "  ".join(f"{name} {value:.3f}" for name, value in running.items())
            print(f"  step {step + 1}/{steps}  {said}  {time.time() - start:.0f} s", flush=True)
    model.eval()
    figures = {name: round(value, 3) for name, value in running.items()}
    return aux, figures | {"seconds": round(time.time() - start)}


@torch.no_grad()
def check(model, aux, corpus):
    """On fresh pages: AUROC of finding wrong words, by kind, and of telling a heading's page from one about
    a like object."""
    rng = np.random.default_rng(1)
    kind = model.config.model_type
    run = model.model if kind == "llama" else model.encoder if kind == "t5" else model
    found = []
    for rows in np.arange(len(corpus.length) // 100 * 100).reshape(-1, 100):
        ids, mask, together, intact = corpus.batch(rows, rng)
        states = run(input_ids=ids, attention_mask=mask).last_hidden_state
        readout = last_token(states, mask) if kind == "llama" else states[:, 0]
        readout = model.pooler(states) if getattr(model, "pooler", None) else readout
        judged = intact >= 0
        kinds = corpus.kind[ids[judged]]
        score = aux["rtd"](states[judged]).squeeze(-1)
        page = aux["page"](readout)[:, 0]
        found.append((kinds, intact[judged], score, together, page))
    kinds, right, score, same, page = map(np.concatenate, zip(*found))
    auroc = {}
    for number, name in enumerate(["object", *toy.ATTRIBUTES], 1):
        of_kind = kinds == number
        auroc[f"wrong {name}"] = round(roc_auc_score(right[of_kind], score[of_kind]), 3)
    return auroc | {"same page": round(roc_auc_score(same, page), 3)}


def make_language_models(names, args):
    """Trains and saves models; yields the figures of each: (name, figures)."""
    rng = np.random.default_rng(0)
    pages, fresh = make_pages(PAGES, rng), make_pages(FRESH_PAGES, rng)
    tokenizer = make_tokenizer(pages)
    corpus, unseen = Corpus(pages, tokenizer), Corpus(fresh, tokenizer, topical=1.0)
    vectors = corpus.word_vectors(rng)
    average = np.mean([len(body) for body in corpus.bodies])
    print(f"{len(pages)} pages, {average:.0f} tokens a body, vocabulary {len(tokenizer)}")
    for name in names:
        model_class, config, shape, loss_of, steps = MODELS[name]
        torch.manual_seed(0)
        settings = config(vocab_size=len(tokenizer), **shape, **IDS)
        model = model_class(settings)
        initialise(model, vectors)
        size = model.num_parameters()
        print(f"{name}: {size:,} parameters")
        steps = max(1, int(steps * args.steps))
        aux, losses = pretrain(model, loss_of, corpus, steps)
        auroc = check(model, aux, unseen)
        model.half().save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        yield name, {"parameters": size, "losses": losses, "auroc": auroc}


def main(argv=None):
    args = parse_args(argv)
    asked = args.only or [*MODELS, "blip"]
    of_language = [name for name in asked if name in MODELS]
    makers = [make_language_models(of_language, args)] if of_language else []
    if "blip" in asked:
        makers.append(make_captioner(args.out / "blip", args.steps))
    figures_file = args.out / "figures.json"
    figures = json.loads(figures_file.read_text()) if figures_file.exists() else {}
    for name, of_model in itertools.chain(*makers):
        bytes_of_files = [file.stat().st_size for file in (args.out / name).iterdir()]
        figures[name] = of_model | {"megabytes": round(sum(bytes_of_files) / 1e6, 2)}
        figures_file.write_text(json.dumps(figures, indent=2) + "\n")
        print(f"  {figures[name]}\nwrote {args.out / name}", flush=True)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--out", type=Path, default=HERE / "models", help="their folder (data/toy/models)")
    p.add_argument("--only", nargs="+", choices=[*MODELS, "blip"], help="remake these alone")
    p.add_argument("--steps", type=float, default=1.0, help="factor on numbers of steps; 0.01 tries it")
    return p.parse_args(argv)


if __name__ == "__main__":
    main()
