"""Stage 03: the teacher labels every impression with a probability for each of the five levels.

Paper: "Distill LLM into Servable Student Model". The soft labels are the teacher's probabilities of the
levels on unlabelled, multilingual impressions; a teacher trained on English labels so carries them over to
other languages.

    1  settings; what is inherited
    2  the text of the pairs; which shards are left to label, and which labels are known
    3  the teacher, LoRA merged, loaded for the first pair that nobody has labelled; --compile its layers
    4  soft labels, one output shard an input shard
    5  --pool (ours): how the teacher's labels are pooled with a regression on the match features, which is
       the better one where human labels are few. The teacher stays alone where it is clearly better, and in
       a language without labels where the match features mean something else

Reads   RUN/features/, RUN/teacher/
Writes  RUN/labels/     impressions/part-*.parquet, row for row the features' shards, and labelled.parquet:
                        p1 … p5 float32 (p5: excellent), the teacher's own, each row sums to 1
                        known.arrow: the same by what decides a label, so that a pair is labelled once, here
                        and in the runs that build on this one
                        pool.json: the two weights and the regression; 04 and 05 pool by it

Toy     python 03_label.py
        python 03_label.py --run outputs/mean --mean outputs/toy outputs/toy.seed1      several teachers' mean
Paper   accelerate launch 03_label.py --preset paper --run /runs/search      shards are dealt to processes;
                                                                            any number of them continues

Shapes: N rows of a shard, B rows of a batch, T tokens, C = 5 levels.
"""

import functools
import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch

from common import NUM_LEVELS, PairText, Teacher, pad_rows, token_batches
from lib import models
from lib.inputs.base import bases_of
from lib.inputs.inherited import (
    require,
    require_pairs,
    require_teacher,
    require_trained_on,
    teacher_identity,
)
from lib.inputs.known import FILE, KnownLabels, label_keys, merge_own, tables_of
from lib.inputs.match import match_names
from lib.inputs.pairs import PairFiles, count_labels, count_rows, read_labelled, write_labels
from lib.inputs.pool import POOL, fit_pool, read_pool, write_pool
from lib.inputs.rows import tokenized_shards
from lib.results import summary
from lib.stages.files import fingerprint, hashed
from lib.stages.processes import of_main, start_processes, start_stage, wait_for_all
from lib.stages.settings import Count, ModelSettings, parse, refuse, typed
from lib.stages.streams import ahead
from lib.stages.terminal import Stop, progress_bar, run_main, stop_on_error
from lib.tables.splits import in_hash_split


@dataclass(frozen=True)
class Settings(ModelSettings):
    """Settings of stage 03."""

    batch_tokens: Count = 8_192  # tokens a forward pass, padding included
    compile: Literal["off", "on", "auto"] = "off"  # torch.compile: faster after a wait; auto: on a GPU alone
    merge: bool = True  # add LoRA into plain weights; --no-merge keeps NF4, for small memory
    model: str | None = None  # where the model of a LoRA teacher is now (default: where 02 found it)
    long_queries: Literal["stop", "cut"] | None = None  # that do not fit (default: as in 02)
    teacher: Path | None = None  # teacher/ of another run (default: RUN's own)
    known: tuple[Path, ...] | None = None  # runs whose labels are looked up (default: RUN, its base …)
    only_labelled: bool = False  # label no impressions, to measure a teacher alone: no student can learn that
    # auto: labels are pooled with a regression on the match features, unless the teacher is clearly better
    pool: Literal["auto", "none"] = "auto"
    mean: tuple[Path, ...] = ()  # runs whose labels, as pooled there, are averaged instead (ours)


TOY = Settings()
SMALL = replace(TOY, preset="small", precision="auto")
# Our choice; the pool, which the paper does not have, is off. Labels depend on precision and merge alone.
PAPER = replace(TOY, preset="paper", precision="auto", batch_tokens=32_768, compile="auto", pool="none")
PRESETS = {"toy": TOY, "small": SMALL, "paper": PAPER}
# Flags that --mean, which asks no teacher, has no use for
OF_A_TEACHER = ("teacher", "known", "model", "long-queries", "pool", "merge", "no-merge", "compile")
OF_A_TEACHER += ("precision", "batch-tokens")
CHECKED_ROWS = 256  # rows labelled before and after compiling: how far do labels move?
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of a probability, that compiling may move it by


