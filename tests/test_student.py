"""The student: its loss in closed form, its inputs by plain indexing, its rows counted."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from helpers import environment, mark_finished, stage, stop_line, synthetic
from sklearn.linear_model import LogisticRegression
from test_pairs import rows_of

from common import Student
from lib.inputs.match import MATCH_FEATURES
from lib.inputs.pairs import PairFiles, read_labelled
from lib.inputs.pool import Pool, write_pool
from lib.inputs.regression import fit_regression, one_hot
from lib.inputs.student_inputs import StudentInputs
from lib.stages.files import read_json, write_json, write_parquet
from lib.stages.terminal import Stop

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
        "numbers": {"pin_price": [10.0, 4.0, -50.0, 50.0]},
        "match": list(MATCH_FEATURES),
        "mean": [1.0, 0.5, 0.0, 2.0],
        "std": [2.0, 0.5, 1.0, 1.0],
        "low": [-9.0] * 4,
        "high": [9.0] * 4,
        "hidden": [16, 8],
        "dropout": 0.1,
        "input_dropout": 0.3,
    } | more


def some_inputs(rows=7, seed=0):
    """Embeddings, categories, numbers and match features for spec(), as arrays."""
    rng = np.random.default_rng(seed)
    x, match = rng.normal(size=(rows, 10)).astype(np.float32), rng.normal(size=(rows, 4)).astype(np.float32)
    categories = np.stack([np.arange(rows) % 3, np.zeros(rows, int)], axis=1)
    return x, categories, rng.normal(10, 4, size=(rows, 1)).astype(np.float32), match


def tensors(x, categories, numbers, match, made_of=None):
    """Arrays as in some_inputs() -> the student's inputs by name, for a spec."""
    made_of, inputs = made_of or spec(), {}
    sizes = made_of["embeddings"]
    for name, part in zip(sizes, torch.from_numpy(x).split([*sizes.values()], dim=1)):
        inputs[name] = part
    for kind, columns in (("categories", categories), ("numbers", numbers), ("match", match)):
        inputs |= zip(made_of[kind], torch.from_numpy(columns).unbind(1))
    return inputs


def normal(e):
    """Rows brought to mean 0 and variance 1."""
    return (e - e.mean(1, keepdims=True)) / np.sqrt(e.var(1, keepdims=True) + 1e-5)


def test_student_shapes_and_unknown_category():
    student = Student(spec()).eval()
    assert student(tensors(*some_inputs())).shape == (7, 5)
    assert [t.num_embeddings for t in student.tables] == [3, 1]  # one row more than values: unknown
    assert [layer.out_features for layer in student.mlp if isinstance(layer, torch.nn.Linear)] == [16, 8, 5]
    bare = Student(spec(embeddings={}, categories={}, numbers={}, hidden=[]))
    assert bare({name: torch.randn(2) for name in MATCH_FEATURES}).shape == (2, 5)


