"""Speed and memory of the teacher and of 01's models, beside what a user would call instead. No download.

    python benchmarks/teacher.py --json FILE                  a GPU of 80 GB, under four minutes
    python benchmarks/teacher.py --parts train --profile      24 GB; where a training step's time goes
    python benchmarks/teacher.py --small --device cpu         the same code at a tiny shape
    python benchmarks/teacher.py --parts peers --device cpu --run RUN --model MODEL       a model and pairs

Weights are random, of Llama-3-8B's, BLIP-large's and MiniLM's shapes. Rows have 144 to 256 random tokens, 200
on average. Tokens are counted, without padding; `naive` takes padded batches in the given order.

    train     02's steps; activations kept, and computed again in the backward pass. naive: after
              prepare_model_for_kbit_training
    label     03's soft_labels, weights as after merging LoRA; the same after compile_layers. naive: NF4 with
              LoRA beside it
    caption   01's caption_chunk, from JPEG files on: pictures
    embed     01's TextEncoder, without its tokenizer
    peers     pairs of RUN, labelled by a BERT-like model with a random classifier: 03's soft_labels beside
              sentence-transformers' CrossEncoder, which must agree: pairs

Bounds: 6 FLOP a linear weight and token for training, 2 for labelling, at the GPU's dense bf16 peak.
"""

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
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import NUM_LEVELS, PairText, Teacher  # noqa: E402
from lib import models  # noqa: E402
from lib.inputs.captions import caption_chunk  # noqa: E402
from lib.inputs.encoders import Captioner, TextEncoder  # noqa: E402
from lib.inputs.rows import LabelledRows, epoch_batches, token_ids_of  # noqa: E402
from lib.stages.files import write_json  # noqa: E402
from lib.stages.processes import start_processes  # noqa: E402
from lib.stages.settings import Count, Device, Positive, Precision, flags_read  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402

NAMES = ("01_build_features", "02_train_teacher", "03_label")
stage01, stage02, stage03 = map(importlib.import_module, NAMES)
SHAPES = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())
NAIVE_ROWS = 32  # rows a naive batch: CrossEncoder.predict's default
PEER_FIELDS, PEER_TOKENS = ["title", "description"], 96
# Dense bf16 TFLOP/s of the makers' data sheets (SXM).
PEAK = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LLAMA = {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "vocab_size": 512}
BLIP = {"vision": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}}
BLIP["text"] = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
WAYS = {
    "train": ("activations kept", "activations twice", "naive"),
    "label": ("plain", "compiled", "naive"),
    "caption": ("ours",),
    "embed": ("ours",),
    "peers": ("CrossEncoder", "ours"),
}
FLOP = {"train": 6, "label": 2}  # a linear weight and token
COLUMNS = {"per_second": "{:,.1f}", "share_of_bound": "{:.0%}", "padding": "{:.1%}", "peak_gb": "{:.1f}"}
COLUMNS |= {"max_difference": "{:.1e}", "said": "{}"}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    parts: tuple[Literal[tuple(WAYS)], ...] = ("train", "label", "caption", "embed")  # what is timed
    small: bool = False  # tiny shapes
    device: Device = "auto"  # where models run
    precision: Precision = "auto"  # bf16 where the hardware has it
    steps: Count = 2  # training steps measured, after one that is not
    rows: Count = 1_024  # rows to label
    images: Count = 1_024  # pictures to caption
    texts: Count = 65_536  # texts to embed
    caption_tokens: Count = 20  # tokens of every caption
    batch_size: Count = stage02.PRESETS["paper"].batch_size  # rows a training step
    profile: bool = False  # a table of one more training step's time
    peak_tflops: Positive | None = None  # dense bf16 peak of this GPU (default: by its name, where known)
    run: Path | None = None  # peers: whose labelled pairs
    model: str | None = None  # peers: a BERT-like model
    json: Path | None = None  # where the figures go


