"""Stage 02: human labels -> the teacher, a language model fine-tuned as cross-encoder.

Paper: "LLM as Relevance Model". [CLS] query [SEP] pin text -> language model -> fully connected layers ->
five levels; point-wise cross-entropy.

    1  settings
    2  the text of the human-labelled pairs, in token ids
    3  the language model and a fresh head: encoders (BERT, T5's) are trained in full, decoders with QLoRA
    4  training; scores on held-out queries after each epoch
    5  the teacher is saved

Reads   RUN/features/   pins.parquet, queries.parquet, labelled.parquet (its `train` rows)
Writes  RUN/teacher/    adapter/ or backbone/, head.safetensors, tokenizer/, teacher.json, training_log.jsonl

Toy     python 02_train_teacher.py
Paper   accelerate launch 02_train_teacher.py --preset paper --run /runs/search      one process a GPU

Shapes: B rows, T tokens, C = 5 levels.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import gather_object

from common import FIELDS, PairText, Teacher, linear_warmup_decay, token_batches
from lib import models
from lib.inputs.base import bases_of
from lib.inputs.held_out import scores_of, warn_if_useless
from lib.inputs.inherited import require
from lib.inputs.rows import LabelledRows, epoch_batches, hash_rows, micro_batches
from lib.results import summary
from lib.stages.checkpoint import CHECKPOINT, Checkpoints, seed_step
from lib.stages.files import write_jsonl
from lib.stages.processes import start_processes, start_stage
from lib.stages.settings import (
    ROOT,
    Count,
    ModelSettings,
    NonNegative,
    Positive,
    Ratio,
    Share,
    Size,
    Width,
    parse,
)
from lib.stages.terminal import Stop, progress_bar, run_main, stop_on_error


@dataclass(frozen=True)
class Settings(ModelSettings):
    """Settings of stage 02."""

    # folder written by save_pretrained, or hub id; None: stage 01's text encoder
    model: str | None = str(ROOT / "data/toy/models/llama")
    fields: tuple[Literal[FIELDS], ...] = FIELDS  # pin-text fields the teacher reads
    max_tokens: Count = 96  # of query and pin text together
    long_queries: Literal["stop", "cut"] = "stop"  # that do not fit: stop, or cut them to half of the room

    finetuning: Literal["auto", "qlora", "lora", "full"] = "auto"  # auto: decoders qlora, encoders full
    lora_rank: Width = 64  # rank R of the update of a weight
    lora_alpha: Positive = 64.0  # the update is (alpha / R) B A x
    lora_dropout: Share = 0.0  # share of A's input left out in a training step

    epochs: Count | None = 6  # passes over the training rows; None: 3 to 10, by how many rows there are
    batch_size: Count = 32  # rows an optimizer step, over all processes
    batch_tokens: Count = 4_096  # tokens a forward pass, which draws its own dropout; a step is several
    lr: Positive = 2e-3  # peak learning rate of LoRA weights
    encoder_lr: Positive = 3e-4  # peak learning rate of a backbone trained in full
    head_lr: Positive = 1e-3  # peak learning rate of the head
    layer_decay: Ratio = 1.0  # encoder_lr of a layer over that of the one above (1: of all alike)
    warmup: Share = 0.1  # share of the steps with a rising learning rate; then it falls linearly to 0
    weight_decay: NonNegative = 0.01  # of AdamW, on weight matrices
    rows: Count | None = None  # train on a random N of the training rows (default: all)
    checkpoint_steps: Count = 100  # steps between two checkpoints to resume from
    seed: Size = 0  # of the head's weights, held-out queries, row order and dropout


TOY = Settings()
# The paper states the model alone. For 7B and 13B the QLoRA paper (Dettmers et al., 2023) has rank and alpha
# (appendix B), dropout (section 4) and learning rate (table 9); Devlin et al., 2019, have the range of
# encoder_lr (appendix A.3). All else is our choice.
QLORA = dict(model="meta-llama/Meta-Llama-3-8B", lora_rank=64, lora_alpha=16.0, lora_dropout=0.1, lr=2e-4)
STEPS = dict(epochs=2, batch_size=128, encoder_lr=2e-5, head_lr=2e-4, warmup=0.03)
SIZES = dict(max_tokens=256, batch_tokens=8_192, checkpoint_steps=200, precision="auto")
PAPER = replace(TOY, preset="paper", **QLORA, **STEPS, **SIZES)
# A real encoder on a laptop or one small GPU, our choice: few rows need more than 3 epochs, encoder_lr with
# the head's 1e-3 is better than 5e-5 for both, layer_decay than 1 where labels are few; the best lr of LoRA
# differs from model to model (experiments/RESULTS.md).
LORA = dict(lora_rank=16, lora_alpha=32.0, lr=5e-4)
FULL = dict(encoder_lr=1e-4, head_lr=1e-3, layer_decay=0.8)
SMALL = replace(
    TOY, preset="small", precision="auto", model=None, max_tokens=128, epochs=None, **LORA, **FULL
)
PRESETS = {"toy": TOY, "small": SMALL, "paper": PAPER}
# Of a loss that is not finite
LOWER = "lower --lr, --encoder-lr, --head-lr, --layer-decay, --lora-alpha or --weight-decay"
READS = ("pins.parquet", "queries.parquet", "labelled.parquet")  # of the features


# ------------------------------------------------------------------------------------------------------------
# Fine-tuning: QLoRA or LoRA beside a frozen language model, or all of its weights


def add_lora(backbone, settings):
    """Freezes the backbone and puts LoRA beside every linear layer: W x + (alpha / R) B A x, A and B are
    trained (Hu et al., 2022). With W in 4 bit (NF4) this is QLoRA (Dettmers et al., 2023)."""
    from peft import LoraConfig, get_peft_model

    sizes = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha}
    lora = LoraConfig(**sizes, lora_dropout=settings.lora_dropout, target_modules="all-linear")
    # peft's prepare_model_for_kbit_training is not used: it would upcast embeddings and norms to fp32.
    with stop_on_error("--model: LoRA cannot stand in it", "--finetuning full trains all weights"):
        return get_peft_model(backbone, lora)


def load_trainable(settings, config, device, dtype):
    """The language model ready for training, and how: "qlora" (4 bit, LoRA beside it), "lora" or "full". The
    paper trains Llama with QLoRA; `auto` does so with every decoder, and trains encoders in full."""
    finetuning = settings.finetuning
    if finetuning == "auto":
        finetuning = "qlora" if models.backbone_kind(config) == "decoder" else "full"
    # Weights that are trained are fp32 (bf16 only by autocast), a frozen backbone has the compute dtype.
    weight_dtype = torch.float32 if finetuning == "full" else dtype
    backbone = models.load_backbone(settings.model, weight_dtype, finetuning == "qlora", device, config)
    return backbone if finetuning == "full" else add_lora(backbone, settings), finetuning


def activations_fit(teacher, rows, settings, device):
    """Does the largest pass of a training step fit into the GPU's memory, all activations kept? Tried."""
    longest = rows.lengths.argmax()
    passed = min(max(settings.batch_tokens // int(rows.lengths[longest]), 1), settings.batch_size)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        ids, mask, levels = rows.batch([longest] * passed, device)
        teacher.loss(teacher.train()(ids, mask), levels).backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        teacher.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    # To come: AdamW's two moments, and of several processes a copy of the gradients, in fp32.
    needed = torch.cuda.max_memory_allocated(device)
    needed += 12 * sum(p.numel() for p in teacher.parameters() if p.requires_grad)
    return needed < 0.9 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))


