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

import functools
import importlib
import sys
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import estimates  # noqa: E402
from experiments.comparison import plot_intervals  # noqa: E402
from experiments.lists import Lists, people_on, strata_of  # noqa: E402
from lib.inputs.inherited import require_teacher, teacher_identity, whence  # noqa: E402
from lib.inputs.known import KnownLabels, tables_of  # noqa: E402
from lib.inputs.pairs import COLUMNS, count_labels, count_rows, read_labelled, read_labels  # noqa: E402
from lib.inputs.rows import tokenized_shards  # noqa: E402
from lib.models import quiet_libraries  # noqa: E402
from lib.stages.files import fingerprint, write_json, write_parquet  # noqa: E402
from lib.stages.finished import require_finished  # noqa: E402
from lib.stages.hardware import pick_hardware  # noqa: E402
from lib.stages.settings import ROOT, Count, DeviceSettings, NonNegative, parse  # noqa: E402
from lib.stages.stage import Stage  # noqa: E402
from lib.stages.terminal import Stop, progress_bar, run_main  # noqa: E402

stage_03 = importlib.import_module("03_label")
METRICS = {"ndcg": "nDCG", "sdcg": "scaled DCG", "precision": "precision"}
FEWEST = 5  # queries of people, or of the judge alone, below which nothing is corrected
SHARD = 8_192  # pairs labelled between two files that survive a kill


@dataclass(frozen=True)
class Settings(DeviceSettings):
    """Settings of the judge."""

    run: Path = ROOT / "outputs" / "toy"  # run directory, through stage 03
    results: tuple[str, ...] = ()  # result lists, NAME=FILE; each pair of lists is compared
    name: str = "experiment"  # folder below RUN/judged
    top: Count = 10  # places of a list that count
    strata: str = ""  # a column of `queries`, or a table with query_id or query, stratum, perhaps weight
    want: NonNegative = 0.0  # a difference of interest: how many queries detect it?
    plan: Count = 1_000  # queries to be drawn from the strata next time
    model: str | None = None  # where the model of a LoRA teacher is now (default: where 02 found it)


def named_files(results):
    """("control=bm25.run", …) -> {name: path}"""
    files = {}
    for text in results:
        name, _, path = text.partition("=")
        if not name.isidentifier() or name in files or not Path(path).is_file():
            raise Stop(f"--results {text}: write NAME=FILE: a file that is there, each name once, of letters")
        files[name] = Path(path)
    if not files:
        raise Stop("--results: give at least one list as NAME=FILE")
    return files


def label_pairs(settings, pairs, read, about, model, work):
    """The teacher's probabilities [N, C] of N pairs, a table of query and pin, as 03 makes them. settings:
    03's. What the run has labelled is looked up; a kill costs the file of pairs that was at work."""
    features, folder = settings.run / "features", settings.run / "teacher"
    device, dtype, hardware = pick_hardware(settings)
    text, target = stage_03.open_text(folder, settings, about, model), {}
    for start in range(0, len(pairs), SHARD):
        some = pairs[start : start + SHARD]
        path = work / "work" / f"pairs-{start // SHARD:05d}.parquet"
        write_parquet(path, {"query_index": some["query"], "pin_index": some["pin"]})
        target[path] = path.with_name(f"labels-{path.name}")
    todo = [path for path in target if not target[path].exists()]
    decided_by = stage_03.what_decides(read["teacher"], hardware, settings.merge)
    earlier, _locks = tables_of((settings.run,), settings.run, decided_by, print)
    unwritten = {target[path].stem for path in todo}
    known = KnownLabels(earlier, work / "work" / "known", decided_by, unwritten)
    teacher = functools.cache(lambda: stage_03.load_teacher(folder, settings, device, dtype))
    with progress_bar(total=count_rows(todo), desc="pairs", unit=" rows") as bar:
        shards = ((target[path], ids) for path, ids in tokenized_shards(features, text, todo))
        stage_03.label_shards(teacher, shards, known, text, settings, bar)
    print(f"labels: {whence(count_labels(target.values()))}")
    return np.concatenate([read_labels(path) for path in target.values()])


def compared(judge, people, covered, groups, weight):
    """Means and differences of every list and metric: {"control", or "treatment - control": {metric:
    {group: Estimate, "corrected": …}}}. judge, people: of Lists.metrics(); groups: {name: [Q]}."""
    found = {}
    pairs = [(name,) for name in judge] + [(b, a) for a, b in combinations(judge, 2)]
    for names, metric in product(pairs, METRICS):
        ours, theirs = (values_of(of, metric, *names) for of in (judge, people))
        entry = {}
        for group, at in groups.items():
            entry[group] = estimates.mean(ours[at], weight[at])._asdict()
        entry["corrected"] = correct(ours, theirs, covered, weight)
        found.setdefault(" - ".join(names), {})[metric] = entry
    return found


def values_of(metrics, metric, one, other=None):
    """A metric of a list by query [Q], or one list's less the other's. metrics: of Lists.metrics()."""
    values = metrics[one][metric]
    if other:
        values = values - metrics[other][metric]
    return values.to_numpy()


def groups_of(lists, strata):
    """All queries, and those of each language and stratum where there are several: {name: [Q]}."""
    groups = {"all": np.full(len(strata), True)}
    for names in (lists.queries["language"].to_numpy(), strata):
        different = sorted(set(names))
        for name in different if len(different) > 1 else ():
            groups[str(name)] = names == name
    return groups


