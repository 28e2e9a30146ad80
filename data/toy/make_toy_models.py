"""Pre-train the toy stand-ins for what a hub gives a real user: Llama, BERT, T5, DeBERTa and one tokenizer;
and BLIP, which make_toy_captioner.py trains. data/toy/README.md says on what, and for what.

    python data/toy/make_toy_models.py                                        # forty minutes on two cores
    python data/toy/make_toy_models.py --only llama --steps 0.01 --out /tmp/models   # to try it

Writes  data/toy/models/NAME: weights in half precision, config, tokenizer
"""

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Literal

import make_toy as toy
import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
import tyro
from make_toy_captioner import make_captioner
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm

PAGES, FRESH_PAGES = 40_000, 1_500
PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FIELDS = ["title:", "description:", "caption:", "queries:", "boards:", "links:"]


# ---------------------------------------------------------------------------------------------------------
# Pages: a heading, then a body that shows the same thing through fields


def any_language(rng):
    return toy.pick(rng, toy.LANGUAGES)


def make_thing(rng):
    """A random object with one value of every property."""
    thing = {"object": toy.pick(rng, list(toy.OBJECTS))}
    for kind in toy.ATTRIBUTES:
        thing[kind] = toy.pick(rng, toy.values_of(kind, thing["object"]))
    return thing


def some_kinds(rng):
    """The object and one to three kinds of properties."""
    return ["object", *rng.choice(toy.ATTRIBUTES, rng.integers(1, 4), replace=False)]


def top_tokens(weighted_texts):
    """The twelve words with the largest weights over (text, weight), as one text."""
    total = Counter()
    for text, weight in weighted_texts:
        for word in re.findall(r"[^\W_]+", text.casefold()):
            total[word] += weight
    return " ".join(word for word, _ in total.most_common(12))


def thing_page(rng):
    """A heading, and the fields that a pin of the same thing has."""
    thing, lang, objects = make_thing(rng), any_language(rng), list(toy.OBJECTS)
    meaning = {kind: thing[kind] for kind in some_kinds(rng)}
    heading = toy.phrase(any_language(rng), meaning, rng)
    # Not used: without it the draws, and so the models, are others.
    toy.word("object", thing["object"], "en", rng)
    events = toy.engagements_of(thing, lang, objects, rng)
    recent = [(text, count) for text, date, count in events if (toy.NEWEST - date).days < 731]
    visits = toy.link_visits_of(thing, lang, objects, rng)
    links = [f"{title} {note or ''}".strip() for title, note, seconds in visits if seconds >= 10]
    fields = [
        toy.title_of(thing, lang, rng),
        toy.description_of(thing, lang, rng),
        f"a {thing['colour']} {thing['object']}" if rng.random() < 0.8 else "",
        top_tokens(recent),
        top_tokens((title, 1) for title in toy.boards_of(thing, lang, rng)),
        " ".join(dict.fromkeys(links)),
    ]
    shown = zip(FIELDS, fields)
    body = [f"{name} {text}" for name, text in shown if text and rng.random() < 0.9]
    return heading, " ".join(body)


def parallel_page(rng):
    """The heading once more or twice, in other words or another language."""
    thing, kinds = make_thing(rng), some_kinds(rng)
    meaning = {kind: value for kind, value in thing.items() if kind in kinds}
    count = rng.choice([1, 2], p=[0.7, 0.3])
    body = []
    for i in sorted(rng.choice(len(FIELDS), count, replace=False)):
        text = toy.phrase(any_language(rng), meaning, rng)
        body += [FIELDS[i], text]
    return toy.phrase(any_language(rng), meaning, rng), " ".join(body)


