"""Kinds of language models: each of the paper's architectures through 02 and 03 with the tokenizer of its hub
folder, others read right or refused in one line, and what a config or a folder promises put to the test."""

import shutil
from datetime import timedelta

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from conftest import save_tokenizer, toy_words
from helpers import TOY_MODELS, stage, stop_line
from safetensors.torch import load_file, save_file

from common import PairText, Teacher
from lib import models as loading
from lib.inputs.encoders import Captioner, TextEncoder
from lib.inputs.pairs import read_labels
from lib.stages import processes
from lib.stages.files import read_json, write_json

trainer, labeller = stage("02"), stage("03")

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SIZE |= dict(max_position_embeddings=128)
DECODER = SIZE | dict(num_key_value_heads=1, head_dim=16)
T5 = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
DEBERTA = SIZE | dict(type_vocab_size=0, relative_attention=True, position_buckets=16, share_att_key=True)
DEBERTA |= dict(pos_att_type=["p2c", "c2p"], position_biased_input=False, norm_rel_ebd="layer_norm")
MODERN = SIZE | dict(bos_token_id=0, eos_token_id=1, cls_token_id=0, sep_token_id=1, pad_token_id=2)
IMAGES = SIZE | dict(image_size=28, patch_size=14)
MOE = DECODER | dict(num_experts_per_tok=2)

# Special pieces of the hub's SentencePiece models, and what tokenizer_config.json says.
BERT_PIECES = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]")
BERT_PIECES |= dict(eos_piece="[SEP]", unk_piece="[UNK]")
PIECES = {
    "deberta-v2": ("spm.model", "DebertaV2Tokenizer", BERT_PIECES),
    "xlm-roberta": ("sentencepiece.bpe.model", "XLMRobertaTokenizer", dict(unk_id=0, bos_id=1, eos_id=2)),
    "t5": ("spiece.model", "T5Tokenizer", dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)),
    "llama": ("tokenizer.model", "LlamaTokenizer", dict(model_type="bpe", byte_fallback=True)),
}


def sentencepiece_folder(folder, kind):
    """A SentencePiece model alone, without tokenizer.json. Returns the size of the vocabulary."""
    file, tokenizer_class, options = PIECES[kind]
    words = toy_words()
    lines = [f"{a} for ideas title: description: {b}" for a, b in zip(words, reversed(words))]
    folder.mkdir(parents=True)
    corpus, prefix = folder / "corpus.txt", folder / "made"
    corpus.write_text("\n".join(3 * lines), encoding="utf-8")
    settings = {"vocab_size": 420, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    arguments = {"input": str(corpus), "model_prefix": str(prefix), **settings, **options}
    sentencepiece.SentencePieceTrainer.train(**arguments)
    corpus.unlink()
    prefix.with_suffix(".vocab").unlink()
    prefix.with_suffix(".model").rename(folder / file)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": tokenizer_class})
    return 500


def save_model(folder, kind, vocab_size, wide=0.2, **shape):
    """A model with random weights, large enough that rows differ."""
    config = transformers.AutoConfig.for_model(kind, **shape)
    config.get_text_config().vocab_size = vocab_size
    torch.manual_seed(0)
    auto_class = transformers.AutoModel
    if loading.backbone_kind(config) == "encoder-decoder":
        auto_class = transformers.AutoModelForTextEncoding
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=wide)
    model.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------
# The paper's architectures, and two that people will bring

BRACKETS = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
# hub id: (architecture, shape, special tokens of tokenizer.json, or a SentencePiece model alone)
TEACHERS = {
    "google-bert/bert-base-multilingual-cased": ("bert", SIZE, BRACKETS),
    "google-t5/t5-base": ("t5", T5, "t5"),
    "microsoft/deberta-v3-base": ("deberta-v2", DEBERTA, "deberta-v2"),
    "microsoft/mdeberta-v3-base": ("deberta-v2", DEBERTA, "deberta-v2"),
    "FacebookAI/xlm-roberta-large": ("xlm-roberta", SIZE | dict(pad_token_id=1), "xlm-roberta"),
    "meta-llama/Meta-Llama-3-8B": ("llama", DECODER, dict(bos_token="<s>", eos_token="</s>")),
    "Qwen/Qwen3-0.6B-Base": ("qwen3", DECODER, dict(eos_token="</s>", pad_token="<pad>")),
    "answerdotai/ModernBERT-base": (
        "modernbert",
        MODERN,
        dict(cls_token="<s>", sep_token="</s>", pad_token="<p>"),
    ),
}
QUICK = ["--rows", "16", "--epochs", "1", "--batch-size", "16", "--max-tokens", "48", "--lora-rank", "4"]
QUICK += ["--lr", "1e-2", "--encoder-lr", "1e-3"]


