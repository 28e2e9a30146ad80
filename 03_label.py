"""Stage 03: the teacher labels every impression with a probability for each of the five levels.

Paper: "Distill LLM into Servable Student Model". The soft labels are the softmax of the teacher's five logits
on unlabelled, multilingual impressions; a teacher trained on English labels so carries them over to other
languages.

Reads   RUN/features/, RUN/teacher/
Writes  RUN/labels/     impressions/part-*.parquet, row for row the features' shards, and labelled.parquet:
                        p1 … p5 float32 (p5: excellent), each row sums to 1

Toy     python 03_label.py
Paper   accelerate launch 03_label.py --preset paper --run /runs/search      shards are dealt to processes;
                                                                            any number of them continues

Shapes: N rows of a shard, B rows of a batch, T tokens, C = 5 levels.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from common import NUM_LEVELS, PairText, Teacher, pad_rows, token_batches, tokenize_pairs
from runs import models, stage
from runs.stage import Count, Device, Precision, Size, StageSettings, Stop


@dataclass(frozen=True)
class Settings(StageSettings):
    """What stage 03 is told."""

    batch_tokens: Count = 8_192  # tokens a forward pass, padding included
    precision: Precision = "fp32"  # of weights and computation; auto: bf16 where the hardware has it
    merge: bool = True  # add LoRA into plain weights; --no-merge keeps NF4, for small memory
    only_labelled: bool = False  # the human-labelled rows alone, to measure a teacher: no student learns that
    workers: Size = 0  # processes that tokenize ahead of the model; 0: none
    device: Device = "auto"  # where the teacher runs


TOY = Settings()
SMALL = replace(TOY, preset="small", precision="auto")
# Our choice; labels depend on the precision alone.
PAPER = replace(TOY, preset="paper", precision="auto", batch_tokens=32_768, workers=4)
PRESETS = {"toy": TOY, "small": SMALL, "paper": PAPER}
CHECKED_ROWS = 256  # rows labelled before and after LoRA is merged, to report how far labels move


# ------------------------------------------------------------------------------------------------------------
# Soft labels


@torch.inference_mode()
def soft_labels(teacher, rows, pad_id, token_budget, on_batch=None):
    """softmax(logits) of N rows of token ids (arrays [T]): float32 [N, C], in the rows' order.

    A batch holds at most `token_budget` tokens of rows of about one length: almost no padding.
    on_batch: called with each batch's number of rows."""
    device = next(teacher.head.parameters()).device
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest_first = np.argsort(lengths, kind="stable")[::-1]  # what does not fit into memory fails at once
    labels = np.empty((len(rows), NUM_LEVELS), np.float32)
    for numbers in token_batches(lengths[longest_first], token_budget):
        batch = longest_first[numbers]
        ids, mask = pad_rows([rows[row] for row in batch], pad_id)
        logits = teacher(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True))
        labels[batch] = logits.double().softmax(dim=1).float().cpu().numpy()
        if on_batch is not None:
            on_batch(len(batch))
    return labels


def merge_lora(teacher, adapter):
    """Every weight W with LoRA becomes W + (alpha / R) B A (Hu et al., 2022), W out of NF4 first: peft's
    merge straight into 4 bit would quantize the sum, which moves the labels. adapter: LoRA's folder."""
    backbone = teacher.backbone
    if getattr(backbone, "is_loaded_in_4bit", False):
        from peft import PeftModel

        backbone = PeftModel.from_pretrained(backbone.unload().dequantize(), adapter)
    teacher.backbone = backbone.merge_and_unload()


# ------------------------------------------------------------------------------------------------------------
# Shards


class PairShards(IterableDataset):
    """Yields (path, token ids: N arrays [T]) of shards of (query, pin) pairs. Of several workers each one
    takes its share of the shards."""

    def __init__(self, features, text, paths):
        self.features, self.text, self.paths = features, text, paths

    def __iter__(self):
        worker = get_worker_info()
        if worker is not None:
            stage.quiet_libraries()
        queries = pq.read_table(self.features / "queries.parquet", columns=["query"])["query"]
        for path in self.paths if worker is None else self.paths[worker.id :: worker.num_workers]:
            pairs = pq.read_table(path, columns=["query_index", "pin_index"])
            query_index, pin_index = pairs["query_index"].to_numpy(), pairs["pin_index"].to_numpy()
            try:
                yield path, tokenize_pairs(self.text, queries, self.read_pins, query_index, pin_index)
            except Stop as error:  # a worker's exception would come with its traceback
                yield path, error

    def read_pins(self, pins):
        """Text columns of pins (sorted row numbers), one row group in memory at a time."""
        columns = {name: [] for name in self.text.fields}
        file, start = pq.ParquetFile(self.features / "pins.parquet", memory_map=True), 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            inside = pins[(pins >= start) & (pins < end)] - start
            if len(inside):
                table = file.read_row_group(group, columns=list(columns)).take(inside)
                for name, values in columns.items():
                    values += table[name].to_pylist()
            start = end
        return columns


def tokenized(shards, workers):
    """What the shards yield, in their order, made ahead of its use by `workers` processes."""
    workers = min(workers, len(shards.paths))
    context = "spawn" if workers else None
    options = {"batch_size": None, "collate_fn": as_it_is}
    for path, rows in DataLoader(shards, num_workers=workers, multiprocessing_context=context, **options):
        if isinstance(rows, Stop):
            raise rows
        yield path, rows


