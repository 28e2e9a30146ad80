"""The text the teacher reads: token budget, templates, padding, batches."""

import numpy as np
import pytest
import torch
from helpers import stop_line
from hypothesis import given
from hypothesis import strategies as st

from common import FIELDS, PairText, pad_rows, share_budget, token_batches
from lib.inputs.rows import tokenize_pairs
from lib.models import backbone_kind, load_config, load_tokenizer

KINDS = ["bert", "deberta", "t5", "llama"]
lengths = st.lists(st.integers(0, 400), max_size=8)


@pytest.mark.parametrize(
    "wanted, budget, allowed",
    [
        ([12, 300, 8], 60, [12, 40, 8]),
        ([5, 5, 5], 60, [5, 5, 5]),
        ([100, 100, 100], 60, [20, 20, 20]),
        ([100, 100, 100], 61, [20, 20, 21]),
        ([7], 3, [3]),
        ([0, 9, 0], 4, [0, 4, 0]),
        ([10, 10], 0, [0, 0]),
        ([10, 10], -3, [0, 0]),
        ([], 10, []),
        ([40, 30, 2], 32, [15, 15, 2]),
    ],
)
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
    config = load_config(str(models[kind]))
    tokenizer = load_tokenizer(str(models[kind]), config)
    return tokenizer, PairText(tokenizer, backbone_kind(config), fields, max_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_the_tokenizers_own(models, kind):
    tokenizer, text = template(models, kind)
    texts = ["red chair", "a b", "", "Ünïcode 椅子 🪑", "word " * 300]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenizer(texts, truncation=True, max_length=4, padding=True)  # leaves its settings behind
    assert text.token_ids(texts) == expected and max(map(len, expected)) > 200
    assert text.token_ids(texts, chunk=2) == expected


def pin(**columns):
    return {name: [columns.get(name, "")] for name in FIELDS}


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("bert", "[CLS] red chair [SEP] title : modern sofa queries : red sofa [SEP]"),
        ("deberta", "[CLS] red chair [SEP] title : modern sofa queries : red sofa [SEP]"),
        ("t5", "red chair </s> title : modern sofa queries : red sofa </s>"),
        ("llama", "<s> red chair LINE title : modern sofa queries : red sofa </s>"),
    ],
)
def test_template_of_every_family(models, kind, expected):
    tokenizer, text = template(models, kind)
    columns = pin(queries="red sofa", title="modern sofa")
    ids = text.pair(text.queries(["Red chair"])[0], text.pins(columns)[0])
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    assert tokens == ["\n" if token == "LINE" else token for token in expected.split()]


@pytest.mark.parametrize(
    "fields, expected",
    [
        (("caption", "title"), "caption : lamp title : modern sofa"),
        (("description",), "description : red"),
        (("boards",), ""),
    ],
)
def test_fields_can_be_chosen_and_come_in_their_order(models, fields, expected):
    columns = pin(title="modern sofa", description="red", caption="lamp")
    tokenizer, text = template(models, "bert", fields)
    tokens = tokenizer.convert_ids_to_tokens(text.pair([], text.pins(columns)[0]).tolist())
    assert tokens == ["[CLS]", "[SEP]", *expected.split(), "[SEP]"]


@pytest.mark.parametrize("kind", KINDS)
def test_query_is_never_cut_and_a_long_description_leaves_the_caption_alone(models, kind):
    tokenizer, text = template(models, kind, max_tokens=40)
    query = "red chair for modern lamp"
    columns = pin(title="sofa", description="chair " * 500, caption="red lamp", boards="table")
    ids = text.pair(text.queries([query])[0], text.pins(columns)[0]).tolist()
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert len(ids) == 40
    assert query.split() == tokens[len(text.open) : len(text.open) + 5]
    said = " ".join(tokens)
    for whole in ("title : sofa", "caption : red lamp", "boards : table", "description : chair chair"):
        assert whole in said
    end = tokenizer.sep_token_id if kind in ("bert", "deberta") else tokenizer.eos_token_id
    assert ids[-1] == end


