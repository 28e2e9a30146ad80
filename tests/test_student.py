"""The student: its loss in closed form, its inputs by plain indexing, its rows counted."""

import subprocess
import sys
import weakref
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from helpers import environment, mark_finished, stage, stop_line, synthetic

from common import MATCH_FEATURES, Student, StudentInputs
from runs.stage import read_json, write_parquet

distil = stage("04")


# ------------------------------------------------------------------------------------------------------------
# The loss


def probabilities(rows, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(5), rows))


def logits(rows, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, 5)) * 2)


def test_loss_by_hand():
    """Teacher (3/4, 1/4, 0, 0, 0), student uniform: KL = 3/4 log(15/4) + 1/4 log(5/4)."""
    loss = distil.distillation_loss(torch.zeros(2, 5), torch.tensor([[0.75, 0.25, 0, 0, 0]] * 2))
    assert loss.item() == pytest.approx(0.75 * np.log(15 / 4) + 0.25 * np.log(5 / 4))


def test_loss_at_temperature_2_by_hand():
    """p^(1/2) of (16, 9, 4, 1, 0)/30 is (4, 3, 2, 1, 0)/10; the student is uniform at every temperature."""
    softened = np.array([0.4, 0.3, 0.2, 0.1])
    loss = distil.distillation_loss(
        torch.zeros(1, 5), torch.tensor([[16, 9, 4, 1, 0.0]]) / 30, temperature=2.0
    )
    assert loss.item() == pytest.approx(4 * (softened * np.log(5 * softened)).sum(), rel=1e-6)


def test_loss_equals_torch_kl_div():
    p, z = probabilities(40), logits(40)
    assert distil.distillation_loss(z, p).item() == pytest.approx(
        F.kl_div(z.log_softmax(1), p, reduction="batchmean").item()
    )
    for T in (0.5, 2.0, 7.0):
        target = (p ** (1 / T)) / (p ** (1 / T)).sum(1, keepdim=True)
        assert distil.distillation_loss(z, p, T).item() == pytest.approx(
            T**2 * F.kl_div((z / T).log_softmax(1), target, reduction="batchmean").item()
        )


def test_loss_of_one_hot_labels_is_cross_entropy():
    y = torch.arange(20) % 5
    one_hot = F.one_hot(y, 5).double()
    assert distil.distillation_loss(logits(20), one_hot).item() == pytest.approx(
        F.cross_entropy(logits(20), y).item()
    )


def test_loss_is_zero_at_the_teacher_and_its_gradient_is_student_minus_teacher():
    p = probabilities(8)
    for T in (1.0, 3.0):
        z = p.log().requires_grad_()
        loss = distil.distillation_loss(z, p, T)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-9) and z.grad.abs().max() < 1e-9
    z = logits(8).requires_grad_()
    distil.distillation_loss(z, p).backward()
    torch.testing.assert_close(z.grad, (z.softmax(1) - p) / 8)


