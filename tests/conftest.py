"""Fixtures: a tiny toy dataset, tiny language models with random weights, stage 01's features of the
dataset."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ["TQDM_DISABLE"] = "1"

import hypothesis  # noqa: E402
import make_toy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import TOY_MODELS, stage  # noqa: E402

from common import FIELDS  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

# The same examples every time; HYPOTHESIS=thorough draws thousands of new ones.
hypothesis.settings.register_profile(
    "usual",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "thorough",
    parent=hypothesis.settings.get_profile("usual"),
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "5000")),
    derandomize=False,
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS", "usual"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy world at one twentieth of its size: 100 pins, 33 queries, 2,000 impressions."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    make_toy.main(folder, scale=0.05)
    return folder


def toy_words():
    """English and Spanish words of the toy world."""
    words = []
    for kind in ("object", "colour", "style"):
        for english, spanish, *_ in make_toy.WORDS[kind].values():
            words += f"{english} {spanish}".split()
    return [word.partition(".")[0].strip("+") for word in words]


def save_tokenizer(folder, **special):
    """A word-level tokenizer; `special`: the model family's special tokens. A line break is a token, as in a
    decoder's tokenizer. Returns the size of the vocabulary."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*special.values(), "[UNK]", "\n", ":", "for", "ideas", *FIELDS, *toy_words()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    pattern = Regex(r"\n|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)
    wrapped.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """{kind: folder} of models with random weights, saved as a hub would hold them: width 64, two layers."""
    import transformers as t

    root = tmp_path_factory.mktemp("models")
    bert_like = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    size = dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    deberta = dict(
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    )
    t5 = dict(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2)
    t5_ids = dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    llama_ids = dict(bos_token_id=0, eos_token_id=1)
    kinds = {
        "bert": (t.BertModel, t.BertConfig, size, bert_like),
        "deberta": (t.DebertaV2Model, t.DebertaV2Config, size | deberta, bert_like),
        "t5": (
            t.T5ForConditionalGeneration,
            t.T5Config,
            t5 | t5_ids,
            dict(pad_token="<pad>", eos_token="</s>"),
        ),
        # No pad token, as Llama 3.
        "llama": (
            t.LlamaForCausalLM,
            t.LlamaConfig,
            size | llama_ids,
            dict(bos_token="<s>", eos_token="</s>"),
        ),
    }
    for name, (model, config, shape, special) in kinds.items():
        vocabulary = save_tokenizer(root / name, **special)
        torch.manual_seed(0)
        model(config(vocab_size=vocabulary, **shape)).save_pretrained(root / name)
    return {name: root / name for name in kinds}


@pytest.fixture(scope="session")
def features(toy, models, tmp_path_factory):
    """Stage 01's folder of the toy dataset: captions by the toy captioner, text embeddings by random
    weights."""
    run = tmp_path_factory.mktemp("features")
    captioner = ["--caption-model", str(TOY_MODELS / "blip"), "--text-encoder", str(models["bert"])]
    where = ["--data", str(toy), "--run", str(run)]
    stage("01").main([*where, *captioner, "--shard-rows", "300", "--device", "cpu"])
    return run / "features"


@pytest.fixture
def run(features, tmp_path):
    """A new run directory on the session's features."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(features)
    return tmp_path / "run"