def test_the_list_is_that_of_the_plan():
    import plan

    planned = {shape["model_type"] for shape in plan.SHAPES.values()}
    assert planned <= {kind for kind, _, _ in TEACHERS.values()}


@pytest.mark.parametrize("name", TEACHERS)
def test_through_02_and_03(run, tmp_path, name):
    kind, shape, tokenizer = TEACHERS[name]
    folder = tmp_path / "model"
    if isinstance(tokenizer, str):
        vocabulary = sentencepiece_folder(folder, tokenizer)
    else:
        vocabulary = save_tokenizer(folder, **tokenizer)
    save_model(folder, kind, vocabulary, **shape)
    trainer.main(["--run", str(run), "--model", str(folder), *QUICK])
    if read_json(run / "teacher" / "teacher.json")["finetuning"] == "full":
        shutil.rmtree(folder)  # such a teacher needs nothing outside its own folder
    labeller.main(["--run", str(run), "--only-labelled"])
    labels = read_labels(run / "labels" / "labelled.parquet")
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    assert labels.std(0).max() > 1e-3  # rows are told apart
    labeller.main(["--run", str(run), "--only-labelled", "--batch-tokens", "300", "--overwrite", "--known"])
    np.testing.assert_allclose(read_labels(run / "labels" / "labelled.parquet"), labels, atol=1e-5)


@pytest.mark.parametrize("kind", PIECES)
def test_sentencepiece_alone(tmp_path, kind):
    """It asked for tiktoken. What a user writes is no special token, though it is a piece of the model."""
    vocabulary = sentencepiece_folder(tmp_path / "model", kind)
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocabulary, **(T5 if kind == "t5" else SIZE))
    tokenizer = loading.load_tokenizer(tmp_path / "model", config)
    kind = loading.backbone_kind(config)
    text = PairText(tokenizer, kind, ("title",), 64)
    plain, tricky = text.queries(["red chair", "red </s> <s> [SEP] [CLS] <pad> chair"])
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    assert len(plain) > 1 and not special & {*plain, *tricky}
    tokenizer.save_pretrained(tmp_path / "saved")
    again = PairText(loading.load_tokenizer(tmp_path / "saved", config), kind, ("title",), 64)
    assert again.queries(["red chair"]) == [plain] and again.describe() == text.describe()


# ------------------------------------------------------------------------------------------------------------
# Other kinds

OTHERS = {
    "gpt2": ("gpt2", dict(n_embd=32, n_layer=2, n_head=2, n_positions=128)),  # layers of its own kind
    "llama, not causal": ("llama", DECODER | dict(is_causal=False)),
    "qwen3, not causal": ("qwen3", DECODER | dict(is_causal=False)),
    "gemma3, not causal": ("gemma3_text", DECODER | dict(use_bidirectional_attention=True)),
    "gemma3 with pictures": ("gemma3", dict(text_config=dict(DECODER), vision_config=dict(IMAGES))),
    "qwen3 moe": ("qwen3_moe", MOE | dict(num_experts=4, moe_intermediate_size=16, decoder_sparse_step=1)),
    "mixtral": ("mixtral", MOE | dict(num_local_experts=4)),
    "opt": ("opt", dict(hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=2,
                        ffn_dim=64, do_layer_norm_before=False)),
    "longformer": ("longformer", SIZE | dict(attention_window=[8, 8], pad_token_id=1)),
    "xlnet": ("xlnet", dict(d_model=32, n_layer=2, n_head=2, d_inner=64)),
}  # fmt: skip
ROW = np.random.default_rng(0).integers(5, 200, 40).astype(np.int32)
ROWS = [ROW[:length] for length in (3, 10, 25, 40)]