def test_gradient_keeps_its_size_at_high_temperatures():
    """Hinton et al., 2015, section 2.1: for large T the gradient tends to (z - v) / N with centred logits;
    here N = 5 levels."""
    p, z = probabilities(30), logits(30)
    v, centred = p.log() - p.log().mean(1, keepdim=True), z - z.mean(1, keepdim=True)
    for T in (200.0, 2_000.0):
        x = z.clone().requires_grad_()
        distil.distillation_loss(x, p, T).backward()
        torch.testing.assert_close(x.grad, (centred - v) / 5 / 30, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("T", [0.25, 1.0, 4.0])
def test_zeros_in_the_target_are_finite(T):
    target = torch.tensor([[1, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [1e-38, 0, 0, 0, 1]], dtype=torch.float32)
    z = torch.tensor([[0.0, 1, 2, 3, 4]] * 3, requires_grad=True)
    loss = distil.distillation_loss(z, target, T)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all() and loss > 0


# ------------------------------------------------------------------------------------------------------------
# The network and its inputs


def spec(**more):
    return {
        "embeddings": {"pin_text": 6, "query_text": 4},
        "categories": {"query_interest": ["home", "food"], "pin_kind": []},
        "category_dim": 3,
        "match": list(MATCH_FEATURES),
        "mean": [1.0, 0.5, 0.0, 2.0],
        "std": [2.0, 0.5, 1.0, 1.0],
        "hidden": [16, 8],
        "dropout": 0.1,
    } | more


def test_student_shapes_and_unknown_category():
    student = Student(spec()).eval()
    x, match = torch.randn(7, 10), torch.randn(7, 4)
    assert student(x, torch.zeros(7, 2, dtype=torch.long), match).shape == (7, 5)
    assert [t.num_embeddings for t in student.tables] == [3, 1]  # one row more than values: unknown
    assert [layer.out_features for layer in student.mlp if isinstance(layer, torch.nn.Linear)] == [16, 8, 5]
    assert Student(spec(embeddings={}, categories={}, hidden=[]))(
        torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.long), torch.randn(2, 4)
    ).shape == (2, 5)


def test_student_by_hand():
    """Without hidden layers: embeddings brought to mean 0 and variance 1 each, categories looked up, match
    features normalized, one linear layer."""
    student = Student(spec(hidden=[])).eval()
    rng = np.random.default_rng(0)
    x, match, categories = (
        rng.normal(size=(3, 10)).astype(np.float32),
        rng.normal(size=(3, 4)).astype(np.float32),
        np.array([[0, 0], [1, 0], [2, 0]]),
    )
    normal = lambda e: (e - e.mean(1, keepdims=True)) / np.sqrt(e.var(1, keepdims=True) + 1e-5)
    tables = [t.weight.detach().numpy() for t in student.tables]
    row = np.concatenate(
        [
            normal(x[:, :6]),
            normal(x[:, 6:]),
            tables[0][categories[:, 0]],
            tables[1][categories[:, 1]],
            (match - [1.0, 0.5, 0.0, 2.0]) / [2.0, 0.5, 1.0, 1.0],
        ],
        1,
    )
    expected = row @ student.mlp[0].weight.detach().numpy().T + student.mlp[0].bias.detach().numpy()
    np.testing.assert_allclose(
        student(torch.from_numpy(x), torch.from_numpy(categories), torch.from_numpy(match)).detach().numpy(),
        expected,
        atol=1e-5,
    )


def test_student_saved_and_loaded_in_a_fresh_process(tmp_path):
    torch.manual_seed(3)
    student = Student(spec()).eval()
    student.save(tmp_path)
    inputs = torch.randn(9, 10), torch.randint(0, 1, (9, 2)), torch.randn(9, 4)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = "import sys, torch, common; folder = sys.argv[1]; student = common.Student.load(folder); "
    code += "torch.save(student(*torch.load(folder + '/inputs.pt')), folder + '/logits.pt')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment(), cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), student(*inputs), rtol=0, atol=1e-6)


def test_gather_equals_plain_indexing(tmp_path):
    synthetic(tmp_path)
    features = tmp_path / "features"
    inputs = StudentInputs(features)
    rng = np.random.default_rng(1)
    q, p = rng.integers(0, 200, 100), rng.integers(0, 30, 100)
    embeddings, categories = inputs.gather(q, p)
    pin, query = np.load(features / "pin_text_embedding.npy"), np.load(features / "query_text_embedding.npy")
    assert list(inputs.dims.items()) == [("pin_text", 6), ("query_text", 4)]
    np.testing.assert_array_equal(
        embeddings.numpy(), np.concatenate([pin[p], query[q].astype(np.float32)], 1)
    )
    assert inputs.categories == {
        "query_interest": ["home", "food"],
        "pin_kind": ["b", "a"],
    }  # most frequent first
    interest = {"home": 1, "food": 2, None: 0}
    kind = {"b": 1, "a": 2, None: 0}
    columns = (
        pq.read_table(features / "queries.parquet")["interest"].to_pylist(),
        pq.read_table(features / "pins.parquet")["kind"].to_pylist(),
    )
    np.testing.assert_array_equal(
        categories.numpy(), [[interest[columns[0][i]], kind[columns[1][j]]] for i, j in zip(q, p)]
    )


def test_value_not_in_the_spec_is_unknown_and_other_features_are_refused(tmp_path):
    synthetic(tmp_path)
    features = tmp_path / "features"
    made = StudentInputs(features)
    later = {"embeddings": made.dims, "categories": {"query_interest": ["home", "garden"], "pin_kind": ["a"]}}
    _, categories = StudentInputs(features, later).gather(np.arange(4), np.zeros(4, int))
    assert categories[:, 0].tolist() == [1, 1, 0, 0]  # home; food and null are unknown
    assert "categories" in stop_line(
        StudentInputs, features, {**later, "categories": {"query_interest": ["home"]}}
    )
    assert "embeddings" in stop_line(StudentInputs, features, {**later, "embeddings": {"pin_text": 6}})


def test_an_id_column_is_no_category(tmp_path):
    """The most frequent 1,000 values have a row each, the others are unknown."""
    synthetic(tmp_path)
    inputs = StudentInputs(tmp_path / "features", max_values=1)
    assert inputs.categories == {"query_interest": ["home"], "pin_kind": ["b"]}


# ------------------------------------------------------------------------------------------------------------
# Rows


def rows_of(folder, *more):
    """The training rows of `folder`, and what their survey gives."""
    argv = ["--run", str(folder), "--batch-size", "16", "--shuffle-window", "2", *more]
    settings = distil.parse(distil.PRESETS, argv)
    rows = distil.TrainingRows(settings, folder / "features", folder / "labels")
    return rows, rows.survey()


def keys(batches):
    """How often each row stands in some batches."""
    count = Counter()
    for batch in batches:
        columns = batch["query"], batch["pin"], batch["match"][:, 0], batch["target"][:, 0]
        count.update(zip(*(column.tolist() for column in columns)))
    return count


def test_rows_are_counted_and_held_out_queries_are_never_trained_on(tmp_path):
    every, _ = synthetic(tmp_path)
    rows, (mean, std, held) = rows_of(tmp_path)
    out = rows.is_held_out
    total = sum(len(p) for _, p in every)
    assert out.any() and rows.total + len(held) == total == 310
    for epoch in (0, 1):
        batches = list(rows.batches(epoch))
        assert not out[np.concatenate([b["query"] for b in batches])].any()
        expected = Counter()
        for table, probabilities in every:
            train = ~out[table["query_index"]]
            columns = table["query_index"], table["pin_index"], table["bm25"], probabilities[:, 0]
            expected.update(zip(*(column[train].tolist() for column in columns)))
        assert keys(batches) == expected  # each training row once an epoch, and nothing else
        assert all(len(b) <= 16 for b in batches)
    assert out[held["query"]].all()
    match = [np.stack([t[n] for n in MATCH_FEATURES], 1)[~out[t["query_index"]]] for t, _ in every]
    training = np.concatenate(match).astype(np.float64)
    np.testing.assert_allclose(mean, training.mean(0), atol=1e-9)
    np.testing.assert_allclose(std, training.std(0), atol=1e-9)


def test_held_out_rows_come_from_every_shard(tmp_path, monkeypatch):
    every, _ = synthetic(tmp_path)
    monkeypatch.setattr(distil, "HELD_OUT_ROWS", 7)
    rows, (_, _, held) = rows_of(tmp_path)
    share = -(-7 // len(every))
    expected = []
    for table, _ in every:
        query = table["query_index"]
        expected += query[rows.is_held_out[query]][:share].tolist()
    assert len(every) > 3 and len(expected) > share and held["query"].tolist() == expected


def test_epochs_differ_and_repeat(tmp_path):
    synthetic(tmp_path)
    (a, _), (b, _) = rows_of(tmp_path), rows_of(tmp_path)

    def order(rows, epoch):
        return np.concatenate([batch["match"] for batch in rows.batches(epoch)])

    np.testing.assert_array_equal(order(a, 0), order(b, 0))
    assert (order(a, 0) != order(a, 1)).any()


@pytest.mark.parametrize("skip", [0, 1, 5, 8, 13, 100])
def test_skipping_batches_equals_dropping_them(tmp_path, skip):
    synthetic(tmp_path)
    rows, _ = rows_of(tmp_path)
    whole, rest = list(rows.batches(0))[skip:], list(rows.batches(0, skip=skip))
    assert len(whole) == len(rest)
    for a, b in zip(whole, rest):
        assert a.tobytes() == b.tobytes()


def test_only_one_window_is_held(tmp_path, monkeypatch):
    synthetic(tmp_path)
    rows, _ = rows_of(tmp_path)
    held, read_window = [], rows.read_window

    def read(window):
        assert not any(array() is not None for array in held), (
            "the window before is still in memory while the next is read"
        )
        made = read_window(window)
        parts = np.concatenate([rows.training_rows(i) for i in window])
        assert made.tobytes() == parts.tobytes()
        held.append(weakref.ref(made))
        return made

    monkeypatch.setattr(rows, "read_window", read)
    assert sum(len(b) for b in rows.batches(0)) == rows.total
    assert len(held) >= 3  # more than one window was read


@pytest.mark.parametrize("n", [1, 17, 100, 10_000])
def test_subsample_has_exactly_so_many_rows(tmp_path, n):
    every, _ = synthetic(tmp_path)
    rows, _ = rows_of(tmp_path, "--rows", str(n))
    all_of_them, _ = rows_of(tmp_path)
    first, second = keys(rows.batches(0)), keys(rows.batches(1))
    assert sum(first.values()) == rows.total == min(n, all_of_them.total)
    assert first == second and not first - keys(all_of_them.batches(0))  # the same rows every epoch


def test_languages(tmp_path):
    synthetic(tmp_path)
    rows, (_, _, held) = rows_of(tmp_path, "--languages", "fr")
    used = np.concatenate([b["query"] for b in rows.batches(0)])
    assert len(used) and (used % 4 == 0).all() and (held["query"] % 4 == 0).all()
    assert "xx" in stop_line(rows_of, tmp_path, "--languages", "xx")


def test_human_labels_are_one_hot_and_of_the_training_split(tmp_path):
    _, human = synthetic(tmp_path)
    rows, (_, _, held) = rows_of(tmp_path, "--labels", "human")
    batches = list(rows.batches(0))
    train = human["split"] == "train"
    assert rows.total + len(held) == train.sum()
    target, query = (
        np.concatenate([b["target"] for b in batches]),
        np.concatenate([b["query"] for b in batches]),
    )
    train &= ~rows.is_held_out[human["query_index"]]
    expected = Counter(zip(human["query_index"][train].tolist(), human["label"][train].tolist()))
    assert Counter(zip(query.tolist(), (target.argmax(1) + 1).tolist())) == expected
    assert (target.max(1) == 1).all() and (target.sum(1) == 1).all()


def test_a_constant_match_feature_does_not_divide_by_zero(tmp_path):
    synthetic(tmp_path)
    for path in (tmp_path / "features" / "impressions").glob("*.parquet"):
        table = pq.read_table(path)
        zeros = pa.array(np.zeros(len(table), np.float32))
        write_parquet(path, table.set_column(table.column_names.index("engagement"), "engagement", zeros))
    _, (mean, std, _) = rows_of(tmp_path)
    assert (mean[3], std[3]) == (0, 1)


def test_shards_of_different_length_are_refused(tmp_path):
    synthetic(tmp_path)
    path = tmp_path / "labels" / "impressions" / "part-00001.parquet"
    write_parquet(path, pq.read_table(path).slice(1))
    line = stop_line(rows_of, tmp_path)
    assert "part-00001.parquet" in line and "60" in line and "61" in line


def test_prepared_ahead_in_order_and_errors_arrive():
    assert list(distil.ahead(iter(range(20)), depth=3)) == list(range(20))
    assert list(distil.ahead(iter([]))) == []

    def fail():
        yield from range(5)
        raise RuntimeError("broken shard")

    got = []
    with pytest.raises(RuntimeError, match="broken shard"):
        for x in distil.ahead(fail()):
            got.append(x)
    assert got == list(range(5))


def test_no_more_is_prepared_than_asked_for():
    """Memory: at most `depth` batches wait beside the one in use."""
    made = []

    def batches():
        for x in range(50):
            made.append(x)
            yield x

    for x in distil.ahead(batches(), depth=3):
        assert len(made) <= x + 1 + 3


# ------------------------------------------------------------------------------------------------------------
# Training


def test_student_learns_what_can_be_learnt_and_survives_a_reload(tmp_path):
    """Soft labels that follow from one match feature: the loss falls far below that of the best constant."""
    every, _ = synthetic(tmp_path, shards=4, shard_rows=400)
    for i, (table, _) in enumerate(every):
        z = np.outer(table["bm25"], [-2, -1, 0, 1, 2])
        p = (np.exp(z) / np.exp(z).sum(1, keepdims=True)).astype(np.float32)
        write_parquet(
            tmp_path / "labels" / "impressions" / f"part-{i:05d}.parquet",
            {f"p{k}": p[:, k - 1] for k in range(1, 6)},
        )
    mark_finished(tmp_path / "labels", identity="labels", inputs={"features": "features"})
    distil.main(
        [
            "--run",
            str(tmp_path),
            "--epochs",
            "12",
            "--hidden",
            "32",
            "--batch-size",
            "64",
            "--lr",
            "0.01",
            "--device",
            "cpu",
        ]
    )
    rows, (_, _, held) = rows_of(tmp_path)
    target = np.concatenate([b["target"] for b in rows.batches(0)])
    constant = (held["target"] * np.log(np.maximum(held["target"], 1e-12) / target.mean(0))).sum(1).mean()
    best = read_json(tmp_path / "student" / "stage.json")["best"]
    assert best["kl"] < 0.2 * constant
    student = Student.load(tmp_path / "student")
    kl, agreement = distil.held_out_scores(
        student, StudentInputs(tmp_path / "features", student.spec), held, torch.device("cpu")
    )
    assert kl == pytest.approx(best["kl"], abs=1e-6) and agreement == best["agreement"]
    names = {"model.safetensors", "features.json", "training_log.jsonl", "stage.json"}
    assert {path.name for path in (tmp_path / "student").iterdir()} == names


def test_loss_that_is_not_finite_stops(tmp_path):
    synthetic(tmp_path)
    line = stop_line(
        distil.main, ["--run", str(tmp_path), "--lr", "1e30", "--epochs", "9", "--device", "cpu"]
    )
    assert "not finite" in line and "--lr" in line
