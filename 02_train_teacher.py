"""Stage 02: human labels -> the teacher, a language model fine-tuned as cross-encoder.

Paper: "LLM as Relevance Model". [CLS] query [SEP] pin text -> language model -> fully connected layers ->
five levels; point-wise cross-entropy. Encoders (BERT, DeBERTa, T5's encoder) are trained in full, decoders
(Llama) with QLoRA.

Reads   RUN/features/   pins.parquet, queries.parquet, labelled.parquet (its `train` rows)
Writes  RUN/teacher/    adapter/ or backbone/, head.safetensors, tokenizer/, teacher.json, training_log.jsonl,
                        README.md (the model's card)

Toy     python 02_train_teacher.py
Paper   accelerate launch 02_train_teacher.py --preset paper --run /runs/search      one process a GPU

Shapes: B rows, T tokens, C = 5 levels.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from sklearn.metrics import roc_auc_score

import common
from common import FIELDS, PairText, Teacher
from runs import cards, models, summary
from runs.checkpoint import load_checkpoint, save_checkpoint
from runs.files import write_jsonl
from runs.finished import require_finished
from runs.processes import start_processes, start_stage
from runs.rows import LabelledRows, epoch_batches, hash_rows, micro_batches
from runs.settings import (
    ROOT,
    Count,
    Device,
    NonNegative,
    Positive,
    Precision,
    Share,
    Size,
    StageSettings,
    Width,
    parse,
    pick_hardware,
)
from runs.terminal import Stop, first_line, progress_bar, run_main


@dataclass(frozen=True)
class Settings(StageSettings):
    """What stage 02 is told."""

    model: str = str(ROOT / "data/toy_models/llama")  # folder written by save_pretrained, or hub id
    fields: tuple[Literal[FIELDS], ...] = FIELDS  # pin-text fields the teacher reads
    max_tokens: Count = 96  # of query and pin text together
    long_queries: Literal["stop", "cut"] = "stop"  # of a query that does not fit: stop, or cut it in half

    finetuning: Literal["auto", "qlora", "lora", "full"] = "auto"  # auto: decoders qlora, encoders full
    lora_rank: Width = 16  # rank R of the update of a weight
    lora_alpha: Positive = 32.0  # the update is (alpha / R) B A x
    lora_dropout: Share = 0.0  # share of A's input left out in a training step

    epochs: Count = 6  # passes over the training rows
    batch_size: Count = 32  # rows an optimizer step, over all processes
    batch_tokens: Count = 4_096  # tokens a forward pass; a step is as many passes as its rows need
    lr: Positive = 2e-3  # peak learning rate of LoRA weights
    encoder_lr: Positive = 3e-4  # peak learning rate of a backbone trained in full
    head_lr: Positive = 1e-3  # peak learning rate of the head
    warmup: Share = 0.1  # share of the steps with a rising learning rate; then it falls linearly to 0
    weight_decay: NonNegative = 0.01  # of AdamW, on weight matrices
    keep: Literal["last", "best"] = "last"  # epoch kept; best: by AUROC >= 4 on at least 50 held-out queries
    rows: Count | None = None  # train on a random N of the training rows (default: all)
    precision: Precision = "fp32"  # of the computation; auto: bf16 where the hardware has it
    checkpoint_steps: Count = 100  # steps between two checkpoints to resume from
    device: Device = "auto"  # where the teacher is trained
    seed: Size = 0  # of the head's weights, held-out queries, row order and dropout


TOY = Settings()
PAPER = replace(
    TOY,
    preset="paper",
    model="meta-llama/Meta-Llama-3-8B",  # stated
    max_tokens=256,  # not stated; our choice
    lora_rank=64,  # not stated; the QLoRA paper's (Dettmers et al., 2023, appendix B)
    lora_alpha=16.0,  # not stated; as the rank
    lora_dropout=0.1,  # not stated; the QLoRA paper's for 7B and 13B (section 4)
    epochs=2,  # not stated; our choice
    batch_size=128,  # not stated; our choice
    batch_tokens=8_192,  # our choice
    lr=2e-4,  # not stated; the QLoRA paper's for 7B and 13B (table 9)
    encoder_lr=2e-5,  # not stated; within the range of Devlin et al., 2019, appendix A.3
    head_lr=2e-4,  # not stated; our choice
    warmup=0.03,  # not stated; our choice
    precision="auto",  # our choice
    checkpoint_steps=200,  # our choice
)
SMALL = replace(
    TOY,
    preset="small",  # a real encoder on a laptop or one small GPU; all values our choice
    model="sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
    max_tokens=128,
    epochs=3,
    lr=5e-4,  # better than 1e-4 and 2e-4: README, MSRD
    encoder_lr=1e-4,  # with the head's 1e-3 better than 5e-5 for both: README, MSRD
    head_lr=1e-3,
    precision="auto",
)
PRESETS = {"toy": TOY, "small": SMALL, "paper": PAPER}
READS = ("pins.parquet", "queries.parquet", "labelled.parquet")  # of the features
LOWER = "lower --lr, --encoder-lr, --head-lr, --lora-alpha or --weight-decay"  # of a loss that is not finite


# ------------------------------------------------------------------------------------------------------------
# Fine-tuning: QLoRA or LoRA beside a frozen language model, or all of its weights


def add_lora(backbone, settings):
    """Freezes the backbone and puts LoRA beside every linear layer: W x + (alpha / R) B A x, A and B are
    trained (Hu et al., 2022). With W in 4 bit (NF4) this is QLoRA (Dettmers et al., 2023)."""
    from peft import LoraConfig, get_peft_model

    sizes = {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha}
    lora = LoraConfig(**sizes, lora_dropout=settings.lora_dropout, target_modules="all-linear")
    # peft's prepare_model_for_kbit_training is not used: it would upcast embeddings and norms to fp32.
    try:
        return get_peft_model(backbone, lora)
    except Exception as error:  # peft knows no way for some layers
        advice = "--finetuning full trains all weights"
        raise Stop(f"--model: LoRA cannot stand in it ({first_line(error)}); {advice}") from error


def prepare_training(backbone, settings, finetuning, device):
    """A loaded backbone -> one with LoRA, unless it is trained in full, and on a GPU with activation
    checkpointing."""
    if finetuning != "full":
        backbone = add_lora(backbone, settings)
    if torch.device(device).type == "cuda":
        backbone.enable_input_require_grads()
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return backbone


def load_trainable(settings, config, device, dtype):
    """The language model ready for training, and how: "qlora" (4 bit, LoRA beside it), "lora" or "full". The
    paper trains Llama with QLoRA; `auto` does so with every decoder, and trains encoders in full."""
    finetuning = settings.finetuning
    if finetuning == "auto":
        finetuning = "qlora" if models.backbone_kind(config) == "decoder" else "full"
    # Weights that are trained are fp32 (bf16 only by autocast), a frozen backbone has the compute dtype.
    weight_dtype = torch.float32 if finetuning == "full" else dtype
    backbone = models.load_backbone(settings.model, weight_dtype, finetuning == "qlora", device, config)
    return prepare_training(backbone, settings, finetuning, device), finetuning


# ------------------------------------------------------------------------------------------------------------
# Training


def make_optimizer(teacher, finetuning, settings):
    """AdamW; backbone and head have learning rates of their own; no decay on biases and norms."""
    backbone_lr = settings.encoder_lr if finetuning == "full" else settings.lr
    groups = []
    for module, lr in ((teacher.backbone, backbone_lr), (teacher.head, settings.head_lr)):
        trainable = [p for p in module.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
        for parameters, decay in ((matrices, settings.weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)


def train_step(model, rows, batch, accelerator, token_budget):
    """Forward and backward passes of one step, dealt out to the processes; adds to the gradients. Returns the
    loss: point-wise multi-class cross-entropy (paper), mean over the step's rows, all processes together."""
    rank, world = accelerator.process_index, accelerator.num_processes
    passes = micro_batches(batch, rows.lengths, token_budget, rank, world)
    total = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(passes, 1):
        weight = 1.0 if len(part) else 0.0  # an empty pass still takes part in the exchange of gradients
        ids, mask, levels = rows.batch(part if len(part) else batch[:1], accelerator.device)
        with contextlib.nullcontext() if number == len(passes) else accelerator.no_sync(model):
            loss = weight * F.cross_entropy(model(ids, mask), levels, reduction="sum") / len(batch)
            accelerator.backward(loss * world)  # data-parallel training averages over processes
        total += loss.detach()
    return accelerator.reduce(total, "sum").item()