def computed_again(backbone):
    """Turns activation checkpointing on: computed twice instead of kept, less memory, more time."""
    backbone.enable_input_require_grads()
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def checkpoint_activations(teacher, rows, settings, accelerator):
    """Turns activation checkpointing on where a GPU's memory needs it, on all processes alike."""
    device, how = accelerator.device, "kept"
    fits = device.type != "cuda" or activations_fit(teacher, rows, settings, device)
    if not all(gather_object([fits])):
        computed_again(teacher.backbone)
        how = "computed again in the backward pass"
    accelerator.print(f"{device}, {accelerator.num_processes} process(es); activations are {how}")


# ------------------------------------------------------------------------------------------------------------
# Training


def peak_rates(teacher, finetuning, settings):
    """{weight: peak learning rate} of all that are trained; ours, the paper does not say. In a backbone
    trained in full a layer has `layer_decay` times the rate of the one above, and what is outside the layers,
    as embeddings, that of one below them (Howard and Ruder, 2018, section 3.2)."""
    is_full = finetuning == "full"
    layers = list(models.layers_of(teacher.backbone)) if is_full and settings.layer_decay != 1 else []
    if len(layers) > teacher.backbone.config.get_text_config().num_hidden_layers:
        raise Stop("--layer-decay: which layer stands above which is not known of this model: use 1")
    peak = settings.encoder_lr if is_full else settings.lr
    rates = dict.fromkeys(teacher.backbone.parameters(), peak * settings.layer_decay ** len(layers))
    for below_top, parts in enumerate(reversed(layers)):
        for part in parts:
            rates |= dict.fromkeys(part.parameters(), peak * settings.layer_decay**below_top)
    rates |= dict.fromkeys(teacher.head.parameters(), settings.head_lr)
    return {weight: rate for weight, rate in rates.items() if weight.requires_grad}


