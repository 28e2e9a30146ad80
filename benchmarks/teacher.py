"""Speed and memory of the teacher and of 01's models, beside what a user would call instead. No download.

    python benchmarks/teacher.py --json FILE                  a GPU of 80 GB, under four minutes
    python benchmarks/teacher.py --parts train --profile      24 GB; where a training step's time goes
    python benchmarks/teacher.py --small --device cpu         the same code at a tiny shape
    python benchmarks/teacher.py --parts peers --run RUN --model MODEL       on a CPU, with a model and pairs

The weights are random and made on the device, layer by layer: models of Llama-3-8B's, BLIP-large's and
MiniLM's shapes. Speed does not depend on their values. Rows have 144 to 256 random tokens, 200 on average.
Tokens are counted without padding.

    train     02's batches, accumulation and optimizer; activations kept, and computed again in the backward
              pass. naive: padded batches in the given order after prepare_model_for_kbit_training
    label     weights in bf16, as after merging LoRA, by 03's soft_labels; the same after compile_layers.
              naive: padded batches in the given order, NF4 with LoRA beside it
    caption   01's caption_chunk in bf16, from JPEG files on. naive: one picture at a time in fp32
    embed     01's TextEncoder in bf16, without its tokenizer
    peers     pairs of RUN, labelled by a BERT-like model with a random classifier: 03's soft_labels,
              sentence_transformers.CrossEncoder.predict, a padded loop; all tokenize the same text. They must
              agree. pip install -r benchmarks/requirements.txt

Bounds: 6 FLOP a linear weight and token for training, activations kept or not (the weights are frozen), 2 for
labelling, at the GPU's dense bf16 peak.
"""

import functools
import importlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import NUM_LEVELS, PairText, Teacher, pad_rows  # noqa: E402
from lib import models  # noqa: E402
from lib.inputs.captions import caption_chunk  # noqa: E402
from lib.inputs.encoders import Captioner, TextEncoder  # noqa: E402
from lib.inputs.rows import epoch_batches, micro_batches, read_fields  # noqa: E402
from lib.stages.files import write_json  # noqa: E402
from lib.stages.hardware import pick_device, pick_dtype  # noqa: E402
from lib.stages.settings import Device  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402

stage01, stage02, stage03 = map(
    importlib.import_module, ("01_build_features", "02_train_teacher", "03_label")
)
SHAPES = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())
NAIVE_ROWS = 32  # rows a naive batch: CrossEncoder.predict's default
# Dense bf16 TFLOP/s of the makers' data sheets (SXM).
PEAK = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LLAMA = {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "vocab_size": 512}
BLIP = {"vision": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}}
BLIP["text"] = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
MINILM = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 12}
MINILM |= {"intermediate_size": 1536, "vocab_size": 250_037}
# Kernels by a part of their name, the first that fits.
KERNELS = {"matrix products": "gemm cutlass nvjet mm", "attention": "flash attention fmha sdpa"}
KERNELS |= {"weights out of NF4": "dequantize 4bit", "copies": "memcpy memset copy", "the rest": ""}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    parts: tuple[Literal["train", "label", "caption", "embed", "peers"], ...] = (
        "train", "label", "caption", "embed",
    )  # fmt: skip
    small: bool = False  # tiny shapes
    device: Device = "auto"
    steps: int = 2  # training steps measured, after one that is not
    rows: int = 1_024  # rows to label
    images: int = 1_024  # pictures to caption
    texts: int = 65_536  # texts to embed
    caption_tokens: int = 20  # tokens of every caption
    batch_size: int | None = None  # rows a step (default: 02's paper preset)
    profile: bool = False  # a table of one more training step's time
    peak_tflops: float | None = None  # dense bf16 peak of this GPU (default: by its name, where known)
    run: Path | None = None  # peers: whose labelled pairs
    model: str | None = None  # peers: a BERT-like model
    json: Path | None = None  # where the figures go


# ------------------------------------------------------------------------------------------------------------
# Models, rows, time