@pytest.mark.parametrize("sizes", [(6, 4), (5, 5)])
def test_student_by_hand(sizes):
    """Without hidden layers: embeddings brought to mean 0 and variance 1 each, the product of those of query
    and pin where they have one size, categories looked up, numbers normalized, one linear layer; plus one of
    the match features alone."""
    student = Student(spec(hidden=[], embeddings=dict(zip(("pin_text", "query_text"), sizes)))).eval()
    x, categories, numbers, match = some_inputs(3)
    tables = [t.weight.detach().numpy() for t in student.tables]
    pin, query = normal(x[:, : sizes[0]]), normal(x[:, sizes[0] :])
    columns = [pin, query, query * pin] if sizes[0] == sizes[1] else [pin, query]
    columns += [tables[0][categories[:, 0]], tables[1][categories[:, 1]], (numbers - 10) / 4]
    columns.append((match - [1.0, 0.5, 0.0, 2.0]) / [2.0, 0.5, 1.0, 1.0])
    weight, bias = (p.detach().numpy() for p in (student.mlp[0].weight, student.mlp[0].bias))
    expected = np.concatenate(columns, axis=1) @ weight.T + bias
    weight, bias = (p.detach().numpy() for p in (student.linear.weight, student.linear.bias))
    expected += columns[-1] @ weight.T + bias
    found = student(tensors(x, categories, numbers, match, student.spec)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_unknown_number_counts_as_the_mean():
    student = Student(spec()).eval()
    x, categories, numbers, match = some_inputs()
    numbers[2], match[3, 1] = np.nan, np.nan
    found = student(tensors(x, categories, numbers, match))
    numbers[2], match[3, 1] = 10.0, 0.5
    torch.testing.assert_close(found, student(tensors(x, categories, numbers, match)))
    assert torch.isfinite(found).all()


def test_dropout_of_inputs_is_for_embeddings_and_training_alone():
    inputs = tensors(*some_inputs())
    student = Student(spec(dropout=0.0, input_dropout=0.5))
    student.train()
    assert (student(inputs) != student(inputs)).any()
    student.eval()
    torch.testing.assert_close(student(inputs), student(inputs), rtol=0, atol=0)
    student = Student(spec(embeddings={}, dropout=0.0, input_dropout=0.5)).train()
    torch.testing.assert_close(student(inputs), student(inputs), rtol=0, atol=0)


def test_student_saved_and_loaded_in_a_fresh_process(tmp_path):
    torch.manual_seed(3)
    student = Student(spec()).eval()
    student.save(tmp_path)
    inputs = tensors(*some_inputs(9))
    torch.save(inputs, tmp_path / "inputs.pt")
    code = "import sys, torch, common; folder = sys.argv[1]; student = common.Student.load(folder); "
    code += "torch.save(student(torch.load(folder + '/inputs.pt')), folder + '/logits.pt')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment(), cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), student(inputs), rtol=0, atol=1e-6)


def test_a_student_of_another_version_is_named(tmp_path):
    Student(spec()).save(tmp_path)
    about = read_json(tmp_path / "features.json")
    del about["numbers"]
    write_json(tmp_path / "features.json", about)
    assert str(tmp_path) in stop_line(Student.load, tmp_path)


def with_column(path, name, values):
    """Adds a column to a Parquet file."""
    table = pq.read_table(path)
    write_parquet(path, table.append_column(name, pa.array(values)))


def test_gather_equals_plain_indexing(tmp_path):
    synthetic(tmp_path)
    features = tmp_path / "features"
    price = [None if i == 3 else float(i) for i in range(30)]
    with_column(features / "pins.parquet", "price", price)
    with_column(features / "queries.parquet", "length", list(range(200)))
    inputs = StudentInputs(features)
    rng = np.random.default_rng(1)
    q, p = rng.integers(0, 200, 100), rng.integers(0, 30, 100)
    match = rng.normal(size=(100, 4)).astype(np.float32)
    gathered = inputs.gather(q, p, match)
    pin, query = np.load(features / "pin_text_embedding.npy"), np.load(features / "query_text_embedding.npy")
    assert list(inputs.dims.items()) == [("pin_text", 6), ("query_text", 4)]
    expected = np.concatenate([pin[p], query[q].astype(np.float32)], axis=1)
    np.testing.assert_array_equal(torch.cat([gathered["pin_text"], gathered["query_text"]], 1), expected)
    most_frequent_first = {"query_interest": ["home", "food"], "pin_kind": ["b", "a"]}
    assert inputs.categories == most_frequent_first
    interest, kind = {"home": 1, "food": 2, None: 0}, {"b": 1, "a": 2, None: 0}
    interests = pq.read_table(features / "queries.parquet")["interest"].to_pylist()
    kinds = pq.read_table(features / "pins.parquet")["kind"].to_pylist()
    np.testing.assert_array_equal(gathered["query_interest"], [interest[interests[i]] for i in q])
    np.testing.assert_array_equal(gathered["pin_kind"], [kind[kinds[j]] for j in p])
    assert list(inputs.numbers) == ["query_length", "pin_price"]
    np.testing.assert_array_equal(gathered["query_length"], q)
    np.testing.assert_array_equal(gathered["pin_price"], [np.nan if j == 3 else j for j in p])
    for column, name in enumerate(MATCH_FEATURES):
        np.testing.assert_array_equal(gathered[name], match[:, column])
    known = [value for value in price if value is not None]
    moments = [np.mean(known), np.std(known), min(known), max(known)]
    assert inputs.numbers["pin_price"] == pytest.approx(moments)


def test_inputs_beyond_the_range_of_training_count_as_its_end():
    made_of = spec(
        low=[0.0, -1.0, -1.0, 0.0], high=[5.0, 1.0, 1.0, 3.0], numbers={"pin_price": [10, 4, 2, 20]}
    )
    student = Student(made_of).eval()
    x, categories, _, _ = some_inputs(1)
    at = {end: np.array([made_of[end]], np.float32) for end in ("low", "high")}
    price = {"low": np.float32([[2.0]]), "high": np.float32([[20.0]])}
    for end, sign in (("low", -1), ("high", 1)):
        inside = student(tensors(x, categories, price[end], at[end], made_of))
        beyond = student(tensors(x, categories, price[end] + 1e6 * sign, at[end] + 1e6 * sign, made_of))
        torch.testing.assert_close(inside, beyond)
    unknown = student(tensors(x, categories, np.float32([[np.nan]]), at["low"] * np.nan, made_of))
    mean = student(tensors(x, categories, np.float32([[10.0]]), np.float32([made_of["mean"]]), made_of))
    torch.testing.assert_close(unknown, mean)


def test_a_number_that_never_changes_does_not_divide_by_zero(tmp_path):
    synthetic(tmp_path)
    with_column(tmp_path / "features" / "pins.parquet", "price", [7.0] * 30)
    assert StudentInputs(tmp_path / "features").numbers == {"pin_price": [7.0, 1.0, 7.0, 7.0]}


def test_a_students_own_inputs_are_read_whatever_else_is_there(tmp_path):
    """A value or a column that its features did not have is unknown; other embeddings are refused."""
    synthetic(tmp_path)
    features = tmp_path / "features"
    made = StudentInputs(features)
    categories = {"pin_colour": ["red"], "query_interest": ["home", "garden"]}
    numbers = {"pin_price": [5.0, 1.0], "pin_kind": [0.0, 1.0]}
    later = {"embeddings": {"pin_text": 6}, "categories": categories, "numbers": numbers, "match": []}
    gathered = StudentInputs(features, later).gather(np.arange(4), np.zeros(4, int), np.zeros((4, 4)))
    assert gathered.keys() == {"pin_text", *categories, *numbers}
    assert gathered["query_interest"].tolist() == [1, 1, 0, 0]  # home; food and null are unknown
    assert gathered["pin_colour"].tolist() == [0] * 4
    assert all(gathered[name].isnan().all() for name in numbers)
    for other in ({"pin_text": 7}, {**made.dims, "pin_visual": 6}):
        assert "embeddings" in stop_line(StudentInputs, features, {**later, "embeddings": other})


def test_an_id_column_is_no_category(tmp_path):
    """The most frequent 1,000 values have a row each, the others are unknown."""
    synthetic(tmp_path)
    inputs = StudentInputs(tmp_path / "features", max_values=1)
    assert inputs.categories == {"query_interest": ["home"], "pin_kind": ["b"]}


# ------------------------------------------------------------------------------------------------------------
# Training


def learnable(folder):
    """Soft labels that follow from one match feature."""
    every, _ = synthetic(folder, shards=4, shard_rows=400)
    for i, (table, _) in enumerate(every):
        z = np.outer(table["bm25"], [-2, -1, 0, 1, 2])
        p = (np.exp(z) / np.exp(z).sum(1, keepdims=True)).astype(np.float32)
        soft = {f"p{level}": p[:, level - 1] for level in range(1, 6)}
        write_parquet(folder / "labels" / "impressions" / f"part-{i:05d}.parquet", soft)
    mark_finished(folder / "labels", identity="labels", inputs={"features": "features"})


def train(folder, *more):
    """Runs stage 04; returns its stage.json and its log."""
    small = ["--hidden", "32", "--batch-size", "64", "--lr", "0.01", "--human-rows", "none"]
    distil.main(["--run", str(folder), *small, "--device", "cpu", "--overwrite", *more])
    log = (folder / "student" / "training_log.jsonl").read_text().splitlines()
    return read_json(folder / "student" / "stage.json"), [json.loads(line) for line in log]


def test_student_learns_what_can_be_learnt_and_survives_a_reload(tmp_path):
    """The loss falls far below that of the best constant; the last epoch is kept."""
    learnable(tmp_path)
    about, log = train(tmp_path, "--epochs", "12", "--input-dropout", "0")
    rows, (_, held) = rows_of(tmp_path)
    target = np.concatenate([b["target"] for b in rows.batches(0)])
    constant = (held["target"] * np.log(np.maximum(held["target"], 1e-12) / target.mean(0))).sum(1).mean()
    assert about["scores"] == log[-1] and [line["epoch"] for line in log] == list(range(1, 13))
    assert about["scores"]["held_out_kl"] < 0.2 * constant and log[-1]["loss"] < 0.5 * log[0]["loss"]
    student = Student.load(tmp_path / "student")
    inputs = StudentInputs(tmp_path / "features", student.spec)
    scores = distil.held_out_scores(student, inputs, held, torch.device("cpu"))
    assert scores["held_out_kl"] == pytest.approx(log[-1]["held_out_kl"], abs=1e-6)
    assert scores["held_out_agreement"] == log[-1]["held_out_agreement"]
    left = {path.name for path in (tmp_path / "student").iterdir()}
    assert not [name for name in left if name.endswith(".pt")]


def test_the_training_loss_is_that_of_the_steps(tmp_path, monkeypatch):
    """Also of an epoch that was continued after a checkpoint."""
    learnable(tmp_path)
    losses, train_step = [], distil.train_step

    def note(student, optimizer, features, target, *rest):
        loss = train_step(student, optimizer, features, target, *rest)
        losses.append(loss.item() * len(target))
        return loss

    monkeypatch.setattr(distil, "train_step", note)
    about, log = train(tmp_path, "--epochs", "1")
    assert log[0]["loss"] == pytest.approx(sum(losses) / about["rows"]["train"], rel=1e-5)
    losses_of_all = list(losses)

    def killed(*args):
        if len(losses) == 10:
            raise KeyboardInterrupt
        return note(*args)

    losses.clear()
    monkeypatch.setattr(distil, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "--epochs", "1", "--checkpoint-steps", "4")
    monkeypatch.setattr(distil, "train_step", note)
    losses.clear()
    again, log_again = train(tmp_path, "--epochs", "1", "--checkpoint-steps", "4")
    assert losses == losses_of_all[8:] and log_again == log


def test_a_student_that_was_killed_after_its_last_epoch_is_saved(tmp_path, monkeypatch, capsys):
    def killed(log):
        raise KeyboardInterrupt

    learnable(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distil, "warn_if_by_heart", killed)
        train(tmp_path, "--epochs", "2")
    about, log = train(tmp_path, "--epochs", "2")
    rows = f"{2 * about['rows']['train']:,}"
    assert len(log) == 2 and f"continuing after {rows} of {rows} rows" in capsys.readouterr().out


@pytest.mark.parametrize("labels", ["teacher", "human"])
def test_a_dataset_of_few_queries_trains_without_held_out_rows(tmp_path, labels, capsys):
    synthetic(tmp_path, queries=3)
    name = {"teacher": "student", "human": "student_human_labels"}[labels]
    distil.main(["--run", str(tmp_path), "--labels", labels, "--epochs", "1"])
    out = capsys.readouterr().out
    assert "0 rows of 0 queries" in out
    assert "held_out_kl" not in read_json(tmp_path / name / "stage.json")["scores"]


def test_loss_that_is_not_finite_stops(tmp_path):
    synthetic(tmp_path)
    line = stop_line(train, tmp_path, "--lr", "1e30", "--epochs", "9")
    assert "not finite" in line and "--lr" in line


# ------------------------------------------------------------------------------------------------------------
# Flags


BAD_FLAGS = """--hidden 256,x|--hidden 256 x|--hidden 0|--hidden -4|--epochs 0|--rows -5|--lr -1|--lr nan
--lr 0|--batch-size 0|--dropout 1|--input-dropout 1.5|--device gpu|--temperature 0|--labels mine
--temperature 1e300|--temperature 1e-300|--hidden 1000000|--category-dim 1000000|--seed 1000000000
--human-rows some|--shuffle-window 0|--seed -1|--nonsense 1|--epochs 1.5
--warmup 1|--weight-decay -1"""


@pytest.mark.parametrize("flags", BAD_FLAGS.replace("\n", "|").split("|"))
def test_bad_flags_end_with_a_line_before_anything_is_touched(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        distil.main(["--run", str(tmp_path), *flags.split()])
    assert stopped.value.code == 2
    assert capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--human-rows none", "--human_rows=half", "--shuffle-window 2"])
def test_flags_that_human_labels_have_no_use_for_are_refused(tmp_path, capsys, flag):
    """They were ignored without a word; those of a preset are."""
    with pytest.raises(SystemExit) as stopped:
        distil.main(["--run", str(tmp_path), "--labels", "human", *flag.split()])
    flag = flag.replace("_", "-").replace("=", " ").split()[0]
    assert stopped.value.code == 2 and f"{flag} would do nothing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    stop_line(distil.main, ["--run", str(tmp_path), "--labels", "human", "--preset", "paper"])


def test_a_language_that_no_query_has_touches_nothing(tmp_path):
    synthetic(tmp_path)
    for language in ("xx", "en,fr"):
        line = stop_line(distil.main, ["--run", str(tmp_path), "--languages", "fr", language])
        assert f"--languages {language}: no query" in line and line.endswith("there are en fr")
    assert not list(tmp_path.glob("*student*"))


BAD_NAMES = ["teacher", "student/../teacher", "student/../../out", "student/x", "student\\x", "students/.."]
BAD_NAMES += ["student ", "student\n", "../student", "/student"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_one_folder_of_a_student(tmp_path, name, capsys):
    synthetic(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        distil.main(["--run", str(tmp_path), "--name", name, "--overwrite"])
    assert end.value.code == 2 and "begins with 'student'" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("labels, name", [("teacher", "student_human_labels"), ("human", "student")])
def test_a_student_has_not_the_name_of_the_other(tmp_path, labels, name, capsys):
    with pytest.raises(SystemExit) as end:
        distil.main(["--run", str(tmp_path), "--labels", labels, "--name", name])
    assert end.value.code == 2 and "the student on the other labels" in capsys.readouterr().err


def test_the_student_starts_as_the_regression_of_its_human_rows(tmp_path, monkeypatch):
    """What training gets is scikit-learn's regression on the match features, with human labels exactly."""
    _, human = synthetic(tmp_path, shards=1)
    started = []
    monkeypatch.setattr(distil, "train", lambda student, rows, *rest: started.append((student, rows)) or [{}])
    distil.main(["--run", str(tmp_path), "--labels", "human", "--device", "cpu"])
    student, rows = started[0]
    x = rows.human["match"].astype(float)
    z = (x - x.mean(0)) / x.std(0)
    expected = LogisticRegression(max_iter=1_000).fit(z, rows.human["target"].argmax(1))
    columns = distil.tensors(StudentInputs(tmp_path / "features"), rows.human, "cpu")[:-1]
    p = student.eval()(*columns).softmax(1).detach().numpy()
    np.testing.assert_allclose(p, expected.predict_proba(z), atol=1e-3)


def test_pooled_labels_are_what_the_student_learns(tmp_path):
    """Targets of impressions and, half, of human-labelled rows: by pool.json, in its languages."""
    every, human = synthetic(tmp_path, shards=2)
    files = PairFiles(tmp_path)
    assert list(files.match) == list(MATCH_FEATURES)
    alone = [files.impressions(path)["target"] for path in files.shards]
    regression = fit_regression(np.random.default_rng(0).normal(size=(90, 4)), np.eye(5)[np.arange(90) % 5])
    pool = Pool(0.5, 0.5, ["fr"], list(files.match), regression)
    write_pool(pool, tmp_path / "labels")
    language = pq.read_table(tmp_path / "features" / "queries.parquet")["language"].to_numpy(False)
    for path, (_, p), before in zip(files.shards, every, alone):
        rows = files.impressions(path)
        french = language[rows["query"]] == "fr"
        expected = np.sqrt(np.maximum(p, 1e-6) * np.maximum(regression.probabilities(rows["match"]), 1e-6))
        expected /= expected.sum(1, keepdims=True)
        np.testing.assert_allclose(rows["target"][french], expected[french], atol=1e-5)
        np.testing.assert_array_equal(rows["target"][~french], before[~french])
    rows = distil.human_rows(files, distil.TOY.__class__(run=tmp_path))
    train, _ = read_labelled(tmp_path)
    np.testing.assert_allclose(rows["target"], (one_hot(train["label"]) + train["pooled"]) / 2, atol=1e-5)
    assert (train["learnt"] == train["pooled"]).all() and (train["pooled"] != train["teacher"]).any()


def trained_on(folder, monkeypatch, *flags):
    """Settings and rows as training gets them, after main() has stopped there."""
    seen = []

    def stop(student, rows, inputs, held_out, settings, device, work):
        seen.append((settings, rows))
        raise Stop("enough")

    monkeypatch.setattr(distil, "train", stop)
    stop_line(distil.main, ["--run", str(folder), "--device", "cpu", "--overwrite", *flags])
    return seen[0]


def test_dropout_follows_the_rows(tmp_path, monkeypatch):
    """Of few human rows the best of DROPOUTS on other queries, of too few queries the last; of many, and of a
    teacher, the first; a flag wins."""
    synthetic(tmp_path, shards=1)
    losses = {0.4: 0.9, 0.6: 0.7, 0.9: 0.8}
    monkeypatch.setattr(distil, "cross_validated", lambda choice, *rest: (0.1, losses[choice.input_dropout]))
    human = ("--labels", "human")
    for flags, expected in (
        (human, (0.6, 0.3)),
        ((), (0.4, 0.1)),
        ((*human, "--dropout", "0.2"), (0.6, 0.2)),
        ((*human, "--dropout", "0.2", "--input-dropout", "0"), (0.0, 0.2)),
    ):
        settings, _ = trained_on(tmp_path, monkeypatch, *flags)
        assert (settings.input_dropout, settings.dropout) == expected
    monkeypatch.setattr(distil, "ENOUGH_QUERIES", 1_000)
    settings, _ = trained_on(tmp_path, monkeypatch, *human)
    assert (settings.input_dropout, settings.dropout) == (0.9, 0.5)
    monkeypatch.setattr(distil, "FEW_ROWS", 100)
    settings, rows = trained_on(tmp_path, monkeypatch, *human)
    assert rows.total > 100 and (settings.input_dropout, settings.dropout) == (0.4, 0.1)


def test_a_text_under_many_ids_is_one_query(tmp_path, monkeypatch, capsys):
    """40 texts under 200 ids: too few to compare dropouts by, as the folds are of texts."""
    _, human = synthetic(tmp_path, shards=1)
    path = tmp_path / "features" / "queries.parquet"
    table = pq.read_table(path)
    texts = [f"text {i % 40}" for i in range(len(table))]
    write_parquet(path, table.set_column(table.column_names.index("query"), "query", [texts]))
    mark_finished(tmp_path / "features")
    distil.main(["--run", str(tmp_path), "--labels", "human", "--epochs", "1", "--device", "cpu"])
    about = read_json(tmp_path / "student_human_labels" / "stage.json")
    assert about["dropouts"] == {"input_dropout": 0.9, "dropout": 0.5} and not about["curve"]
    counted = re.findall(r"of (\d+) queries", capsys.readouterr().out)
    learnt = human["query_index"][human["split"] == "train"]
    assert sum(map(int, counted)) == len(set(learnt % 40))  # those to train on, and those held out


def test_cross_validation_is_over_queries(tmp_path, monkeypatch):
    """Every row is left out once, by a student that was trained on no row of its query; the loss is the mean
    over rows."""
    synthetic(tmp_path, shards=1)
    learnt, folds = [], []
    make, score = distil.new_student, distil.held_out_scores

    def recorded(student, inputs, left_out, device):
        folds.append((left_out, score(student, inputs, left_out, device)["held_out_kl"]))
        return {"held_out_kl": folds[-1][1]}

    choose, chosen = distil.with_dropout, []
    monkeypatch.setattr(distil, "with_dropout", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    monkeypatch.setattr(distil, "new_student", lambda *given: learnt.append(given[3]) or make(*given))
    monkeypatch.setattr(distil, "held_out_scores", recorded)
    flags = ("--labels", "human", "--epochs", "2", "--hidden", "8")
    settings, rows = trained_on(tmp_path, monkeypatch, *flags)
    before, after = folds[::2], folds[1::2]  # of each student's training
    assert len(after) == distil.FOLDS * (len(distil.DROPOUTS) + 1) and len(learnt) == len(after) + 1
    first = list(zip(learnt, after))[: distil.FOLDS]
    for trained, (left_out, _) in first:
        assert not set(trained["query"]) & set(left_out["query"])
        assert len(trained) + len(left_out) == len(rows.human)
    assert sum(len(left_out) for _, (left_out, _) in first) == len(rows.human)
    sums = []
    for start in range(0, len(after), distil.FOLDS):
        sums.append(sum(len(left_out) * loss for left_out, loss in after[start : start + distil.FOLDS]))
    best = int(np.argmin(sums[:-1]))
    assert settings.input_dropout == distil.DROPOUTS[best][0]
    for trained, (left_out, _) in list(zip(learnt, after))[-distil.FOLDS :]:  # of the curve: one fold alone
        assert len(trained) + len(left_out) < len(rows.human)
        assert not set(trained["query"]) & set(left_out["query"])
    (_, curve) = chosen[0]
    n = len(rows.human)
    assert curve["student"] == pytest.approx([sums[-1] / n, sums[best] / n], abs=1e-4)
    regression = sum(len(left_out) * loss for left_out, loss in before[: distil.FOLDS]) / n
    assert curve["match"][1] == pytest.approx(regression)


def test_a_student_that_learns_by_heart_is_told(capsys):
    distil.warn_if_by_heart([{"loss": 1.0}, {"loss": 0.9}])  # nothing is held out
    distil.warn_if_by_heart([{"held_out_kl": 1.0}, {"held_out_kl": 0.9}, {"held_out_kl": 0.94}])
    distil.warn_if_by_heart([{"held_out_kl": 0.0002}, {"held_out_kl": 0.0003}])  # both are next to nothing
    assert not capsys.readouterr().out
    distil.warn_if_by_heart([{"held_out_kl": 1.3}, {"held_out_kl": 1.23}, {"held_out_kl": 1.53}])
    assert "from 1.230 to 1.530" in capsys.readouterr().out
    distil.warn_if_by_heart([{"held_out_kl": 1.2, "loss": 1.0}, {"held_out_kl": 1.9, "loss": 2.0}])
    assert "loss fell" not in (said := capsys.readouterr().out) and "lower --lr" in said