def list_page(rng):
    """Facts: the words of four languages for one thing, what goes together, what belongs to a family."""

    def word(kind, concept):
        return toy.word(kind, concept, any_language(rng), rng).partition(".")[0]

    chance, obj = rng.random(), toy.pick(rng, list(toy.OBJECTS))
    family = toy.FAMILY_OF[obj]
    if chance < 0.4:
        kind = toy.pick(rng, ["object", *toy.ATTRIBUTES])
        meaning = {kind: make_thing(rng)[kind]}
        heading, *facts = (toy.phrase(lang, meaning, rng) for lang in rng.permutation(toy.LANGUAGES))
    elif chance < 0.75:
        heading = word("object", obj)
        facts = [word("object", other) for other in rng.permutation(sorted(toy.COMPLEMENTS[obj]))]
    else:
        heading = word("object", obj) if rng.random() < 0.5 else word("family", family)
        facts = [word("family", family)]
        members = list(toy.WORLD["objects"][family])
        facts += [word("object", member) for member in rng.choice(members, 4, replace=False)]
    return heading, " ".join(facts)


def make_pages(count, rng):
    """About `count` pages of three kinds, (heading, body); those without a body are left out."""
    kinds = rng.choice([list_page, parallel_page, thing_page], count, p=[0.2, 0.35, 0.45])
    pages = [kind(rng) for kind in kinds]
    return [page for page in pages if page[1]]


# ---------------------------------------------------------------------------------------------------------
# Tokenizer


def concept_words():
    """{word, in all its forms: (kind, concept)} for every word with one meaning."""
    meanings = defaultdict(set)
    for kind in ("object", *toy.ATTRIBUTES):
        for concept, texts in toy.WORDS[kind].items():
            text = re.sub(r"(\w+)\+", r"\1 \1er \1e \1es", " ".join(texts))  # "rot+"
            text = re.sub(r"\.[mfn]\b|/", " ", text)  # "silla.f", "rojo/roja"
            for form in text.casefold().split():
                meanings[form].add((kind, concept))
    return {word: found.pop() for word, found in meanings.items() if len(found) == 1}


def make_tokenizer(pages):
    """Unigram: every word of the world is one token, and any that the pages have twice; anything else falls
    to letters, then to bytes."""
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("ß", "ss")]
    )
    metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    pieces = pre_tokenizers.Split(Regex(r"▁?[\p{L}\p{N}]+:?|▁?[^\p{L}\p{N}▁]"), "isolated")
    splitter = pre_tokenizers.Sequence([metaspace, pieces])
    count = Counter()
    for page in pages:
        text = normalizer.normalize_str(" ".join(page))
        count.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    words = {piece for piece, n in count.items() if n >= 2 and len(piece) > 1}
    words |= {"▁" + normalizer.normalize_str(word) for word in (*concept_words(), *FIELDS)}
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-()/&%+\"▁"}.union(*words))
    scores = dict.fromkeys(SPECIAL, 0.0) | dict.fromkeys((f"<0x{b:02X}>" for b in range(256)), -30.0)
    scores |= dict.fromkeys(letters, -12.0) | dict.fromkeys(sorted(words), -6.0)
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
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=256,
        padding_side="right",
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


# ---------------------------------------------------------------------------------------------------------
# Batches: pages as token ids, some words in another language, some words wrong, some bodies from another page


