"""Stage 03: the teacher labels every impression with a probability for each of the five levels.

Paper: "Distill LLM into Servable Student Model": the soft labels are the softmax of the teacher's five logits, on unlabelled,
multilingual impressions; a teacher trained on English labels so carries them over to other languages.

Reads   RUN/features/, RUN/teacher/
Writes  RUN/labels/     impressions/part-*.parquet, row for row the features' shards, and labelled.parquet: p1 … p5 float32, each row sums to 1

Toy     python 03_label.py
Paper   accelerate launch 03_label.py --preset paper --run /runs/search      (shards are dealt to processes; killed, any number of processes continues)
"""

import argparse
import concurrent.futures
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from tqdm import tqdm

import common
from common import C, PackedRows, PairText, Stop, Teacher, write_parquet

PRESETS = {
    "toy": dict(precision="fp32", batch_tokens=8_192, workers=0),
    "paper": dict(precision="auto", batch_tokens=32_768, workers=4),  # our choice; the labels do not depend on them
}
PLAN = {  # what --dry-run reckons with
    "toy": dict(model=str(common.ROOT / "data/toy_models/llama"), rows=40_000, tokens=28, tokens_per_second=66_000, source="measured on two CPU cores"),
    "paper": dict(model="meta-llama/Meta-Llama-3-8B", rows=30_000_000, tokens=200,  # model and rows: stated; tokens: an assumption
                  tokens_per_second=10_000, source="50 rows/s of 200 tokens, Llama-3-8B in 8 bit, A100, Faire's engineering blog"),
}
CHECKED_ROWS = 256  # rows labelled with and without merged LoRA, to report how far labels move


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--batch-tokens", type=int, metavar="N", help="tokens a forward pass, padding included")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="of weights and computation (auto: bf16 where the hardware has it)")
    p.add_argument("--merge", action=argparse.BooleanOptionalAction, default=True, help="add LoRA into plain weights (default); --no-merge keeps NF4, for small memory")
    p.add_argument("--fp8", action="store_true", help="matrix products in 8-bit floating point, for GPUs that have it (Hopper and later); prints how far labels move")
    p.add_argument("--only-labelled", action="store_true", help="label the human-labelled rows alone, to measure a teacher: no student can be trained on that")
    p.add_argument("--compile", action="store_true", help="compile the teacher (minutes at first; pays for long runs; moves labels by rounding; needs a C++ compiler on a CPU)")
    p.add_argument("--workers", type=int, metavar="N", help="processes that tokenise ahead of the model; 0: in this one")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--expect-model", metavar="PATH_OR_HUB_ID", help="model that --dry-run reckons with before there is a teacher")
    common.plan_flags(p)
    return common.parse(p, PRESETS, argv)


class Shards:
    """What a worker needs to turn a shard of pairs into token ids."""

    def __init__(self, features, teacher_folder, about):
        self.features, self.about = Path(features), about
        config = common.load_config(about["model"])
        self.tokenizer = common.load_tokenizer(teacher_folder / "tokenizer", config)
        self.text = PairText(self.tokenizer, about["kind"], about["fields"], about["max_tokens"])
        self.queries = pq.read_table(self.features / "queries.parquet", columns=["query"])["query"]
        self.pins = pq.ParquetFile(self.features / "pins.parquet", memory_map=True)
        sizes = [self.pins.metadata.row_group(g).num_rows for g in range(self.pins.num_row_groups)]
        self.group_start = np.concatenate([[0], np.cumsum(sizes)])

    def pin_columns(self, pins):
        """Text fields of pins (sorted row numbers), one row group in memory at a time: dict of columns."""
        columns = {name: [] for name in self.text.fields}
        group = np.searchsorted(self.group_start, pins, side="right") - 1
        for g in np.unique(group):
            table = self.pins.read_row_group(g, columns=list(columns)).take(pins[group == g] - self.group_start[g])
            for name, values in columns.items():
                values += table[name].to_pylist()
        return columns

    def token_ids(self, path):
        """A shard's PackedRows. Each query and pin of the shard is tokenised once."""
        table = pq.read_table(path, columns=["query_index", "pin_index"])
        queries, which_query = np.unique(table["query_index"].to_numpy(), return_inverse=True)
        pins, which_pin = np.unique(table["pin_index"].to_numpy(), return_inverse=True)
        query_ids = self.text.queries(self.queries.take(queries).to_pylist())
        pin_ids = self.text.pins(self.pin_columns(pins))
        return PackedRows(self.text.pair(query_ids[q], pin_ids[p]) for q, p in zip(which_query, which_pin))