# ------------------------------------------------------------------------------------------------------------
# Soft labels


@torch.inference_mode()
def soft_labels(teacher, rows, pad_id, token_budget, on_batch=None):
    """The teacher's probabilities of N rows of token ids (arrays [T]): float32 [N, C], in the rows' order.

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
        labels[batch] = teacher.probabilities(logits).float().cpu().numpy()
        if on_batch is not None:
            on_batch(len(batch))
    return labels


def label_shard(teacher, rows, name, known, pad_id, token_budget, on_batch=None):
    """Soft labels [N, C] of the rows of a shard of this name: looked up where a pair is known, else by one
    pass of the teacher for each different pair. Returns also where they are from (write_labels). teacher():
    the Teacher, asked for only if a pair is new."""
    keys = label_keys(rows, known.decided_by)
    keys, first, which = np.unique(keys, return_index=True, return_inverse=True)
    labels, source = known.find(keys)
    new = np.flatnonzero(source < 0)
    new = new[np.argsort(first[new])]  # in the rows' order
    if len(new):
        rows_of_new = [rows[row] for row in first[new]]
        labels[new] = soft_labels(teacher(), rows_of_new, pad_id, token_budget, on_batch)
    known.add(name, keys[source != 0], labels[source != 0])
    looked_up = {run: int((source == number).sum()) for number, run in enumerate(known.earlier, 1)}
    return labels[which], {"rows": len(rows), "passes": len(new), "looked_up": looked_up}


def merge_lora(teacher, adapter):
    """Every weight W with LoRA becomes W + (alpha / R) B A (Hu et al., 2022), W out of NF4 first: peft's
    merge straight into 4 bit would quantize the sum, which moves the labels. adapter: LoRA's folder."""
    backbone = teacher.backbone
    if getattr(backbone, "is_loaded_in_4bit", False):
        backbone = models.load_lora(backbone.unload().dequantize(), adapter)
    teacher.backbone = backbone.merge_and_unload()


def compile_layers(teacher, sample, pad_id, settings, accelerator):
    """The teacher; where it is wanted, its layers compiled by torch.compile for batches of any shape. Tried
    on `sample`, rows of token ids: Stop if labels move by more than rounding."""
    on_gpu, token_budget = accelerator.device.type == "cuda", settings.batch_tokens
    if settings.compile == "off" or (settings.compile == "auto" and not on_gpu):
        return teacher
    before = soft_labels(teacher, sample, pad_id, token_budget)
    for layer in itertools.chain.from_iterable(models.layers_of(teacher.backbone)):
        layer.compile(dynamic=True)
    start = time.monotonic()
    with stop_on_error("--compile: PyTorch cannot compile here", "--compile off labels without"):
        after = soft_labels(teacher, sample, pad_id, token_budget)
    moved = np.abs(after - before).max()
    seconds = time.monotonic() - start
    accelerator.print(f"layers compiled in {seconds:.0f} s; labels move by at most {moved:.1e}")
    if not moved < ROUNDING[teacher.dtype]:
        raise Stop("--compile: labels move by more than rounding; --compile off labels without")
    return teacher


# ------------------------------------------------------------------------------------------------------------


def load_teacher(folder, settings, device, dtype):
    """The teacher in `folder`, its LoRA merged if wanted."""
    teacher, about = Teacher.load(folder, dtype, device, settings.model)
    if about["finetuning"] != "full" and settings.merge:
        with stop_on_error("LoRA cannot be merged", "--no-merge labels without"):
            merge_lora(teacher, folder / "adapter")
    return teacher


def open_text(folder, settings, about, model):
    """The PairText of the pairs, as the teacher in `folder` read it; all queries are checked at once."""
    tokenizer = models.load_tokenizer(folder / "tokenizer", models.load_config(model))
    cut = (settings.long_queries or about["long_queries"]) == "cut"
    text = PairText(tokenizer, about["kind"], about["fields"], about["max_tokens"], cut)
    queries = pq.read_table(settings.run / "features" / "queries.parquet", columns=["query"])["query"]
    text.queries(queries.to_pylist())
    return text