def into_4_bit(linear, device, dtype):
    """A linear layer in NF4, as QLoRA holds it."""
    import bitsandbytes as bnb

    shape = (linear.in_features, linear.out_features)
    packed = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    options = {"quant_type": "nf4", "compress_statistics": True, "module": packed}
    packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options).to(device)
    packed.support_avx512bf16_for_cpu = False
    return packed


def random_decoder(config, device, dtype, quantize=True):
    """A decoder with random weights: its shape on the meta device, then layer by layer into bf16 on the
    device and, with `quantize` and if linear, from there into NF4."""
    torch.manual_seed(0)
    backbone = models.empty_backbone(config, dtype)
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


def random_rows(n, vocab):
    """n rows of 144 to 256 random tokens, and their lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(144, 257, n)
    return [rng.integers(0, vocab, length, dtype=np.int32) for length in lengths], lengths


def measured(device, work, count):
    """Calls work(). {"per_second": `count` by its seconds, "peak_gb"}."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "per_second": count / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def in_order(rows):
    """Naive batches of row numbers."""
    return np.array_split(np.arange(len(rows)), -(-len(rows) // NAIVE_ROWS))


# ------------------------------------------------------------------------------------------------------------
# 02 and 03


class Bench:
    """The ways of training and labelling a decoder."""

    def __init__(self, options):
        from transformers import AutoConfig

        self.options, self.device, self.dtype = options, pick_device(options.device), torch.bfloat16
        self.config = AutoConfig.for_model(
            **(LLAMA if options.small else SHAPES["meta-llama/Meta-Llama-3-8B"])
        )
        settings = stage02.PRESETS["paper"]
        self.settings = replace(settings, batch_size=options.batch_size or settings.batch_size)
        linear = [m for m in models.empty_backbone(self.config).modules() if isinstance(m, nn.Linear)]
        self.linear = sum(layer.weight.numel() for layer in linear)

    def teacher(self, quantize):
        backbone = random_decoder(self.config, self.device, self.dtype, quantize)
        if quantize:
            backbone = stage02.add_lora(backbone, self.settings)
        return Teacher(backbone, "decoder", self.dtype).to(self.device)

    def train(self, way):
        """Tokens/s of optimizer steps, the first of which is not timed."""
        settings, options = self.settings, self.options
        rows, lengths = random_rows(settings.batch_size * (options.steps + 1), self.config.vocab_size)
        if way == "naive":
            from peft import prepare_model_for_kbit_training as prepare

            backbone = prepare(random_decoder(self.config, self.device, self.dtype))
            teacher = Teacher(stage02.add_lora(backbone, settings), "decoder", self.dtype).to(self.device)
            batches = np.split(np.arange(len(rows)), options.steps + 1)
            steps = [np.array_split(batch, -(-len(batch) // NAIVE_ROWS)) for batch in batches]
        else:
            teacher, steps = self.teacher(quantize=True), []
            if way == "activations twice":
                stage02.computed_again(teacher.backbone)
            for batch in epoch_batches(lengths, settings.batch_size, seed=0, epoch=0):
                steps.append(micro_batches(batch, lengths, settings.batch_tokens, rank=0, world=1))
        optimizer = stage02.make_optimizer(teacher.train(), "qlora", settings)
        targets = torch.from_numpy(np.random.default_rng(1).integers(0, NUM_LEVELS, len(rows))).to(
            self.device
        )

        def step(passes):
            for part in passes:
                logits = teacher(*self.batch(rows, part))
                (teacher.loss(logits, targets[part]) / sum(map(len, passes))).backward()
            torch.nn.utils.clip_grad_norm_([p for p in teacher.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step(steps[0])
        tokens = sum(int(lengths[part].sum()) for passes in steps[1:] for part in passes)
        positions = sum(len(part) * int(lengths[part].max()) for passes in steps[1:] for part in passes)
        figures = measured(self.device, lambda: [step(passes) for passes in steps[1:]], tokens)
        if options.profile:
            figures["profile"] = profile(lambda: step(steps[0]), self.device)
        return {**figures, "padding": positions / tokens - 1}

    def label(self, way):
        """Tokens/s of labelling."""
        rows, lengths = random_rows(self.options.rows, self.config.vocab_size)
        teacher, said = self.teacher(quantize=way == "naive").eval(), []
        settings = replace(stage03.PRESETS["paper"], compile="on")
        work = functools.partial(stage03.soft_labels, teacher, pad_id=0, token_budget=settings.batch_tokens)
        if way == "naive":
            work = functools.partial(self.label_naive, teacher)
        if way == "compiled":
            process = SimpleNamespace(device=self.device, print=said.append)
            stage03.compile_layers(teacher, rows[:256], 0, settings, process)
        work(rows[:256])
        positions = []
        seen = teacher.backbone.get_input_embeddings().register_forward_pre_hook(
            lambda module, inputs: positions.append(inputs[0].numel())
        )
        figures = measured(self.device, lambda: work(rows), tokens := int(lengths.sum()))
        seen.remove()
        return {**figures, "said": said, "padding": sum(positions) / tokens - 1}

    @torch.inference_mode()
    def label_naive(self, teacher, rows):
        return [teacher(*self.batch(rows, part)).softmax(1).float().cpu() for part in in_order(rows)]

    def batch(self, rows, numbers):
        return [tensor.to(self.device) for tensor in pad_rows([rows[number] for number in numbers], 0)]

    # --------------------------------------------------------------------------------------------------------
    # 01

    def caption(self, way):
        """Pictures/s of a captioner, from JPEG files of 640 x 480 on."""
        dtype, batch = (torch.float32, 1) if way == "naive" else (self.dtype, stage01.Settings().image_batch)
        images = self.options.images // (16 if way == "naive" else 1)
        captioner = self.random_captioner(dtype)
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng(0)
            for number in range(32):
                pixels = rng.integers(0, 255, (60, 80, 3), np.uint8)
                Image.fromarray(pixels).resize((640, 480)).save(f"{folder}/{number}.jpg")
            names = pa.array([f"{number % 32}.jpg" for number in range(images)])
            chunk = pa.table({"digest": names, "image": names})
            caption_chunk(chunk[:batch], captioner, Path(folder), batch)
            return measured(self.device, lambda: caption_chunk(chunk, captioner, Path(folder), batch), images)

    def random_captioner(self, dtype):
        from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor

        vision, text = (SMALL if self.options.small else BLIP[side] for side in ("vision", "text"))
        size = {"image_size": 32 if self.options.small else 384, "patch_size": 16}
        config = BlipConfig(
            vision_config={**vision, **size},
            text_config={**text, "encoder_hidden_size": vision["hidden_size"]},
        )
        captioner = Captioner.__new__(Captioner)
        with self.device:
            captioner.model = BlipForConditionalGeneration(config).to(dtype).eval()
        captioner.model.generation_config.min_new_tokens = self.options.caption_tokens
        pixels = BlipImageProcessor(size={"height": size["image_size"], "width": size["image_size"]})
        words = SimpleNamespace(batch_decode=lambda ids, **options: [""] * len(ids))
        captioner.processor = SimpleNamespace(image_processor=pixels, tokenizer=words)
        captioner.name, captioner.tokens = "random weights", self.options.caption_tokens
        captioner.device, captioner.dim = self.device, config.vision_config.hidden_size
        return captioner

    def embed(self, way):
        """Tokens/s of a text encoder, of texts of 8 to 128 tokens."""
        from transformers import AutoConfig

        settings, rng = stage01.PRESETS["paper"], np.random.default_rng(0)
        config = AutoConfig.for_model(**(MINILM | (SMALL if self.options.small else {})))
        encoder = TextEncoder.__new__(TextEncoder)
        encoder.model = models.random_backbone(config, self.dtype).to(self.device).eval()
        encoder.max_tokens, encoder.token_batch = settings.text_tokens, settings.token_batch
        encoder.device, encoder.dim, encoder.name = self.device, config.hidden_size, "random weights"
        rows = {str(i): rng.integers(5, 30_000, rng.integers(8, 129)) for i in range(self.options.texts)}
        encoder.tokenizer = RandomTokens(rows)
        tokens = sum(map(len, rows.values()))
        encoder([*rows][:256])
        return measured(self.device, lambda: encoder([*rows], multiple=8), tokens)


class RandomTokens(dict):
    """{text: token ids}, called as a tokenizer is."""

    pad_token_id = 0

    def __call__(self, texts, **options):
        return {"input_ids": [self[text] for text in texts]}


def profile(step, device):
    """{kind of kernel: share of a step's time}."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CUDA if device.type == "cuda" else kinds.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    spent = dict.fromkeys(KERNELS, 0.0)
    for event in profiler.key_averages():
        words = {kind: parts.split() for kind, parts in KERNELS.items()}
        name = event.key.lower()
        kind = next(kind for kind, parts in words.items() if not parts or any(part in name for part in parts))
        spent[kind] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    return {kind: time / sum(spent.values()) for kind, time in spent.items()}


# ------------------------------------------------------------------------------------------------------------
# Peers: each way(folder, pairs, dtype) -> (label, the embedding layer); label() -> probabilities [B, C]


def pairs_of(run, n):
    """n human-labelled pairs of a run: queries, titles, descriptions."""
    features = run / "features"
    pairs = pq.read_table(features / "labelled.parquet", columns=["query_index", "pin_index"]).slice(0, n)
    queries = pq.read_table(features / "queries.parquet", columns=["query"])["query"]
    pins, which = np.unique(pairs["pin_index"].to_numpy(), return_inverse=True)
    text = read_fields(features / "pins.parquet", ("title", "description"), pins)
    columns = [queries.take(pairs["query_index"]).to_pylist()]
    return list(zip(*columns, *([texts[pin] for pin in which] for texts in text.values())))


def plain_text(pair):
    """The words that PairText writes."""
    fields = {"title": pair[1], "description": pair[2]}
    return pair[0], " ".join(f"{name}: {text}" for name, text in fields.items() if text)


def cross_encoder(folder, pairs, dtype):
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise Stop("sentence-transformers: pip install -r benchmarks/requirements.txt") from error
    encoder = CrossEncoder(str(folder), device="cpu", max_length=96, model_kwargs={"dtype": dtype})
    options = {"batch_size": NAIVE_ROWS, "apply_softmax": True, "show_progress_bar": False}
    return lambda: encoder.predict([*map(plain_text, pairs)], **options), encoder


def padded_loop(folder, pairs, dtype):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    options = {"truncation": True, "max_length": 96, "padding": True, "return_tensors": "pt"}

    @torch.inference_mode()
    def label():
        out = []
        for part in in_order(pairs):
            queries, texts = zip(*(plain_text(pairs[number]) for number in part))
            out.append(model(**tokenizer(list(queries), list(texts), **options)).logits.float().softmax(1))
        return torch.cat(out).numpy()

    return label, model


def ours(folder, pairs, dtype):
    """03's teacher with the classifier's own layers as its head, in fp32 as always."""
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = models.load_tokenizer(folder, network.config)
    teacher = Teacher(models.load_backbone(folder, dtype), "encoder", dtype).eval()
    teacher.head = nn.Sequential(network.bert.pooler.dense, nn.Tanh(), network.classifier).eval()
    text = PairText(tokenizer, "encoder", ("title", "description"), 96)

    def label():
        queries, pins = ([*dict.fromkeys(pair[side] for pair in pairs)] for side in (slice(1), slice(1, 3)))
        query_ids = dict(zip(queries, text.queries([query for (query,) in queries])))
        titles, descriptions = zip(*pins)
        pin_ids = dict(zip(pins, text.pins({"title": titles, "description": descriptions})))
        rows = [text.pair(query_ids[pair[:1]], pin_ids[pair[1:]]) for pair in pairs]
        return stage03.soft_labels(teacher, rows, tokenizer.pad_token_id, 2_048)

    return label, teacher


def peers(options):
    """{way: figures}, in fp32 and, where the CPU multiplies it, bf16."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if options.run is None or options.model is None:
        raise Stop("--parts peers: --run RUN --model MODEL")
    pairs, found, first = pairs_of(options.run, options.rows), {}, None
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        network = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=NUM_LEVELS)
        nn.init.normal_(network.classifier.weight, std=0.8)  # so that probabilities are spread
        network.save_pretrained(folder)
        names = ["input_ids", "attention_mask"]
        AutoTokenizer.from_pretrained(options.model, model_input_names=names).save_pretrained(folder)
        for dtype in dict.fromkeys((torch.float32, pick_dtype("auto", "cpu"))):
            for way in (cross_encoder, padded_loop, ours):
                label, module = way(folder, pairs, dtype)
                p = np.asarray(label(), np.float64)  # the first call sets things up
                figures = measured(torch.device("cpu"), label, len(pairs))
                first = p if first is None else first
                figures["max_difference"] = float(np.abs(p - first).max())
                found[f"{way.__name__}, {str(dtype).removeprefix('torch.')}"] = figures
    return found


# ------------------------------------------------------------------------------------------------------------

WAYS = {
    "train": ("activations kept", "activations twice", "naive"),
    "label": ("plain", "compiled", "naive"),
    "caption": ("ours", "naive"),
    "embed": ("ours",),
}
UNITS = {"caption": "pictures", "peers": "rows"}
FLOP = {"train": 6, "label": 2}


def attempt(function, way):
    """The figures, or what kept them away: one way may not fit into the memory that another fits into."""
    try:
        return function(way)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(argv=None):
    options = tyro.cli(Options, args=argv, description=__doc__)
    models.quiet_libraries()
    start, bench = time.perf_counter(), Bench(options)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    peak = options.peak_tflops or next((tflops for key, tflops in PEAK.items() if key in name), None)
    found = {"device": name, "torch": torch.__version__, "linear_weights": bench.linear, "peak_tflops": peak}
    print(
        f"{name}; torch {torch.__version__}; {bench.linear / 1e9:.2f} B linear weights; peak {peak} TFLOP/s"
    )
    print("\n| what | way | a second | share of the bound | padding | peak memory | more |")
    print("| --- | --- |" + " ---: |" * 4 + " --- |")
    for part in options.parts:
        ways = peers(options) if part == "peers" else dict.fromkeys(WAYS[part])
        for way in ways:
            figures = ways[way] = ways[way] or attempt(getattr(bench, part), way)
            if part in FLOP and peak and "per_second" in figures:
                figures["share_of_bound"] = figures["per_second"] * FLOP[part] * bench.linear / (peak * 1e12)
            print_row(part, way, figures)
        found[part] = ways
    found["seconds"] = time.perf_counter() - start
    print(f"\n{found['seconds']:.0f} s in all")
    if options.json:
        write_json(options.json, found)


def print_row(part, way, figures):
    """A row of a Markdown table."""
    unit = UNITS.get(part, "tokens")
    cells = [part, way, figures.get("error") or f"{figures['per_second']:,.1f} {unit}"]
    forms = {"share_of_bound": "{:.0%}", "padding": "{:.1%}", "peak_gb": "{:.1f} GB"}
    for key, form in forms.items():
        cells.append(form.format(figures[key]) if figures.get(key) is not None else "")
    more = [*figures.get("said", [])]
    more += [f"max difference {figures['max_difference']:.1e}"] if "max_difference" in figures else []
    more += [f"{kind} {share:.0%}" for kind, share in figures.get("profile", {}).items()]
    print(f"| {' | '.join(cells)} | {', '.join(more)} |", flush=True)


if __name__ == "__main__":
    run_main(main)
