"""Opens pre-trained models: config, tokenizer, backbone; from a folder or a hub, by safetensors, without
remote code.

No method of the paper is in this file. transformers raises errors of many kinds for a folder that will not
do: here each becomes one line.
"""

from pathlib import Path

from runs.stage import Stop, fingerprint, first_line


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
    raise Stop(
        f"a model of type {name!r} is no text encoder, encoder-decoder or decoder: "
        "give --model a BERT-, DeBERTa-, T5- or Llama-like model"
    )


def load_config(model):
    """The config of a model folder or hub id; Stop with one line when there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a folder that will not do
        raise Stop(
            f"{model}: no usable model config here ({first_line(error)}); "
            "give a folder written by save_pretrained, or a hub id"
        ) from error


def model_fingerprint(model):
    """Of a model folder: its files. Of a hub id: the name and the commit the hub cache resolved it to."""
    if Path(model).is_dir():
        return fingerprint(model)
    return f"{model}@{getattr(load_config(str(model)), '_commit_hash', None)}"


def fit_length(max_tokens, config):
    """max_tokens if the model has as many positions, else Stop."""
    limit = getattr(config, "max_position_embeddings", None) or max_tokens
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        limit -= config.pad_token_id + 1  # these count positions from there
    if max_tokens > limit:
        raise Stop(f"--max-tokens {max_tokens}: this model reads at most {limit}")
    return max_tokens


def load_backbone(model, dtype, quantize=False, device="cpu", config=None):
    """A pre-trained model without its language-model head. Safetensors only, no remote code.

    quantize: NF4 with double quantization and `dtype` as compute type (QLoRA, Dettmers et al., 2023), loaded
    straight into 4 bit."""
    from transformers import AutoModel, AutoModelForTextEncoding, BitsAndBytesConfig

    config = config or load_config(model)
    auto_class = AutoModelForTextEncoding if backbone_kind(config) == "encoder-decoder" else AutoModel
    options = {"config": config, "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if quantize:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": str(device)}
    try:
        backbone, loading = auto_class.from_pretrained(model, output_loading_info=True, **options)
    except Exception as error:  # transformers, safetensors and bitsandbytes raise many kinds here
        if quantize:
            advice = "--finetuning lora trains LoRA without quantization"
            raise Stop(f"{model} cannot be loaded in 4 bit here ({first_line(error)}); {advice}") from error
        advice = "it must hold safetensors weights (pickled ones are refused)"
        raise Stop(f"{model}: cannot be loaded ({first_line(error)}); {advice}") from error
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:  # transformers would begin with random ones
        raise Stop(
            f"{model}: {len(missing)} weights of a {config.model_type} model are missing, "
            f"the first: {missing[0]}; are these the weights of another model?"
        )
    without_pooler(backbone)
    if not quantize:
        return backbone.to(device)
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights at the first evaluation on such a CPU: training after it
            # has no gradients, merging no weights
            module.support_avx512bf16_for_cpu = False
    return backbone


def without_pooler(backbone):
    """Drops an extra layer that some encoders carry: not read here, and unused weights stall data-parallel
    training."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    return backbone


def load_tokenizer(model, config):
    """The tokenizer, with a pad token: its own, else the config's, else end-of-text (pooling goes by the
    mask)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # as above
        raise Stop(f"{model}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        known = getattr(config, "pad_token_id", None)
        tokenizer.pad_token = tokenizer.eos_token if known is None else tokenizer.convert_ids_to_tokens(known)
    if tokenizer.pad_token_id is None:
        raise Stop(f"{model}: its tokenizer has neither a pad nor an end-of-text token")
    config.pad_token_id = tokenizer.pad_token_id
    return tokenizer
