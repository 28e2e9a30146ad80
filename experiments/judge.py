"""The teacher as judge: result lists of an experiment, labelled by a run's teacher instead of by people.

Wang et al., 2025 (arXiv 2509.03764). Where people have labelled the lists' tops of some queries, the figures
are corrected by them (experiments/estimates.py). Beside a result stands how far the judge agrees with people.

    python experiments/judge.py --run outputs/toy --results control=bm25.run treatment=student.csv --top 10
    python experiments/judge.py --run RUN --results a=a.parquet b=b.parquet --strata interest --want 0.01

Reads   RUN/features, RUN/teacher, RUN/labels; result lists: a TREC run (.run), or a table (Parquet, CSV, TSV,
        JSONL) with query_id or query, pin_id, and rank or score
Writes  RUN/judged/NAME/    pairs.parquet (every pair, its rank in each list, p1 … p5), metrics.json,
        differences.png
"""

import functools
import importlib
import json
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import estimates  # noqa: E402
from experiments.comparison import plot_intervals  # noqa: E402
from experiments.lists import Lists, strata_of  # noqa: E402
from lib.inputs.inherited import require_pairs, require_teacher, whence  # noqa: E402
from lib.inputs.known import KnownLabels, tables_of  # noqa: E402
from lib.inputs.pairs import COLUMNS, count_labels, count_rows, read_labelled, read_labels  # noqa: E402
from lib.inputs.rows import tokenized_shards  # noqa: E402
from lib.models import quiet_libraries  # noqa: E402
from lib.stages.files import fingerprint, write_json, write_parquet  # noqa: E402
from lib.stages.hardware import pick_hardware  # noqa: E402
from lib.stages.settings import ROOT, Count, DeviceSettings, NonNegative, parse  # noqa: E402
from lib.stages.stage import Stage  # noqa: E402
from lib.stages.terminal import Stop, progress_bar, run_main  # noqa: E402

stage_03 = importlib.import_module("03_label")
METRICS = {"ndcg": "nDCG@{}", "sdcg": "scaled DCG@{}", "precision": "precision@{}"}
VALUE = "{value:+.4f} [{low:+.4f}, {high:+.4f}]"
CORRECTED = f"; corrected {VALUE} by {{people:,}} queries of people (as {{people_alone:,.0f}} alone)"
DETECTS = "  {}: {queries:,} queries detect {detects:.4f} of nDCG"
WANTED = "; the wanted difference takes {queries_for_want:,.0f}"
FEWEST = 5  # queries: with fewer of people's nothing is corrected, with fewer others people's alone count
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
    for text in results or [""]:
        name, _, path = text.partition("=")
        if not name.isidentifier() or name in files or not Path(path).is_file():
            raise Stop(f"--results {text}: write NAME=FILE: a file that is there, each name once, of letters")
        files[name] = Path(path)
    return files


