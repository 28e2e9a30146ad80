"""The teacher: pooling, every kind of backbone saved and loaded again, LoRA merged, batches, and model folders that are refused."""

import argparse
import contextlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import common
from common import PackedRows, PairText, Teacher, pool
from helpers import TOY_MODELS, environment, stage, stop_line

trainer = stage("02")

ARMS = {"bert": ("bert",), "t5": ("t5",), "deberta": ("deberta",), "llama qlora": ("llama",), "llama lora": ("llama", "--no-qlora"), "llama full": ("llama", "--no-lora")}
QUICK = ["--rows", "48", "--epochs", "1", "--batch-rows", "16", "--max-tokens", "48", "--lora-rank", "4", "--lr", "1e-2", "--encoder-lr", "1e-3", "--device", "cpu", "--precision", "fp32"]


# ---------------------------------------------------------------------------------------------------------------------
# Pooling


def test_pool_by_hand():
    hidden = torch.arange(2 * 4 * 1, dtype=torch.float32).reshape(2, 4, 1)
    right, left = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert pool(hidden, right, "last").ravel().tolist() == [2, 7]
    assert pool(hidden, left, "last").ravel().tolist() == [3, 7]
    assert pool(hidden, right, "first").ravel().tolist() == [0, 4]
    assert pool(hidden, left, "first").ravel().tolist() == [2, 4]


@pytest.mark.parametrize("how", ["first", "last"])
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_pool_finds_the_token_whatever_the_padding(how, sizes):
    rows = [list(range(10 * i, 10 * i + n)) for i, n in enumerate(sizes)]
    wanted = [row[0 if how == "first" else -1] for row in rows]
    for side in ("left", "right"):
        ids, mask = PackedRows(rows).batch(np.arange(len(rows)), pad_id=wanted[0], side=side)  # the pad id is a token that matters
        assert pool(ids[..., None].float(), mask, how).ravel().tolist() == wanted


def untrained(models, kind, **more):
    torch.manual_seed(1)
    config = common.load_config(str(models[kind]))
    backbone = common.load_backbone(str(models[kind]), torch.float32)
    return Teacher(backbone, common.backbone_kind(config), **more).eval(), common.load_tokenizer(str(models[kind]), config)


def some_rows(tokenizer):
    """Rows of different length; one holds the pad token alone, one ends with it."""
    rng, pad = np.random.default_rng(0), tokenizer.pad_token_id
    rows = [rng.integers(0, len(tokenizer), n).tolist() for n in (9, 1, 17, 4, 30)]
    return PackedRows([*rows, [pad] * 6, [*rows[0], pad, pad]])


@torch.inference_mode()
def logits_of(teacher, packed, pad_id, rows, side="right"):
    return teacher(*packed.batch(np.array(rows), pad_id, side))


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_a_batch_gives_what_each_row_gives_alone(models, kind):
    teacher, tokenizer = untrained(models, kind)
    packed, pad = some_rows(tokenizer), tokenizer.pad_token_id
    alone = torch.cat([logits_of(teacher, packed, pad, [i]) for i in range(len(packed))])
    assert len(torch.unique(alone, dim=0)) == len(packed)  # the rows are told apart
    torch.testing.assert_close(logits_of(teacher, packed, pad, range(len(packed))), alone, rtol=0, atol=2e-5)
    if kind != "bert":  # BERT's absolute positions count from the left edge of the batch
        torch.testing.assert_close(logits_of(teacher, packed, pad, range(len(packed)), "left"), alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_soft_labels_come_in_the_rows_order(models, kind):
    teacher, tokenizer = untrained(models, kind)
    packed, pad, seen = some_rows(tokenizer), tokenizer.pad_token_id, []
    expected = torch.cat([logits_of(teacher, packed, pad, [i]) for i in range(len(packed))]).double().softmax(1).numpy()
    for budget in (1, 40, 10_000):
        got = common.soft_labels(teacher, packed, pad, budget, "cpu", progress=seen.append)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert sum(seen) == 3 * len(packed)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)


def test_read_out_token_of_every_kind(models):
    for kind, how in (("bert", "first"), ("deberta", "first"), ("t5", "first"), ("llama", "last")):
        assert untrained(models, kind)[0].how == how


