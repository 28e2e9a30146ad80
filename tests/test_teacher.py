"""The teacher: pooling, every kind of backbone saved and loaded again, LoRA merged, batches, and model
folders that are refused."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from helpers import TOY_MODELS, environment, mark_finished, stage, stop_line, synthetic
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common import PairText, Teacher, linear_warmup_decay, pad_rows, pooling
from lib import models as loading
from lib.inputs.rows import LabelledRows, epoch_batches, micro_batches, split_rows
from lib.stages.files import read_json, write_parquet
from lib.stages.terminal import first_line

trainer, labeller = stage("02"), stage("03")

CONDITIONS = {
    "bert": ("bert",),
    "t5": ("t5",),
    "deberta": ("deberta",),
    "llama qlora": ("llama",),
    "llama lora": ("llama", "--finetuning", "lora"),
    "llama full": ("llama", "--finetuning", "full"),
}
QUICK = ["--rows", "48", "--epochs", "1", "--batch-size", "16", "--max-tokens", "48", "--lora-rank", "4"]
QUICK += ["--lr", "1e-2", "--encoder-lr", "1e-3", "--device", "cpu", "--precision", "fp32"]


# ------------------------------------------------------------------------------------------------------------
# Pooling


def test_pooling_by_hand():
    hidden = torch.arange(2 * 4 * 1, dtype=torch.float32).reshape(2, 4, 1)
    right, left = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert pooling(hidden, right, "last").ravel().tolist() == [2, 7]
    assert pooling(hidden, left, "last").ravel().tolist() == [3, 7]
    assert pooling(hidden, right, "first").ravel().tolist() == [0, 4]
    assert pooling(hidden, left, "first").ravel().tolist() == [2, 4]


@pytest.mark.parametrize("which", ["first", "last"])
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_pooling_finds_the_token_whatever_the_padding(which, sizes):
    rows = [np.arange(10 * i, 10 * i + n, dtype=np.int32) for i, n in enumerate(sizes)]
    wanted = [row[0 if which == "first" else -1] for row in rows]
    for side in ("left", "right"):
        ids, mask = pad_rows(rows, pad_id=wanted[0], side=side)  # the pad id is a token that matters
        assert pooling(ids[..., None].float(), mask, which).ravel().tolist() == wanted


def tokenizer_of(folder):
    return loading.load_tokenizer(folder, loading.load_config(folder))


def untrained(models, kind, **more):
    torch.manual_seed(1)
    backbone = loading.load_backbone(models[kind], torch.float32)
    teacher = Teacher(backbone, loading.backbone_kind(backbone.config), **more)
    return teacher.eval(), tokenizer_of(models[kind])


def some_rows(tokenizer):
    """Rows of different length; one holds the pad token alone, one ends with it."""
    rng, pad = np.random.default_rng(0), tokenizer.pad_token_id
    rows = [rng.integers(0, len(tokenizer), n).tolist() for n in (9, 1, 17, 4, 30)]
    return [np.array(row, np.int32) for row in [*rows, [pad] * 6, [*rows[0], pad, pad]]]


@torch.inference_mode()
def logits_of(teacher, rows, pad_id, side="right"):
    return teacher(*pad_rows(rows, pad_id, side))


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_a_batch_gives_what_each_row_gives_alone(models, kind):
    teacher, tokenizer = untrained(models, kind)
    rows, pad = some_rows(tokenizer), tokenizer.pad_token_id
    alone = torch.cat([logits_of(teacher, [row], pad) for row in rows])
    assert len(torch.unique(alone, dim=0)) == len(rows)  # the rows are told apart
    torch.testing.assert_close(logits_of(teacher, rows, pad), alone, rtol=0, atol=2e-5)
    if kind != "bert":  # BERT's absolute positions count from the left edge of the batch
        torch.testing.assert_close(logits_of(teacher, rows, pad, "left"), alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_soft_labels_come_in_the_rows_order(models, kind):
    teacher, tokenizer = untrained(models, kind)
    rows, pad, seen = some_rows(tokenizer), tokenizer.pad_token_id, []
    expected = torch.cat([logits_of(teacher, [row], pad) for row in rows]).double().softmax(1).numpy()
    for budget in (1, 40, 10_000):
        got = labeller.soft_labels(teacher, rows, pad, budget, on_batch=seen.append)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert sum(seen) == 3 * len(rows)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)


def test_read_out_token_of_every_kind(models):
    for kind, which in (("bert", "first"), ("deberta", "first"), ("t5", "first"), ("llama", "last")):
        assert untrained(models, kind)[0].pooling == which


# ------------------------------------------------------------------------------------------------------------
# Every kind, trained by 02's main, saved, and loaded again by a fresh process


@pytest.fixture(scope="module")
def teachers(features, models, tmp_path_factory):
    """{condition: (teacher folder, its logits in the process that trained it)} and the batch they are of."""
    made, batch = {}, pad_rows(some_rows(tokenizer_of(models["llama"])), 1)
    save = Teacher.save
    for condition, (kind, *more) in CONDITIONS.items():
        run = tmp_path_factory.mktemp("teacher")
        (run / "features").symlink_to(features)

        def spy(self, folder, about, condition=condition, run=run):
            with torch.inference_mode():
                made[condition] = run / "teacher", self.eval()(*batch)
            save(self, folder, about)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Teacher, "save", spy)
            trainer.main(["--run", str(run), "--model", str(models[kind]), *QUICK, *more])
    return made, batch


def test_reloaded_in_a_fresh_process_with_equal_logits(teachers, tmp_path):
    made, batch = teachers
    torch.save(batch, tmp_path / "batch.pt")
    code = """import sys, torch, common