def label_pairs(settings, pairs, read, about, model, work):
    """The teacher's probabilities [N, C] of N pairs, a table of query and pin, as 03 makes them. settings:
    03's. What the run has labelled is looked up; a kill costs the file of pairs that was at work."""
    features, folder = settings.run / "features", settings.run / "teacher"
    device, dtype, hardware = pick_hardware(settings)
    text, target = stage_03.open_text(folder, settings, about, model), {}
    for number, some in pairs.groupby(pairs.index // SHARD):
        path = work / "work" / f"pairs-{number:05d}.parquet"
        write_parquet(path, {"query_index": some["query"], "pin_index": some["pin"]})
        target[path] = path.with_name(f"labels-{path.name}")
    todo = [path for path in target if not target[path].exists()]
    decided_by = stage_03.what_decides(read["teacher"], hardware, settings.merge)
    earlier, _locks = tables_of((settings.run,), settings.run, decided_by)
    unwritten = {target[path].stem for path in todo}
    known = KnownLabels(earlier, work / "work" / "known", decided_by, unwritten)
    teacher = functools.cache(lambda: stage_03.load_teacher(folder, settings, device, dtype))
    with progress_bar(total=count_rows(todo), desc="pairs", unit=" rows") as bar:
        shards = ((target[path], ids) for path, ids in tokenized_shards(features, text, todo))
        stage_03.label_shards(teacher, shards, known, text, settings, bar)
    print(f"labels: {whence(count_labels(target.values()))}")
    return np.concatenate([read_labels(path) for path in target.values()])


def compared(judge, people, covered, groups, weight):
    """Means of every list, and difference of two, by metric and group: {"treatment - control": {metric:
    {group: Estimate, "corrected": …}}}. judge, people: of Lists.metrics(); groups: {name: [Q]}."""
    found = {}
    for name, metric in product(judge, METRICS):
        ours, theirs = judge[name][metric], people[name][metric]
        entry = {"corrected": correct(ours, theirs, covered, weight)}
        for group, at in groups.items():
            entry[group] = estimates.mean(ours[at], weight[at])._asdict()
        found.setdefault(name, {})[metric] = entry
    return found


def groups_of(weight, *columns):
    """All queries of some weight [Q], and those of each language and stratum, where there are several: {name:
    [Q]}. columns: their names [Q]."""
    groups = {"all": weight > 0}
    for names in columns:
        different = sorted(set(names[groups["all"]]))
        for name in different if len(different) > 1 else ():
            at = names == name
            is_taken = name == "corrected" or not np.array_equal(groups.get(name, at), at)
            groups[f"{name} (stratum)" if is_taken else name] = at
    return groups


def correct(judge, people, covered, weight):
    """The mean of the judge's values [Q], corrected by people's of the covered queries; people's own where
    the judge has next to no other query; None: people have too few. Queries without weight do not count."""
    there = np.isfinite(judge) & (weight > 0)
    both = covered & there & np.isfinite(people)
    rest = ~covered & there
    if both.sum() < FEWEST:
        return None
    if rest.sum() < FEWEST:
        found, tuned, alone = estimates.mean(people[both], weight[both]), 0.0, int(both.sum())
    else:
        scale = weight / weight[there].mean()
        people, judge = people * scale, judge * scale
        found, tuned, alone = estimates.corrected_mean(people[both], judge[both], judge[rest])
    return {**found._asdict(), "lambda": tuned, "people": int(both.sum()), "people_alone": alone}


def numbers(found):
    """{"queries": 280, "kappa": 0.94, …} -> "queries 280, kappa 0.94, …"."""
    return ", ".join(f"{name} {value:,.4g}" for name, value in found.items())


def say(result):
    """The result on the terminal."""
    print("judge beside people:", numbers(result["agreement"][""]))
    print(f"gain of a pair: {result['gain']}, the nearer to people's:", numbers(result["distance"]))
    is_corrected = True
    for name, metric in product(result["means"], METRICS):
        found = result["means"][name][metric]
        is_corrected &= bool(found["corrected"])
        line = f"  {name:<24} {METRICS[metric].format(result['top']):<15} {VALUE.format(**found['all'])}"
        if found["corrected"]:
            line += CORRECTED.format(**found["corrected"])
        print(line)
    if not is_corrected:
        print(f"the judge's own figures: people have labelled the tops of fewer than {FEWEST} queries")
    for name, found in result["power"].items():
        wanted = WANTED.format(**found) if found["queries_for_want"] else ""
        print(DETECTS.format(name, **found) + wanted)


def main(argv=None):
    # 1. Settings, what is inherited, and the folder
    settings = parse({"toy": Settings()}, argv, __doc__)
    quiet_libraries()
    run = settings.run
    files = named_files(settings.results)
    read, about, model = require_teacher(run, run / "teacher", settings.model)
    labels = require_pairs(run, ["labelled.parquet", "pool.json"])["labels"]
    of_03 = parse(stage_03.PRESETS, labels["command"])  # the flags that the run's labels were made with
    of_03 = replace(of_03, run=run, model=settings.model, device=settings.device)
    inputs = {f"list {name}": fingerprint(path) for name, path in files.items()}
    inputs |= {"labels": labels["identity"], "precision": pick_hardware(of_03)[2]}
    if Path(settings.strata).is_file():
        inputs["strata"] = fingerprint(settings.strata)
    stage = Stage(run / "judged" / settings.name, replace(settings, results=()), inputs)
    if stage.done:
        return

    # 2. The lists, and the teacher's label of every pair
    lists = Lists(files, run, settings.top)
    print(f"{len(files)} lists, {len(lists.queries):,} queries, {len(lists.pairs):,} different pairs")
    strata, weight = strata_of(settings.strata, lists.queries)
    p = label_pairs(of_03, lists.pairs, read, about, model, stage.folder)

    # 3. How far it can be trusted, and what it says
    _, evaluation = read_labelled(run)
    how, distance, agreement = estimates.trust(evaluation)
    people, covered = lists.people(evaluation)
    judge = lists.metrics(*estimates.gains(p, how))
    people = lists.metrics(*estimates.gains(people, how))
    groups = groups_of(weight, lists.queries["language"].to_numpy(), strata)
    result = {"top": settings.top, "gain": how, "distance": distance, "agreement": agreement}
    result["means"] = compared(judge, people, covered, groups, weight)
    options = strata, weight, settings.want, settings.plan
    differences = [name for name in judge if " - " in name]
    result["power"] = {name: estimates.power(judge[name]["ndcg"], *options) for name in differences}

    # 4. Files, and the terminal
    write_parquet(stage.folder / "pairs.parquet", lists.columns() | dict(zip(COLUMNS, p.T)))
    numbers = json.dumps(result, default=vars)  # in which NaN may stand, that is no JSON
    write_json(stage.folder / "metrics.json", json.loads(numbers, parse_constant=lambda name: None))
    panels = {heading.format("K"): {} for heading in METRICS.values()}
    for name, (metric, heading), group in product(differences or judge, METRICS.items(), groups):
        panels[heading.format("K")][f"{name}, {group}"] = result["means"][name][metric][group]
    plot_intervals(stage.folder / "differences.png", panels)
    say(result)
    stage.finish(["work"], rows={"pairs": len(p), "queries": len(lists.queries)})


if __name__ == "__main__":
    run_main(main)
