"""Opens pre-trained models: config, tokenizer, backbone, LoRA; from a folder or a hub, by safetensors,
without remote code. What libraries raise for a folder that will not do becomes one line."""

import contextlib
import json
import logging
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence

from lib.stages.files import fingerprint, hashed, read_json
from lib.stages.finished import remake
from lib.stages.terminal import Stop, stop_on_error

READ = ("*.json", "*.model", "vocab*", "merges*", "dict*")  # of a model folder, beside its weights
MOST_LAYERS, MOST_ROWS = 1_000, 20_000_000  # in a config; rows: of any matrix


def quiet_libraries():
    """Turns off what libraries print beside the point, and bounds what they keep. Before a model computes."""
    import transformers

    # On a CPU, oneDNN and PyTorch's layer over it each keep up to 1,024 compiled matrix products of 0.7 MB,
    # one a shape. Batches come in ever new shapes, but all layers of a batch share a few.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="bitsandbytes|peft|torch.utils.checkpoint")


def backbone_kind(config):
    """'encoder' (BERT, DeBERTa, XLM-R), 'encoder-decoder' (T5: its encoder is used) or 'decoder' (Llama)."""
    from transformers.models.auto import modeling_auto as auto

    name = config.model_type
    # A T5 encoder saved alone says that it is no encoder-decoder.
    if config.is_encoder_decoder or name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoder"
    if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    kinds = "text encoder, encoder-decoder or decoder"
    raise Stop(f"a model of type {name!r} is no {kinds}: give --model one like BERT, DeBERTa, T5 or Llama")