@torch.inference_mode()
def evaluate(teacher, rows, accelerator, token_budget):
    """{"held_out_loss" (cross-entropy), "held_out_accuracy", "held_out_auroc_4"} on the held-out rows, each
    process on its share; {} if there are none. AUROC of P(label >= 4); NaN without both kinds."""
    teacher.eval()
    watched = rows.held_out if len(rows.held_out) else rows.train[:64]  # these for a finite loss alone
    mine = watched[accelerator.process_index :: accelerator.num_processes]
    order = mine[np.argsort(rows.lengths[mine], kind="stable")]
    sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    scored = []
    for batch in common.token_batches(rows.lengths[order], token_budget):
        ids, mask, levels = rows.batch(order[batch], accelerator.device)
        logits = teacher(ids, mask)
        sums[0] += F.cross_entropy(logits, levels, reduction="sum")
        sums[1] += (logits.argmax(1) == levels).sum()
        scored += zip((levels >= 3).tolist(), logits.softmax(1)[:, 3:].sum(1).tolist())
    loss, accuracy = (accelerator.reduce(sums, "sum") / len(watched)).tolist()
    if not math.isfinite(loss):
        raise Stop(f"the loss after the epoch is {loss}: {LOWER}")
    relevant, score = zip(*gather_object(scored))
    if not len(rows.held_out):
        return {}
    auroc = roc_auc_score(relevant, score) if len(set(relevant)) == 2 else math.nan
    return {"held_out_loss": loss, "held_out_accuracy": accuracy, "held_out_auroc_4": float(auroc)}