batch, out = torch.load(sys.argv[1]), {}
for folder in sys.argv[3:]:
    teacher, about = common.Teacher.load(folder)
    with torch.inference_mode():
        out[folder] = teacher(*batch)
torch.save(out, sys.argv[2])"""
    folders = [str(folder) for folder, _ in made.values()]
    argv = [sys.executable, "-c", code, tmp_path / "batch.pt", tmp_path / "out.pt", *folders]
    subprocess.run(argv, check=True, env=environment(torch.get_num_threads()), cwd=tmp_path)
    out = torch.load(tmp_path / "out.pt")
    for condition, (folder, logits) in made.items():
        found = out[str(folder)]
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5, msg=condition)


def test_head_is_fp32_and_never_quantized(teachers):
    for condition, (folder, _) in teachers[0].items():
        teacher, about = Teacher.load(folder, torch.bfloat16)
        assert about["finetuning"] == {"llama qlora": "qlora", "llama lora": "lora"}.get(condition, "full")
        layers = [m for m in teacher.head if list(m.parameters())]
        assert [type(m) for m in layers] == [nn.Linear] * 3 and layers[-1].out_features == 5
        assert {p.dtype for p in teacher.head.parameters()} == {torch.float32}
        names = {type(m).__name__ for m in teacher.backbone.modules()}
        assert ("Linear4bit" in names) == (condition == "llama qlora")


def test_what_was_trained_is_in_the_files(teachers, models):
    """Head and backbone both moved from where they began."""
    for condition, (folder, logits) in teachers[0].items():
        teacher, about = Teacher.load(folder)
        with torch.inference_mode():
            if about["finetuning"] == "full":
                before = loading.load_backbone(models[CONDITIONS[condition][0]], torch.float32)
                plain = Teacher(before, teacher.kind).eval()
                plain.head = teacher.head
                plain = plain(*teachers[1])
            else:
                with teacher.backbone.disable_adapter():
                    plain = teacher(*teachers[1])
        assert (plain - logits).abs().max() > 1e-3, condition
        # three steps and an epoch's end
        assert (folder / "training_log.jsonl").read_text().count("\n") == 4
        assert not list(folder.glob("checkpoint*")) and not list(folder.glob("best*"))


def test_every_tokenizer_has_a_pad_token_and_no_config_is_changed(teachers, models):
    """A changed pad id moved the positions of XLM-R's kin, which count from it, in 02 but not in 03."""
    for folder, _ in teachers[0].values():
        config = loading.load_config(read_json(folder / "teacher.json")["model"])
        before = config.to_dict()
        tokenizer = loading.load_tokenizer(folder / "tokenizer", config)
        assert 0 <= tokenizer.pad_token_id < config.vocab_size and config.to_dict() == before
    tokenizer = tokenizer_of(models["llama"])  # has none, as Llama 3
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.pad_token_id != 0