class RandomRows(LabelledRows):
    """N rows of 144 to 256 random tokens, with levels."""

    def __init__(self, n, vocab):
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(144, 257, n)
        self.ids = [rng.integers(0, vocab, length, dtype=np.int32) for length in self.lengths]
        self.levels, self.pad_id = torch.from_numpy(rng.integers(0, NUM_LEVELS, n)), 0


def into_4_bit(linear):
    """A linear layer in NF4, as QLoRA holds it."""
    from bitsandbytes import nn as bnb

    options, weight = {"compress_statistics": True, "quant_type": "nf4"}, linear.weight
    packed = bnb.Linear4bit(*weight.shape[::-1], False, weight.dtype, device="meta", **options)
    packed.weight = bnb.Params4bit(weight.data, requires_grad=False, **options).to(weight.device)
    packed.support_avx512bf16_for_cpu = False
    return packed


class Bench:
    """What is measured, each part in its ways: figures by COLUMNS."""

    def __init__(self, options):
        self.options, self.make_config = options, transformers.AutoConfig.for_model
        self.accelerator, self.dtype, _ = start_processes(options)
        self.device, self.first = self.accelerator.device, None
        self.config = self.make_config(**LLAMA if options.small else SHAPES["meta-llama/Meta-Llama-3-8B"])
        self.settings = replace(stage02.PRESETS["paper"], batch_size=options.batch_size)
        layers = models.empty_backbone(self.config).modules()
        self.linear = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))

    def measured(self, work, count, teacher=None):
        """Calls work(), which does so many; of a teacher's tokens also the share of padding."""
        on_gpu, positions = self.device.type == "cuda", []
        if teacher is not None:
            embedding = teacher.backbone.get_input_embeddings()
            embedding.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].numel()))
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        figures = {"per_second": count / (time.perf_counter() - start)}
        figures |= {"padding": sum(positions) / count - 1} if positions else {}
        return figures | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if on_gpu else {})

    # --------------------------------------------------------------------------------------------------------
    # 02 and 03

    def teacher(self, quantize, prepare=lambda backbone: backbone):
        """A decoder with random weights; in NF4, `prepare`d, with LoRA beside it."""
        torch.manual_seed(0)
        with self.device:
            backbone = models.random_backbone(self.config, self.dtype).requires_grad_(False)
        if quantize:
            for name, module in list(backbone.named_modules()):
                if type(module) is nn.Linear:
                    backbone.set_submodule(name, into_4_bit(module))
            backbone.is_loaded_in_4bit = True
            backbone = stage02.add_lora(prepare(backbone), self.settings)
        return Teacher(backbone, "decoder", self.dtype).to(self.device)

    def train(self, way):
        """Tokens of optimizer steps, the first of which is not timed."""
        settings, steps = self.settings, self.options.steps + 1
        rows = RandomRows(settings.batch_size * steps, self.config.vocab_size)
        if way == "naive":  # 02's limit of tokens makes passes of NAIVE_ROWS
            teacher = self.teacher(True, peft.prepare_model_for_kbit_training)
            batches = np.split(np.arange(len(rows.ids)), steps)
        else:
            teacher = self.teacher(True)
            batches = epoch_batches(rows.lengths, settings.batch_size, seed=0, epoch=0)
        if way == "activations twice":
            stage02.computed_again(teacher.backbone)
        optimizer = stage02.make_optimizer(teacher, "qlora", settings)

        def train_on(batches):
            for batch in batches:
                stage02.train_step(teacher, optimizer, rows, batch, 1.0, settings, self.accelerator)

        train_on(batches[:1])
        tokens = int(rows.lengths[np.concatenate(batches[1:])].sum())
        figures = self.measured(lambda: train_on(batches[1:]), tokens, teacher)
        if self.options.profile:
            kinds, by = torch.profiler.ProfilerActivity, "cuda" if self.device.type == "cuda" else "cpu"
            with torch.profiler.profile(activities=[getattr(kinds, by.upper())]) as profiler:
                train_on(batches[:1])
            figures["profile"] = profiler.key_averages().table(f"self_{by}_time_total", row_limit=20)
        return figures

    def label(self, way):
        """Tokens of rows."""
        rows, said = RandomRows(self.options.rows, self.config.vocab_size), []
        teacher = self.teacher(quantize=way == "naive").eval()
        settings = replace(stage03.PRESETS["paper"], compile="on")
        size, budget = len(rows.ids), settings.batch_tokens
        if way == "naive":
            size, budget = NAIVE_ROWS, 512 * NAIVE_ROWS  # all of them at once
        if way == "compiled":
            process = SimpleNamespace(device=self.device, print=said.append)
            stage03.compile_layers(teacher, rows.ids[:256], 0, settings, process)

        def work(ids):
            for start in range(0, len(ids), size):
                stage03.soft_labels(teacher, ids[start : start + size], 0, budget)

        work(rows.ids[:256])
        figures = self.measured(lambda: work(rows.ids), int(rows.lengths.sum()), teacher)
        return figures | {"said": " ".join(said)}

    # --------------------------------------------------------------------------------------------------------
    # 01

    def caption(self, way):
        """Pictures of 640 x 480."""
        captioner, batch, images = self.captioner(), stage01.Settings().image_batch, self.options.images
        with tempfile.TemporaryDirectory() as folder:
            Image.effect_noise((640, 480), 100).convert("RGB").save(f"{folder}/one.jpg")
            chunk = pa.table(dict.fromkeys(("digest", "image"), ["one.jpg"] * images))
            caption_chunk(chunk[:batch], captioner, Path(folder), batch)
            return self.measured(lambda: caption_chunk(chunk, captioner, Path(folder), batch), images)

    def captioner(self):
        """01's Captioner, of random weights and without words."""
        vision, text = (SMALL if self.options.small else BLIP[side] for side in ("vision", "text"))
        side, dim = 32 if self.options.small else 384, vision["hidden_size"]
        sides = {"vision_config": {**vision, "image_size": side, "patch_size": 16}}
        config = transformers.BlipConfig(**sides, text_config={**text, "encoder_hidden_size": dim})
        captioner = Captioner.__new__(Captioner)
        with self.device:
            captioner.model = transformers.BlipForConditionalGeneration(config).to(self.dtype).eval()
        captioner.model.generation_config.min_new_tokens = self.options.caption_tokens
        pixels = transformers.BlipImageProcessor(size={"height": side, "width": side})
        words = SimpleNamespace(batch_decode=lambda ids, **options: [""] * len(ids))
        captioner.processor = SimpleNamespace(image_processor=pixels, tokenizer=words)
        captioner.name, captioner.tokens = "random weights", self.options.caption_tokens
        captioner.device, captioner.dim = self.device, dim
        return captioner

    def embed(self, way):
        """Tokens of texts of 8 to 128."""
        settings, rng = stage01.PRESETS["paper"], np.random.default_rng(0)
        shape = SHAPES[settings.text_encoder] | (SMALL if self.options.small else {})
        config = self.make_config(**shape)
        rows = {str(i): rng.integers(5, 30_000, rng.integers(8, 129)) for i in range(self.options.texts)}

        def tokenizer(texts, **options):
            return {"input_ids": [rows[text] for text in texts]}

        encoder = TextEncoder.__new__(TextEncoder)
        encoder.model = models.random_backbone(config, self.dtype).to(self.device).eval()
        encoder.max_tokens, encoder.token_batch = settings.text_tokens, settings.token_batch
        encoder.device, encoder.dim, encoder.name = self.device, config.hidden_size, "random weights"
        encoder.tokenizer, tokenizer.pad_token_id = tokenizer, 0
        encoder([*rows][:256])
        return self.measured(lambda: encoder([*rows], multiple=8), sum(map(len, rows.values())))

    # --------------------------------------------------------------------------------------------------------
    # Peers

    def peers(self, way):
        """Pairs of a run, from their texts on; and how far the ways' probabilities differ."""
        run, model = self.options.run, self.options.model
        if run is None or model is None:
            raise Stop("--parts peers: --run RUN --model MODEL")
        pairs = pq.read_table(run / "features" / "labelled.parquet").slice(0, self.options.rows)
        torch.manual_seed(0)
        network = transformers.BertForSequenceClassification.from_pretrained(model, num_labels=NUM_LEVELS)
        nn.init.normal_(network.classifier.weight, std=0.8)  # so that probabilities are spread
        names = ["input_ids", "attention_mask"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, model_input_names=names)
        prepare = self.cross_encoder if way == "CrossEncoder" else self.ours
        label = prepare(network, tokenizer, run / "features", pairs)
        p = label()  # the first call sets things up
        self.first = p if self.first is None else self.first
        figures = {"max_difference": float(np.abs(p - self.first).max())}
        return figures | self.measured(label, len(pairs))

    def cross_encoder(self, network, tokenizer, features, pairs):
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise Stop("sentence-transformers: pip install -r benchmarks/requirements.txt") from error
        with tempfile.TemporaryDirectory() as folder:
            network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            options = {"device": str(self.device), "max_length": PEER_TOKENS}
            encoder = CrossEncoder(folder, model_kwargs={"dtype": self.dtype}, **options)
        queries = pq.read_table(features / "queries.parquet")["query"].take(pairs["query_index"]).to_pylist()
        pins = pq.read_table(features / "pins.parquet", columns=PEER_FIELDS).take(pairs["pin_index"])
        texts = [" ".join(f"{k}: {text}" for k, text in pin.items() if text) for pin in pins.to_pylist()]
        options = {"batch_size": NAIVE_ROWS, "apply_softmax": True, "show_progress_bar": False}
        return lambda: encoder.predict([*zip(queries, texts)], **options)

    def ours(self, network, tokenizer, features, pairs):
        """03's teacher with the classifier's own layers as its head, in fp32 as always."""
        head = nn.Sequential(network.bert.pooler.dense, nn.Tanh(), network.classifier)
        network.bert.pooler = None
        teacher = Teacher(network.bert.to(self.dtype), "encoder", self.dtype)
        teacher.head = head
        teacher.to(self.device).eval()
        text = PairText(tokenizer, "encoder", PEER_FIELDS, PEER_TOKENS)
        queries = pq.read_table(features / "queries.parquet")["query"]

        def label():
            rows = token_ids_of(features, text, queries, pairs)
            return stage03.soft_labels(teacher, rows, tokenizer.pad_token_id, 2_048)

        return label


