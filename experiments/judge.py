"""The teacher as judge: result lists of an experiment, labelled by a run's teacher instead of by people.

Wang et al., 2025, "LLM-based Relevance Assessment for Web-Scale Search Evaluation at Pinterest" (arXiv
2509.03764). Where people have labelled the lists' tops of some queries, the figures are corrected by them
(experiments/estimates.py). Beside every result stands how far this judge agrees with people.

    python experiments/judge.py --run outputs/toy --results control=bm25.run treatment=student.csv --top 10
    python experiments/judge.py --run RUN --results a=a.parquet b=b.parquet --strata interest --want 0.01

Reads   RUN/features, RUN/teacher, RUN/labels; result lists: a TREC run (.run), or a table (Parquet, CSV, TSV,
        JSONL) with query_id or query, pin_id, and rank or score
Writes  RUN/judged/NAME/    pairs.parquet (every pair, its rank in each list, p1 … p5), metrics.json,
        differences.png
"""

import importlib
import sys
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import estimates  # noqa: E402
from experiments.lists import Lists, people_on, strata_of  # noqa: E402
from lib.inputs.inherited import require_teacher, teacher_identity  # noqa: E402
from lib.inputs.known import KnownLabels, tables_of  # noqa: E402
from lib.inputs.pairs import COLUMNS, count_labels, count_rows, read_labelled, read_labels  # noqa: E402
from lib.inputs.rows import tokenized_shards  # noqa: E402
from lib.models import quiet_libraries  # noqa: E402
from lib.results.pictures import drawable, picture_file  # noqa: E402
from lib.results.summary import whence  # noqa: E402
from lib.stages.files import fingerprint, write_json, write_parquet  # noqa: E402
from lib.stages.finished import require_finished  # noqa: E402
from lib.stages.hardware import pick_hardware  # noqa: E402
from lib.stages.settings import ROOT, Count, ModelSettings, NonNegative, parse  # noqa: E402
from lib.stages.stage import Stage  # noqa: E402
from lib.stages.terminal import Stop, progress_bar, run_main  # noqa: E402

stage_03 = importlib.import_module("03_label")
METRICS = {"ndcg": "nDCG", "sdcg": "scaled DCG", "precision": "precision"}
FEWEST = 5  # queries of people, or of the judge alone, below which nothing is corrected
SHARD = 8_192  # pairs labelled between two files that survive a kill


@dataclass(frozen=True)
class Settings(ModelSettings):
    """Settings of the judge."""

    run: Path = ROOT / "outputs" / "toy"  # run directory, through stage 03
    results: tuple[str, ...] = ()  # result lists, NAME=FILE; each pair of lists is compared
    name: str = "experiment"  # folder below RUN/judged
    top: Count = 10  # places of a list that count
    strata: str = ""  # a column of `queries`, or a table with query_id or query, stratum, perhaps weight
    want: NonNegative = 0.0  # a difference of interest: how many queries detect it?
    plan: Count = 1_000  # queries to be drawn from the strata next time
    model: str | None = None  # where the model of a LoRA teacher is now (default: where 02 found it)
    merge: bool = True  # as in 03
    long_queries: str | None = None  # as in 03
    batch_tokens: Count = 8_192  # tokens a forward pass, padding included


# ------------------------------------------------------------------------------------------------------------
# Pairs and their labels


def named_files(results):
    """("control=bm25.run", …) -> {name: path}"""
    files = {}
    for text in results:
        name, equals, path = text.partition("=")
        if not equals or not name.isidentifier() or name in files:
            raise Stop(f"--results {text}: write NAME=FILE, each name once, of letters, digits and _")
        if not Path(path).is_file():
            raise Stop(f"--results {text}: no such file")
        files[name] = Path(path)
    if not files:
        raise Stop("--results: give at least one list as NAME=FILE")
    return files


