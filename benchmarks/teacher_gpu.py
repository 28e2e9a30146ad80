"""Training, labelling and captioning speed at the paper's size on one GPU, beside the naive way, without a
download.

    python benchmarks/teacher_gpu.py --json teacher_gpu.json         a GPU of 40 GB or more
    python benchmarks/teacher_gpu.py --parts train                   24 GB
    python benchmarks/teacher_gpu.py --small --device cpu            the same code at a tiny shape

The weights are random and made on the device, layer by layer: a model of Llama-3-8B's shape in NF4, and one
of BLIP-large's. Speed does not depend on their values. Rows have 144 to 256 random tokens, 200 on average.
Tokens are counted without padding.

    train     ours: stage 02's batches, accumulation, checkpointing and optimizer.
              naive: padded batches in the given order after prepare_model_for_kbit_training
    label     ours: weights in bf16, as after merging LoRA, soft_labels as stage 03 calls it.
              naive: padded batches in the given order, NF4 with LoRA beside it
    caption   ours: stage 01's batches in bf16.   naive: one picture at a time in fp32

Bounds: 6 FLOP a linear weight and token for training (forward, forward again, gradients of the inputs; the
weights are frozen), 2 for labelling, at the GPU's dense bf16 peak.
"""

import argparse
import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import NUM_LEVELS, Teacher, pad_rows  # noqa: E402
from lib import models  # noqa: E402
from lib.inputs.rows import epoch_batches, micro_batches  # noqa: E402
from lib.stages.files import write_json  # noqa: E402
from lib.stages.hardware import pick_device  # noqa: E402
from lib.stages.terminal import run_main  # noqa: E402

stage02, stage03 = importlib.import_module("02_train_teacher"), importlib.import_module("03_label")
SHAPES = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())
PARTS = ("train", "label", "caption")
NAIVE_ROWS = 32  # rows a naive batch
# Dense bf16 TFLOP/s of the makers' data sheets (SXM).
PEAK = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}
SMALL = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    vocab_size=512,
    max_position_embeddings=512,
)
SMALL_BLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
BLIP_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
BLIP_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--parts", default=",".join(PARTS), metavar="A,B,…", help=f"default: {','.join(PARTS)}")
    p.add_argument("--small", action="store_true", help="a tiny shape")
    p.add_argument("--steps", type=int, default=6, metavar="N", help="steps measured, after one that is not")
    p.add_argument("--rows", type=int, default=4_096, metavar="N", help="rows to label (default: 4,096)")
    p.add_argument("--images", type=int, default=512, metavar="N", help="pictures to caption (default: 512)")
    p.add_argument(
        "--caption-tokens", type=int, default=20, metavar="N", help="tokens a caption (default: 20)"
    )
    p.add_argument("--image-batch", type=int, default=64, metavar="N", help="pictures a batch (default: 64)")
    p.add_argument("--batch-size", type=int, metavar="N", help="rows a step (default: 02's paper preset)")
    peak = "dense bf16 peak of this GPU (default: by its name, where known)"
    p.add_argument("--peak-tflops", type=float, metavar="N", help=peak)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    args.parts = args.parts.split(",")
    if set(args.parts) - set(PARTS):
        p.error(f"--parts: choose from {','.join(PARTS)}")
    return args


# ------------------------------------------------------------------------------------------------------------
# Models and rows


def into_4_bit(linear, device, dtype):
    """A linear layer in NF4, as QLoRA holds it."""
    import bitsandbytes as bnb

    shape = (linear.in_features, linear.out_features)
    packed = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    options = {"quant_type": "nf4", "compress_statistics": True, "module": packed}
    packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options).to(device)
    packed.support_avx512bf16_for_cpu = False
    return packed


def random_backbone(config, device, dtype, quantize=True, seed=0):
    """A decoder with random weights: its shape on the meta device, then layer by layer into bf16 on the
    device and, with `quantize` and if linear, from there into NF4."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    with torch.device("meta"):
        backbone = AutoModel.from_config(config, dtype=dtype)
    for name, module in list(backbone.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.empty(parameter.shape, device=device, dtype=dtype)
            weight = nn.init.normal_(weight, std=0.02) if parameter.ndim > 1 else nn.init.ones_(weight)
            setattr(module, key, nn.Parameter(weight, requires_grad=False))
        if quantize and type(module) is nn.Linear:
            backbone.set_submodule(name, into_4_bit(module, device, dtype))
    backbone.rotary_emb = type(backbone.rotary_emb)(config=config).to(device)
    backbone.is_loaded_in_4bit = quantize
    return backbone


def random_rows(n, vocab, seed=0):
    """n rows of 144 to 256 random tokens, and their lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(144, 257, n)
    return [rng.integers(0, vocab, length, dtype=np.int32) for length in lengths], lengths