def train_epoch(model, optimizer, rows, train_state, settings, accelerator, checkpoint):
    """The steps of an epoch that are left, each a line of the log. Every so many steps a checkpoint."""
    teacher, is_main = accelerator.unwrap_model(model), accelerator.is_main_process
    epoch, done = divmod(train_state["step"], steps_per_epoch(rows, settings))
    batches = epoch_batches(rows.lengths[rows.train], settings.batch_size, settings.seed, epoch)
    steps = settings.epochs * len(batches)
    options = {"total": steps, "initial": train_state["step"], "unit": " steps", "disable": not is_main}
    with progress_bar(desc=f"epoch {epoch + 1}", **options) as bar:
        for number, batch in enumerate(batches[done:], done + 1):
            factor = common.linear_warmup_decay(train_state["step"] / steps, settings.warmup)
            step = train_state["step"] + 1
            # A seed of its own for every step's dropout: a resumed run equals an undisturbed one.
            torch.manual_seed(settings.seed * 1_000_003 + step * 1_009 + accelerator.process_index)
            teacher.train()
            loss = train_step(model, rows, rows.train[batch], accelerator, settings.batch_tokens)
            if not math.isfinite(loss):
                where = f"at step {step}, training rows {rows.train[batch][:8].tolist()}…"
                raise Stop(f"the loss is {loss} {where}: {LOWER}, or use --precision fp32")
            update_weights(teacher, optimizer, factor)
            line = {"step": step, "epoch": epoch + 1, "loss": round(loss, 6)}
            train_state["log"].append({**line, "lr_factor": round(factor, 6)})
            train_state["step"] = step
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if is_main and step % settings.checkpoint_steps == 0 and number < len(batches):
                save_checkpoint(checkpoint, teacher, optimizer, train_state)
    return epoch + 1


def train(teacher, optimizer, rows, settings, accelerator, work):
    """The training loop. Leaves the weights of the last epoch in `teacher` (--keep best: of the one with the
    highest held-out AUROC); returns the log and that epoch's scores. Checkpoints go into `work`."""
    model = accelerator.prepare(teacher)
    checkpoint, best = work / "checkpoint.pt", work / "best.pt"
    steps = settings.epochs * steps_per_epoch(rows, settings)
    train_state = {"step": 0, "best": None, "log": []}
    if checkpoint.exists():
        train_state = load_checkpoint(checkpoint, teacher, optimizer)
        accelerator.print(f"continuing at step {train_state['step']} of {steps}")
    log = train_state["log"]
    while train_state["step"] < steps:
        epoch = train_epoch(model, optimizer, rows, train_state, settings, accelerator, checkpoint)
        losses = [line["loss"] for line in log if line["epoch"] == epoch]
        scores = {"epoch": epoch, "train_loss": float(np.mean(losses))}
        scores |= evaluate(teacher, rows, accelerator, settings.batch_tokens)
        accelerator.print(summary.in_words(scores))
        log.append({"step": train_state["step"], **scores})
        if is_better(scores, train_state["best"], rows, settings):
            train_state["best"] = scores
            if accelerator.is_main_process:
                save_checkpoint(best, teacher, None, scores)
        if accelerator.is_main_process:
            save_checkpoint(checkpoint, teacher, optimizer, train_state)
    accelerator.wait_for_everyone()
    load_checkpoint(best, teacher)
    return train_state