def what_decides(trained, hardware, merge):
    """Hash of what decides a pair's label, beside its token ids. trained: stage.json of 02."""
    return hashed([teacher_identity(trained), trained["text"], hardware, merge])


def shard_paths(settings):
    """The files of pairs to label: the human-labelled ones, and those of impressions."""
    features = settings.run / "features"
    impressions = [] if settings.only_labelled else features.glob("impressions/part-*.parquet")
    return [features / "labelled.parquet", *sorted(impressions)]


def label_shards(teacher, shards, known, text, settings, bar):
    """Labels shards, (path to write to, rows), each whole or not at all. teacher: of label_shard()."""
    for path, rows in ahead(shards, depth=1):
        of_rows = path.stem, known, text.tokenizer.pad_token_id, settings.batch_tokens
        labels, counts = label_shard(teacher, rows, *of_rows, bar.update)
        write_labels(path, labels, counts)
        bar.update(len(rows) - counts["passes"])


def pool_before(settings, trained):
    """The labels of a run that RUN builds on, pooled for this teacher, or None; and a lock on them. trained:
    stage.json of 02."""
    for labels in [run / "labels" for run in bases_of(settings.run)] if settings.pool == "auto" else ():
        if (labels / POOL).exists():
            made = require(labels, [POOL])
            if made["inputs"].get("teacher") == teacher_identity(trained):
                return labels, made
    return None, None


def pool_labels(run, labels, split, before):
    """Writes pool.json into the folder of labels: where human labels are few, the teacher alone is worse than
    a regression on the match features. By RUN's rows that 02 held out, none where the teacher is clearly
    better there, and by impressions for languages without labels; without such rows the one of `before`, of
    pool_before(), where the features are there. split: of in_hash_split, 02's."""
    rows, _ = read_labelled(run, labels.name)
    held_out, names = in_hash_split(rows["key"], **split), match_names(run / "features" / "labelled.parquet")
    pool = before and read_pool(before)
    if held_out.any():
        earlier = pool.languages if pool else ()
        pool = fit_pool(rows, held_out, names)
        summary.describe_pool(pool, held_out.sum(), len(set(rows["key"][held_out])))
        if pool:
            pool, times_as_far = pool.widened(*PairFiles(run).sample(labels), earlier)
            summary.describe_languages(pool, times_as_far)
    elif not pool:
        print("not pooled: no training query was held out to weigh the teacher by")
    elif lacking := [name for name in pool.names if name not in names]:
        print(f"not pooled: the pool of {before} reads {' '.join(lacking)}, which these tables lack")
        pool = None
    else:
        print(f"pooled as in {before}")
    if pool:
        write_pool(pool, labels)