def load_config(model):
    """The config of a model folder or hub id; Stop with one line when there is none, or LoRA weights lie
    beside it. Which code computes attention or experts, perhaps a repository's, is no folder's choice."""
    from transformers import AutoConfig, PreTrainedConfig

    with stop_on_error(f"{model}: no usable model config", "give a folder of save_pretrained, or a hub id"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if file_of(model, "adapter_config.json"):  # transformers hands it to peft, which imports what it names
        advice = "give the model's folder without them, or merge them into it first"
        raise Stop(f"{model}: holds adapter_config.json, LoRA weights; {advice}")
    if getattr(config, "quantization_config", None) is not None:
        raise Stop(f"{model}: its config has a quantization_config; give a model with plain weights")
    config._attn_implementation = config._experts_implementation = None
    refuse_huge(model, config.to_dict())
    for part in (config, *vars(config).values()):  # what decides the form of what comes out
        if isinstance(part, PreTrainedConfig):
            part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
    return config


def refuse_huge(model, config):
    """Stop if a config asks for more layers, or larger ones, than any model has: before memory is taken."""
    for name, value in config.items():
        if not re.search(r"config|size|dim|^d_|layer|head|embeddings|expert|num_", name):
            continue
        if isinstance(value, dict):
            refuse_huge(model, value)
        elif isinstance(value, int) and value > (MOST_LAYERS if "layer" in name else MOST_ROWS):
            raise Stop(f"{model}: its config asks for {name} {value:,}, more than any model has")


def file_of(model, name):
    """Path of a file of a model folder, or of a hub id in the cache; None if there is none."""
    from transformers.utils import cached_file

    raising = ("gated_repo", "missing_entries", "connection_errors")
    options = {f"_raise_exceptions_for_{what}": False for what in raising}
    with stop_on_error(f"{model}: {name} cannot be had"):
        path = cached_file(str(model), name, **options)
    return path and Path(path)


def weights_of(model):
    """The files that hold the weights in use, an index among them, which may name safetensors files alone."""
    if whole := file_of(model, "model.safetensors"):
        return [whole]
    index = file_of(model, "model.safetensors.index.json")
    if index is None:
        return []
    with stop_on_error(f"{index}: no index of weights"):
        names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise Stop(f"{index}: names {name!r}, which is no safetensors file of this folder")
    return [index, *filter(None, (file_of(model, name) for name in names))]


def model_fingerprint(model):
    """Hash of the files that a model is read from; of a hub id its name and commit in the hub's cache."""
    if Path(model).is_dir():
        read = {path for pattern in READ for path in Path(model).glob(pattern) if path.is_file()}
        read = {path for path in read if not re.search(r"^\.|\.index\.json$", path.name)}
        return hashed([[path.name, fingerprint(path)] for path in sorted({*read, *weights_of(model)})])
    return f"{model}@{getattr(load_config(str(model)), '_commit_hash', None)}"


def is_model(model, trained_fingerprint):
    """Is the model with this fingerprint here?"""
    with contextlib.suppress(Stop):
        return model_fingerprint(model) == trained_fingerprint
    return False


def auto_class_of(config):
    """The class of transformers that a backbone is loaded by."""
    from transformers import AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if backbone_kind(config) == "encoder-decoder" else AutoModel


def random_backbone(config, dtype=torch.float32):
    """The backbone with random weights."""
    backbone = auto_class_of(config).from_config(config, dtype=dtype)
    backbone.pooler = None
    return backbone


def empty_backbone(config, dtype=torch.float32):
    """The backbone on the device "meta": its shapes alone."""
    with torch.device("meta"):
        return random_backbone(config, dtype)


def layers_of(module):
    """The layers of a model, from the lowest on, each a tuple of modules: what its outermost lists hold.
    Lists of one length beside each other hold parts of the same layers (as XLM's), a list of lists their
    layers (as Funnel's)."""
    lists = [flattened(child) for child in module.children() if isinstance(child, torch.nn.ModuleList)]
    if len({len(layers) for layers in lists}) == 1:
        yield from zip(*lists)
    else:
        yield from ((layer,) for layers in lists for layer in layers)
    for child in module.children():
        if not isinstance(child, torch.nn.ModuleList):
            yield from layers_of(child)


def flattened(modules):
    """The modules of a list of modules, and of lists in it."""
    is_list = [isinstance(module, torch.nn.ModuleList) for module in modules]
    return [layer for module in modules for layer in flattened(module)] if any(is_list) else [*modules]


def fit_length(max_tokens, config, flag="--max-tokens"):
    """max_tokens if the model has positions for as many, or sets no limit; else Stop."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    if limit > 0 and backbone_kind(config) == "encoder":
        with contextlib.suppress(Exception):  # what does not come into being is refused when it is loaded
            for name, module in empty_backbone(config).named_modules():
                counts_from_pad = getattr(module, "padding_idx", None) is not None
                if name.endswith("position_embeddings") and counts_from_pad:  # RoBERTa, MPNet and their kin
                    limit = module.num_embeddings - module.padding_idx - 1
    if 0 < limit < max_tokens:
        raise Stop(f"{flag} {max_tokens}: this model reads at most {limit}")
    return max_tokens


def load_backbone(model, dtype, quantize=False, device="cpu", config=None):
    """A pre-trained model without its language-model head. Safetensors only, no remote code. quantize: NF4
    with double quantization, `dtype` as compute type (QLoRA, Dettmers et al., 2023), straight into 4 bit."""
    from transformers import BitsAndBytesConfig

    config = config or load_config(model)
    options = {"config": config, "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    what, advice = f"{model}: cannot be loaded", "it must hold safetensors weights (pickled ones are refused)"
    if quantize:
        what = f"{model} cannot be loaded in 4 bit here"
        advice = "--finetuning lora trains LoRA without quantization"
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
        options["device_map"] = {"": str(device)}
    weights_of(model)
    with stop_on_error(what, advice):
        kind = auto_class_of(config)
        backbone, loading = kind.from_pretrained(model, output_loading_info=True, **options)
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:  # transformers would begin with random ones
        first = f"the first: {missing[0]}; are these the weights of another model?"
        raise Stop(f"{model}: {len(missing)} weights of a {config.model_type} model are missing, {first}")
    backbone.pooler = None  # of some encoders: not read here; unused weights stall data-parallel training
    if not quantize:
        return backbone.to(device)
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else bitsandbytes repacks the weights at the first evaluation: no gradients, nothing to merge
            module.support_avx512bf16_for_cpu = False
    return backbone


def load_lora(backbone, folder):
    """A backbone with the LoRA weights of a folder beside it. Of the folder's config, perhaps a stranger's,
    sizes and names of layers are used, nothing else; no memory is taken on its word."""
    from peft import LoraConfig, PeftModel

    teacher = Path(folder).parent
    how = remake(teacher, f"02_train_teacher.py --run {teacher.parent}")
    with stop_on_error(f"{folder}: LoRA weights that do not fit", how):
        saved = read_json(folder / "adapter_config.json")
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            names = [name for name in file.keys() if "lora_A" in name]  # noqa: SIM118
            ranks = [file.get_slice(name).get_shape()[0] for name in names]
        if min(ranks) != saved["r"]:  # of a mixture of experts, all experts' ranks stand in one matrix
            raise ValueError(f"rank {saved['r']}, weights of rank {min(ranks)}")
        lora = LoraConfig(r=int(saved["r"]), lora_alpha=float(saved["lora_alpha"]), **plain_layers(saved))
        return PeftModel.from_pretrained(backbone, folder, config=lora)


def plain_layers(saved):
    r"""The layers that LoRA stands in: lists of names, and {name: number} of those with another rank or
    alpha. A name is letters, digits and dots, after perhaps `.*\.`: peft would read others as patterns."""
    layers = {}
    for kind in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        names = saved.get(kind) or []
        if any(not re.fullmatch(r"(\.\*\\\.)?[\w.]+", name) for name in names):
            raise ValueError(f"{kind}: not a list of names")
        if isinstance(names, dict):
            number = int if kind == "rank_pattern" else float
            layers[kind] = {name: number(value) for name, value in names.items()}
        elif names:
            layers[kind] = [*names]
    return layers


def load_tokenizer(model, config):
    """The tokenizer, with a pad token: its own, else the config's, else end-of-text."""
    from transformers import AutoTokenizer

    refuse_endless(model)
    with stop_on_error(f"{model}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    rows = config.get_text_config().vocab_size
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        known = getattr(config, "pad_token_id", None)
        usable = known is not None and 0 <= known < min(rows, len(tokenizer))
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known) if usable else tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise Stop(f"{model}: its tokenizer has neither a pad nor an end-of-text token")
    ends = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    added = [number for number, token in tokenizer.added_tokens_decoder.items() if not token.special]
    # Special tokens never come from text, but those that open, separate and close a pair count.
    largest = max([tokenizer.vocab_size - 1, *added, *(number for number in ends if number is not None)])
    if largest >= rows:
        raise Stop(f"{model}: its tokenizer makes ids up to {largest:,}, its embedding has {rows:,} rows")
    return tokenizer


def refuse_endless(model):
    """Stop if tokenizer.json lists more steps than any tokenizer has, or a pattern that may never end."""
    path = file_of(model, "tokenizer.json")
    if path is None:
        return
    with stop_on_error(f"{path}: no tokenizer"):
        about = read_json(path)
        text = json.dumps([part for name, part in about.items() if name not in ("model", "added_tokens")])
    if (steps := text.count('"type"')) > MOST_LAYERS:
        raise Stop(f"{path}: {steps:,} steps, more than any tokenizer has")
    for found in re.findall(r'"Regex": ("(?:[^"\\]|\\.)*")', text):
        if may_never_end(pattern := json.loads(found)):
            raise Stop(f"{path}: the pattern {pattern[:80]!r} repeats what repeats: it may never end")


def may_never_end(pattern):
    """Has a regular expression more than 10,000 characters, a repeat without bound of a group with another in
    it, or more than 4 in a row? Only so its time grows faster than any text is worth."""
    plain, before = re.sub(r"\\[pPx]\{[^}]*\}|\\.", "x", pattern, flags=re.DOTALL), None
    while plain != before:  # sets of characters, which may stand in others
        plain, before = re.sub(r"\[[^\[\]]*\]", "x", plain), plain
    repeat = r"[*+]+|\{\d*,\}"
    while len(pattern) <= 10_000 and (group := re.search(rf"\(([^()]*)\)({repeat})?", plain)):
        repeats = re.search(repeat, group[1])
        if repeats and group[2]:
            return True
        plain = plain.replace(group[0], "x+" if repeats or group[2] else "x", 1)
    return len(pattern) > 10_000 or any(len(re.findall(repeat, part)) > 4 for part in plain.split("|"))


@torch.inference_mode()
def check_reading(teacher, row, pad_id, device):
    """Stop unless the teacher reads half of a row of token ids [T] beside the whole of it as it reads it
    alone: then a batch changes nothing, and padding is not read."""
    whole = torch.from_numpy(row).long().to(device)
    half = whole[: max(1, len(whole) // 2)]
    ids = pad_sequence([whole, half], batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones_like(whole), torch.ones_like(half)], batch_first=True)
    teacher.eval()
    with stop_on_error("--model: a model of this kind cannot be a teacher"):  # it wants more than these
        teacher(ids, mask)
        together = teacher.represent(ids, mask)[1]
        alone = teacher.represent(half[None], torch.ones_like(half)[None])[0]
    if not torch.isfinite(together).all():
        raise Stop("--model: what it computes is no number (NaN): are its weights whole?")
    moved = ((together - alone).norm() / alone.norm()).item()
    if not moved < (0.1 if teacher.dtype == torch.bfloat16 else 1e-4):
        raise Stop(f"--model: a model of this kind reads padding (in a batch a row moves by {moved:.1%})")
