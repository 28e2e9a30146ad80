"""Stage 04: soft labels -> the student, a feed-forward network on precomputed features, cheap enough to serve.

Paper: "Distill LLM into Servable Student Model". The student learns the teacher's probabilities of the five levels on unlabelled impressions
(knowledge distillation). The paper does not give the loss; ours is Hinton et al., 2015: KL divergence at temperature T, times T squared.

Reads   RUN/features/, RUN/labels/ (not with --labels human)
Writes  RUN/student/    model.safetensors, features.json (feature spec with normalisation), training_log.jsonl, stage.json

Toy     python 04_train_student.py
        python 04_train_student.py --labels human          the same network on the human labels alone, into RUN/student_human_labels/
        python 04_train_student.py --rows 6000 --name student_6000
Paper   python 04_train_student.py --preset paper --run /runs/search
"""

import argparse
import json
import math
import queue
import threading

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn
from tqdm import tqdm

import common
from common import C, MATCH_FEATURES, Stage, Stop, Student, StudentInputs

PRESETS = {
    "toy": dict(hidden="256,128", category_dim=8, dropout=0.1, epochs=20, batch_rows=256, lr=1e-3, weight_decay=1e-4, warmup=0.05,
                temperature=1.0, window=4, checkpoint_steps=500),
    "paper": dict(
        hidden="1024,512,256", category_dim=32, dropout=0.1,  # not stated in the paper; our choice
        epochs=3, batch_rows=4_096, lr=1e-3, weight_decay=1e-5, warmup=0.01,  # not stated in the paper; our choice
        temperature=1.0,  # not stated in the paper; at 1 the gradient is that of soft cross-entropy
        window=8,  # our choice
        checkpoint_steps=2_000,  # our choice
    ),
}
HELD_OUT = 0.05  # share of the queries that choose the epoch
HELD_OUT_ROWS = 100_000  # about, at most


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--labels", choices=("teacher", "human"), default="teacher", help="learn soft labels of impressions (default), or the human training labels")
    p.add_argument("--name", metavar="NAME", help="output folder below RUN (default: student, or student_human_labels)")
    p.add_argument("--rows", type=int, metavar="N", help="train on a random N impressions (default: all)")
    p.add_argument("--languages", metavar="A,B,…", help="train on impressions of queries in these languages only (default: all)")
    p.add_argument("--hidden", metavar="A,B,…", help="widths of the hidden layers")
    p.add_argument("--category-dim", type=int, metavar="D", help="size of the embedding of a categorical column")
    p.add_argument("--dropout", type=float, metavar="P")
    p.add_argument("--epochs", type=int, metavar="N")
    p.add_argument("--batch-rows", type=int, metavar="B")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--weight-decay", type=float)
    p.add_argument("--warmup", type=float, metavar="SHARE", help="share of training with rising learning rate; then it falls linearly to 0")
    p.add_argument("--temperature", type=float, metavar="T", help="softens teacher and student alike; 1 leaves the probabilities as they are")
    p.add_argument("--window", type=int, metavar="N", help="shards shuffled together; their rows are held in memory")
    p.add_argument("--checkpoint-steps", type=int, metavar="N", help="steps between two checkpoints to resume from")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--seed", type=int, default=0)
    args = common.parse(p, PRESETS, argv)
    args.name = args.name or ("student" if args.labels == "teacher" else "student_human_labels")
    if not args.name.startswith("student"):
        p.error("--name must begin with 'student': stage 05 finds students by it")
    args.hidden = [int(w) for w in args.hidden.split(",")]
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def soften(p, temperature):
    """Probabilities [B, C] at temperature T: p^(1/T), normalised. It is what a softmax over the logits divided by T gives."""
    return (p.log() / temperature).softmax(dim=1)


