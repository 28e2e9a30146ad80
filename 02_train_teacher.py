"""Stage 02: human labels -> the teacher, a language model fine-tuned as cross-encoder.

Paper: "LLM as Relevance Model". [CLS] query [SEP] pin text -> language model -> fully connected layers -> five levels; point-wise
cross-entropy. Encoders (BERT, DeBERTa, T5's encoder) are trained in full, decoders (Llama) with QLoRA.

Reads   RUN/features/   pins.parquet, queries.parquet, labelled.parquet (its `train` rows)
Writes  RUN/teacher/    adapter/ or backbone/, head.safetensors, tokenizer/, teacher.json, training_log.jsonl, stage.json

Toy     python 02_train_teacher.py
Paper   accelerate launch 02_train_teacher.py --preset paper --run /runs/search      (one process a GPU; also without `accelerate launch`)
"""

import argparse
import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm

import common
from common import C, FIELDS, LEVELS, ROOT, PackedRows, PairText, Stop, Teacher

PRESETS = {
    "toy": dict(model=str(ROOT / "data/toy_models/llama"), fields=",".join(FIELDS), precision="fp32", max_tokens=96, epochs=6, batch_rows=32, batch_tokens=4_096,
                lr=2e-3, encoder_lr=3e-4, head_lr=1e-3, warmup=0.1, weight_decay=0.01, lora_rank=16, lora_alpha=32, lora_dropout=0.0, checkpoint_steps=100),
    "paper": dict(
        model="meta-llama/Meta-Llama-3-8B",  # stated; the others by --model: google-bert/bert-base-multilingual-cased, google-t5/t5-base, microsoft/deberta-v3-base
        fields=",".join(FIELDS),  # stated
        max_tokens=256,  # not stated in the paper; our choice
        precision="auto",  # bf16 on a GPU; our choice
        epochs=2, batch_rows=128, batch_tokens=8_192,  # not stated in the paper; our choice
        lr=2e-4,  # LoRA; not stated in the paper; the QLoRA paper's value for 7B-13B (Dettmers et al., 2023, table 9)
        encoder_lr=2e-5,  # full fine-tuning; not stated in the paper; within the range of Devlin et al., 2019, appendix A.3
        head_lr=2e-4,  # our choice
        warmup=0.03, weight_decay=0.01,  # our choice
        lora_rank=64, lora_alpha=16, lora_dropout=0.1,  # not stated in the paper; the QLoRA paper's (section 4 and appendix B)
        checkpoint_steps=200,  # our choice
    ),
}

PLAN = {  # what --dry-run reckons with
    "toy": dict(rows=6_000, tokens=28, tokens_per_second=15_000, source="measured on two CPU cores"),
    "paper": dict(rows=280_000, tokens=200, tokens_per_second=2_413, source="QLoRA, Llama-3.1-8B, RTX 4090, torchtune's README"),  # rows: stated; tokens: an assumption
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--model", metavar="PATH_OR_HUB_ID", help="BERT-, DeBERTa-, T5- or Llama-like model; a hub id or a folder written by save_pretrained")
    p.add_argument("--fields", metavar="A,B,…", help=f"pin-text fields the teacher reads (default: {','.join(FIELDS)})")
    p.add_argument("--max-tokens", type=int, metavar="T", help="tokens of query and pin text together")
    p.add_argument("--qlora", action=argparse.BooleanOptionalAction, default=None, help="backbone in 4 bit (NF4) with LoRA (default: decoders yes, encoders no)")
    p.add_argument("--lora", action=argparse.BooleanOptionalAction, default=None,
                   help="LoRA on an unquantised backbone; --no-qlora alone means this for a decoder, --no-lora trains all weights")
    p.add_argument("--lora-rank", type=int, metavar="R")
    p.add_argument("--lora-alpha", type=float, metavar="A", help="the update is (A / R) B A x")
    p.add_argument("--lora-dropout", type=float, metavar="P")
    p.add_argument("--epochs", type=int, metavar="N")
    p.add_argument("--batch-rows", type=int, metavar="B", help="rows an optimiser step, over all processes")
    p.add_argument("--batch-tokens", type=int, metavar="N", help="tokens a forward pass; a step's rows are accumulated in as many passes as that takes")
    p.add_argument("--lr", type=float, help="peak learning rate of LoRA weights")
    p.add_argument("--encoder-lr", type=float, help="peak learning rate of a backbone trained in full")
    p.add_argument("--head-lr", type=float, help="peak learning rate of the head")
    p.add_argument("--warmup", type=float, metavar="SHARE", help="share of the steps with rising learning rate; then it falls linearly to 0")
    p.add_argument("--weight-decay", type=float)
    p.add_argument("--rows", type=int, metavar="N", help="train on a random N of the training rows (default: all)")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="of the computation (auto: bf16 where the hardware has it)")
    p.add_argument("--checkpoint-steps", type=int, metavar="N", help="steps between two checkpoints to resume from")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--seed", type=int, default=0)
    common.plan_flags(p)
    args = common.parse(p, PRESETS, argv)
    args.fields = [f for f in args.fields.split(",") if f]
    if not args.fields or set(args.fields) - set(FIELDS):
        p.error(f"--fields: choose from {','.join(FIELDS)}")
    if args.qlora and args.lora is False:
        p.error("--qlora trains LoRA weights: it does not go with --no-lora")
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data