@pytest.mark.parametrize("condition", ["llama qlora", "llama lora"])
def test_merged_lora_gives_the_same_logits(teachers, condition):
    (folder, logits), batch = teachers[0][condition], teachers[1]
    teacher, _ = Teacher.load(folder)
    with torch.inference_mode():
        before = teacher(*batch)  # a forward pass before the merge, as 03 does
    labeller.merge_lora(teacher, folder / "adapter")
    with torch.inference_mode():
        after = teacher(*batch)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(after, logits, rtol=0, atol=1e-4)
    assert {type(m).__name__ for m in teacher.backbone.modules() if hasattr(m, "in_features")} == {"Linear"}
    assert not any("lora" in name for name, _ in teacher.named_parameters())


def quantized(models, dtype=torch.float32):
    settings = trainer.Settings(model=str(models["llama"]), lora_rank=4)
    config = loading.load_config(models["llama"])
    backbone, finetuning = trainer.load_trainable(settings, config, "cpu", dtype)
    assert finetuning == "qlora"
    teacher = Teacher(backbone, "decoder", dtype)
    for module in teacher.head:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():  # as after some training: B is no longer zero
        for name, p in teacher.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0), std=0.05)
    return teacher


def test_an_evaluation_changes_nothing_for_the_training_after_it(models):
    """bitsandbytes repacks 4-bit weights for fast inference on some CPUs; gradients no longer pass through
    them then."""
    teacher = quantized(models)
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
    assert before.keys() == after.keys()
    assert sum("lora_" in n for n in before) == 28  # 2 layers, 7 linear layers, A and B
    for name in before:
        torch.testing.assert_close(after[name], before[name], msg=name)


def test_qlora_freezes_the_backbone_and_upcasts_nothing(models):
    teacher = quantized(models, torch.bfloat16)
    trainable = [name for name, p in teacher.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith("head") for name in trainable)
    assert any("lora_" in name for name in trainable) and any(name.startswith("head") for name in trainable)
    assert teacher.backbone.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in teacher.named_parameters() if "norm" in n} == {torch.bfloat16}
    assert sum("lora_A" in n for n, _ in teacher.named_parameters()) == 14  # on every linear layer


# ------------------------------------------------------------------------------------------------------------
# Kinds of models, and folders that are refused


KINDS = {
    "encoder": ["bert", "roberta", "xlm-roberta", "deberta-v2", "modernbert"],
    "encoder-decoder": ["t5", "mt5"],
    "decoder": ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_backbone_kind(kind):
    for name in KINDS[kind]:
        assert loading.backbone_kind(transformers.AutoConfig.for_model(name)) == kind


@pytest.mark.parametrize("name", ["blip", "clip", "vit"])
def test_other_architectures_are_refused(name):
    assert repr(name) in stop_line(loading.backbone_kind, transformers.AutoConfig.for_model(name))


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
    assert str(tmp_path / "model") in train_with(
        run, copy_of(models["bert"], tmp_path / "model", without=[absent])
    )


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
    assert str(folder) in train_with(run, folder, "--finetuning", "full")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"nonsense \xff", b"[]", b"null"], ids=repr)
def test_garbage_in_a_model_folder_is_one_line(run, models, tmp_path, name, content):
    folder = copy_of(models["bert"], tmp_path / "model")
    (folder / name).write_bytes(content)
    assert str(folder) in train_with(run, folder)