def label_pairs(settings, query, pin, read, about, model, work):
    """The teacher's probabilities [N, C] of N pairs, row numbers of the run's queries and pins. What the run
    has labelled is looked up; a kill costs the file of pairs that was at work."""
    features, folder = settings.run / "features", settings.run / "teacher"
    device, dtype, hardware = pick_hardware(settings)
    text, paths = stage_03.open_text(folder, settings, about, model), []
    for start in range(0, len(query), SHARD):
        some, path = slice(start, start + SHARD), work / "work" / f"pairs-{start // SHARD:05d}.parquet"
        write_parquet(path, {"query_index": query[some], "pin_index": pin[some]})
        paths.append(path)

    def target(path):
        return work / "work" / f"labels-{path.stem}.parquet"

    todo = [path for path in paths if not target(path).exists()]
    decided_by = stage_03.what_decides(read["teacher"], hardware, settings.merge)
    earlier, _locks = tables_of((settings.run,), settings.run, decided_by, print)
    unwritten = {target(path).stem for path in todo}
    known = KnownLabels(earlier, work / "work" / "known", decided_by, unwritten)
    [(_, rows)] = tokenized_shards(features, text, paths[:1])
    sample = rows[: stage_03.CHECKED_ROWS]
    teacher, _ = stage_03.load_teacher(folder, settings, sample, text, device, dtype)
    with progress_bar(total=count_rows(todo), desc="pairs", unit=" rows") as bar:
        shards = ((target(path), ids) for path, ids in tokenized_shards(features, text, todo))
        stage_03.label_shards(teacher, shards, known, text, settings, bar)
    print(f"labels: {whence(count_labels([target(path) for path in paths]))}")
    return np.concatenate([read_labels(target(path)) for path in paths])


# ------------------------------------------------------------------------------------------------------------
# What they say


def compared(judge, people, covered, groups, weight):
    """Means and differences of every list and metric: {"control", or "treatment - control": {metric:
    {group: Estimate, "corrected": …}}}. judge, people: of Lists.metrics(); groups: {name: [Q]}."""
    pairs = [(name,) for name in judge] + [(b, a) for a, b in combinations(judge, 2)]
    found = {}
    for names in pairs:
        entry = found.setdefault(" - ".join(names), {})
        for metric in METRICS:
            ours, theirs = (
                of[names[0]][metric] - (of[names[1]][metric] if len(names) > 1 else 0)
                for of in (judge, people)
            )
            entry[metric] = {g: estimates.mean(ours[at], weight[at])._asdict() for g, at in groups.items()}
            entry[metric]["corrected"] = correct(ours, theirs, covered, weight)
    return found


def correct(judge, people, covered, weight):
    """The mean of the judge's values [Q], corrected by people's of the covered queries; None: too few."""
    scale = weight / weight[np.isfinite(judge)].mean()
    both, rest = covered & np.isfinite(judge) & np.isfinite(people), ~covered & np.isfinite(judge)
    if both.sum() < FEWEST or rest.sum() < FEWEST:
        return None
    people, judge = people * scale, judge * scale
    found, tuned = estimates.corrected_mean(people[both], judge[both], judge[rest])
    alone = estimates.queries_as_good(people[both], found.error)
    return {**found._asdict(), "lambda": tuned, "people": int(both.sum()), "people_alone": alone}


def plot_differences(means, groups, path):
    """Means of every pair of lists (of one list: its values) by group, with intervals; a panel a metric."""
    names = [name for name in means if " - " in name] or list(means)
    with picture_file(path, (10, 0.9 + 0.3 * len(names) * len(groups)), [*groups]) as figure:
        for ax, (metric, heading) in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS.items()):
            labels = [drawable(f"{name}, {group}") for name in names for group in groups]
            found = [means[name][metric][group] for name in names for group in groups]
            value = np.array([m["value"] for m in found])
            reach = np.array([m["high"] - m["value"] for m in found])
            ax.errorbar(value, range(len(value)), xerr=reach, fmt="o", ms=4, capsize=2)
            ax.axvline(0, color="gray", lw=0.8)
            ax.set(yticks=range(len(labels)), yticklabels=labels, xlabel=f"{heading}@K, 95 % interval")
        figure.axes[0].invert_yaxis()