def read_labelled(features, split):
    """query_index, pin_index, label, query_id and pin_id of one split's rows, as arrays."""
    table = pq.read_table(features / "labelled.parquet", filters=[("split", "=", split)])
    rows = {c: table[c].to_numpy() for c in ("query_index", "pin_index", "label")}
    for side, file in (("query", "queries.parquet"), ("pin", "pins.parquet")):
        ids = pq.read_table(features / file, columns=[f"{side}_id"])[f"{side}_id"]
        rows[f"{side}_id"] = ids.take(rows[f"{side}_index"]).to_numpy(zero_copy_only=False)
    return rows


def token_ids(features, text, query_index, pin_index):
    """PackedRows of `[CLS] query [SEP] pin text` for pairs; each query and pin is tokenised once."""
    queries, which_query = np.unique(query_index, return_inverse=True)
    pins, which_pin = np.unique(pin_index, return_inverse=True)
    query_ids = text.queries(pq.read_table(features / "queries.parquet", columns=["query"])["query"].take(queries).to_pylist())
    pin_ids = text.pins(pq.read_table(features / "pins.parquet", columns=list(text.fields)).take(pins).to_pydict())
    return PackedRows(text.pair(query_ids[q], pin_ids[p]) for q, p in zip(which_query, which_pin))