def teacher_on(folder, finetuning):
    """As 02 begins with it, but with LoRA weights that are not zero."""
    settings = trainer.Settings(model=str(folder), finetuning=finetuning, lora_rank=4)
    config = loading.load_config(folder)
    backbone, _ = trainer.load_trainable(settings, config, "cpu", torch.float32)
    teacher = Teacher(backbone, loading.backbone_kind(config))
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    loading.check_reading(teacher, ROW, 0, "cpu")
    return teacher.eval()


@pytest.mark.parametrize("name", OTHERS)
def test_batches_change_nothing_and_merged_is_unmerged(tmp_path, name):
    kind, shape = OTHERS[name]
    folder = save_model(tmp_path / "model", kind, 220, **shape)
    for finetuning in ("full", "lora", "qlora"):
        if finetuning == "qlora" and name == "longformer":
            continue  # an encoder
        teacher = teacher_on(folder, finetuning)
        alone, together = (labeller.soft_labels(teacher, ROWS, 0, budget) for budget in (1, 10_000))
        np.testing.assert_allclose(alone, together, atol=1e-5)
        if finetuning != "full":
            saved = tmp_path / finetuning
            teacher.save(saved, {"finetuning": finetuning, "model": str(folder), "kind": teacher.kind})
            teacher, _ = Teacher.load(saved)
            loaded = labeller.soft_labels(teacher, ROWS, 0, 10_000)
            np.testing.assert_allclose(loaded, together, atol=1e-6)
            labeller.merge_lora(teacher, saved / "adapter")
            merged = labeller.soft_labels(teacher, ROWS, 0, 10_000)
            np.testing.assert_allclose(merged, together, atol=1e-4)