_shards = None


def start_worker(*args):
    """A worker process keeps one Shards."""
    global _shards
    common.quiet()
    _shards = Shards(*args)


def worker_token_ids(path):
    """Shards.token_ids in a worker process."""
    return _shards.token_ids(path)


def tokenised(paths, shards, workers, make):
    """Yields (path, PackedRows), tokenised ahead of the model by `workers` processes."""
    if workers == 0 or len(paths) < 2:
        for path in paths:
            yield path, shards.token_ids(path)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, make) as pool:
        ahead = []
        for path in [*paths, *[None] * (workers + 1)]:
            if path is not None:
                ahead.append((path, pool.submit(worker_token_ids, path)))
            if ahead and (path is None or len(ahead) > workers):
                first, future = ahead.pop(0)
                yield first, future.result()


def write_labels(path, probabilities):
    """Soft labels [B, C] -> columns p1 … p5 (p5: excellent)."""
    write_parquet(path, {f"p{level}": probabilities[:, level - 1] for level in range(1, C + 1)})


def load_teacher(args, folder, shards, sample, device, dtype):
    """The teacher ready to label, LoRA merged unless --no-merge, and how far each change of its weights moved the labels of `sample` rows."""
    teacher, about = Teacher.load(folder, dtype, device)
    label = lambda: common.soft_labels(teacher, sample, shards.tokenizer.pad_token_id, args.batch_tokens, device, dtype)
    changes = {}
    if about["lora"] and args.merge:
        changes["merge"] = lambda: common.merge_lora(teacher, dtype)
    if args.fp8:
        if dtype != torch.bfloat16 or about["lora"] and not args.merge:
            raise Stop("--fp8 needs --precision bf16 and merged LoRA")
        changes["fp8"] = lambda: common.use_fp8(teacher)
    moved = {}
    for name, change in changes.items():
        before = label()
        change()
        after = label()
        moved[name] = {"rows": len(before), "max_difference": float(np.abs(after - before).max()), "mean_difference": float(np.abs(after - before).mean()),
                       "same_level": float((after.argmax(1) == before.argmax(1)).mean())}
    teacher = common.for_inference(teacher, device, dtype, args.compile)
    if args.compile:
        teacher.backbone = torch.compile(teacher.backbone, dynamic=True)
    return teacher, moved


def dry_run(args):
    """Prints the plan: parameters, memory, hours."""
    device, dtype = common.plan_device(args)
    path, features = args.run / "teacher" / "teacher.json", args.run / "features"
    about = common.read_json(path) if path.exists() else {"model": args.expect_model or PLAN[args.preset]["model"], "lora": True, "qlora": True}
    config, source = common.plan_config(about["model"])
    with torch.device("meta"):
        teacher = Teacher(common.load_backbone(about["model"], dtype, device="meta", config=config), common.backbone_kind(config)).requires_grad_(False)
    parts = [p for p in [features / "labelled.parquet", *features.glob("impressions/part-*.parquet")] if p.exists()]
    rows = sum(pq.read_metadata(p).num_rows for p in parts) if parts else None
    common.plan_print(args, PLAN[args.preset], (about["model"], source), teacher,
                      common.plan_memory(teacher, device, dtype, about["lora"] and about["qlora"] and not args.merge, args.batch_tokens, train=False), rows, features)