# ------------------------------------------------------------------------------------------------------------


def attempt(bench, part, way, peak):
    """The figures, or what kept them away: one way may not fit into the memory that another fits into."""
    try:
        figures = getattr(bench, part)(way)
    except torch.OutOfMemoryError:
        return {"said": "out of memory"}
    if peak and part in FLOP:
        figures["share_of_bound"] = figures["per_second"] * FLOP[part] * bench.linear / (peak * 1e12)
    return figures


def main(argv=None):
    options = flags_read(Options, None, argv, __doc__.split("\n")[0])
    models.quiet_libraries()
    start, bench = time.perf_counter(), Bench(options)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    peak = options.peak_tflops or next((tflops for key, tflops in PEAK.items() if key in name), None)
    found = {"device": name, "torch": torch.__version__, "linear_weights": bench.linear, "peak_tflops": peak}
    print(", ".join(f"{key} {value}" for key, value in found.items()), end=f", {bench.dtype}\n\n")
    print(f"| what | way | {' | '.join(COLUMNS)} |".replace("_", " "))
    print("| --- | --- |" + " ---: |" * len(COLUMNS))
    for part in options.parts:
        found[part] = {}
        for way in WAYS[part]:
            figures = found[part][way] = attempt(bench, part, way, peak)
            cells = [form.format(figures[key]) if key in figures else "" for key, form in COLUMNS.items()]
            print(f"| {' | '.join([part, way, *cells])} |", flush=True)
    for way, figures in found.get("train", {}).items():
        if "profile" in figures:
            print(f"\na step of training, {way}\n{figures['profile']}")
    found["seconds"] = time.perf_counter() - start
    print(f"\n{found['seconds']:.0f} s in all")
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    run_main(main)
