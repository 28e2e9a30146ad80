"""Training, labelling and captioning speed at the paper's size on one GPU, beside the naive way, without a download.

    python benchmarks/teacher_gpu.py --json teacher_gpu.json         a GPU of 40 GB or more
    python benchmarks/teacher_gpu.py --parts train                   24 GB
    python benchmarks/teacher_gpu.py --small --device cpu            the same code at a tiny shape, to see that it runs

The weights are random and made on the device, layer by layer: a model of Llama-3-8B's shape in NF4, and one of BLIP-large's. Speed does not depend on their values.
Rows have 144 to 256 random tokens, 200 on average. Tokens are counted without padding.

    train     ours: stage 02's batches, accumulation, checkpointing and optimiser.  naive: padded batches in the given order after prepare_model_for_kbit_training
    label     ours: LoRA merged, soft_labels as stage 03 calls it.                  naive: padded batches in the given order, NF4 with LoRA beside it
    caption   ours: stage 01's batches in bf16.                                     naive: one picture at a time in fp32

Bounds: 6 FLOP a linear weight and token for training (forward, forward again, gradients of the inputs; the weights are frozen), 2 for labelling, at the GPU's dense bf16 peak.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from common import C, PackedRows, Teacher  # noqa: E402

stage02, stage03 = importlib.import_module("02_train_teacher"), importlib.import_module("03_label")
PARTS = ("train", "label", "caption")
NAIVE_ROWS = 32  # rows a naive batch
PEAK = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}  # dense bf16 TFLOP/s of the makers' data sheets (SXM)
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=512, max_position_embeddings=512)
BLIP = {  # (vision, text)
    False: (dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=384, patch_size=16),
            dict(hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)),
    True: (dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16),
           dict(hidden_size=32, encoder_hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--parts", default=",".join(PARTS), metavar="A,B,…", help=f"default: {','.join(PARTS)}")
    p.add_argument("--small", action="store_true", help="a tiny shape")
    p.add_argument("--steps", type=int, default=6, metavar="N", help="optimiser steps measured, after one that is not (default: 6)")
    p.add_argument("--rows", type=int, default=4_096, metavar="N", help="rows to label (default: 4,096)")
    p.add_argument("--images", type=int, default=512, metavar="N", help="pictures to caption (default: 512)")
    p.add_argument("--caption-tokens", type=int, default=20, metavar="N", help="tokens a caption (default: 20)")
    p.add_argument("--image-batch", type=int, default=64, metavar="N", help="pictures a batch (default: 64)")
    p.add_argument("--batch-rows", type=int, metavar="N", help="rows an optimiser step (default: stage 02's paper preset)")
    p.add_argument("--compile", action="store_true", help="label with a compiled teacher, as stage 03 --compile")
    p.add_argument("--fp8", action="store_true", help="label with 8-bit products, as stage 03 --fp8; the bound stays that of bf16")
    p.add_argument("--peak-tflops", type=float, metavar="N", help="dense bf16 peak of this GPU (default: by its name, where known)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    args.parts = args.parts.split(",")
    if set(args.parts) - set(PARTS):
        p.error(f"--parts: choose from {','.join(PARTS)}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Models and rows


def random_backbone(config, device, dtype, seed=0):
    """A decoder with random weights: its shape on the meta device, then layer by layer into bf16 on the device and, if linear, from there into NF4."""
    import bitsandbytes as bnb

    torch.manual_seed(seed)
    backbone = common.load_backbone("", dtype, device="meta", config=config)
    for name, module in list(backbone.named_modules()):
        for key, p in list(module.named_parameters(recurse=False)):
            weight = torch.empty(p.shape, device=device, dtype=dtype)
            setattr(module, key, nn.Parameter(nn.init.normal_(weight, std=0.02) if p.ndim > 1 else nn.init.ones_(weight), requires_grad=False))
        if type(module) is nn.Linear:
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed).to(device)
            packed.support_avx512bf16_for_cpu = False
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, packed)
    backbone.rotary_emb = type(backbone.rotary_emb)(config=config).to(device)
    backbone.is_loaded_in_4bit = True
    return backbone


def random_rows(n, vocab, seed=0):
    """n rows of 144 to 256 random tokens, PackedRows."""
    rng = np.random.default_rng(seed)
    return PackedRows(rng.integers(0, vocab, length).tolist() for length in rng.integers(144, 257, n))


def settings(args):
    """Stage 02's arguments of the paper preset."""
    s = stage02.parse_args(["--preset", "paper"])
    s.batch_rows = args.batch_rows or s.batch_rows
    return s


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


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_ours(config, args, device, dtype):
    """QLoRA steps as stage 02 makes them."""
    s = settings(args)
    teacher, lora, _ = stage02.build_teacher(s, config, device, dtype, backbone=random_backbone(config, device, dtype))
    rows = random_rows(s.batch_rows * (args.steps + 1), config.vocab_size)
    steps = [[(part, rows.batch(part, 0)) for part in stage02.micro_batches(batch, rows.lengths, s.batch_tokens, 0, 1)]
             for batch in stage02.epoch_batches(rows.lengths, s.batch_rows, 0, 0)]
    return train(teacher, stage02.optimiser_of(teacher, s, lora), rows, steps, device, dtype, teacher.mask_matters)


