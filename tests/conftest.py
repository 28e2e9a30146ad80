"""Fixtures: a tiny toy dataset, tiny language models with random weights, and stage 01's features of the tiny dataset."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ["TQDM_DISABLE"] = "1"

import hypothesis
import pytest
import torch

import make_toy
from common import FIELDS
from helpers import TOY_MODELS, stage

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

# The same examples every time; HYPOTHESIS=thorough draws thousands of new ones.
hypothesis.settings.register_profile("usual", max_examples=60, deadline=None, derandomize=True, database=None,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("thorough", parent=hypothesis.settings.get_profile("usual"), max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "5000")), derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS", "usual"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy world at one twentieth of its size: 100 pins, 33 queries, 2,000 impressions."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    make_toy.main(["--scale", "0.05", "--out", str(folder)])
    return folder


def save_tokenizer(folder, **special):
    """A word-level tokenizer; `special`: the model family's special tokens. A line break is a token, as in a decoder's tokenizer."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [w.partition(".")[0].strip("+") for table in (make_toy.OBJECTS, make_toy.COLOURS, make_toy.STYLES) for by in table.values() for w in by["en"] + by["es"]]
    vocab = [*dict.fromkeys([*special.values(), "[UNK]", "\n", ":", "for", "ideas", *(f"{n}" for n in FIELDS), *words])]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)
    tokenizer.save_pretrained(folder)
    return len(vocab)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{kind: folder} of models with random weights, saved as a hub would hold them: width 64, two layers."""
    import transformers as t

    root, made = tmp_path_factory.mktemp("models"), {}
    bert_like = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, max_position_embeddings=128)
    for name, special, config in (
        ("bert", bert_like, lambda v: t.BertConfig(vocab_size=v, **size)),
        ("deberta", bert_like, lambda v: t.DebertaV2Config(vocab_size=v, type_vocab_size=0, relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
                                                           pos_att_type=["p2c", "c2p"], position_biased_input=False, **size)),
        ("t5", dict(pad_token="<pad>", eos_token="</s>"), lambda v: t.T5Config(vocab_size=v, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)),
        ("llama", dict(bos_token="<s>", eos_token="</s>"), lambda v: t.LlamaConfig(vocab_size=v, bos_token_id=0, eos_token_id=1, **size)),  # no pad token, as Llama 3
    ):
        made[name] = root / name
        config = config(save_tokenizer(made[name], **special))
        torch.manual_seed(0)
        cls = {"bert": t.BertModel, "deberta": t.DebertaV2Model, "t5": t.T5ForConditionalGeneration, "llama": t.LlamaForCausalLM}[name]
        cls(config).save_pretrained(made[name])
    return made


@pytest.fixture(scope="session")
def features(toy, models, tmp_path_factory):
    """A run directory with the stage 01 of the toy data set: captions by the toy captioner, text embeddings by random weights."""
    run = tmp_path_factory.mktemp("features")
    stage("01").main(["--data", str(toy), "--run", str(run), "--caption-model", str(TOY_MODELS / "blip"), "--text-encoder", str(models["bert"]),
                      "--shard-rows", "300", "--device", "cpu"])
    return run / "features"


@pytest.fixture
def run(features, tmp_path):
    """A new run directory on the session's features."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(features)
    return tmp_path / "run"