def as_it_is(shard):
    """Keeps DataLoader from turning arrays into tensors."""
    return shard


def write_labels(path, labels):
    """Soft labels [N, C] -> columns p1 … p5."""
    stage.write_parquet(path, {f"p{level}": labels[:, level - 1] for level in range(1, NUM_LEVELS + 1)})


def mean_label(paths):
    """Mean [C] of the label shards' rows."""
    total, rows = np.zeros(NUM_LEVELS), 0
    for path in paths:
        table = pq.read_table(path)
        total += np.stack([column.to_numpy() for column in table.columns], axis=1).sum(0, dtype=np.float64)
        rows += len(table)
    return total / rows


# ------------------------------------------------------------------------------------------------------------


def load_teacher(folder, settings, sample, pad_id, device):
    """The teacher ready to label, and how far merging LoRA moved the labels of `sample` (or None)."""
    teacher, about = Teacher.load(folder, stage.pick_dtype(settings.precision, device), device)
    if about["finetuning"] == "full" or not settings.merge:
        return teacher, None
    before = soft_labels(teacher, sample, pad_id, settings.batch_tokens)
    merge_lora(teacher, folder / "adapter")
    after = soft_labels(teacher, sample, pad_id, settings.batch_tokens)
    moved = {"rows": len(sample), "max_difference": float(np.abs(after - before).max())}
    return teacher, {**moved, "same_level": float((after.argmax(1) == before.argmax(1)).mean())}


def inherited(run):
    """stage.json of features and teacher, checked, and teacher.json."""
    made = stage.require_finished(run / "features", f"01_build_features.py --run {run}")
    trained = stage.require_finished(run / "teacher", f"02_train_teacher.py --run {run}")
    if trained["inputs"]["features"] != made["identity"]:
        what = f"trained on other features than {run / 'features'} holds now"
        raise Stop(f"{run / 'teacher'}: {what}: run 02_train_teacher.py --overwrite")
    return made, trained, stage.read_json(run / "teacher" / "teacher.json")


def main(argv=None):
    # 1. Settings, what is inherited, and whether anything is left to do
    settings = stage.parse(PRESETS, argv, __doc__)
    stage.quiet_libraries()
    stage.pick_device(settings.device)
    accelerator = Accelerator(cpu=settings.device == "cpu")
    rank, world, is_main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    features, folder = settings.run / "features", settings.run / "teacher"
    made, trained, about = inherited(settings.run)
    inputs = {"features": made["identity"], "teacher": trained["identity"], "text": trained["text"]}
    output = stage.start_stage(accelerator, settings.run / "labels", settings, inputs)
    if output is None:
        return

    # 2. The text of the pairs
    source = folder / "backbone" if about["finetuning"] == "full" else about["model"]
    tokenizer = models.load_tokenizer(folder / "tokenizer", models.load_config(source))
    text = PairText(tokenizer, about["kind"], about["fields"], about["max_tokens"])
    if text.describe() != trained["text"]:
        raise Stop(f"{folder}: its text template is not this code's: run 02_train_teacher.py --overwrite")

    # 3. The teacher, LoRA merged
    labelled, impressions = features / "labelled.parquet", sorted(features.glob("impressions/part-*.parquet"))
    paths = [labelled] if settings.only_labelled else [labelled, *impressions]
    [(_, sample)] = PairShards(features, text, [labelled])
    arguments = sample[:CHECKED_ROWS], tokenizer.pad_token_id, accelerator.device
    teacher, moved = load_teacher(folder, settings, *arguments)
    todo = [path for path in paths if not (output.work / path.relative_to(features)).exists()]
    accelerator.wait_for_everyone()  # nobody writes before everybody has seen the same list
    if is_main:
        print(f"teacher: {about['model']}, trained on {', '.join(about['fields'])}; {accelerator.device}, "
              f"{stage.dtype_name(teacher.dtype)}, {world} process(es)")  # fmt: skip
        print(f"LoRA merged: {moved}" if moved else "nothing merged")
        print(f"shards: {len(paths)}, of which {len(todo)} to label")

    # 4. Soft labels, one output shard an input shard; a shard is written whole or not at all
    mine, start, tokens = todo[rank::world], time.time(), 0
    total = sum(pq.read_metadata(path).num_rows for path in mine)
    with stage.progress_bar(total=total, desc="soft labels", unit=" rows", disable=not is_main) as bar:
        for path, rows in tokenized(PairShards(features, text, mine), settings.workers):
            labels = soft_labels(teacher, rows, tokenizer.pad_token_id, settings.batch_tokens, bar.update)
            write_labels(output.work / path.relative_to(features), labels)
            tokens += sum(len(row) for row in rows)
    seconds = time.time() - start
    accelerator.wait_for_everyone()

    # 5. Summary
    if is_main:
        if mine:
            print(f"this process: {total / seconds:,.0f} rows/s, {tokens / seconds:,.0f} tokens/s")
        written = [output.work / path.relative_to(features) for path in paths]
        shares = [f"{level}: {100 * mean:.0f} %" for level, mean in enumerate(mean_label(written[-100:]), 1)]
        print(f"mean soft label: {', '.join(shares)}")
        counts = [pq.read_metadata(path).num_rows for path in paths]
        output.finish(rows={"impressions": sum(counts[1:]), "labelled": counts[0]}, merge=moved)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    stage.run_main(main)