def test_truncated_weights_are_refused(run, models, tmp_path):
    folder = copy_of(models["bert"], tmp_path / "model", without=["model.safetensors"])
    raw = (models["bert"] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    assert str(folder) in train_with(run, folder)


FAILURES = [ImportError("bitsandbytes is not here"), RuntimeError("no kernel for this\ndevice")]
FAILURES += [ValueError("not supported"), OSError("libbitsandbytes.so")]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_where_4_bit_fails_the_line_names_the_way_out(run, models, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", fail)
    line = train_with(run, models["llama"])
    assert "--finetuning lora" in line and first_line(error) in line
    assert not (run / "teacher" / "head.safetensors").exists()  # no other way is taken


def test_loss_that_is_not_finite_stops(run, models):
    line = train_with(run, models["bert"], "--encoder-lr", "1e30", "--head-lr", "1e30", "--warmup", "0")
    assert "loss" in line and "training rows [" in line and "--lr" in line
    assert "--encoder-lr" in line and "--head-lr" in line and "--weight-decay" in line


def test_text_longer_than_the_model_reads_is_refused(run, models):
    assert "128" in train_with(run, models["bert"], "--max-tokens", "129")
    config = transformers.AutoConfig.for_model("roberta", max_position_embeddings=130, pad_token_id=1)
    assert loading.fit_length(128, config) == 128 and "128" in stop_line(loading.fit_length, 129, config)
    assert loading.fit_length(5_000, transformers.AutoConfig.for_model("t5")) == 5_000  # relative positions


WRONG = ["--fields title nonsense", "--finetuning half", "--epoch 1", "--unknown", "--epochs 0", "--rows 0"]
WRONG += [
    "--lr -1",
    "--lr nan",
    "--batch-size 0",
    "--warmup 1",
    "--device gpu",
    "--precision fp16",
    "--seed -1",
    "--seed 1000000000",
    "--lora-rank 1000000",
    "--layer-decay 0",
    "--layer-decay 1e30",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_flags(wrong, tmp_path):
    with pytest.raises(SystemExit) as e:
        trainer.main(["--run", str(tmp_path / "run"), *wrong.split()])
    assert e.value.code == 2 and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------
# Rows into batches


def test_rows_stand_in_one_order_whatever_that_of_the_table(models, tmp_path):
    """Also those that are the same to the teacher, as of queries that differ in spaces, of which some are
    held out: another order was another teacher."""
    _, human = synthetic(tmp_path, shards=1)
    features, found = tmp_path / "features", []
    queries = pq.read_table(features / "queries.parquet")
    texts = pa.array([f"red{' ' * i} chair" for i in range(len(queries))])
    write_parquet(features / "queries.parquet", queries.set_column(1, "query", texts))
    text = PairText(tokenizer_of(models["bert"]), "encoder", ("title", "caption"), 32)
    for step in (1, -1):
        write_parquet(features / "labelled.parquet", {name: x[::step] for name, x in human.items()})
        rows = LabelledRows(features, text, trainer.Settings())
        assert len({row.tobytes() for row in rows.ids}) == 1 and 0 < len(rows.held_out) < len(rows.ids) / 10
        found.append((rows.held_out.tolist(), rows.train.tolist(), rows.levels.tolist()))
    assert found[0] == found[1]


def test_token_ids_are_the_pairs_texts(features, models):
    text = PairText(tokenizer_of(models["bert"]), "encoder", ("title", "caption"), 32)
    rows = LabelledRows(features, text, trainer.Settings())
    labelled = pq.read_table(features / "labelled.parquet", filters=[("split", "=", "train")]).to_pylist()
    queries = pq.read_table(features / "queries.parquet").to_pylist()
    pins = pq.read_table(features / "pins.parquet").to_pylist()
    expected = []
    for row in labelled:
        query, pin = queries[row["query_index"]], pins[row["pin_index"]]
        pin_ids = text.pins({field: [pin[field]] for field in ("title", "caption")})
        ids = text.pair(text.queries([query["query"]])[0], pin_ids[0])
        expected.append((ids.tobytes(), row["label"] - 1))
    found = [ids.tobytes() for ids in rows.ids]
    assert len(labelled) == 300 and [*zip(found, rows.levels.tolist())] == sorted(expected)


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=150),
    st.integers(1, 20),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_an_epoch_has_every_row_once(lengths, batch_size, seed, epoch):
    lengths = np.array(lengths)
    batches = epoch_batches(lengths, batch_size, seed, epoch, pool=3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    full, rest = divmod(len(lengths), batch_size)
    assert Counter(map(len, batches)) == Counter([batch_size] * full + [rest] * (rest > 0))
    for a, b in zip(batches, epoch_batches(lengths, batch_size, seed, epoch, pool=3)):
        np.testing.assert_array_equal(a, b)


def test_epochs_and_seeds_shuffle_anew_and_batches_have_little_padding():
    lengths = np.random.default_rng(0).integers(5, 200, 2_000)

    def order(seed, epoch):
        return np.concatenate(epoch_batches(lengths, 32, seed, epoch)).tolist()

    def positions(batches):
        return sum(lengths[batch].max() * len(batch) for batch in batches)

    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert positions(epoch_batches(lengths, 32, 0, 0)) < 1.2 * lengths.sum()
    assert 1.2 * lengths.sum() < positions(np.array_split(np.arange(2_000), 63))


def test_few_rows_have_more_epochs():
    """About 400 steps, in 3 to 10 epochs; 3 where ten make fewer."""
    assert trainer.passes_over(100_000, 32) == trainer.passes_over(32 * 133, 32) == 3
    assert trainer.passes_over(32 * 100, 32) == 4
    assert trainer.passes_over(32 * 40, 32) == 10 and trainer.passes_over(476, 32) == 3


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 300), st.integers(1, 5))
def test_micro_batches(lengths, budget, world):
    lengths = np.array(lengths)
    batch = np.random.default_rng(0).permutation(len(lengths))
    parts = [micro_batches(batch, lengths, budget, rank, world) for rank in range(world)]
    rows = [row for part in parts for piece in part for row in piece]
    assert sorted(rows) == list(range(len(lengths)))  # every row, on one process
    assert len({len(part) for part in parts}) == 1  # as many passes everywhere
    for part in parts:
        for piece in part:
            assert len(piece) <= 1 or len(piece) * lengths[piece].max() <= budget


class OneOfMany:
    """What train_step uses of an Accelerator, for one of several processes that are run one after another:
    nothing is exchanged."""

    device = torch.device("cpu")

    def __init__(self, rank, world):
        self.process_index, self.num_processes = rank, world

    no_sync = staticmethod(lambda model: contextlib.nullcontext())
    backward = staticmethod(lambda loss: loss.backward())
    reduce = staticmethod(lambda value, how: value)
    unwrap_model = staticmethod(lambda model: model)


def labelled_rows(ids, levels, pad_id):
    """A LabelledRows that was not read from features."""
    rows = LabelledRows.__new__(LabelledRows)
    rows.ids, rows.levels, rows.pad_id = ids, levels, pad_id
    rows.lengths = np.array([len(row) for row in ids])
    return rows


@pytest.mark.parametrize("budget,world", [(10_000, 1), (40, 1), (10_000, 2), (16, 3), (10_000, 9)])
def test_gradients_are_those_of_the_mean_over_the_batch(models, budget, world):
    """In one pass or several, on one process or several (9: some have no row): the gradient of the batch's
    mean loss, here a small one that is not cut."""
    teacher, tokenizer = untrained(models, "bert", dropout=0.0)
    teacher.train = lambda: teacher  # no dropout
    teacher.loss = lambda logits, level: 1e-3 * nn.functional.cross_entropy(logits, level, reduction="sum")
    rows = labelled_rows(some_rows(tokenizer), torch.tensor([0, 1, 2, 3, 4, 0, 1]), tokenizer.pad_token_id)
    batch = np.array([6, 2, 3, 0, 5, 1])
    assert (len(micro_batches(batch, rows.lengths, budget, 0, world)) > 1) == (budget < 10_000)

    def collect():
        return torch.cat([p.grad.ravel() for p in teacher.parameters() if p.grad is not None])

    ids, mask, levels = rows.batch(batch, torch.device("cpu"))
    expected_loss = 1e-3 * nn.functional.cross_entropy(teacher(ids, mask), levels)
    expected_loss.backward()
    expected = collect()
    teacher.zero_grad()
    waits = SimpleNamespace(param_groups=[], step=lambda: None, zero_grad=lambda set_to_none: None)
    loss, settings = 0.0, replace(trainer.TOY, batch_tokens=budget)
    for rank in range(world):
        loss += trainer.train_step(teacher, waits, rows, batch, 1.0, settings, OneOfMany(rank, world))
    assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
    # data-parallel training averages over processes
    torch.testing.assert_close(collect() / world, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["bert", "t5", "deberta"])
def test_lower_layers_learn_more_slowly_and_vectors_do_not_decay(models, kind):
    """Half the rate a layer, from the top down; what is outside the layers is below them; the head's own."""
    teacher, _ = untrained(models, kind)
    settings = replace(trainer.TOY, encoder_lr=0.01, head_lr=0.7, layer_decay=0.5, weight_decay=0.1)
    optimizer = trainer.make_optimizer(teacher, "full", settings)
    group_of = {weight: group for group in optimizer.param_groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(teacher.parameters()))
    depth = teacher.backbone.config.num_hidden_layers
    for name, weight in teacher.named_parameters():
        layer = re.search(r"(?:layer|block)\.(\d+)\.", name)
        expected = 0.01 * 0.5 ** (depth - 1 - int(layer[1]) if layer else depth)
        group = group_of[weight]
        assert group["lr"] == group["peak"] == pytest.approx(0.7 if name.startswith("head") else expected)
        assert group["weight_decay"] == (0.1 if weight.ndim > 1 else 0.0)
    same = trainer.make_optimizer(teacher, "full", replace(settings, layer_decay=1.0)).param_groups
    assert sorted({group["peak"] for group in same}) == [0.01, 0.7]


XLM = dict(vocab_size=30, emb_dim=16, n_layers=3, n_heads=2, max_position_embeddings=32)
FUNNEL = dict(vocab_size=30, block_sizes=[2, 2], d_model=16, n_head=2, d_head=8, d_inner=16)


def test_layers_whose_parts_are_in_several_lists_or_in_lists_of_lists():
    teacher = Teacher(loading.random_backbone(transformers.XLMConfig(**XLM)), "encoder", torch.float32)
    rates = trainer.peak_rates(teacher, "full", replace(trainer.TOY, encoder_lr=1.0, layer_decay=0.5))
    for name, weight in teacher.backbone.named_parameters():
        layer = re.search(r"(?:attentions|layer_norm1|ffns|layer_norm2)\.(\d+)\.", name)
        assert rates[weight] == 0.5 ** (2 - int(layer[1]) if layer else 3), name
    funnel = transformers.FunnelBaseModel(transformers.FunnelConfig(**FUNNEL))
    assert [type(part).__name__ for [part] in loading.layers_of(funnel)] == ["FunnelLayer"] * 4


def test_layers_of_unknown_order_have_one_rate():
    """Pictures and text are read by two stacks."""
    teacher = Teacher(loading.random_backbone(transformers.XLMConfig(**XLM)), "encoder", torch.float32)
    teacher.backbone.vision = nn.ModuleList([nn.Linear(2, 2)] * 3 + [nn.ReLU()])
    settings = replace(trainer.TOY, layer_decay=0.5)
    assert "--layer-decay" in stop_line(trainer.peak_rates, teacher, "full", settings)
    assert len({*trainer.peak_rates(teacher, "full", replace(settings, layer_decay=1.0)).values()}) == 2


def test_a_single_row_can_be_described(capsys, models):
    teacher, tokenizer = untrained(models, "bert")
    rows = labelled_rows(some_rows(tokenizer), torch.tensor([0, 1, 2, 3, 4, 0, 1]), tokenizer.pad_token_id)
    rows.train, rows.held_out = np.array([5]), np.array([], int)
    vars(rows).update(train_queries=1, held_out_queries=0, match={})
    labeller.summary.describe_teacher(teacher, "full", rows, trainer.TOY)
    said = capsys.readouterr().out
    assert "1 highly irrelevant 100 %" in said.lower() and "nothing" not in said
    given = ["--preset", "small", "--lr", "0.1", "--encoder-lr=0.1"]
    for finetuning, idle in (("full", "--lr"), ("lora", "--encoder-lr"), ("qlora", "--encoder-lr")):
        settings = trainer.parse(trainer.PRESETS, given)
        labeller.summary.describe_teacher(teacher, finetuning, rows, settings)
        assert f"--finetuning {finetuning} these do nothing: {idle}\n" in capsys.readouterr().out


def test_learning_rate():
    warmup, steps = 0.1, 1_000
    factors = np.array([linear_warmup_decay(i / steps, warmup) for i in range(steps)])
    assert 0 < factors[0] < 0.02 and factors[99] == pytest.approx(1, abs=0.02) and factors[100] == 1
    assert (np.diff(factors[:100]) > 0).all() and (np.diff(factors[100:]) < 0).all()
    # a straight line that would reach 0 at the end
    np.testing.assert_allclose(factors[100:], (1 - np.arange(100, steps) / steps) / 0.9)
    assert linear_warmup_decay(0, 0) == 1


# ------------------------------------------------------------------------------------------------------------
# Held out


def test_held_out_rows_are_of_whole_queries_and_at_most_a_tenth():
    stage_02 = stage("02")
    for queries in (1, 2, 12, 100, 400):
        for seed in range(5):
            sizes = np.random.default_rng(seed).integers(1, 60, queries)
            keys = [f"query {i}" for i, size in enumerate(sizes) for _ in range(size)]
            train, held_out, _ = split_rows(keys, replace(stage_02.TOY, seed=seed))
            assert sorted([*train, *held_out]) == list(range(len(keys)))
            assert len(held_out) <= len(keys) / 10 and len(train)
            assert not {keys[row] for row in train} & {keys[row] for row in held_out}
            assert len(held_out) or queries < 100


def test_one_training_query_trains_without_held_out_rows(run, models, capsys):
    """It ended in a traceback: no row was held out, and no epoch could be chosen."""
    features = run / "features"
    own = run.parent / "one" / "features"
    shutil.copytree(features, own)
    labelled = pq.read_table(own / "labelled.parquet")
    train = labelled.filter(pc.equal(labelled["split"], "train"))
    first = train.filter(pc.equal(train["query_index"], train["query_index"][0]))
    write_parquet(own / "labelled.parquet", first)
    mark_finished(own)
    argv = ["--run", str(own.parent), "--model", str(models["bert"]), "--epochs", "2", "--device", "cpu"]
    stage("02").main(argv)
    said = capsys.readouterr().out
    assert "none held out" in said
    text = (own.parent / "teacher" / "training_log.jsonl").read_text()
    log = [json.loads(line) for line in text.splitlines()]
    assert [line["epoch"] for line in log if "train_loss" in line] == [1, 2]
    assert read_json(own.parent / "teacher" / "stage.json")["scores"]["epoch"] == 2


def test_activations_computed_again_give_the_same_gradients(models, capsys):
    """With dropout too, which is drawn once. On a CPU they are kept."""
    trainer, teacher = stage("02"), quantized(models)
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, print=print)
    gradients = []
    for again in (False, True):
        trainer.checkpoint_activations(teacher.train(), None, trainer.Settings(), accelerator)
        assert "activations are kept" in capsys.readouterr().out
        if again:
            trainer.computed_again(teacher.backbone)
        torch.manual_seed(0)
        ids = torch.arange(24).reshape(2, 12) % 20
        teacher(ids, torch.ones_like(ids)).square().sum().backward()
        gradients.append([p.grad.clone() for p in teacher.parameters() if p.requires_grad])
        teacher.zero_grad(set_to_none=True)
    assert teacher.backbone.base_model.model.is_gradient_checkpointing
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


@pytest.mark.parametrize("free, fits", [(10_000, False), (10**12, True), (None, False)])
def test_activations_are_kept_where_they_fit(models, monkeypatch, free, fits):
    """free: bytes; None: the pass itself does not fit."""
    trainer, teacher, asked = stage("02"), quantized(models), []

    def batch(rows, device):
        asked.append(len(rows))
        if free is None:
            raise torch.OutOfMemoryError
        ids = torch.ones(len(rows), 12, dtype=torch.long)
        return ids, ids, torch.zeros(len(rows), dtype=torch.long)

    memory = {"reset_peak_memory_stats": None, "empty_cache": None, "memory_reserved": 0}
    memory |= {"max_memory_allocated": 1_000, "mem_get_info": (free, 0)}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    rows = SimpleNamespace(lengths=np.array([3, 12, 7]), batch=batch)
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=1, print=print)
    settings = trainer.Settings(batch_tokens=100, batch_size=16)
    assert trainer.activations_fit(teacher, rows, settings, accelerator.device) == fits
    assert asked == [8] and all(p.grad is None for p in teacher.parameters())
    trainer.checkpoint_activations(teacher, rows, settings, accelerator)
    assert teacher.backbone.base_model.model.is_gradient_checkpointing != fits