def correct(judge, people, covered, weight):
    """The mean of the judge's values [Q], corrected by people's of the covered queries; None: too few."""
    there = np.isfinite(judge)
    both, rest = covered & there & np.isfinite(people), ~covered & there
    if both.sum() < FEWEST or rest.sum() < FEWEST:
        return None
    scale = weight / weight[there].mean()
    people, judge = people * scale, judge * scale
    found, tuned = estimates.corrected_mean(people[both], judge[both], judge[rest])
    alone = estimates.queries_as_good(people[both], found.error)
    return {**found._asdict(), "lambda": tuned, "people": int(both.sum()), "people_alone": alone}


def plot_differences(means, groups, path):
    """Means of every pair of lists (of one list: its values) by group, with intervals; a panel a metric."""
    names, panels = [name for name in means if " - " in name] or list(means), {}
    for metric, heading in METRICS.items():
        rows = panels.setdefault(f"{heading}@K", {})
        for name, group in product(names, groups):
            rows[f"{name}, {group}"] = SimpleNamespace(**means[name][metric][group])
    plot_intervals(path, panels)


def shown(found):
    """An Estimate in words."""
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def say(result, top):
    """The result on the terminal."""
    overall = result["agreement"][""]
    agrees = [f"{name} {overall[name]:.3f}" for name in ("exact", "within_one", "kappa", "tau", "rho")]
    of_pairs = f"{overall['pairs']:,} pairs of {overall['queries']:,} queries"
    print(f"judge beside people, {of_pairs}: {', '.join(agrees)}")
    far = ", ".join(f"{how} {distance:.3f}" for how, distance in result["distance"].items())
    print(f"gain of a pair: {result['gain']}, the nearer to people's (mean distance: {far})")
    few = True
    for name, metric in product(result["means"], METRICS):
        groups = result["means"][name][metric]
        line = f"  {name:<24} {METRICS[metric] + f'@{top}':<15} {shown(groups['all'])}"
        corrected = groups["corrected"]
        if corrected:
            few = False
            by = f"{corrected['people']:,} queries of people (as {corrected['people_alone']:,} alone)"
            line += f"; corrected {shown(corrected)} by {by}"
        print(line)
    if few:
        print(f"the judge's own figures: people have labelled the tops of fewer than {FEWEST} queries")
    for name, found in result["power"].items():
        line = f"  {name}: {found['queries']:,} queries detect {found['detects']:.4f} of nDCG"
        if found["queries_for_want"]:
            line += f"; the wanted difference takes {found['queries_for_want']:,}"
        print(line)


def main(argv=None):
    # 1. Settings, what is inherited, and the folder
    settings = parse({"toy": Settings()}, argv, __doc__)
    quiet_libraries()
    run, files = settings.run, named_files(settings.results)
    read, about, model = require_teacher(run, run / "teacher", settings.model)
    labels = require_finished(run / "labels", f"03_label.py --run {run}", ["labelled.parquet", "pool.json"])
    of_03 = parse(stage_03.PRESETS, labels["command"])  # the flags that the run's labels were made with
    of_03 = replace(of_03, run=run, model=settings.model, device=settings.device)
    inputs = {f"list {name}": fingerprint(path) for name, path in files.items()}
    inputs |= {"features": read["features"]["identity"], "teacher": teacher_identity(read["teacher"])}
    inputs["precision"] = pick_hardware(of_03)[2]
    if Path(settings.strata).is_file():
        inputs["strata"] = fingerprint(settings.strata)
    stage = Stage(run / "judged" / settings.name, replace(settings, results=()), inputs)
    if stage.done:
        return

    # 2. The lists, and the teacher's label of every pair
    lists = Lists(files, run, settings.top)
    print(f"{len(files)} lists, {len(lists.queries):,} queries, {len(lists.pairs):,} different pairs")
    p = label_pairs(of_03, lists.pairs, read, about, model, stage.folder)

    # 3. How far it can be trusted, and what it says
    _, evaluation = read_labelled(run)
    columns = "label", "teacher", "query_index", "language"
    how, distance, agreement = estimates.trust(*(evaluation[name] for name in columns))
    people, covered = people_on(lists, evaluation)
    judge = lists.metrics(*estimates.gains(p, how))
    people = lists.metrics(*estimates.gains(people, how))
    strata, weight = strata_of(settings.strata, lists)
    groups = groups_of(lists, strata)
    result = {
        "top": settings.top,
        "gain": how,
        "distance": distance,
        "agreement": agreement,
        "means": compared(judge, people, covered, groups, weight),
        "power": {},
    }
    for a, b in combinations(judge, 2):  # of nDCG
        options = strata, weight, settings.want, settings.plan
        result["power"][f"{b} - {a}"] = estimates.power(values_of(judge, "ndcg", b, a), *options)

    # 4. Files, and the terminal
    write_parquet(stage.folder / "pairs.parquet", {**lists.columns(), **dict(zip(COLUMNS, p.T))})
    write_json(stage.folder / "metrics.json", result)
    plot_differences(result["means"], list(groups), stage.folder / "differences.png")
    say(result, settings.top)
    stage.finish(["work"], rows={"pairs": len(p), "queries": len(lists.queries)})


if __name__ == "__main__":
    run_main(main)