# ---------------------------------------------------------------------------------------------------------------------
# Every kind, trained by 02's main, saved, and loaded again by a fresh process


@pytest.fixture(scope="module")
def teachers(features, models, tmp_path_factory):
    """{arm: (teacher folder, its logits in the process that trained it)} and the batch they are of."""
    made, batch = {}, some_rows(common.load_tokenizer(str(models["llama"]), common.load_config(str(models["llama"])))).batch(np.arange(7), 1)
    save = Teacher.save
    for arm, (kind, *more) in ARMS.items():
        run = tmp_path_factory.mktemp("teacher")
        (run / "features").symlink_to(features)

        def spy(self, folder, about):
            with torch.inference_mode():
                made[arm] = run / "teacher", self.eval()(*batch)
            save(self, folder, about)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Teacher, "save", spy)
            trainer.main(["--run", str(run), "--model", str(models[kind]), *QUICK, *more])
    return made, batch


def test_reloaded_in_a_fresh_process_with_equal_logits(teachers, tmp_path):
    made, batch = teachers
    torch.save(batch, tmp_path / "batch.pt")
    code = """import sys, torch, common
common.quiet()
batch, out = torch.load(sys.argv[1]), {}
for folder in sys.argv[3:]:
    teacher, about = common.Teacher.load(folder)
    with torch.inference_mode():
        out[folder] = teacher(*batch)
torch.save(out, sys.argv[2])"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "batch.pt", tmp_path / "out.pt", *[str(f) for f, _ in made.values()]], check=True, env=environment(torch.get_num_threads()), cwd=tmp_path)
    out = torch.load(tmp_path / "out.pt")
    for arm, (folder, logits) in made.items():
        torch.testing.assert_close(out[str(folder)], logits, rtol=0, atol=1e-5, msg=lambda m: f"{arm}: {m}")


def test_head_is_fp32_and_never_quantised(teachers):
    for arm, (folder, _) in teachers[0].items():
        teacher, about = Teacher.load(folder, torch.bfloat16)
        assert about["qlora"] == (arm == "llama qlora") and about["lora"] == (arm in ("llama qlora", "llama lora"))
        layers = [m for m in teacher.head if list(m.parameters())]
        assert [type(m) for m in layers] == [nn.Linear] * 3 and layers[-1].out_features == 5
        assert {p.dtype for p in teacher.head.parameters()} == {torch.float32}
        names = {type(m).__name__ for m in teacher.backbone.modules()}
        assert ("Linear4bit" in names) == (arm == "llama qlora")


def test_what_was_trained_is_in_the_files(teachers, models):
    """Head and backbone both moved from where they began."""
    for arm, (folder, logits) in teachers[0].items():
        teacher, about = Teacher.load(folder)
        if about["lora"]:
            with teacher.backbone.disable_adapter(), torch.inference_mode():
                plain = teacher(*teachers[1])
        else:
            before = common.load_backbone(str(models[ARMS[arm][0]]), torch.float32)
            with torch.inference_mode():
                plain = Teacher(before, teacher.kind).eval()
                plain.head = teacher.head
                plain = plain(*teachers[1])
        assert (plain - logits).abs().max() > 1e-3, arm
        assert (folder / "training_log.jsonl").read_text().count("\n") == 4  # three steps and an epoch's end
        assert not list(folder.glob("checkpoint*")) and not list(folder.glob("best*"))


def test_tokenizer_and_config_have_a_pad_token(teachers, models):
    for folder, _ in teachers[0].values():
        config = common.load_config(common.read_json(folder / "teacher.json")["model"])
        config.pad_token_id = None
        tokenizer = common.load_tokenizer(str(folder / "tokenizer"), config)
        assert tokenizer.pad_token_id is not None and config.pad_token_id == tokenizer.pad_token_id
    config = common.load_config(str(models["llama"]))
    assert config.pad_token_id is None
    tokenizer = common.load_tokenizer(str(models["llama"]), config)
    assert tokenizer.pad_token == tokenizer.eos_token and config.pad_token_id == tokenizer.eos_token_id != 0


@pytest.mark.parametrize("arm", ["llama qlora", "llama lora"])
def test_merged_lora_gives_the_same_logits(teachers, arm):
    (folder, logits), batch = teachers[0][arm], teachers[1]
    teacher, _ = Teacher.load(folder)
    with torch.inference_mode():
        before = teacher(*batch)  # a forward pass before the merge, as 03 does
    common.merge_lora(teacher, torch.float32)
    with torch.inference_mode():
        after = teacher(*batch)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(after, logits, rtol=0, atol=1e-4)
    assert {type(m).__name__ for m in teacher.backbone.modules() if hasattr(m, "in_features")} == {"Linear"}
    assert not any("lora" in n for n, _ in teacher.named_parameters())


def quantised(models, dtype=torch.float32):
    args = trainer.parse_args(["--model", str(models["llama"]), "--lora-rank", "4"])
    teacher, lora, qlora = trainer.build_teacher(args, common.load_config(str(models["llama"])), torch.device("cpu"), dtype)
    assert lora and qlora
    for module in teacher.head:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # as after some training: B is no longer zero
        for name, p in teacher.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0), std=0.05)
    return teacher


def test_an_evaluation_changes_nothing_for_the_training_after_it(models):
    """bitsandbytes repacks 4-bit weights for fast inference on some CPUs; gradients no longer pass through them then."""
    teacher = quantised(models)
    ids = torch.randint(4, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)

    def gradients():
        teacher.train().zero_grad()
        teacher(ids, mask).square().sum().backward()
        return {n: p.grad.clone() for n, p in teacher.named_parameters() if p.grad is not None}

    before = gradients()
    teacher.eval()
    with torch.inference_mode():
        teacher(ids, mask)
    after = gradients()
    assert before.keys() == after.keys() and sum("lora_" in n for n in before) == 28  # 2 layers, 7 linear layers, A and B
    for name in before:
        torch.testing.assert_close(after[name], before[name], msg=lambda m: f"{name}: {m}")


def test_qlora_freezes_the_backbone_and_upcasts_nothing(models):
    teacher = quantised(models, torch.bfloat16)
    assert {n.split(".")[0] if n.startswith("head") else "lora" for n, p in teacher.named_parameters() if p.requires_grad} == {"head", "lora"}
    assert all("lora_" in n or n.startswith("head") for n, p in teacher.named_parameters() if p.requires_grad)
    assert teacher.backbone.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in teacher.named_parameters() if "norm" in n} == {torch.bfloat16}
    assert sum("lora_A" in n for n, _ in teacher.named_parameters()) == 14  # on every linear layer


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of models, and folders that are refused


@pytest.mark.parametrize("name,kind", [("bert", "encoder"), ("roberta", "encoder"), ("xlm-roberta", "encoder"), ("deberta-v2", "encoder"), ("modernbert", "encoder"),
                                       ("t5", "encoder-decoder"), ("mt5", "encoder-decoder"), ("llama", "decoder"), ("mistral", "decoder"), ("qwen2", "decoder"), ("gemma2", "decoder"), ("gpt2", "decoder")])
def test_backbone_kind(name, kind):
    assert common.backbone_kind(transformers.AutoConfig.for_model(name)) == kind


@pytest.mark.parametrize("name", ["blip", "clip", "vit"])
def test_other_architectures_are_refused(name):
    assert repr(name) in stop_line(common.backbone_kind, transformers.AutoConfig.for_model(name))


def train_with(run, model, *more):
    return stop_line(trainer.main, ["--run", str(run), "--model", str(model), *QUICK, *more])


def copy_of(folder, to, without=()):
    to.mkdir()
    for path in folder.iterdir():
        if path.name not in without:
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_captioner_as_teacher_is_refused(run):
    assert "'blip'" in train_with(run, TOY_MODELS / "blip")


def test_no_model_at_all(run, tmp_path):
    assert str(tmp_path / "nowhere") in train_with(run, tmp_path / "nowhere")


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors", "tokenizer.json"])
def test_model_folder_without_a_file(run, models, tmp_path, absent):
    assert str(tmp_path / "model") in train_with(run, copy_of(models["bert"], tmp_path / "model", without=[absent]))


class Unpickled:
    ran = False

    def __reduce__(self):
        return (setattr, (Unpickled, "ran", True))


@pytest.mark.parametrize("harmless", [True, False])
def test_pickled_weights_are_refused_unread(run, models, tmp_path, harmless):
    folder = copy_of(models["bert"], tmp_path / "model", without=["model.safetensors"])
    right = transformers.BertModel.from_pretrained(models["bert"]).state_dict()
    torch.save(right if harmless else {"embeddings": Unpickled()}, folder / "pytorch_model.bin")
    line = train_with(run, folder)
    assert str(folder) in line and "safetensors" in line and not Unpickled.ran


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_weights_of_another_architecture_are_refused(run, models, tmp_path, kind):
    """transformers would begin with random weights and say so only in a log."""
    folder = copy_of(models[kind], tmp_path / "model", without=["model.safetensors"])
    (folder / "model.safetensors").write_bytes((models["deberta"] / "model.safetensors").read_bytes())
    assert str(folder) in train_with(run, folder, "--no-qlora")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"nonsense \xff", b"[]", b"null"], ids=repr)
def test_garbage_in_a_model_folder_is_one_line(run, models, tmp_path, name, content):
    folder = copy_of(models["bert"], tmp_path / "model")
    (folder / name).write_bytes(content)
    assert str(folder) in train_with(run, folder)


def test_truncated_weights_are_refused(run, models, tmp_path):
    folder = copy_of(models["bert"], tmp_path / "model", without=["model.safetensors"])
    raw = (models["bert"] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:len(raw) // 2])
    assert str(folder) in train_with(run, folder)


@pytest.mark.parametrize("error", [ImportError("bitsandbytes is not here"), RuntimeError("no kernel for this\ndevice"), ValueError("not supported"), OSError("libbitsandbytes.so")], ids=lambda e: type(e).__name__)
def test_where_4_bit_fails_the_line_names_the_way_out(run, models, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", fail)
    line = train_with(run, models["llama"])
    assert "--no-qlora" in line and common.first_line(error) in line
    assert not (run / "teacher" / "head.safetensors").exists()  # no other way is taken


def test_loss_that_is_not_finite_stops(run, models):
    line = train_with(run, models["bert"], "--encoder-lr", "1e30", "--head-lr", "1e30", "--warmup", "0")
    assert "loss" in line and "step 2" in line and "--lr" in line


def test_text_longer_than_the_model_reads_is_refused(run, models):
    assert "128" in train_with(run, models["bert"], "--max-tokens", "129")
    config = transformers.AutoConfig.for_model("roberta", max_position_embeddings=130, pad_token_id=1)
    assert common.fit_length(128, config) == 128 and "128" in stop_line(common.fit_length, 129, config)
    assert common.fit_length(5_000, transformers.AutoConfig.for_model("t5")) == 5_000  # relative positions


@pytest.mark.parametrize("wrong", [["--fields", "title,nonsense"], ["--fields", ""], ["--qlora", "--no-lora"], ["--epoch", "1"], ["--unknown"]])
def test_wrong_flags(wrong):
    with pytest.raises(SystemExit) as e:
        trainer.parse_args(wrong)
    assert e.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# Rows into batches


def test_token_ids_are_the_pairs_texts(features, models):
    text = PairText(common.load_tokenizer(str(models["bert"]), common.load_config(str(models["bert"]))), "encoder", ("title", "caption"), 32)
    rows = trainer.read_labelled(features, "train")
    ids = trainer.token_ids(features, text, rows["query_index"], rows["pin_index"])
    import pyarrow.parquet as pq

    queries, pins = pq.read_table(features / "queries.parquet").to_pylist(), pq.read_table(features / "pins.parquet").to_pylist()
    assert len(ids) == len(rows["label"]) == 300
    for i in (0, 17, 299):
        query, pin = queries[rows["query_index"][i]], pins[rows["pin_index"][i]]
        assert (query["query_id"], pin["pin_id"]) == (rows["query_id"][i], rows["pin_id"][i])
        expected = text.pair(text.queries([query["query"]])[0], text.pins({f: [pin[f]] for f in ("title", "caption")})[0])
        assert ids.flat[ids.start[i]:ids.start[i] + ids.lengths[i]].tolist() == expected


@given(st.lists(st.integers(1, 90), min_size=1, max_size=150), st.integers(1, 20), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_has_every_row_once(sizes, batch_rows, seed, epoch):
    sizes = np.array(sizes)
    batches = trainer.epoch_batches(sizes, batch_rows, seed, epoch, pool=3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(sizes)))
    assert Counter(len(b) for b in batches) == Counter([batch_rows] * (len(sizes) // batch_rows) + [len(sizes) % batch_rows] * (len(sizes) % batch_rows > 0))
    for a, b in zip(batches, trainer.epoch_batches(sizes, batch_rows, seed, epoch, pool=3)):
        np.testing.assert_array_equal(a, b)


def test_epochs_and_seeds_shuffle_anew_and_batches_have_little_padding():
    sizes = np.random.default_rng(0).integers(5, 200, 2_000)
    order = lambda *key: np.concatenate(trainer.epoch_batches(sizes, 32, *key)).tolist()
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    padded = sum(sizes[b].max() * len(b) for b in trainer.epoch_batches(sizes, 32, 0, 0))
    assert padded < 1.2 * sizes.sum() < sum(sizes[b].max() * len(b) for b in np.array_split(np.arange(2_000), 63))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 300), st.integers(1, 5))
def test_micro_batches(sizes, budget, world):
    sizes = np.array(sizes)
    batch = np.random.default_rng(0).permutation(len(sizes))
    parts = [trainer.micro_batches(batch, sizes, budget, rank, world) for rank in range(world)]
    assert sorted(row for part in parts for piece in part for row in piece) == list(range(len(sizes)))  # every row, on one process
    assert len({len(part) for part in parts}) == 1  # as many passes everywhere: gradients are exchanged in step
    for part in parts:
        for piece in part:
            assert len(piece) <= 1 or len(piece) * sizes[piece].max() <= budget


class OneOfMany:
    """What `gradients` uses of an Accelerator, for one of several processes that are run one after another: nothing is exchanged."""

    device = torch.device("cpu")

    def __init__(self, rank, world):
        self.process_index, self.num_processes = rank, world

    no_sync = staticmethod(lambda model: contextlib.nullcontext())
    backward = staticmethod(lambda loss: loss.backward())
    reduce = staticmethod(lambda value, how: value)


@pytest.mark.parametrize("budget,world", [(10_000, 1), (40, 1), (10_000, 2), (16, 3), (10_000, 9)])
def test_gradients_are_those_of_the_mean_over_the_batch(models, budget, world):
    """In one pass or several, on one process or several (9: some have no row): the gradient of the batch's mean cross-entropy."""
    teacher, tokenizer = untrained(models, "bert", dropout=0.0)
    packed, labels, batch = some_rows(tokenizer), torch.tensor([0, 1, 2, 3, 4, 0, 1]), np.array([6, 2, 3, 0, 5, 1])
    assert (len(trainer.micro_batches(batch, packed.lengths, budget, 0, world)) > 1) == (budget < 10_000)
    collect = lambda: torch.cat([p.grad.ravel() for p in teacher.parameters() if p.grad is not None])
    expected_loss = nn.functional.cross_entropy(teacher(*packed.batch(batch, tokenizer.pad_token_id)), labels[batch])
    expected_loss.backward()
    expected = collect()
    teacher.zero_grad()
    args = argparse.Namespace(batch_tokens=budget)
    loss = sum(trainer.gradients(teacher, teacher, batch, packed, labels, args, OneOfMany(rank, world), torch.float32, tokenizer.pad_token_id) for rank in range(world))
    assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
    torch.testing.assert_close(collect() / world, expected, rtol=1e-4, atol=1e-6)  # data-parallel training averages over processes


def test_learning_rate():
    warmup, steps = 0.1, 1_000
    factors = np.array([common.lr_factor(i / steps, warmup) for i in range(steps)])
    assert 0 < factors[0] < 0.02 and factors[99] == pytest.approx(1, abs=0.02) and factors[100] == 1
    assert (np.diff(factors[:100]) > 0).all() and (np.diff(factors[100:]) < 0).all()
    np.testing.assert_allclose(factors[100:], (1 - np.arange(100, steps) / steps) / 0.9)  # a straight line that would reach 0 at the end
    assert common.lr_factor(0, 0) == 1