def shown(found):
    """An Estimate in words."""
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def say(result, top):
    """The result on the terminal."""
    overall = result["agreement"][""]
    figures = ", ".join(
        f"{name} {overall[name]:.3f}" for name in ("exact", "within_one", "kappa", "tau", "rho")
    )
    print(f"judge beside people, {overall['pairs']:,} pairs of {overall['queries']:,} queries: {figures}")
    print(f"gain of a pair: {result['gain']}, the nearer to people's (mean distance {result['distance']})")
    for name, entry in result["means"].items():
        for metric, groups in entry.items():
            corrected = groups["corrected"]
            line = f"  {name:<24} {METRICS[metric] + f'@{top}':<15} {shown(groups['all'])}"
            if corrected:
                by = f"by {corrected['people']:,} queries of people (as {corrected['people_alone']:,} alone)"
                line += f"; corrected {shown(corrected)} {by}"
            print(line)
    if not any(groups["corrected"] for entry in result["means"].values() for groups in entry.values()):
        print(
            f"these are the judge's own figures: people have labelled the tops of fewer than {FEWEST} queries"
        )
    for name, entry in result["power"].items():
        line = f"{entry['ndcg']['queries']:,} queries detect {entry['ndcg']['detects']:.4f} of nDCG"
        wanted = entry["ndcg"]["queries_for_want"]
        print(f"  {name}: {line}" + f"; the wanted difference takes {wanted:,}" * bool(wanted))


def main(argv=None):
    # 1. Settings, what is inherited, and the folder
    settings = parse({"toy": Settings()}, argv, __doc__)
    quiet_libraries()
    run, files = settings.run, named_files(settings.results)
    read, about, model = require_teacher(run, run / "teacher", settings.model)
    _lock = require_finished(run / "labels", f"03_label.py --run {run}", ["labelled.parquet", "pool.json"])
    inputs = {f"list {name}": fingerprint(path) for name, path in files.items()}
    inputs |= {"features": read["features"]["identity"], "teacher": teacher_identity(read["teacher"])}
    inputs["precision"] = pick_hardware(settings)[2]
    if Path(settings.strata).is_file():
        inputs["strata"] = fingerprint(settings.strata)
    stage = Stage(run / "judged" / settings.name, replace(settings, results=()), inputs)
    if stage.done:
        return

    # 2. The lists, and the teacher's label of every pair
    lists = Lists(files, run, settings.top)
    print(f"{len(files)} lists, {len(lists.queries):,} queries, {len(lists.query):,} different pairs")
    p = label_pairs(settings, lists.query, lists.pin, read, about, model, stage.folder)

    # 3. How far it can be trusted, and what it says
    _, evaluation = read_labelled(run)
    rows = [evaluation[name] for name in ("label", "teacher", "query_index", "language")]
    how, distance, agreement = estimates.trust(*rows)
    people, covered = people_on(lists, evaluation)
    judge, people = (lists.metrics(*estimates.gains(labels, how)) for labels in (p, people))
    strata, weight = strata_of(settings.strata, lists, run)
    groups = {"all": np.full(len(strata), True)}
    for names in (np.array(lists.language, object), strata):
        groups |= {str(name): names == name for name in sorted(set(names)) if len(set(names)) > 1}
    result = {"top": settings.top, "gain": how, "distance": distance, "agreement": agreement}
    result["means"] = compared(judge, people, covered, groups, weight)
    result["power"] = {}
    for a, b in combinations(judge, 2):
        pair = {metric: judge[b][metric] - judge[a][metric] for metric in METRICS}
        options = strata, weight, settings.want, settings.plan
        result["power"][f"{b} - {a}"] = {metric: estimates.power(x, *options) for metric, x in pair.items()}

    # 4. Files, and the terminal
    write_parquet(stage.folder / "pairs.parquet", {**lists.columns(), **dict(zip(COLUMNS, p.T))})
    write_json(stage.folder / "metrics.json", result)
    plot_differences(result["means"], list(groups), stage.folder / "differences.png")
    say(result, settings.top)
    stage.finish(["work"], rows={"pairs": len(p), "queries": len(lists.queries)})


if __name__ == "__main__":
    run_main(main)