def epoch_batches(lengths, batch_rows, seed, epoch, pool=16):
    """Row numbers of one epoch in batches of `batch_rows`: shuffled, then sorted by length inside pools of `pool` batches, so that
    a batch has little padding, and the batches shuffled. Depends on seed and epoch alone: a resumed run sees the same batches."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), pool * batch_rows):
        block = order[start:start + pool * batch_rows]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[i:i + batch_rows] for i in range(0, len(block), batch_rows)]
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(rows, lengths, budget, rank, world):
    """This process's part of a batch, cut into forward passes of at most `budget` tokens; as many passes on every process,
    so that gradients are exchanged in step. A pass may be empty."""
    parts = [rows[r::world] for r in range(world)]
    tokens = lambda piece: len(piece) * lengths[piece].max() if len(piece) > 1 else 0
    n = 1
    while any(tokens(piece) > budget for part in parts for piece in np.array_split(part, n)):
        n += 1
    return np.array_split(parts[rank], n)


# ---------------------------------------------------------------------------------------------------------------------
# Model


def build_teacher(args, config, device, dtype, backbone=None):
    """The backbone (QLoRA, LoRA or in full) with a fresh head. backbone: one that is loaded already."""
    kind = common.backbone_kind(config)
    qlora = args.qlora if args.qlora is not None else kind == "decoder" and args.lora is None
    lora = qlora or (args.lora if args.lora is not None else kind == "decoder")
    # Weights that are trained stay fp32 (bf16 only by autocast); a frozen backbone is held in the compute precision.
    backbone = backbone or common.load_backbone(args.model, dtype if lora else torch.float32, quantise=qlora, device=device, config=config)
    if lora:
        from peft import LoraConfig, get_peft_model

        # Freezing happens in get_peft_model. peft's prepare_model_for_kbit_training is not used: it would upcast embeddings and norms to fp32.
        backbone = get_peft_model(backbone, LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
                                                       target_modules="all-linear", bias="none"))
    if device.type == "cuda":
        backbone.enable_input_require_grads()
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Teacher(backbone, kind).to(device), lora, qlora


def dry_run(args):
    """Prints the plan: parameters, memory, steps, hours."""
    device, dtype = common.plan_device(args)
    config, source = common.plan_config(args.model)
    common.fit_length(args.max_tokens, config)
    with torch.device("meta"):
        teacher, lora, qlora = build_teacher(args, config, torch.device("meta"), dtype)
    path = args.run / "features" / "labelled.parquet"
    rows = pq.read_table(path, columns=["split"])["split"].to_pylist().count("train") if path.exists() else None
    rows = common.plan_print(args, PLAN[args.preset], (args.model, source), teacher,
                             common.plan_memory(teacher, device, dtype, qlora, args.batch_tokens, train=True), rows, path, args.epochs)
    print(f"steps:   {args.epochs * math.ceil(rows / args.batch_rows):,} of {args.batch_rows} rows, in passes of at most {args.batch_tokens:,} tokens; at most, since a tenth of the queries is held out")


def optimiser_of(teacher, args, lora):
    """AdamW; the head and the backbone have learning rates of their own; no decay on biases and norms."""
    groups = []
    for module, lr in ((teacher.backbone, args.lr if lora else args.encoder_lr), (teacher.head, args.head_lr)):
        trainable = [p for p in module.parameters() if p.requires_grad]
        groups.append(dict(params=[p for p in trainable if p.ndim > 1], lr=lr, peak=lr, weight_decay=args.weight_decay))
        groups.append(dict(params=[p for p in trainable if p.ndim <= 1], lr=lr, peak=lr, weight_decay=0.0))
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.999), eps=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def gradients(model, teacher, batch, ids, targets, args, accelerator, dtype, pad_id):
    """Forward and backward passes of one step, cut by tokens and dealt out to the processes. batch: row numbers of `ids`. Adds to the gradients;
    returns the loss: point-wise multi-class cross-entropy (paper), mean over the step's rows, all processes together."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    total = torch.zeros((), device=device)
    parts = micro_batches(batch, ids.lengths, args.batch_tokens, rank, world)
    for i, part in enumerate(parts):
        weight = 1.0 if len(part) else 0.0  # an empty pass still takes part in the exchange of gradients
        part = part if len(part) else batch[:1]
        x, mask = ids.batch(part, pad_id)
        mask_matters = teacher.mask_matters(mask)
        x, mask = x.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        with contextlib.nullcontext() if i == len(parts) - 1 else accelerator.no_sync(model):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(x, mask, mask_matters)
            loss = weight * F.cross_entropy(logits, targets[part].to(device), reduction="sum") / len(batch)
            accelerator.backward(loss * world)  # data-parallel training averages over processes
        total += loss.detach()
    return accelerator.reduce(total, "sum").item()