def padded(rows, numbers):
    """Token ids and mask [B, T] of some rows."""
    return pad_rows([rows[number] for number in numbers], 0)


def paper_settings(args):
    """Stage 02's settings of the paper preset."""
    settings = stage02.PRESETS["paper"]
    return replace(settings, batch_size=args.batch_size or settings.batch_size)


class Clock:
    """Seconds and peak memory of a block on the device."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.peak_gb = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None


def naive_batches(rows, size=NAIVE_ROWS):
    """Row numbers in their order, `size` a batch."""
    return [np.arange(i, min(i + size, len(rows))) for i in range(0, len(rows), size)]


# ------------------------------------------------------------------------------------------------------------
# Training


def train_ours(config, args, device, dtype):
    """QLoRA steps as stage 02 makes them."""
    settings = paper_settings(args)
    backbone = random_backbone(config, device, dtype)
    backbone = stage02.prepare_training(backbone, settings, "qlora", device)
    teacher = Teacher(backbone, "decoder", dtype).to(device)
    rows, lengths = random_rows(settings.batch_size * (args.steps + 1), config.vocab_size)
    steps = []
    for batch in epoch_batches(lengths, settings.batch_size, seed=0, epoch=0):
        passes = micro_batches(batch, lengths, settings.batch_tokens, rank=0, world=1)
        steps.append([(part, padded(rows, part)) for part in passes])
    return train(teacher, stage02.make_optimizer(teacher, "qlora", settings), lengths, steps, device)


def train_naive(config, args, device, dtype):
    """QLoRA steps as a tutorial makes them: peft's preparation for k-bit training, padded batches."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    settings = paper_settings(args)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    backbone = prepare_model_for_kbit_training(random_backbone(config, device, dtype), **options)
    lora = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha, "lora_dropout": settings.lora_dropout}
    backbone = get_peft_model(backbone, LoraConfig(**lora, target_modules="all-linear"))
    teacher = Teacher(backbone, "decoder", dtype).to(device)
    rows, lengths = random_rows(settings.batch_size * (args.steps + 1), config.vocab_size)
    size = min(NAIVE_ROWS, settings.batch_size)
    passes = [(part, padded(rows, part)) for part in naive_batches(rows, size)]
    a_step = settings.batch_size // size
    steps = [passes[i : i + a_step] for i in range(0, len(passes), a_step)]
    return train(teacher, stage02.make_optimizer(teacher, "qlora", settings), lengths, steps, device)