def distillation_loss(logits, soft_labels, temperature=1.0):
    """KL(teacher || student), mean over rows: student logits [B, C], teacher probabilities [B, C] -> scalar.

    Both are softened by the temperature T, and the loss is multiplied by T^2 so that its gradient keeps its size (Hinton et al., 2015,
    section 2). With one-hot labels and T = 1 this is cross-entropy."""
    target = soft_labels if temperature == 1 else soften(soft_labels, temperature)
    log_student = (logits / temperature).log_softmax(dim=1)
    return temperature**2 * (torch.special.xlogy(target, target) - target * log_student).sum(dim=1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Rows: (query_index, pin_index, match features [F], target [C]) from pairs of feature and label shards


class Rows:
    """Streams training rows. A shard is read whole, `window` shards at a time: memory does not grow with their number.

    Shuffling: shards in random order, rows shuffled inside a window. Two rows of shards in different windows never meet in a batch; with
    impressions in log order that costs little as long as a window spans many queries."""

    def __init__(self, args, features, labels):
        self.args, self.features = args, features
        queries = pq.read_table(features / "queries.parquet", columns=["query_id", "language"])
        self.held_out_query = common.in_validation(queries["query_id"].to_pylist(), HELD_OUT if args.labels == "teacher" else 0.1, f"student:{args.seed}")
        wanted = np.array(queries["language"].to_pylist(), dtype=object)
        self.wanted_query = np.isin(wanted, args.languages.split(",")) if args.languages else np.ones(len(wanted), dtype=bool)
        if args.labels == "human":
            self.shards = [(features / "labelled.parquet", None)]
        else:
            self.shards = [(p, labels / "impressions" / p.name) for p in sorted((features / "impressions").glob("part-*.parquet"))]
        self.keep, self.kept, self.read_rows = None, None, 0

    def read(self, i):
        """Shard i as dict of arrays: query, pin [N] int64, match [N, F], target [N, C] float32, and training/held-out masks."""
        path, label_path = self.shards[i]
        table = pq.read_table(path)
        query = table["query_index"].to_numpy().astype(np.int64)
        match = np.stack([table[name].to_numpy() for name in MATCH_FEATURES], 1)
        if label_path is None:
            target = np.eye(C, dtype=np.float32)[table["label"].to_numpy() - 1]
            use = np.array(table["split"].to_pylist()) == "train"
        else:
            labels = pq.read_table(label_path)
            if len(labels) != len(table):
                raise Stop(f"{label_path} has {len(labels):,} rows, {path} {len(table):,}: run 03_label.py --overwrite")
            target = np.stack([labels[f"p{level}"].to_numpy() for level in range(1, C + 1)], 1)
            use = np.ones(len(table), dtype=bool)
        use &= self.wanted_query[query]
        held = self.held_out_query[query]
        return {"query": query, "pin": table["pin_index"].to_numpy().astype(np.int64), "match": match, "target": target, "train": use & ~held, "held": use & held}

    def survey(self):
        """One pass: counts training rows a shard, deals --rows to shards, finds the mean and standard deviation of the match features
        and takes the held-out rows, of every shard at most its share of HELD_OUT_ROWS: logs change over time. Returns mean, std [F] and the held-out rows."""
        counts, total, squares, held, share = [], 0.0, 0.0, [], math.ceil(HELD_OUT_ROWS / max(len(self.shards), 1))
        for i in tqdm(range(len(self.shards)), desc="survey", unit=" shards"):
            shard = self.read(i)
            rows = shard["match"][shard["train"]].astype(np.float64)
            counts.append(len(rows))
            total, squares = total + rows.sum(0), squares + (rows**2).sum(0)
            taken = np.flatnonzero(shard["held"])[:share]
            held.append({k: shard[k][taken] for k in ("query", "pin", "match", "target")})
        n = sum(counts)
        if n == 0:
            raise Stop(f"no rows to train on in {self.features}" + (f" for --languages {self.args.languages}" if self.args.languages else ""))
        rng = np.random.default_rng([self.args.seed, 1])
        self.keep = counts if not self.args.rows or self.args.rows >= n else rng.multivariate_hypergeometric(counts, self.args.rows, method="marginals").tolist()
        mean = total / n
        std = np.sqrt(np.maximum(squares / n - mean**2, 0))
        return mean.tolist(), np.where(std > 1e-6, std, 1.0).tolist(), {k: np.concatenate([h[k] for h in held]) for k in held[0]}

    @property
    def total(self):
        return sum(self.keep)

    def training_rows(self, i):
        """The training rows of shard i, --rows applied."""
        shard = self.read(i)
        rows = np.flatnonzero(shard["train"])
        if self.keep[i] < len(rows):
            rows = np.sort(np.random.default_rng([self.args.seed, 2, i]).permutation(rows)[:self.keep[i]])
        return {k: shard[k][rows] for k in ("query", "pin", "match", "target")}

    def read_window(self, window):
        """The training rows of the shards `window`, one after another. A column of the shards is let go as soon as it is joined."""
        parts = [self.training_rows(i) for i in window]
        return {k: np.concatenate([part.pop(k) for part in parts]) for k in tuple(parts[0])}

    def batches(self, epoch, skip=0):
        """One epoch's batches as dicts of arrays, without the first `skip`."""
        args, rng = self.args, np.random.default_rng([self.args.seed, 3, epoch])
        order = rng.permutation(len(self.shards))
        for start in range(0, len(order), args.window):
            window = order[start:start + args.window]
            n = sum(self.keep[i] for i in window)
            shuffled = rng.permutation(n)
            steps = math.ceil(n / args.batch_rows)
            if skip >= steps:
                skip -= steps
                continue
            rows = None  # the window before: not held while this one is read
            rows = self.read_window(window)
            for step in range(skip, steps):
                at = shuffled[step * args.batch_rows:(step + 1) * args.batch_rows]
                yield {k: v[at] for k, v in rows.items()}
            skip = 0


def ahead(batches, prepare, depth=4):
    """prepare(batch) for each batch, done in a thread `depth` batches ahead of the training step (NumPy's gathers release the interpreter lock)."""
    todo, stop = queue.Queue(depth), threading.Event()

    def work():
        try:
            for batch in batches:
                if stop.is_set():
                    return
                todo.put((prepare(batch), None))
            todo.put((None, None))
        except BaseException as e:  # handed to the training thread
            todo.put((None, e))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            batch, error = todo.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        stop.set()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def tensors(inputs, batch, device):
    """A batch of row numbers -> embeddings [B, sum of D], categories [B, K], match features [B, F], target [B, C]."""
    embeddings, categories = inputs.gather(batch["query"], batch["pin"])
    return tuple(t.to(device, non_blocking=True) for t in (embeddings, categories, torch.from_numpy(batch["match"]), torch.from_numpy(batch["target"])))


@torch.inference_mode()
def held_out_scores(student, inputs, held, device, chunk=16_384):
    """KL(target || student) at temperature 1 and agreement of the most probable level, over the held-out rows."""
    student.eval()
    loss = right = 0.0
    for start in range(0, len(held["query"]), chunk):
        embeddings, categories, match, target = tensors(inputs, {k: v[start:start + chunk] for k, v in held.items()}, device)
        logits = student(embeddings, categories, match)
        loss += distillation_loss(logits, target).item() * len(target)
        right += (logits.argmax(1) == target.argmax(1)).sum().item()
    return loss / len(held["query"]), right / len(held["query"])


def train(student, rows, inputs, held, args, device, folder):
    """The training loop; leaves the weights of the epoch with the lowest held-out KL in `student`. Returns its log and best epoch."""
    optimiser = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    position = {"epoch": 0, "step": 0, "rows": 0, "best": None, "log": []}
    if (folder / "checkpoint.safetensors").exists():
        position = common.load_checkpoint(folder / "checkpoint.safetensors", student, optimiser)
        print(f"continuing in epoch {position['epoch'] + 1}, after {position['rows']:,} rows")
    planned = rows.total * args.epochs
    bar = tqdm(total=planned, initial=position["rows"], desc="student", unit=" rows", unit_scale=True)
    for epoch in range(position["epoch"], args.epochs):
        loss_sum = loss_rows = 0
        for embeddings, categories, match, target in ahead(rows.batches(epoch, position["step"]), lambda b: tensors(inputs, b, device)):
            # Every step draws its dropout from a seed of its own, so that a resumed run equals an undisturbed one.
            torch.manual_seed((args.seed * 1_009 + epoch) * 10_000_019 + position["step"])
            student.train()
            loss = distillation_loss(student(embeddings, categories, match), target, args.temperature)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = args.lr * common.lr_factor(position["rows"] / planned, args.warmup)
            optimiser.step()
            position["step"] += 1
            position["rows"] += len(target)
            bar.update(len(target))
            if position["step"] % 50 == 0:
                loss_sum, loss_rows = loss_sum + loss.item(), loss_rows + 1
                if not math.isfinite(loss_sum):
                    raise Stop(f"the loss is not finite in epoch {epoch + 1}, step {position['step']}: lower --lr")
                bar.set_postfix(loss=f"{loss_sum / loss_rows:.4f}")
            if position["step"] % args.checkpoint_steps == 0:
                common.save_checkpoint(folder / "checkpoint.safetensors", student, optimiser, position)
        kl, agreement = held_out_scores(student, inputs, held, device)
        if not math.isfinite(kl):
            raise Stop(f"the held-out loss is not finite after epoch {epoch + 1}: lower --lr")
        position["log"].append({"epoch": epoch + 1, "rows": position["rows"], "held_out_kl": round(kl, 6), "held_out_agreement": round(agreement, 6)})
        if position["best"] is None or kl < position["best"]["kl"]:
            position["best"] = {"epoch": epoch + 1, "kl": kl, "agreement": agreement}
            common.save_checkpoint(folder / "best.safetensors", student, None, position["best"])
        position |= {"epoch": epoch + 1, "step": 0}
        common.save_checkpoint(folder / "checkpoint.safetensors", student, optimiser, position)
    bar.close()
    common.load_checkpoint(folder / "best.safetensors", student)
    return position


def main(argv=None):
    args = parse_args(argv)
    device = common.pick_device(args.device)
    features, labels, folder = args.run / "features", args.run / "labels", args.run / args.name

    # 1. What is inherited
    made = common.need(features, f"01_build_features.py --run {args.run}")
    inherited = {"features": made["identity"]}
    if args.labels == "teacher":
        labelled = common.need(labels, f"03_label.py --run {args.run}")
        if labelled["inputs"]["features"] != made["identity"]:
            raise Stop(f"{labels} was made from other features than {features} holds now: run 03_label.py --overwrite")
        if labelled["arguments"].get("only_labelled"):
            raise Stop(f"{labels} has no impressions (made with --only-labelled): make them with: python 03_label.py --run {args.run} --overwrite")
        inherited["labels"] = labelled["identity"]
    stage = Stage(folder, args, inherited)
    if stage.done:
        return

    # 2. Rows and inputs
    rows = Rows(args, features, labels)
    mean, std, held = rows.survey()
    if not len(held["query"]):
        raise Stop(f"no query of {features} falls into the held-out {HELD_OUT:.0%}: more queries are needed")
    inputs = StudentInputs(features).to(device)
    spec = {"embeddings": inputs.dims, "categories": inputs.categories, "category_dim": args.category_dim, "match": list(MATCH_FEATURES),
            "mean": mean, "std": std, "hidden": args.hidden, "dropout": args.dropout}

    # 3. The network
    torch.manual_seed(args.seed)
    student = Student(spec).to(device)
    print(f"{'soft labels of the teacher' if args.labels == 'teacher' else 'human labels'}: {rows.total:,} rows, {len(held['query']):,} held out; {device}")
    print("inputs: " + ", ".join(f"{name} {dim}" for name, dim in inputs.dims.items()) +
          f", {len(inputs.categories)} categories x {args.category_dim}, {len(MATCH_FEATURES)} match features; "
          f"{sum(p.numel() for p in student.parameters()) / 1e3:,.0f} k parameters")

    # 4. Distillation
    position = train(student, rows, inputs, held, args, device, folder)

    # 5. Save
    student.save(folder)
    with common.atomic(folder / "training_log.jsonl") as tmp:
        tmp.write_text("".join(json.dumps(line) + "\n" for line in position["log"]))
    best = position["best"]
    print(f"kept epoch {best['epoch']}: held-out KL {best['kl']:.4f}, same most probable level {100 * best['agreement']:.1f} %")
    stage.finish(rows={"train": rows.total, "held_out": len(held["query"])}, best=best)
    for name in ("checkpoint.safetensors", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    common.run(main)