def label_by_teacher(settings, accelerator, dtype, hardware):
    """RUN/labels, of one teacher. dtype, hardware: of the computation (start_processes)."""
    # 1. What is inherited, and whether anything is left to do
    run, is_main = settings.run, accelerator.is_main_process
    features, folder = run / "features", settings.teacher or run / "teacher"
    read, about, model = require_teacher(run, folder, settings.model)
    inputs = {"features": read["features"]["identity"], "text": read["teacher"]["text"]}
    inputs |= {"teacher": teacher_identity(read["teacher"]), "precision": hardware}
    before, _lock = pool_before(settings, read["teacher"])
    inputs |= {"pool": fingerprint(before / POOL)} if before else {}
    stage, work = start_stage(accelerator, run / "labels", settings, inputs)
    if work is None:
        return

    # 2. The text of the pairs, the shards left to label, and labels that are known
    text, paths = open_text(folder, settings, about, model), shard_paths(settings)
    target = {path: work / path.relative_to(features) for path in paths}
    unwritten = of_main({path.stem for path in paths if not target[path].exists()})
    own, decided_by = work / "known", what_decides(read["teacher"], hardware, settings.merge)
    earlier, _locks = tables_of(settings.known, run, decided_by) if is_main else (None, None)
    known = KnownLabels(of_main(earlier), own, decided_by, unwritten)
    todo = of_main([path for path in paths if path.stem in unwritten or path.stem not in known.covered])

    # 3. The teacher, LoRA merged; a day on which no pair is new needs none
    [(_, rows)] = tokenized_shards(features, text, paths[:1])
    if settings.teacher is None:
        require_trained_on(run, read["teacher"], rows)
    summary.describe_labelling(about, paths, todo, hardware, accelerator)

    @functools.cache
    def teacher():
        loaded, sample = load_teacher(folder, settings, accelerator.device, dtype), rows[:CHECKED_ROWS]
        return compile_layers(loaded, sample, text.tokenizer.pad_token_id, settings, accelerator)

    # 4. Soft labels, one output shard an input shard
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    shards = ((target[path], ids) for path, ids in tokenized_shards(features, text, mine, {paths[0]: rows}))
    with progress_bar(total=count_rows(mine), unit=" rows", disable=not is_main) as bar:
        label_shards(teacher, shards, known, text, settings, bar)
    wait_for_all(accelerator, target.values())

    # 5. Pooled with what the match features say (ours); summary
    if is_main:
        if settings.pool == "auto":
            pool_labels(run, work, read["teacher"]["held_out"], before)
        counts = summary.describe_labels([*target.values()], merge_own(own, work / FILE))
        rows_of = {"impressions": count_rows(paths[1:]), "labelled": len(rows)}
        whose = {"model": about["model"], "folder": settings.teacher and str(folder.resolve())}
        stage.finish(["known"], labels=counts, teacher=whose, rows=rows_of)
    accelerator.wait_for_everyone()


def average_labels(settings, accelerator):
    """--mean: RUN/labels are the mean of what the students of several runs learn, over the same features:
    several teachers err less than one (deep ensembles: Lakshminarayanan et al., 2017)."""
    run, runs, impressions = settings.run, settings.mean, not settings.only_labelled
    if idle := typed(settings, *OF_A_TEACHER):
        refuse(f"--mean asks no teacher: {idle} would do nothing")
    if len({each.resolve() for each in (run, *runs)}) <= len(runs):
        raise Stop("--mean: a run stands twice, or is --run, whose labels it would replace; another --run")
    read = [require_pairs(each, ["*.parquet", POOL], impressions=impressions) for each in runs]
    features = require(run / "features", ["*.parquet"])
    for each, made in zip(runs, read):
        if made["features"]["identity"] != features["identity"]:
            raise Stop(f"--mean {each}: of other features than {run}")
    averaged = sorted(made["labels"]["identity"] for made in read)
    inputs = {"features": features["identity"], "mean of": averaged}
    stage, work = start_stage(accelerator, run / "labels", settings, inputs)
    if work and accelerator.is_main_process:
        paths, files = shard_paths(settings), [PairFiles(each) for each in runs]
        target = {path: work / path.relative_to(run / "features") for path in paths}
        whose = f"the mean of {len(runs)} runs"
        for path in progress_bar(iterable=paths, desc="mean", unit=" shards"):
            name = path.relative_to(run / "features")
            labels = [of_run.soft_labels(name, of_run.read(path)) for of_run in files]
            labels = np.mean(labels, axis=0, dtype=np.float64)  # in fp32 it hangs on their order
            counts = {"rows": len(labels), "passes": 0, "looked_up": {whose: len(labels)}}
            write_labels(target[path], labels.astype(np.float32), counts)
        counts = count_labels(target.values())
        rows_of = {"impressions": count_rows(paths[1:]), "labelled": count_rows(paths[:1])}
        stage.finish(labels=counts, teacher={"model": whose, "folder": None}, rows=rows_of)
    accelerator.wait_for_everyone()


def main(argv=None):
    settings = parse(PRESETS, argv, __doc__)
    models.quiet_libraries()
    processes = start_processes(settings)
    if settings.mean:
        average_labels(settings, processes[0])
    else:
        label_by_teacher(settings, *processes)


if __name__ == "__main__":
    run_main(main)