def steps_per_epoch(rows, settings):
    """Optimizer steps of one pass over the training rows."""
    return math.ceil(len(rows.train) / settings.batch_size)


def is_better(scores, best, rows, settings):
    """Is this epoch to be kept? The last one always is (the learning rate falls to zero there), unless
    --keep best and enough held-out queries to tell."""
    if best is None or settings.keep == "last" or rows.held_out_queries < summary.ENOUGH_QUERIES:
        return True
    return scores["held_out_auroc_4"] > best["held_out_auroc_4"]


def update_weights(teacher, optimizer, lr_factor):
    """The optimizer's step, at `lr_factor` times the peak learning rates. Gradients are cut to norm 1."""
    torch.nn.utils.clip_grad_norm_([p for p in teacher.parameters() if p.requires_grad], 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------------------------


def open_text(settings, config):
    """The PairText of the pairs, for a model of this config."""
    kind, tokenizer = models.backbone_kind(config), models.load_tokenizer(settings.model, config)
    max_tokens = models.fit_length(settings.max_tokens, config)
    return PairText(tokenizer, kind, settings.fields, max_tokens, settings.long_queries == "cut")


def save(teacher, finetuning, text, settings, folder):
    """Writes the teacher and its tokenizer; returns teacher.json: what stage 03 needs to read pairs as 02."""
    about = {
        "model": models.full_name(settings.model),
        "kind": teacher.kind,
        "finetuning": finetuning,
        "fields": settings.fields,
        "max_tokens": text.max_tokens,
        "long_queries": settings.long_queries,
    }
    teacher.save(folder, about)
    text.tokenizer.save_pretrained(folder / "tokenizer")
    return about


def main(argv=None):
    # 1. Settings
    settings = parse(PRESETS, argv, __doc__)
    models.quiet_libraries()
    device, dtype, hardware = pick_hardware(settings)
    accelerator = start_processes(device)
    if not settings.fields:
        raise Stop(f"--fields: at least one of {' '.join(FIELDS)}")

    # 2. The text of the human-labelled pairs: with model and settings it is the teacher's identity
    features = settings.run / "features"
    _lock = require_finished(features, f"01_build_features.py --run {settings.run}", reads=READS)
    config = models.load_config(settings.model)
    kind, text = models.backbone_kind(config), open_text(settings, config)
    rows = LabelledRows(features, text, settings)
    inputs = {"rows": hash_rows(rows.ids, rows.levels), "held-out rows": hash_rows([], rows.held_out)}
    inputs["model"] = models.model_fingerprint(settings.model)
    inputs["precision"] = hardware
    output, work = start_stage(accelerator, settings.run / "teacher", settings, inputs)
    if work is None:
        return
    text.queries(rows.queries)  # those of impressions too: better now than halfway through stage 03

    # 3. The language model and a fresh head
    torch.manual_seed(settings.seed)
    backbone, finetuning = load_trainable(settings, config, accelerator.device, dtype)
    teacher = Teacher(backbone, kind, dtype).to(accelerator.device)
    models.check_reading(teacher, rows.ids[rows.lengths.argmax()], rows.pad_id, accelerator.device)
    optimizer = make_optimizer(teacher, finetuning, settings)
    if accelerator.is_main_process:
        summary.describe_teacher(teacher, finetuning, rows, settings)
        print(f"{accelerator.device}, {accelerator.num_processes} process(es)")

    # 4. Training
    train_state = train(teacher, optimizer, rows, settings, accelerator, work)

    # 5. Save
    if accelerator.is_main_process:
        summary.warn_if_useless(rows, train_state["best"])
        about = save(teacher, finetuning, text, settings, work)
        write_jsonl(work / "training_log.jsonl", train_state["log"])
        counts = {"train": len(rows.train), "held_out": len(rows.held_out)}
        command = cards.command_line("02_train_teacher.py", settings, PRESETS)
        cards.write_teacher_card(about, settings, command, counts, train_state["log"], work)
        facts = {"best": train_state["best"], "text": text.describe(), "held_out": rows.split}
        output.finish(["checkpoint.pt", "best.pt"], rows=counts, **facts)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    run_main(main)