def train(teacher, rows, labels, ids, held_out, args, accelerator, dtype, pad_id, folder):
    """The training loop. rows/held_out: row numbers of `ids` (PackedRows) and `labels` [B] in 0..4. Leaves the weights of the epoch
    with the lowest held-out cross-entropy in `teacher` (its product is probabilities, and cross-entropy scores those). Returns the log."""
    model = accelerator.prepare(teacher)
    optimiser = optimiser_of(teacher, args, lora=any("lora_" in n for n, _ in teacher.named_parameters()))
    trainable = [p for p in teacher.parameters() if p.requires_grad]
    lengths = ids.lengths[rows]
    steps = args.epochs * math.ceil(len(rows) / args.batch_rows)
    targets = torch.from_numpy(labels)

    position = {"step": 0, "best": None, "log": []}
    if (folder / "checkpoint.safetensors").exists():
        position = common.load_checkpoint(folder / "checkpoint.safetensors", teacher, optimiser)
        if accelerator.is_main_process:
            print(f"continuing at step {position['step']} of {steps}")
    bar = tqdm(total=steps, initial=position["step"], desc="teacher", unit=" steps", disable=not accelerator.is_main_process)
    step = 0
    for epoch in range(args.epochs):
        losses = []
        for batch in epoch_batches(lengths, args.batch_rows, args.seed, epoch):
            step += 1
            if step <= position["step"]:
                continue
            # Every step draws its dropout from a seed of its own, so that a resumed run equals an undisturbed one.
            torch.manual_seed(args.seed * 1_000_003 + step * 1_009 + accelerator.process_index)
            teacher.train()
            loss = gradients(model, teacher, rows[batch], ids, targets, args, accelerator, dtype, pad_id)
            if not math.isfinite(loss):
                raise Stop(f"the loss is {loss} at step {step}, rows {rows[batch][:8].tolist()}… of the training rows: lower --lr, or use --precision fp32")
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            factor = common.lr_factor((step - 1) / steps, args.warmup)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(loss)
            position["log"].append({"step": step, "epoch": epoch + 1, "loss": round(loss, 6), "lr_factor": round(factor, 6)})
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
            if step % args.checkpoint_steps == 0 and step % math.ceil(len(rows) / args.batch_rows):
                checkpoint(accelerator, folder, teacher, optimiser, position, step)
        if step <= position["step"]:
            continue

        loss, accuracy = evaluate(teacher, ids, held_out, targets, args, accelerator, dtype, pad_id)
        position["log"].append({"step": step, "epoch": epoch + 1, "held_out_loss": round(loss, 6), "held_out_accuracy": round(accuracy, 6)})
        better = position["best"] is None or loss < position["best"]["loss"]
        if better:
            position["best"] = {"epoch": epoch + 1, "loss": loss, "accuracy": accuracy}
            if accelerator.is_main_process:
                common.save_checkpoint(folder / "best.safetensors", teacher, None, position["best"])
        checkpoint(accelerator, folder, teacher, optimiser, position, step)
        if accelerator.is_main_process:
            tqdm.write(f"epoch {epoch + 1}: held-out cross-entropy {loss:.4f}, accuracy {accuracy:.4f}{'  (best so far)' if better else ''}")
    bar.close()
    accelerator.wait_for_everyone()
    common.load_checkpoint(folder / "best.safetensors", teacher)
    return position


def checkpoint(accelerator, folder, teacher, optimiser, position, step):
    """What a killed run continues from, written by the main process; the others wait."""
    position["step"] = step
    if accelerator.is_main_process:
        common.save_checkpoint(folder / "checkpoint.safetensors", teacher, optimiser, position)
    accelerator.wait_for_everyone()