@given(st.lists(st.integers(0, 90), min_size=6, max_size=6), st.integers(1, 30))
def test_a_pair_never_exceeds_its_length(sizes, query_size):
    text = PairText.__new__(PairText)  # no tokenizer: token ids by hand
    text.open, text.separator, text.close, text.max_tokens = [1], [2], [3], 50
    fields = [[10 + i] * n for i, n in enumerate(sizes) if n]
    ids = text.pair([5] * query_size, fields).tolist()
    assert len(ids) == min(50, 3 + query_size + sum(sizes))
    assert ids[: query_size + 2] == [1, *[5] * query_size, 2] and ids[-1] == 3
    body = ids[query_size + 2 : -1]
    assert body == sorted(body)  # the fields stay in order
    fair = (50 - 3 - query_size) // len(fields) if fields else 0
    assert all(body.count(field[0]) >= min(len(field), fair) for field in fields)


def test_a_query_that_does_not_fit_stops(models):
    _, text = template(models, "bert", max_tokens=10)
    assert len(text.queries(["chair " * 7])[0]) == 7  # 10 less [CLS], [SEP], [SEP]
    line = stop_line(text.queries, ["red", "chair " * 8])
    assert "the first has 8" in line and "--max-tokens" in line and "--long-queries cut" in line


def test_too_few_tokens_for_a_query_stop(models):
    """A query cut to less than nothing was one without its end."""
    _, text = template(models, "bert", max_tokens=4)
    text.cut_queries = True
    assert "--max-tokens 4: no room" in stop_line(text.queries, ["red chair"])
    text.max_tokens = 5
    assert len(text.queries(["red chair lamp"])[0]) == 1


def test_describe_tells_templates_apart(models):
    kinds = (("bert", FIELDS, 64), ("t5", FIELDS, 64), ("llama", FIELDS, 64), ("bert", FIELDS[:2], 64))
    about = [template(models, *kind)[1].describe() for kind in (*kinds, ("bert", FIELDS, 32))]
    assert all(a != b for i, a in enumerate(about) for b in about[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_special_token(models, kind):
    """A user who writes "[SEP] title: sofa" into a query must not get the ids of a query and a field."""
    tokenizer, text = template(models, kind, max_tokens=40)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    written = f"red {' '.join(tokenizer.all_special_tokens)} chair"
    assert not special & set(text.queries([written])[0])
    ids = text.pair(text.queries([written])[0], text.pins(pin(title=written))[0]).tolist()
    frame = [*text.open, *text.separator, *text.close]
    assert [i for i in ids if i in special] == [i for i in frame if i in special]


def test_pairs_are_tokenized_once_a_query_and_once_a_pin(models):
    import pyarrow as pa

    _, text = template(models, "bert")
    queries = pa.array(["red chair", "sofa", "lamp"])
    titles = ["modern sofa", "red lamp", "table"]
    seen = []

    def read_pins(pins):
        seen.append(pins.tolist())
        return pin(title="") | {name: [titles[p] if name == "title" else "" for p in pins] for name in FIELDS}

    query_index, pin_index = np.array([2, 0, 2, 0]), np.array([1, 1, 0, 1])
    rows = tokenize_pairs(text, queries, read_pins, query_index, pin_index)
    assert seen == [[0, 1]]
    for q, p, row in zip(query_index, pin_index, rows):
        query_ids, pin_ids = text.queries([queries[int(q)].as_py()])[0], text.pins(pin(title=titles[p]))[0]
        assert row.dtype == np.int32 and row.tolist() == text.pair(query_ids, pin_ids).tolist()


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@given(rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=9))
def test_pad_rows(side, rows):
    arrays = [np.array(row, dtype=np.int32) for row in rows]
    ids, mask = pad_rows(arrays, pad_id=0, side=side)  # 0 is a token of the rows as well
    T = max(map(len, rows))
    assert ids.shape == mask.shape == (len(rows), T) and ids.dtype == mask.dtype == torch.int64
    for row, line, m in zip(rows, ids.tolist(), mask.tolist()):
        pad, ones = [0] * (T - len(row)), [1] * len(row)
        assert line == (pad + row if side == "left" else row + pad)
        assert m == (pad + ones if side == "left" else ones + pad)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 500), st.booleans())
def test_token_batches(sizes, budget, longest_first):
    sizes = sorted(sizes, reverse=longest_first)
    batches = list(token_batches(sizes, budget))
    assert [row for batch in batches for row in batch] == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(sizes[i] for i in batch) <= budget
    # A batch is as large as the budget allows, or half full where the length changes.
    for batch, after in zip(batches, batches[1:]):
        full = (len(batch) + 1) * max(sizes[i] for i in [*batch, after[0]]) > budget
        half = 2 * len(batch) * max(sizes[i] for i in batch) >= budget
        assert full or (half and sizes[batch[-1]] != sizes[after[0]])