def make_optimizer(teacher, finetuning, settings):
    """AdamW, its step one pass over the weights; no decay on biases and norms."""
    groups = {}
    for weight, rate in peak_rates(teacher, finetuning, settings).items():
        decay = settings.weight_decay if weight.ndim > 1 else 0.0
        new = {"params": [], "lr": rate, "peak": rate, "weight_decay": decay}
        groups.setdefault((rate, decay), new)["params"].append(weight)
    return torch.optim.AdamW(groups.values(), betas=(0.9, 0.999), eps=1e-8, fused=True)


def passes_over(rows, batch_size, steps=400, least=3, most=10):
    """Epochs over so many training rows: 3, or up to 10 for about 400 optimizer steps, which a fresh head
    needs. Rows too few for that are learned by heart: 3 (our choice; experiments/RESULTS.md)."""
    epochs = round(steps / math.ceil(rows / batch_size))
    return least if epochs > most else max(epochs, least)


def train_step(model, optimizer, rows, batch, lr_factor, settings, accelerator):
    """One step on a batch of row numbers: forward and backward passes, dealt out to the processes; gradients
    cut to norm 1; AdamW at `lr_factor` times the peak learning rates. Returns the rows' mean loss."""
    teacher = accelerator.unwrap_model(model).train()
    rank, world = accelerator.process_index, accelerator.num_processes
    passes = micro_batches(batch, rows.lengths, settings.batch_tokens, rank, world)
    total = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(passes, 1):
        weight = 1.0 if len(part) else 0.0  # an empty pass still takes part in the exchange of gradients
        ids, mask, levels = rows.batch(part if len(part) else batch[:1], accelerator.device)
        with contextlib.nullcontext() if number == len(passes) else accelerator.no_sync(model):
            loss = weight * teacher.loss(model(ids, mask), levels) / len(batch)
            accelerator.backward(loss * world)  # data-parallel training averages over processes
        total += loss.detach()
    total = accelerator.reduce(total, "sum").item()
    if not math.isfinite(total):
        where = f"training rows {batch[:8].tolist()}…"
        raise Stop(f"the loss is {total} on the {where}: {LOWER}, or use --precision fp32")
    torch.nn.utils.clip_grad_norm_([p for p in teacher.parameters() if p.requires_grad], 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


@torch.inference_mode()
def held_out_scores(teacher, rows, settings, accelerator):
    """scores_of() the held-out rows, each process on its share; {} if there are none."""
    teacher.eval()
    watched = rows.held_out if len(rows.held_out) else rows.train[:64]  # these for a finite loss alone
    mine = watched[accelerator.process_index :: accelerator.num_processes]
    order, scored = mine[np.argsort(rows.lengths[mine], kind="stable")], []
    for batch in token_batches(rows.lengths[order], settings.batch_tokens):
        ids, mask, levels = rows.batch(order[batch], accelerator.device)
        p = teacher.probabilities(teacher(ids, mask))
        scored += zip((levels + 1).tolist(), p.tolist())
    scores = scores_of(*map(np.array, zip(*gather_object(scored))))
    if not math.isfinite(scores["loss"]):
        raise Stop(f"the loss after the epoch is {scores['loss']}: {LOWER}")
    return {f"held_out_{name}": value for name, value in scores.items()} if len(rows.held_out) else {}


def train(teacher, optimizer, rows, settings, accelerator, folder):
    """The training loop, over what is left of it. Each step is a line of the log, each epoch one more with
    its scores; every so many steps there is a checkpoint in `folder`. Returns the log."""
    model = accelerator.prepare(teacher)
    checkpoints = Checkpoints(folder, teacher, optimizer, {"step": 0}, accelerator.is_main_process)
    state, per_epoch = checkpoints.state, math.ceil(len(rows.train) / settings.batch_size)
    steps, shown = settings.epochs * per_epoch, {"unit": " steps", "disable": not checkpoints.writes}
    if checkpoints.continues:
        accelerator.print(f"continuing at step {state['step']} of {steps}")
    for epoch in range(state["step"] // per_epoch, settings.epochs):
        batches = epoch_batches(rows.lengths[rows.train], settings.batch_size, settings.seed, epoch)
        bar = progress_bar(total=steps, initial=state["step"], desc=f"epoch {epoch + 1}", **shown)
        for batch in batches[state["step"] % per_epoch :]:
            factor = linear_warmup_decay(state["step"] / steps, settings.warmup)
            state["step"] += 1
            seed_step(settings.seed, state["step"], accelerator.process_index)
            loss = train_step(model, optimizer, rows, rows.train[batch], factor, settings, accelerator)
            line = {"step": state["step"], "epoch": epoch + 1, "loss": round(loss, 6)}
            state["log"].append({**line, "lr_factor": round(factor, 6)})
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if state["step"] % settings.checkpoint_steps == 0 and state["step"] % per_epoch:
                checkpoints.save()
        bar.close()
        losses = [line["loss"] for line in state["log"] if line["epoch"] == epoch + 1]
        scores = {"epoch": epoch + 1, "train_loss": float(np.mean(losses))}
        scores |= held_out_scores(teacher, rows, settings, accelerator)
        checkpoints.end_epoch(scores, step=state["step"])
    accelerator.wait_for_everyone()
    return state["log"]


# ------------------------------------------------------------------------------------------------------------


def open_text(settings, config):
    """The PairText of the pairs, for a model of this config."""
    kind, tokenizer = models.backbone_kind(config), models.load_tokenizer(settings.model, config)
    max_tokens = models.fit_length(settings.max_tokens, config)
    return PairText(tokenizer, kind, settings.fields, max_tokens, settings.long_queries == "cut")


def save(teacher, finetuning, text, settings, folder):
    """Writes the teacher, its tokenizer, and in teacher.json what stage 03 needs to read pairs as 02."""
    path = Path(settings.model)
    about = {"model": str(path.resolve()) if path.is_dir() else settings.model, "kind": teacher.kind}
    about |= {"finetuning": finetuning, "fields": settings.fields, "max_tokens": text.max_tokens}
    about["long_queries"] = settings.long_queries
    teacher.save(folder, about)
    text.tokenizer.save_pretrained(folder / "tokenizer")


def main(argv=None):
    # 1. Settings
    settings = parse(PRESETS, argv, __doc__)
    models.quiet_libraries()
    accelerator, dtype, hardware = start_processes(settings)
    if not settings.fields:
        raise Stop(f"--fields: at least one of {' '.join(FIELDS)}")

    # 2. The text of the human-labelled pairs: with model and settings it is the teacher's identity
    features = settings.run / "features"
    about = require(features, READS)
    if settings.model is None:
        settings = replace(settings, model=about["arguments"]["text_encoder"])
        accelerator.print(f"--model {settings.model}: stage 01's text encoder")
    config = models.load_config(settings.model)
    kind, text = models.backbone_kind(config), open_text(settings, config)
    rows = LabelledRows(features, text, settings)
    if settings.epochs is None:
        settings = replace(settings, epochs=passes_over(len(rows.train), settings.batch_size))
    inputs = {"rows": hash_rows(rows.ids, rows.levels), "held-out rows": hash_rows([], rows.held_out)}
    inputs |= {"model": models.model_fingerprint(settings.model), "precision": hardware}
    place, earlier = settings.run / "teacher", bases_of(settings.run)
    stage, folder = start_stage(accelerator, place, settings, inputs, earlier)
    if folder is None:
        return
    text.queries(rows.queries)  # of impressions too: stage 03 reads all of them

    # 3. The language model and a fresh head
    torch.manual_seed(settings.seed)
    backbone, finetuning = load_trainable(settings, config, accelerator.device, dtype)
    teacher = Teacher(backbone, kind, dtype).to(accelerator.device)
    models.check_reading(teacher, rows.ids[rows.lengths.argmax()], rows.pad_id, accelerator.device)
    checkpoint_activations(teacher, rows, settings, accelerator)
    optimizer = make_optimizer(teacher, finetuning, settings)
    if accelerator.is_main_process:
        summary.describe_teacher(teacher, finetuning, rows, settings)

    # 4. Training
    log = train(teacher, optimizer, rows, settings, accelerator, folder)

    # 5. Save
    if accelerator.is_main_process:
        warn_if_useless(rows, log[-1])
        save(teacher, finetuning, text, settings, folder)
        write_jsonl(folder / "training_log.jsonl", log)
        counts = {"train": len(rows.train), "held_out": len(rows.held_out)}
        counts |= {"train_queries": rows.train_queries}
        facts = {"scores": log[-1], "text": text.describe(), "held_out": rows.split}
        stage.finish([CHECKPOINT], rows=counts, **facts)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_main(main)