def train_naive(config, args, device, dtype):
    """QLoRA steps as a tutorial makes them: peft's preparation for k-bit training, padded batches."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    s = settings(args)
    backbone = prepare_model_for_kbit_training(random_backbone(config, device, dtype), gradient_checkpointing_kwargs={"use_reentrant": False})
    backbone = get_peft_model(backbone, LoraConfig(r=s.lora_rank, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout, target_modules="all-linear"))
    teacher = Teacher(backbone, "decoder").to(device)
    rows = random_rows(s.batch_rows * (args.steps + 1), config.vocab_size)
    size = min(NAIVE_ROWS, s.batch_rows)
    passes = [(part, rows.batch(part, 0)) for part in naive_batches(rows, size)]
    a_step = s.batch_rows // size
    steps = [passes[i:i + a_step] for i in range(0, len(passes), a_step)]
    return train(teacher, stage02.optimiser_of(teacher, s, True), rows, steps, device, dtype, lambda mask: True)


def train(teacher, optimiser, rows, steps, device, dtype, mask_matters):
    """Optimiser steps over `steps`: lists of (row numbers, (ids, mask)). The first step is not timed."""
    teacher.train()
    targets = torch.from_numpy(np.random.default_rng(1).integers(0, C, len(rows)))
    trainable = [p for p in teacher.parameters() if p.requires_grad]

    def step(parts):
        n = sum(len(part) for part, _ in parts)
        for part, (x, mask) in parts:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = teacher(x.to(device, non_blocking=True), mask.to(device, non_blocking=True), mask_matters(mask))
            (F.cross_entropy(logits, targets[part].to(device), reduction="sum") / n).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    step(steps[0])
    with Clock(device) as clock:
        for parts in steps[1:]:
            step(parts)
    tokens = sum(int(rows.lengths[part].sum()) for parts in steps[1:] for part, _ in parts)
    padded = sum(x.numel() for parts in steps[1:] for _, (x, _) in parts)
    return {"tokens_per_second": tokens / clock.seconds, "padding": padded / tokens - 1, "peak_gb": clock.peak_gb}


# ---------------------------------------------------------------------------------------------------------------------
# Labelling


def label_both(config, args, device, dtype):
    """Naive first, on NF4 with LoRA beside it; then the same teacher merged. Returns figures, and how far the labels differ."""
    s = settings(args)
    teacher, _, _ = stage02.build_teacher(s, config, device, dtype, backbone=random_backbone(config, device, dtype))
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if "lora_B" in name:  # zero at first, which would make merging trivial
                p.normal_(std=0.01)
    teacher.eval()
    rows, found, figures = random_rows(args.rows, config.vocab_size), np.empty((args.rows, C), np.float32), {}

    @torch.inference_mode()
    def naive(batches):
        for part in batches:
            x, mask = (t.to(device) for t in rows.batch(part, 0))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                found[part] = teacher(x, mask).softmax(1).float().cpu().numpy()

    naive(naive_batches(rows)[:1])
    with Clock(device) as clock:
        naive(naive_batches(rows))
    tokens = int(rows.lengths.sum())
    figure = lambda padded: {"rows_per_second": len(rows) / clock.seconds, "tokens_per_second": tokens / clock.seconds, "padding": padded / tokens - 1, "peak_gb": clock.peak_gb}
    figures["naive"] = figure(sum(rows.lengths[part].max() * len(part) for part in naive_batches(rows)))

    common.merge_lora(teacher, dtype)
    if args.fp8:
        common.use_fp8(teacher)
    common.for_inference(teacher, device, dtype, args.compile)
    if args.compile:
        teacher.backbone = torch.compile(teacher.backbone, dynamic=True)
    budget = stage03.PRESETS["paper"]["batch_tokens"]
    warm = random_rows(min(256, args.rows), config.vocab_size)
    common.soft_labels(teacher, warm, 0, budget, device, dtype)
    with Clock(device) as clock:
        ours = common.soft_labels(teacher, rows, 0, budget, device, dtype)
    figures["ours"] = figure(stage03.padded_tokens(rows.lengths, budget))
    figures["max_difference"] = float(np.abs(ours - found).max())
    figures["same_level"] = float((ours.argmax(1) == found.argmax(1)).mean())
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def caption(args, device, dtype, batch):
    """Images/s of 01's captioner at the size of BLIP-large, and peak memory."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    vision, text = BLIP[args.small]
    torch.manual_seed(0)
    with device:
        model = BlipForConditionalGeneration(BlipConfig(vision_config=BlipVisionConfig(**vision).to_dict(), text_config=BlipTextConfig(**text).to_dict())).to(dtype).eval()
    pixels = torch.randn(batch, 3, vision["image_size"], vision["image_size"])
    n = args.images if batch > 1 else max(4, args.images // 16)  # the naive way on fewer pictures

    @torch.inference_mode()
    def run(times):
        for _ in range(times):
            model.generate(pixels.to(device, dtype), min_new_tokens=args.caption_tokens, max_new_tokens=args.caption_tokens, num_beams=1, do_sample=False)

    run(1)
    with Clock(device) as clock:
        run(-(-n // batch))
    return {"images_per_second": batch * -(-n // batch) / clock.seconds, "peak_gb": clock.peak_gb}


# ---------------------------------------------------------------------------------------------------------------------


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
    common.quiet()
    from transformers import LlamaConfig

    device = common.pick_device(args.device)
    dtype = torch.bfloat16
    config = LlamaConfig(**(SMALL if args.small else common.PUBLISHED["meta-llama/Meta-Llama-3-8B"][1]))
    linear = sum(m.weight.numel() for m in common.load_backbone("", dtype, device="meta", config=config).modules() if isinstance(m, nn.Linear))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = args.peak_tflops or next((t for key, t in PEAK.items() if key in name), None)
    import bitsandbytes, peft, transformers

    out = {"device": name, "small": args.small, "linear_weights": linear, "peak_tflops": peak,
           "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes)}}
    print(f"{name}; {', '.join(f'{k} {v}' for k, v in out['versions'].items())}; {linear / 1e9:.2f} B linear weights" + ("" if peak else "; its peak is not known: no share of the bound (--peak-tflops)"))
    if "train" in args.parts:
        out["train"] = {"ours": attempt(train_ours, config, args, device, dtype), "naive": attempt(train_naive, config, args, device, dtype)}
    if "label" in args.parts:
        out["label"] = attempt(label_both, config, args, device, dtype)
    if "caption" in args.parts:
        out["caption"] = {"ours": attempt(caption, args, device, dtype, args.image_batch), "naive": attempt(caption, args, device, torch.float32, 1)}
    for part, flop in (("train", 6), ("label", 2)):
        for figures in (out.get(part, {}).get(way) for way in ("ours", "naive")):
            if figures and "error" not in figures:
                figures["share_of_bound"] = figures["tokens_per_second"] * flop * linear / (peak * 1e12) if peak else None
    print_table(out)
    if args.json:
        common.write_json(args.json, out)


def print_table(out):
    """Markdown."""
    print("\n| what | way | speed | share of the bound | padding | peak memory | ours / naive |\n| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    number = lambda figures, key, form: form.format(figures[key]) if figures.get(key) is not None else ""
    for part, key, unit in (("train", "tokens_per_second", "tokens/s"), ("label", "rows_per_second", "rows/s"), ("caption", "images_per_second", "images/s")):
        both = out.get(part, {})
        for way in ("ours", "naive"):
            if (figures := both.get(way)) is None:
                continue
            ratio = f"{both['ours'][key] / both['naive'][key]:.2f}×" if all(key in both.get(w, {}) for w in ("ours", "naive")) else ""
            print(f"| {part} | {way} | {figures.get('error') or f'{figures[key]:,.1f} {unit}'} | {number(figures, 'share_of_bound', '{:.0%}')} | {number(figures, 'padding', '{:.1%}')} | "
                  f"{number(figures, 'peak_gb', '{:.1f} GB')} | {ratio if way == 'ours' else ''} |")
    if "max_difference" in out.get("label", {}):
        print(f"\nlabels, ours beside naive: at most {out['label']['max_difference']:.1e} apart, same level on {out['label']['same_level']:.1%} of the rows")


if __name__ == "__main__":
    common.run(main)
