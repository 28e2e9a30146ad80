"""The text the teacher reads: token budget, templates, padding, batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import common
from common import FIELDS, PackedRows, PairText, share_budget, token_batches
from helpers import stop_line

lengths = st.lists(st.integers(0, 400), max_size=8)


@pytest.mark.parametrize("wanted,budget,allowed", [
    ([12, 300, 8], 60, [12, 40, 8]), ([5, 5, 5], 60, [5, 5, 5]), ([100, 100, 100], 60, [20, 20, 20]), ([100, 100, 100], 61, [20, 20, 21]), ([7], 3, [3]),
    ([0, 9, 0], 4, [0, 4, 0]), ([10, 10], 0, [0, 0]), ([10, 10], -3, [0, 0]), ([], 10, []), ([40, 30, 2], 32, [15, 15, 2])])
def test_share_budget_by_hand(wanted, budget, allowed):
    assert share_budget(wanted, budget) == allowed


@given(lengths, st.integers(-5, 600))
def test_share_budget(wanted, budget):
    allowed = share_budget(wanted, budget)
    assert sum(allowed) == min(sum(wanted), max(budget, 0))  # never over, and nothing left unused
    assert all(0 <= a <= w for a, w in zip(allowed, wanted))
    cut = [a for a, w in zip(allowed, wanted) if a < w]
    if cut:  # max-min fair: who is cut has as much as anybody, up to the remainder of one division
        assert max(allowed) - min(cut) <= 1
        assert all(a == w for a, w in zip(allowed, wanted) if w < min(cut))


def template(models, kind, fields=FIELDS, max_tokens=64):
    config = common.load_config(str(models[kind]))
    tokenizer = common.load_tokenizer(str(models[kind]), config)
    return tokenizer, PairText(tokenizer, common.backbone_kind(config), fields, max_tokens)


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_token_ids_are_the_tokenizers_own(models, kind):
    tokenizer, text = template(models, kind)
    texts = ["red chair", "a [SEP] b", "", "Ünïcode 椅子 🪑", "word " * 300]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenizer(texts, truncation=True, max_length=4, padding=True)  # leaves its settings behind
    assert text._ids(texts) == expected and max(map(len, expected)) > 200


def pin(**columns):
    return {name: [columns.get(name, "")] for name in FIELDS}


@pytest.mark.parametrize("kind,expected", [
    ("bert", "[CLS] red chair [SEP] title : modern sofa queries : red sofa [SEP]"),
    ("deberta", "[CLS] red chair [SEP] title : modern sofa queries : red sofa [SEP]"),
    ("t5", "red chair </s> title : modern sofa queries : red sofa </s>"),
    ("llama", "<s> red chair \n title : modern sofa queries : red sofa </s>")])
def test_template_of_every_family(models, kind, expected):
    tokenizer, text = template(models, kind)
    ids = text.pair(text.queries(["Red chair"])[0], text.pins(pin(queries="red sofa", title="modern sofa"))[0])
    assert tokenizer.convert_ids_to_tokens(ids) == expected.replace("\n", "LINE").replace(" ", "\x00").replace("LINE", "\n").split("\x00")


def test_fields_can_be_chosen_and_come_in_their_order(models):
    columns = pin(title="modern sofa", description="red", caption="lamp")
    for fields, expected in ((("caption", "title"), "caption : lamp title : modern sofa"), (("description",), "description : red"), (("boards",), "")):
        tokenizer, text = template(models, "bert", fields)
        got = tokenizer.convert_ids_to_tokens(text.pair([], text.pins(columns)[0]))
        assert got == ["[CLS]", "[SEP]", *expected.split(), "[SEP]"]


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_query_is_never_cut_and_a_long_description_leaves_the_caption_alone(models, kind):
    tokenizer, text = template(models, kind, max_tokens=40)
    query = "red chair for modern lamp"
    columns = pin(title="sofa", description="chair " * 500, caption="red lamp", boards="table")
    ids = text.pair(text.queries([query])[0], text.pins(columns)[0])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(ids) == 40
    assert query.split() == tokens[len(text.open):len(text.open) + 5]
    said = " ".join(tokens)
    assert "title : sofa" in said and "caption : red lamp" in said and "boards : table" in said and "description : chair chair" in said
    assert ids[-1] == (tokenizer.sep_token_id if kind in ("bert", "deberta") else tokenizer.eos_token_id)


@given(st.lists(st.integers(0, 90), min_size=6, max_size=6), st.integers(1, 30))
def test_a_pair_never_exceeds_its_length(sizes, query_size):
    text = PairText.__new__(PairText)  # no tokenizer: token ids by hand
    text.open, text.separator, text.close, text.max_tokens = [1], [2], [3], 50
    fields = [[10 + i] * n for i, n in enumerate(sizes) if n]
    ids = text.pair([5] * query_size, fields)
    assert len(ids) == min(50, 3 + query_size + sum(sizes))
    assert ids[:query_size + 2] == [1, *[5] * query_size, 2] and ids[-1] == 3
    body = ids[query_size + 2:-1]
    assert body == sorted(body)  # the fields stay in order
    fair = (50 - 3 - query_size) // len(fields) if fields else 0
    assert all(body.count(f[0]) >= min(len(f), fair) for f in fields)


def test_a_query_that_does_not_fit_stops(models):
    _, text = template(models, "bert", max_tokens=10)
    assert len(text.queries(["chair " * 7])[0]) == 7  # 10 less [CLS], [SEP], [SEP]
    line = stop_line(text.queries, ["red", "chair " * 8])
    assert "8 tokens" in line and "--max-tokens" in line


def test_describe_tells_templates_apart(models):
    about = [template(models, kind, fields, n)[1].describe() for kind, fields, n in (("bert", FIELDS, 64), ("t5", FIELDS, 64), ("llama", FIELDS, 64), ("bert", FIELDS[:2], 64), ("bert", FIELDS, 32))]
    assert all(a != b for i, a in enumerate(about) for b in about[:i])


def test_special_tokens_in_a_users_text_do_not_end_it(models):
    """Text of a user cannot close the pair: what a tokenizer makes of '[SEP]' in it is its own affair, but the pair still has its close."""
    tokenizer, text = template(models, "bert", max_tokens=20)
    ids = text.pair(text.queries(["red [SEP] chair"])[0], text.pins(pin(title="[CLS] " * 50))[0])
    assert len(ids) == 20 and ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@given(rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=9), data=st.data())
def test_packed_rows(side, rows, data):
    packed = PackedRows(iter(rows))
    assert len(packed) == len(rows) and packed.lengths.tolist() == [len(r) for r in rows]
    at = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=12)))
    ids, mask = packed.batch(at, pad_id=0, side=side)  # 0 is a token of the rows as well
    T = max(len(rows[i]) for i in at)
    assert ids.shape == mask.shape == (len(at), T) and ids.dtype == mask.dtype == torch.int64
    for line, m, i in zip(ids.tolist(), mask.tolist(), at):
        pad = [0] * (T - len(rows[i]))
        ones = [1] * len(rows[i])
        assert line == (pad + rows[i] if side == "left" else rows[i] + pad)
        assert m == (pad + ones if side == "left" else ones + pad)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 500), st.booleans())
def test_token_batches(sizes, budget, longest_first):
    sizes = sorted(sizes, reverse=longest_first)
    batches = list(token_batches(sizes, budget))
    assert [row for batch in batches for row in batch] == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(sizes[i] for i in batch) <= budget
    for batch, after in zip(batches, batches[1:]):  # a batch is as large as the budget allows, or half full where the length changes
        full = (len(batch) + 1) * max(sizes[i] for i in [*batch, after[0]]) > budget
        assert full or 2 * len(batch) * max(sizes[i] for i in batch) >= budget and sizes[batch[-1]] != sizes[after[0]]