MOBILE = SIZE | dict(embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32)
REFUSED = {
    "convbert": (SIZE | dict(embedding_size=32), "padding"),
    "mobilebert": (MOBILE, "padding"),
    "fnet": (SIZE, "padding"),
    "squeezebert": (SIZE | dict(embedding_size=32), "cannot be a teacher"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_cannot_be_read_is_refused_before_training(tmp_path, kind):
    shape, why = REFUSED[kind]
    folder = save_model(tmp_path / "model", kind, 220, **shape)
    assert why in stop_line(teacher_on, folder, "full")


def test_an_encoder_decoder_without_an_encoder_of_its_own_is_refused(tmp_path):
    shape = dict(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=220)
    config = transformers.AutoConfig.for_model("bart", **shape)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    assert str(tmp_path) in stop_line(teacher_on, tmp_path, "full")


def test_lora_where_it_cannot_stand(tmp_path):
    shape = dict(hidden_size=32, state_size=4, num_hidden_layers=1)
    folder = save_model(tmp_path / "model", "mamba", 220, **shape)
    assert "--finetuning full" in stop_line(teacher_on, folder, "lora")


@pytest.mark.parametrize("kind", ["mpnet", "roberta", "xlm-roberta", "camembert", "longformer"])
def test_positions_that_are_counted_from_the_pad_token(kind):
    config = transformers.AutoConfig.for_model(kind, vocab_size=220, pad_token_id=1, **SIZE)
    config.max_position_embeddings = 66
    assert loading.fit_length(64, config) == 64
    assert "at most 64" in stop_line(loading.fit_length, 65, config)


def test_no_limit_and_others_limits():
    for_model = transformers.AutoConfig.for_model
    assert loading.fit_length(5_000, for_model("t5", **T5)) == 5_000  # relative positions
    assert loading.fit_length(5_000, for_model("xlnet", d_model=32, n_layer=1, n_head=2)) == 5_000
    assert "at most 128" in stop_line(loading.fit_length, 129, for_model("bert", **SIZE))
    pictures = for_model("gemma3", text_config=dict(DECODER), vision_config=dict(IMAGES))
    assert "at most 128" in stop_line(loading.fit_length, 129, pictures)


# ------------------------------------------------------------------------------------------------------------
# Tokenizers that do not fit their model


def llama_config(vocab_size, **more):
    return transformers.AutoConfig.for_model("llama", vocab_size=vocab_size, **DECODER, **more)


@pytest.mark.parametrize("pad", [-1, 10_000])
def test_a_pad_id_that_is_none(tmp_path, pad):
    size = save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
    tokenizer = loading.load_tokenizer(tmp_path, llama_config(size, pad_token_id=pad))
    assert tokenizer.pad_token == tokenizer.eos_token


def test_a_pad_token_beyond_the_embedding(tmp_path):
    """As that of many a Llama: added to the tokenizer, not to the model."""
    size = save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    assert loading.load_tokenizer(tmp_path, llama_config(size)).pad_token == "</s>"
    assert loading.load_tokenizer(tmp_path, llama_config(size + 1)).pad_token == "<pad>"


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    size = save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
    line = stop_line(loading.load_tokenizer, tmp_path, llama_config(size - 9))
    assert f"{size - 1}" in line and f"{size - 9} rows" in line


# ------------------------------------------------------------------------------------------------------------
# LoRA stands beside a model that somebody may change, and is a stranger's file


@pytest.fixture(scope="module")
def lora_run(features, models, tmp_path_factory):
    """A run whose teacher is LoRA beside a copy of the Llama."""
    run = tmp_path_factory.mktemp("lora") / "run"
    run.mkdir()
    (run / "features").symlink_to(features)
    shutil.copytree(models["llama"], run.parent / "base")
    trainer.main(["--run", str(run), "--model", str(run.parent / "base"), *QUICK])
    return run


@pytest.fixture
def lora(lora_run, tmp_path):
    """A copy of it, and its model's folder."""
    shutil.copytree(lora_run, tmp_path / "run", symlinks=True)
    return tmp_path / "run", lora_run.parent / "base"


def test_a_changed_base_is_named(lora):
    run, base = lora
    weights, before = base / "model.safetensors", (base / "model.safetensors").read_bytes()
    tensors = load_file(weights)
    tensors[next(iter(tensors))] += 0.1
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        line = stop_line(labeller.main, ["--run", str(run), "--only-labelled"])
        assert str(base) in line and "--model" in line and not (run / "labels").exists()
    finally:
        weights.write_bytes(before)


def test_a_hub_id_whose_commit_moved_is_another_model(monkeypatch):
    config = transformers.BertConfig()
    monkeypatch.setattr(loading, "load_config", lambda model: config)
    config._commit_hash = "one"
    trained = loading.model_fingerprint("some/model")
    assert loading.is_model("some/model", trained)
    config._commit_hash = "two"
    assert not loading.is_model("some/model", trained)


def test_a_moved_base_is_found_by_the_flag(lora):
    run, base = lora
    moved = run.parent / "elsewhere"
    base.rename(moved)
    try:
        line = stop_line(labeller.main, ["--run", str(run), "--only-labelled"])
        assert str(base) in line and "--model" in line
        labeller.main(["--run", str(run), "--only-labelled", "--model", str(moved)])
    finally:
        moved.rename(base)
    assert len(read_labels(run / "labels" / "labelled.parquet"))


STRANGE = [{"r": 10**9}, {"r": "four"}, {"base_model_name_or_path": "/nowhere"}]
STRANGE += [{"target_modules": "(a+)+$"}, {"target_modules": ["(a+)+$"]}, {"rank_pattern": {"(a+)+$": 4}}]
STRANGE += [{"megatron_config": {"a": 1}, "megatron_core": "antigravity"}]


@pytest.mark.parametrize("change", STRANGE, ids=str)
def test_a_strangers_adapter(lora, monkeypatch, change):
    """No memory is taken on a config's word, no module imported, no other model opened."""
    run, _ = lora
    expected, _ = Teacher.load(run / "teacher")
    path = run / "teacher" / "adapter" / "adapter_config.json"
    write_json(path, read_json(path) | change)
    monkeypatch.setitem(__import__("sys").modules, "antigravity", None)  # an import of it is an error
    if not change.keys() & {"base_model_name_or_path", "megatron_core"}:
        assert "adapter" in stop_line(Teacher.load, run / "teacher")
        return
    found, _ = Teacher.load(run / "teacher")
    same = [labeller.soft_labels(teacher, ROWS, 0, 10_000) for teacher in (expected, found)]
    np.testing.assert_array_equal(*same)


PAYLOAD = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "megatron_config": {"a": 1}}
PAYLOAD |= {"megatron_core": "megatron_of_a_stranger.payload", "base_model_name_or_path": "/nowhere"}


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "blip"])
@pytest.mark.parametrize("alone", [False, True], ids=["beside a model", "alone"])
def test_no_module_that_a_model_folder_names_is_imported(models, tmp_path, monkeypatch, kind, alone):
    """peft imports what `megatron_core` of adapter_config.json names; transformers hands it that file."""
    folder, package = tmp_path / "model", tmp_path / "code" / "megatron_of_a_stranger"
    shutil.copytree(TOY_MODELS / "blip" if kind == "blip" else models[kind], folder)
    if alone:
        (folder / "config.json").unlink()
    write_json(folder / "adapter_config.json", PAYLOAD)
    save_file({}, folder / "adapter_model.safetensors")
    package.mkdir(parents=True)
    (package / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(package.parent)
    ways = {
        "llama": lambda: loading.load_backbone(str(folder), torch.float32),
        "bert": lambda: TextEncoder(str(folder), 32, 1_000, "cpu", torch.float32),
        "t5": lambda: loading.load_backbone(str(folder), torch.float32),
        "blip": lambda: Captioner(str(folder), 5, "cpu", torch.float32),
    }
    line = stop_line(ways[kind])
    assert str(folder) in line and ("config" in line if alone else "adapter_config.json" in line)
    assert not (tmp_path / "ran").exists()


def test_no_kernel_that_a_config_names_is_loaded(models, tmp_path, monkeypatch):
    """`attn_implementation` may be a repository of code; a folder's is not used."""
    shutil.copytree(models["llama"], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    write_json(
        path, read_json(path) | {"attn_implementation": "stranger/kernel", "experts_implementation": "x/y"}
    )
    config = loading.load_config(tmp_path / "model")
    assert config._attn_implementation is None and config._experts_implementation is None
    backbone = loading.load_backbone(str(tmp_path / "model"), torch.float32)
    assert backbone.config._attn_implementation in ("sdpa", "eager")


def test_positions_of_xlm_r_with_lora_are_those_of_training(features, tmp_path):
    """Its tokenizer has a pad id of its own, which 02 wrote into the config and 03 did not."""
    folder, run = tmp_path / "model", tmp_path / "run"
    size = save_tokenizer(folder, pad_token="<pad>", cls_token="<s>", sep_token="</s>", mask_token="<m>")
    save_model(folder, "xlm-roberta", size, **SIZE, pad_token_id=5)
    assert loading.load_tokenizer(folder, loading.load_config(folder)).pad_token_id == 0
    run.mkdir()
    (run / "features").symlink_to(features)
    seen, save = {}, Teacher.save

    def spy(self, folder, about):
        seen["labels"] = labeller.soft_labels(self.eval(), ROWS, 0, 1)
        save(self, folder, about)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "save", spy)
        trainer.main(["--run", str(run), "--model", str(folder), "--finetuning", "lora", *QUICK])
    teacher, _ = Teacher.load(run / "teacher")
    np.testing.assert_allclose(labeller.soft_labels(teacher, ROWS, 0, 1), seen["labels"], atol=1e-6)
    assert read_json(run / "teacher" / "teacher.json")["finetuning"] == "lora"


# ------------------------------------------------------------------------------------------------------------
# Folders: which files are the model, what a config may ask for, weights that are no numbers


@pytest.fixture
def bert(models, tmp_path):
    """A folder of one's own."""
    shutil.copytree(models["bert"], tmp_path / "bert")
    return tmp_path / "bert"


def changed(folder, file, **values):
    """A JSON file of the folder with other values."""
    write_json(folder / file, read_json(folder / file) | values)
    return folder


def test_files_that_no_model_reads_are_not_the_model(bert):
    """Downloaded again, .cache/huggingface holds another time: it was another model."""
    before = loading.model_fingerprint(bert)
    others = [".cache/huggingface/config.json.metadata", ".DS_Store", ".git/HEAD", "README.md", "LICENSE"]
    others += ["onnx/config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors", "tf_model.h5"]
    for name in [*others, "model.safetensors.index.json"]:
        (bert / name).parent.mkdir(parents=True, exist_ok=True)
        (bert / name).write_text("{}")
    assert loading.model_fingerprint(bert) == before
    assert loading.model_fingerprint(shutil.copytree(bert, bert.with_name("copy"))) == before
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = (bert / name).read_bytes()
        (bert / name).write_bytes(content + b" ")
        assert loading.model_fingerprint(bert) != before
        (bert / name).write_bytes(content)
    (bert / "vocab.txt").write_text("x")
    assert loading.model_fingerprint(bert) != before


def test_shards_in_use_are_the_model(bert):
    (bert / "model.safetensors").rename(bert / "model-00001-of-00001.safetensors")
    weights = load_file(bert / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    write_json(bert / "model.safetensors.index.json", index)
    before = loading.model_fingerprint(bert)
    loading.load_backbone(bert, torch.float32)
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, bert / "model-00001-of-00001.safetensors"
    )
    assert loading.model_fingerprint(bert) != before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../elsewhere/model.safetensors", "/etc/passwd"])
def test_an_index_that_names_no_safetensors_file_of_the_folder(bert, name):
    """A .bin named there was loaded, although safetensors only."""
    weights = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    torch.save(weights, bert / "pytorch_model.bin")
    write_json(bert / "model.safetensors.index.json", {"weight_map": dict.fromkeys(weights, name)})
    assert "no safetensors file of this folder" in stop_line(loading.load_backbone, bert, torch.float32)


@pytest.mark.parametrize(
    "values", [{"num_hidden_layers": 10**7}, {"hidden_size": 10**9}, {"vocab_size": 10**12}]
)
def test_a_config_that_asks_for_more_than_any_model_has(bert, values):
    """10^7 layers had no end."""
    line = stop_line(loading.load_config, changed(bert, "config.json", **values))
    assert str(bert) in line and next(iter(values)) in line


def test_a_config_does_not_change_the_form_of_what_comes_out(bert):
    changed(bert, "config.json", return_dict=False, output_attentions=True, output_hidden_states=True)
    encoder = TextEncoder(str(bert), 16, 512, torch.device("cpu"), torch.float32)
    assert np.isfinite(encoder(["red chair"])).all()


def test_a_config_that_asks_for_quantization_is_refused(bert):
    changed(bert, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "quantization_config" in stop_line(loading.load_backbone, bert, torch.float32)


@pytest.mark.parametrize("steps", [{"type": "Lowercase"}, {"type": "Prepend", "prepend": "a"}])
def test_a_tokenizer_of_very_many_steps(bert, steps):
    changed(bert, "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [steps] * 100_000})
    assert "steps" in stop_line(loading.load_tokenizer, bert, loading.load_config(bert))


GPT = r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n/]*|\s+"


@pytest.mark.parametrize("pattern", [GPT, LLAMA, O200K, r" ?[^(\s|[.,!?])]+", r"\d{1,3}(?=(?:\d{3})*\b)"])
def test_patterns_of_known_tokenizers_are_read(pattern):
    assert not loading.may_never_end(pattern)


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(\s*)*x", r"(?:\w+\s?){3,}!", "((a|b)*c)*d", r"\w*\w*\w*\w*\w*!", "a" * 10_001]
)
def test_a_pattern_that_may_never_end_is_refused(bert, pattern):
    """Some of these end in a panic of the tokenizers' library, others compute for hours."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    changed(bert, "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split]})
    assert "may never end" in stop_line(loading.load_tokenizer, bert, loading.load_config(bert))


def test_what_a_hub_id_names_is_checked_as_a_folder_is(bert, tmp_path, monkeypatch):
    hub = tmp_path / "hub" / "models--some--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.parent))
    folder = shutil.copytree(bert, hub / "snapshots" / ("c" * 40))
    config = loading.load_config("some/model")
    assert loading.load_tokenizer("some/model", config) and loading.load_backbone("some/model", torch.float32)
    split = {"type": "Split", "pattern": {"Regex": "(a+)+"}, "behavior": "Isolated", "invert": False}
    changed(folder, "tokenizer.json", pre_tokenizer=split)
    assert "may never end" in stop_line(loading.load_tokenizer, "some/model", config)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"w": "pytorch_model.bin"}})
    assert "no safetensors file" in stop_line(loading.load_backbone, "some/model", torch.float32)


def test_a_panic_of_the_tokenizers_library_is_one_line():
    """It is no Exception: a traceback."""

    class PanicException(BaseException):
        pass

    def panics(texts, **options):
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    encoder = TextEncoder.__new__(TextEncoder)
    encoder.max_tokens, encoder.name, encoder.tokenizer = 8, "a/model", panics
    assert "a/model" in stop_line(encoder, ["text"]) and "panic" not in stop_line(encoder, ["text"])
    text = PairText.__new__(PairText)
    text.tokenizer = panics
    assert "tokenizer" in stop_line(text.token_ids, ["text"])


def with_nan(folder):
    """A model's folder, one weight of which is NaN."""
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("LayerNorm.weight") or "layernorm" in name.lower())
    save_file(weights | {name: weights[name] * torch.nan}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_are_no_numbers_end_01_and_02(bert, tmp_path):
    """01 ended ok, 04 blamed --lr."""
    encoder = TextEncoder(str(with_nan(bert)), 16, 512, torch.device("cpu"), torch.float32)
    line = stop_line(encoder, ["red chair"])
    assert str(bert) in line and "no number" in line
    teacher = Teacher(loading.load_backbone(bert, torch.float32), "encoder")
    line = stop_line(loading.check_reading, teacher, np.arange(4, dtype=np.int32), 0, torch.device("cpu"))
    assert "no number" in line
    blip = with_nan(shutil.copytree(TOY_MODELS / "blip", tmp_path / "blip"))
    line = stop_line(Captioner, str(blip), 3, torch.device("cpu"), torch.float32)
    assert str(blip) in line and "no number" in line


@pytest.mark.parametrize("side", [0, 8])
def test_an_image_processor_of_another_size(tmp_path, side):
    blip = shutil.copytree(TOY_MODELS / "blip", tmp_path / "blip")
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (blip / name).exists():
            about = read_json(blip / name)
            part = about.get("image_processor", about)
            part["size"] = {"height": side, "width": side}
            write_json(blip / name, about)
    line = stop_line(Captioner, str(blip), 3, torch.device("cpu"), torch.float32)
    assert str(blip) in line and "image processor" in line


# ------------------------------------------------------------------------------------------------------------
# Launchers


@pytest.mark.parametrize(
    "name, value",
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
    ],
)
def test_what_a_launcher_asks_for_behind_the_settings(monkeypatch, name, value):
    """With bf16 stage.json said float32, and the weights were others."""
    monkeypatch.setenv(name, value)
    assert f"{name}={value}" in stop_line(processes.start_processes, trainer.Settings())
    monkeypatch.setenv(name, "no")
    processes.refuse_launcher()


def test_a_world_that_a_platform_has_set_is_named(monkeypatch, capsys):
    """One process of two waited without a word, for half an hour."""
    world = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}).items():
        monkeypatch.setenv(name, value)
    assert timedelta(minutes=1) <= processes.MEET <= timedelta(minutes=15) < processes.WORK
    monkeypatch.setattr(processes, "MEET", timedelta(seconds=1))
    processes.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        line = stop_line(processes.start_processes, trainer.Settings(device="cpu"))
    finally:
        processes.AcceleratorState._reset_state(reset_partial_state=True)
    assert "2 processes do not come together" in line and "WORLD_SIZE" in line
    assert "waits for 1 more process(es) at 127.0.0.1:29517" in capsys.readouterr().out