def evaluate(teacher, ids, held_out, targets, args, accelerator, dtype, pad_id):
    """Cross-entropy and accuracy on the held-out rows, each process on its share."""
    teacher.eval()
    mine = held_out[accelerator.process_index::accelerator.num_processes]
    sums = torch.zeros(3, device=accelerator.device, dtype=torch.float64)
    if len(mine):
        order = mine[np.argsort(ids.lengths[mine], kind="stable")]
        for part in common.token_batches(ids.lengths[order], args.batch_tokens):
            part = order[part]
            x, mask = ids.batch(part, pad_id)
            mask_matters = teacher.mask_matters(mask)
            x, mask = x.to(accelerator.device), mask.to(accelerator.device)
            with torch.inference_mode(), torch.autocast(accelerator.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = teacher(x, mask, mask_matters)
                y = targets[part].to(accelerator.device)
                sums += torch.stack([F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum(), torch.tensor(len(part), device=y.device)]).double()
    loss, right, n = accelerator.reduce(sums, "sum").tolist()
    return loss / n, right / n


def main(argv=None):
    args = parse_args(argv)
    common.quiet()
    if args.dry_run:
        return dry_run(args)
    accelerator = Accelerator(cpu=args.device == "cpu")
    device, main_process = accelerator.device, accelerator.is_main_process
    dtype = common.pick_dtype(args.precision, device)
    features, folder = args.run / "features", args.run / "teacher"

    # 1. What is inherited, and whether anything is left to do
    before = common.need(features, f"01_build_features.py --run {args.run}")
    stage = common.start(accelerator, folder, args, {"features": before["identity"], "model": common.fingerprint_model(args.model)})
    if stage is None:
        return
    config = common.load_config(args.model)
    tokenizer = common.load_tokenizer(args.model, config)
    kind = common.backbone_kind(config)
    text = PairText(tokenizer, kind, args.fields, common.fit_length(args.max_tokens, config))

    # 2. Human labels; a tenth of the training queries is held out to choose the epoch
    labelled = read_labelled(features, "train")
    held = common.in_validation(labelled["query_id"], 0.1, f"teacher:{args.seed}")
    rows, held_out = np.flatnonzero(~held), np.flatnonzero(held)
    if not len(held_out):
        rows, held_out = rows[:-max(1, len(rows) // 10)], rows[-max(1, len(rows) // 10):]
    if args.rows:
        rows = np.sort(np.random.default_rng(args.seed).permutation(rows)[:args.rows])
    labels = labelled["label"].astype(np.int64) - 1
    ids = token_ids(features, text, labelled["query_index"], labelled["pin_index"])

    # 3. The model
    torch.manual_seed(args.seed)
    teacher, lora, qlora = build_teacher(args, config, device, dtype)
    if main_process:
        trainable, every = sum(p.numel() for p in teacher.parameters() if p.requires_grad), teacher_size(teacher)
        print(f"{args.model}: {kind}, read out at the {teacher.how} token, {'QLoRA (NF4)' if qlora else 'LoRA' if lora else 'all weights trained'}; "
              f"{every / 1e6:,.1f} M parameters, {100 * trainable / every:.1f} % trainable; {device}, {str(dtype).removeprefix('torch.')}, {accelerator.num_processes} process(es)")
        print(f"rows: {len(rows):,} train, {len(held_out):,} held out; tokens a row: mean {ids.lengths.mean():.0f}, max {ids.lengths.max()} of {text.max_tokens}")
        print("labels: " + ", ".join(f"{level} {LEVELS[level]} {100 * (labels[rows] == level - 1).mean():.0f} %" for level in range(1, C + 1)))

    # 4. Training
    position = train(teacher, rows, labels, ids, held_out, args, accelerator, dtype, tokenizer.pad_token_id, folder)

    # 5. Save
    if main_process:
        about = {"model": args.model, "kind": kind, "fields": args.fields, "max_tokens": text.max_tokens, "lora": lora, "qlora": qlora}
        teacher.save(folder, about)
        tokenizer.save_pretrained(folder / "tokenizer")
        with common.atomic(folder / "training_log.jsonl") as tmp:
            tmp.write_text("".join(json.dumps(line) + "\n" for line in position["log"]))
        print(f"kept epoch {position['best']['epoch']}: held-out accuracy {position['best']['accuracy']:.4f}")
        stage.finish(rows={"train": len(rows), "held_out": len(held_out)}, best=position["best"], text=text.describe(),
                     weights=common.hashed([common.fingerprint(folder / name) for name in ("head.safetensors", "adapter" if lora else "backbone")]))
        for name in ("checkpoint.safetensors", "best.safetensors"):
            (folder / name).unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def teacher_size(teacher):
    """Parameters, counting a 4-bit weight as the elements it stands for."""
    return sum(math.prod(p.quant_state.shape) if getattr(p, "quant_state", None) is not None else p.numel() for p in teacher.parameters())


if __name__ == "__main__":
    common.run(main)