def token_ids(tokenizer, texts):
    return [np.array(ids, int) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def rows_alike(values):
    """For each row the numbers of the rows that have its value."""
    rows = {value: np.flatnonzero(values == value) for value in np.unique(values)}
    return [rows[value] for value in values]


class Corpus:
    """Pages as token ids, and what each token means, so that words can be swapped quickly."""

    def __init__(self, pages, tokenizer):
        self.vocab = len(tokenizer)
        self.heads, self.bodies = (token_ids(tokenizer, [*texts]) for texts in zip(*pages))
        lengths = [len(head) + len(body) for head, body in zip(self.heads, self.bodies)]
        self.length = np.array(lengths)
        kinds, concepts = np.full((2, self.vocab), "", object)
        for word, (kind, concept) in concept_words().items():
            token = token_ids(tokenizer, [word])[0][0]
            kinds[token], concepts[token] = kind, f"{kind} {concept}"
        self.concept = np.unique(concepts, return_inverse=True)[1]  # 0: means nothing in particular
        self.same_concept = rows_alike(concepts)
        self.same_kind = rows_alike(kinds)
        objects = np.where(kinds == "object", self.concept, 0)
        first = [next(filter(None, objects[head]), 0) for head in self.heads]
        self.same_object = rows_alike(np.array(first))  # pages whose heading names the same object

    def swap(self, ids, share, table, rng):
        """Replace a share of the meaningful words by one from `table`: same_concept or same_kind."""
        out = ids.copy()
        swapped = (self.concept[ids] > 0) & (rng.random(len(ids)) < share)
        for i in np.flatnonzero(swapped):
            out[i] = toy.pick(rng, table[ids[i]])
        return out

    def word_vectors(self, rng):
        """[V, D] word vectors: the SVD of the positive pointwise mutual information of words on a page."""
        count = np.zeros((self.vocab, self.vocab))
        for page in map(np.concatenate, zip(self.heads, self.bodies)):
            words = np.unique(self.swap(page, 0.7, self.same_concept, rng))
            count[np.ix_(words, words)] += 1
        np.fill_diagonal(count, 0)
        total = count.sum(1) + 1e-9
        lift = count * total.sum() / np.outer(total, total)
        information = np.log(np.maximum(lift, 1))
        left, singular, _ = np.linalg.svd(information)
        return left[:, :D] * np.sqrt(singular[:D])

    def batch(self, rows, rng):
        """ids [B, T]; same [B] page; intact [B, T] 1/0, -1 where not judged."""

        def reworded(ids):
            return self.swap(ids, 0.5, self.same_concept, rng)

        heads, bodies = ([reworded(texts[i]) for i in rows] for texts in (self.heads, self.bodies))
        same = rng.random(len(rows)) >= 0.3
        sequences, intact = [], []
        for row, head, right, own in zip(rows, heads, bodies, same):
            away = self.same_object[row] if rng.random() < 0.5 else rows
            if not own:
                right = reworded(self.bodies[toy.pick(rng, away)])
            shown = right
            if own and rng.random() < 0.5:
                shown = self.swap(right, 0.2, self.same_kind, rng)
            before, after = self.concept[right], self.concept[shown]
            judged = np.where(own & (before > 0), before == after, -1).tolist()
            end = [SEP] if rng.random() < 0.7 else []
            sequences.append([CLS, *head, SEP, *shown, *end])
            intact.append([-1] * (len(head) + 2) + judged + [-1] * len(end))
        return padded(sequences, PAD), torch.from_numpy(same), padded(intact, -1)


def padded(rows, value):
    """Lists of integers -> [B, T], filled up at the right. T: a multiple of four, so that there are few
    different shapes, since oneDNN prepares each one."""
    longest = max(map(len, rows))
    width = longest + -longest % 4
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# ---------------------------------------------------------------------------------------------------------
# Models: what config.json will say

D = 128
SHAPE = {
    "hidden_size": D,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LLAMA = SHAPE | {
    "intermediate_size": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
BERT = SHAPE | {
    "intermediate_size": 384,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DEBERTA = BERT | {
    "relative_attention": True,
    "position_buckets": 32,
    "max_relative_positions": -1,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
T5 = {
    "d_model": D,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 4,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 64,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": PAD,
}
IDS = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}
QUERY_OF = {"k_proj": "q_proj", "k": "q", "key": "query", "key_proj": "query_proj"}


def initialise(model, vectors):
    """Start from word vectors, and with equal query and key maps: every head begins by looking for words
    alike.

    T5 needs more: it does not scale its attention scores, it scales its logits down, and where a head looks
    is learnt from small numbers at first: the others know positions from the beginning."""
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last == "relative_attention_bias":
            nn.init.normal_(module.weight, std=2.0)
        elif isinstance(module, nn.Linear) and last != "lm_head":
            is_output = re.search(r"o_proj|down_proj|output\.dense|\.w?o$", name)
            scale = 0.5 if is_output else 1.0
            if last in ("q", "k"):
                scale = model.config.d_kv**-0.25
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if last in QUERY_OF:
                query = model.get_submodule(f"{parent}.{QUERY_OF[last]}")
                module.weight.data.copy_(query.weight)
    vectors = torch.tensor(vectors, dtype=torch.float32)
    norm = D**0.5 if model.config.model_type == "t5" else 0.5
    size = vectors.norm(dim=1)
    unknown = size < 1e-3
    vectors *= norm / size[~unknown].mean()
    vectors[unknown] = torch.randn(int(unknown.sum()), D) * norm / D**0.5
    model.get_input_embeddings().weight.data.copy_(vectors)


# ---------------------------------------------------------------------------------------------------------
# Objectives: {name: loss} of a batch. aux: the heads that are trained with a model and not saved


def run(model, ids):
    """Hidden states [B, T, D] of token ids [B, T]."""
    return model(input_ids=ids, attention_mask=(ids != PAD).long()).last_hidden_state


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


def llama_loss(model, aux, ids, same, intact):
    """The next word, but no wrong word and no word of another page; what is judged is judged from the left
    alone. The readout is the last token that is no padding."""
    states = run(model.model, ids)
    real = ids != PAD
    told = real & same[:, None] & (intact != 0)
    told = F.pad(told[:, 1:], (0, 1))
    target = ids.roll(-1, 1).masked_fill(~told, -100)
    logits = model.lm_head(states).flatten(0, 1)
    lm = F.cross_entropy(logits.float(), target.flatten())
    readout = states[torch.arange(len(ids)), real.sum(1) - 1]
    return {"lm": lm} | judge(aux, states, readout, same, intact)


def hide(ids, same, intact):
    """Hide words from an encoder, but not the wrong ones, nor those on another's page: ids with [MASK], where
    they stand, and `intact` without them."""
    right = (ids > MASK) & same[:, None] & (intact != 0)
    hidden = right & (torch.rand(ids.shape) < 0.15)
    return ids.masked_fill(hidden, MASK), hidden, intact.masked_fill(hidden, -1)


def encoder_loss(model, aux, ids, same, intact):
    shown, hidden, intact = hide(ids, same, intact)
    states = run(model, shown)
    fill = -hidden.sum() % 64  # rows of zeros, not judged: few different shapes
    found = F.pad(states[hidden], (0, 0, 0, fill))
    target = F.pad(ids[hidden], (0, fill), value=-100)
    guess = aux["mlm"](found) @ model.get_input_embeddings().weight.T
    mlm = F.cross_entropy(guess.float(), target)
    readout = model.pooler(states) if getattr(model, "pooler", None) else states[:, 0]
    return {"mlm": mlm} | judge(aux, states, readout, same, intact)


def mean_vector(model, ids):
    """Token ids [B, T] -> mean hidden state of the tokens that are no padding, of length 1 [B, D]."""
    mask = (ids != PAD).long()
    total = (run(model, ids) * mask[..., None]).sum(1).float()
    return F.normalize(total / mask.sum(1, keepdim=True), dim=-1)


def bert_loss(model, aux, ids, same, intact):
    """As an encoder, and as a sentence encoder: a heading lies nearest to its own body (InfoNCE over the
    batch)."""
    heads, bodies = [], []
    for row in ids.tolist():
        body = row.index(SEP) + 1
        heads.append(row[:body])
        bodies.append([CLS, *row[body:]])
    heads, bodies = (mean_vector(model, padded(texts, PAD)) for texts in (heads, bodies))
    near = heads @ bodies.T / 0.05
    own = torch.arange(len(near)).masked_fill(~same, -100)
    pair = (F.cross_entropy(near, own) + F.cross_entropy(near.T, own)) / 2
    return encoder_loss(model, aux, ids, same, intact) | {"pair": pair}


def t5_loss(model, aux, ids, same, intact):
    """The decoder writes the hidden words, in order; the encoder's first token is the readout."""
    shown, hidden, intact = hide(ids, same, intact)
    states = run(model.encoder, shown)
    words = [row[where].tolist() for row, where in zip(ids, hidden)]
    mask = (ids != PAD).long()
    denoise = model(encoder_outputs=(states,), attention_mask=mask, labels=padded(words, -100)).loss
    return {"denoise": denoise} | judge(aux, states, states[:, 0], same, intact)


MODELS = {  # class, shape, loss, steps
    "llama": (hf.LlamaForCausalLM, LLAMA, llama_loss, 2000),
    "bert": (hf.BertModel, BERT, bert_loss, 1500),
    "t5": (hf.T5ForConditionalGeneration, T5, t5_loss, 3000),
    "deberta": (hf.DebertaV2Model, DEBERTA, encoder_loss, 2000),
}


# ---------------------------------------------------------------------------------------------------------
# Training


def batches(corpus, steps, rng):
    """Of `steps` batches the rows, about 1,600 tokens each; short pages alone for the first half."""
    queue = []
    for step in range(steps):
        if not queue:
            longest = 14 if step < steps / 2 else 99
            order = rng.permutation(np.flatnonzero(corpus.length <= longest))[:6000]
            order = order[np.argsort(corpus.length[order], kind="stable")]
            chunks = []
            while len(order) >= 160:
                fitting = int(1600 / (corpus.length[order[-1]] + 3))
                size = max(16, fitting // 16 * 16)  # rows in sixteens
                chunks.append(order[-size:])
                order = order[:-size]
            queue = toy.shuffled(chunks, rng)
        yield queue.pop()


def pretrain(model, loss_of, corpus, steps):
    """Trains a model in place, and the heads it is asked with, which are returned. T5's queries and keys,
    with their smaller weights and larger scores, have a fifth of the learning rate."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rtd = nn.Linear(D, 1)
    page = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 2))
    mlm = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D))
    aux = nn.ModuleDict({"rtd": rtd, "page": page, "mlm": mlm})
    weights, of_rate = [*model.parameters(), *aux.parameters()], defaultdict(list)
    for name, weight in (*model.named_parameters(), *aux.named_parameters()):
        rate = 0.2 * 3e-3 if re.search(r"Attention\.[qk]\.", name) else 3e-3
        of_rate[rate].append(weight)
    groups = [{"params": params, "rate": rate} for rate, params in of_rate.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05, betas=(0.9, 0.98))
    model.set_attn_implementation("eager")  # 1.6 times as fast on a CPU at this length
    model.train()
    bar = tqdm(batches(corpus, steps, rng), total=steps, mininterval=1)
    for step, rows in enumerate(bar):
        warmup, decay = min(1, (step + 1) / 100), max(0.02, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * warmup * decay
        with torch.autocast("cpu", torch.bfloat16):
            losses = loss_of(model, aux, *corpus.batch(rows, rng))
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix({name: loss.item() for name, loss in losses.items()}, refresh=False)
    model.eval()
    return aux


def make_language_models(names, out, share):
    """Trains and saves models, with a share of their steps."""
    rng = np.random.default_rng(0)
    pages, fresh = make_pages(PAGES, rng), make_pages(FRESH_PAGES, rng)
    tokenizer = make_tokenizer(pages)
    corpus = Corpus(pages, tokenizer)
    vectors = corpus.word_vectors(rng)
    unseen = Corpus(fresh, tokenizer).batch(range(100), rng)
    for name in names:
        model_class, shape, loss_of, steps = MODELS[name]
        torch.manual_seed(0)
        config = model_class.config_class(vocab_size=len(tokenizer), **shape, **IDS)
        model = model_class(config)
        initialise(model, vectors)
        print(f"{name}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")
        aux = pretrain(model, loss_of, corpus, max(1, int(steps * share)))
        with torch.no_grad():
            losses = loss_of(model, aux, *unseen)
        print("on fresh pages:", *(f"{loss} {value:.3f}" for loss, value in losses.items()))
        model.half().save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        print(f"wrote {out / name}")


NAMES = (*MODELS, "blip")


def main(out: Path = toy.HERE / "models", only: tuple[Literal[NAMES], ...] = NAMES, steps: float = 1.0):
    """Pre-train the toy stand-ins.

    Args:
        out: their folder
        only: remake these alone
        steps: factor on numbers of steps; 0.01 tries it
    """
    of_language = [name for name in only if name in MODELS]
    if of_language:
        make_language_models(of_language, out, steps)
    if "blip" in only:
        make_captioner(out / "blip", steps)


if __name__ == "__main__":
    tyro.cli(main)