def train(teacher, optimizer, lengths, steps, device):
    """Optimizer steps over `steps`: lists of (row numbers, (ids, mask)). The first step is not timed."""
    teacher.train()
    targets = torch.from_numpy(np.random.default_rng(1).integers(0, NUM_LEVELS, len(lengths)))

    def one_step(passes):
        rows = sum(len(part) for part, _ in passes)
        for part, (ids, mask) in passes:
            logits = teacher(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True))
            (teacher.loss(logits, targets[part].to(device)) / rows).backward()
        torch.nn.utils.clip_grad_norm_([p for p in teacher.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    one_step(steps[0])
    with Clock(device) as clock:
        for passes in steps[1:]:
            one_step(passes)
    passes = [one for passes in steps[1:] for one in passes]
    tokens = sum(int(lengths[part].sum()) for part, _ in passes)
    positions = sum(ids.numel() for _, (ids, _) in passes)
    speed = {"tokens_per_second": tokens / clock.seconds, "padding": positions / tokens - 1}
    return {**speed, "peak_gb": clock.peak_gb}


# ------------------------------------------------------------------------------------------------------------
# Labelling


def label_figures(clock, lengths, positions):
    """Speed, padding and memory of labelling rows of these lengths."""
    tokens = int(lengths.sum())
    return {
        "rows_per_second": len(lengths) / clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "padding": positions / tokens - 1,
        "peak_gb": clock.peak_gb,
    }


@torch.inference_mode()
def label_naive(config, args, device, dtype):
    """NF4 with LoRA beside it, padded batches in the given order."""
    backbone = random_backbone(config, device, dtype)
    backbone = stage02.prepare_training(backbone, paper_settings(args), "qlora", device)
    teacher = Teacher(backbone, "decoder", dtype).to(device).eval()
    rows, lengths = random_rows(args.rows, config.vocab_size)
    batches = [padded(rows, part) for part in naive_batches(rows)]
    teacher(*(tensor.to(device) for tensor in batches[0]))
    with Clock(device) as clock:
        for ids, mask in batches:
            teacher(ids.to(device), mask.to(device)).softmax(1).float().cpu()
    return label_figures(clock, lengths, sum(ids.numel() for ids, _ in batches))


def label_ours(config, args, device, dtype):
    """Plain weights, as after merging, by stage 03's soft_labels."""
    teacher = Teacher(random_backbone(config, device, dtype, quantize=False), "decoder", dtype).to(device)
    teacher.eval()
    rows, lengths = random_rows(args.rows, config.vocab_size)
    budget, positions = stage03.PRESETS["paper"].batch_tokens, []
    stage03.soft_labels(teacher, rows[:256], 0, budget)
    count = teacher.backbone.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: positions.append(inputs[0].numel())
    )
    with Clock(device) as clock:
        stage03.soft_labels(teacher, rows, 0, budget)
    count.remove()
    return label_figures(clock, lengths, sum(positions))


# ------------------------------------------------------------------------------------------------------------
# Captions


def caption(args, device, dtype, batch):
    """Images/s of 01's captioner at the size of BLIP-large, and peak memory."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    width, patch = (32, 16) if args.small else (384, 16)
    vision = {**(SMALL_BLIP if args.small else BLIP_LARGE), "image_size": width, "patch_size": patch}
    text = {**(SMALL_BLIP if args.small else BLIP_TEXT), "encoder_hidden_size": vision["hidden_size"]}
    both = {
        "vision_config": BlipVisionConfig(**vision).to_dict(),
        "text_config": BlipTextConfig(**text).to_dict(),
    }
    torch.manual_seed(0)
    with device:
        model = BlipForConditionalGeneration(BlipConfig(**both)).to(dtype).eval()
    pixels = torch.randn(batch, 3, width, width)
    images = args.images if batch > 1 else max(4, args.images // 16)  # the naive way on fewer pictures
    length = {"min_new_tokens": args.caption_tokens, "max_new_tokens": args.caption_tokens}

    @torch.inference_mode()
    def run(times):
        for _ in range(times):
            model.generate(pixels.to(device, dtype), num_beams=1, do_sample=False, **length)

    batches = -(-images // batch)
    run(1)
    with Clock(device) as clock:
        run(batches)
    return {"images_per_second": batch * batches / clock.seconds, "peak_gb": clock.peak_gb}


# ------------------------------------------------------------------------------------------------------------


def attempt(function, *args):
    """The figures, or what kept them away: the naive way may not fit into the memory that ours fits into."""
    try:
        return function(*args)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(argv=None):
    args = parse_args(argv)
    models.quiet_libraries()
    import bitsandbytes
    import peft
    import transformers
    from transformers import AutoConfig

    device, dtype = pick_device(args.device), torch.bfloat16
    shape = {"model_type": "llama", **SMALL} if args.small else SHAPES["meta-llama/Meta-Llama-3-8B"]
    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        backbone = transformers.AutoModel.from_config(config)
    linear = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, nn.Linear))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = args.peak_tflops or next((t for key, t in PEAK.items() if key in name), None)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes)}
    out = {"device": name, "small": args.small, "linear_weights": linear, "peak_tflops": peak}
    out["versions"] = versions
    unknown = "" if peak else "; its peak is not known: no share of the bound (--peak-tflops)"
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    print(f"{name}; {packages}; {linear / 1e9:.2f} B linear weights{unknown}")

    shared = (config, args, device, dtype)
    if "train" in args.parts:
        out["train"] = {"ours": attempt(train_ours, *shared), "naive": attempt(train_naive, *shared)}
    if "label" in args.parts:
        out["label"] = {"ours": attempt(label_ours, *shared), "naive": attempt(label_naive, *shared)}
    if "caption" in args.parts:
        ours = attempt(caption, args, device, dtype, args.image_batch)
        out["caption"] = {"ours": ours, "naive": attempt(caption, args, device, torch.float32, 1)}
    for part, flop in (("train", 6), ("label", 2)):
        for figures in out.get(part, {}).values():
            if peak and "error" not in figures:
                figures["share_of_bound"] = figures["tokens_per_second"] * flop * linear / (peak * 1e12)
    print_table(out)
    if args.json:
        write_json(args.json, out)


def print_table(out):
    """Markdown."""
    print("\n| what | way | speed | share of the bound | padding | peak memory | ours / naive |")
    print("| --- | --- |" + " ---: |" * 5)
    units = (("train", "tokens"), ("label", "rows"), ("caption", "images"))
    for part, unit in units:
        both = out.get(part, {})
        key = f"{unit}_per_second"
        for way, figures in both.items():
            cells = [part, way, figures.get("error") or f"{figures[key]:,.1f} {unit}/s"]
            for name, form in (("share_of_bound", "{:.0%}"), ("padding", "{:.1%}"), ("peak_gb", "{:.1f} GB")):
                cells.append(form.format(figures[name]) if figures.get(name) is not None else "")
            comparable = way == "ours" and all(key in other for other in both.values())
            cells.append(f"{both['ours'][key] / both['naive'][key]:.2f}×" if comparable else "")
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    run_main(main)