def main(argv=None):
    args = parse_args(argv)
    common.quiet()
    if args.dry_run:
        return dry_run(args)
    accelerator = Accelerator(cpu=args.device == "cpu")
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    dtype = common.pick_dtype(args.precision, device)
    features, folder = args.run / "features", args.run / "labels"

    # 1. What is inherited
    made = common.need(features, f"01_build_features.py --run {args.run}")
    trained = common.need(args.run / "teacher", f"02_train_teacher.py --run {args.run}")
    if trained["inputs"]["features"] != made["identity"]:
        raise Stop(f"{args.run / 'teacher'} was trained on other features than {features} holds now: run 02_train_teacher.py --overwrite")
    stage = common.start(accelerator, folder, args, {"features": made["identity"], "teacher": trained["weights"], "text": trained["text"]})
    if stage is None:
        return
    about = common.read_json(args.run / "teacher" / "teacher.json")
    make = (features, args.run / "teacher", about)
    shards = Shards(*make)
    if shards.text.describe() != trained["text"]:
        raise Stop(f"{args.run / 'teacher'}: its text template is not this code's: run 02_train_teacher.py --overwrite")

    # 2. The teacher
    labelled = shards.token_ids(features / "labelled.parquet")
    sample = PackedRows(labelled.flat[labelled.start[i]:labelled.start[i] + labelled.lengths[i]] for i in range(min(CHECKED_ROWS, len(labelled))))
    teacher, moved = load_teacher(args, args.run / "teacher", shards, sample, device, dtype)
    parts = [] if args.only_labelled else sorted((features / "impressions").glob("part-*.parquet"))
    todo = [p for p in [features / "labelled.parquet", *parts] if not target(folder, features, p).exists()]
    accelerator.wait_for_everyone()  # nobody writes before everybody has seen the same list: it is dealt out by rank
    if accelerator.is_main_process:
        print(f"teacher: {about['model']}, trained on {', '.join(about['fields'])}, at most {about['max_tokens']} tokens; "
              f"{device}, {str(dtype).removeprefix('torch.')}, {world} process(es)")
        for name, m in moved.items():
            print(f"{'LoRA merged' if name == 'merge' else '8-bit products'}: labels of {m['rows']} rows moved by at most {m['max_difference']:.1e}, same level on {100 * m['same_level']:.1f} %")
        print(f"shards: {1 + len(parts)}, of which {len(todo)} to label")

    # 3. Soft labels, one output shard an input shard; a shard is written whole or not at all
    start, rows_done, tokens, padded = time.time(), 0, 0, 0
    count = sum(pq.read_metadata(p).num_rows for p in todo[rank::world])
    with tqdm(total=count, desc="soft labels", unit=" rows", unit_scale=True, disable=not accelerator.is_main_process) as bar:
        for path, ids in tokenised(todo[rank::world], shards, args.workers, make):
            write_labels(target(folder, features, path), common.soft_labels(
                teacher, ids, shards.tokenizer.pad_token_id, args.batch_tokens, device, dtype, bar.update))
            rows_done += len(ids)
            tokens += int(ids.lengths.sum())
            padded += padded_tokens(ids.lengths, args.batch_tokens)
    seconds = max(time.time() - start, 1e-9)
    accelerator.wait_for_everyone()

    # 4. Summary
    if accelerator.is_main_process:
        if rows_done:
            print(f"this process: {rows_done / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s, padding {100 * (padded / tokens - 1):.1f} % of tokens")
        means = np.mean([np.stack([pq.read_table(target(folder, features, p))[f"p{level}"].to_numpy() for level in range(1, C + 1)], 1).mean(0)
                         for p in parts[:100] or [features / "labelled.parquet"]], axis=0)
        print("mean soft label: " + ", ".join(f"{level}: {100 * m:.0f} %" for level, m in enumerate(means, 1)))
        stage.finish(rows={"impressions": sum(pq.read_metadata(p).num_rows for p in parts), "labelled": len(labelled)}, merge=moved.get("merge"), fp8=moved.get("fp8"))
    accelerator.wait_for_everyone()


def target(folder, features, path):
    """The label shard of a feature shard."""
    return folder / path.relative_to(features)


def padded_tokens(lengths, budget):
    """Tokens the forward passes see, padding included."""
    order = np.sort(lengths)[::-1]
    return int(sum(order[b[0]] * len(b) for b in common.token_batches(order, budget)))


if __name__ == "__main__":
    common.run(main)
