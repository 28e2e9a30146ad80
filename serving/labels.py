"""People's labels of pairs: a queue, a file a person, how far people agree."""

import csv
import io
import itertools
import os
import re
import threading
from collections import Counter

import numpy as np
from sklearn.metrics import cohen_kappa_score

from common import LEVELS
from lib.stages.files import whole_file
from lib.stages.terminal import Stop
from lib.tables.result_lists import read_columns

COLUMNS = ("query_id", "pin_id", "label", "rater", "note")


class Labels:
    """The queue of pairs, and what people have said of them: {name: {(query_id, pin_id): level}}, each in a
    file of its own."""

    def __init__(self, queue, folder, raters):
        self.folder, self.raters, self.lock, self.pairs = folder, raters, threading.Lock(), []
        if queue:
            table = read_columns(queue, {"pin_id": "id"}).to_pylist()
            self.pairs = list(dict.fromkeys((row["query_id"], row["pin_id"]) for row in table))
        self.said = {}
        for path in sorted(folder.glob("labels_*.csv")) if queue else ():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row.get("label")]
            name = path.stem.removeprefix("labels_")
            self.said[name] = {(row["query_id"], row["pin_id"]): int(row["label"]) for row in rows}

    def path(self, name):
        """The file of a person. Stop for a name that is none."""
        if not re.fullmatch(r"[\w-]{1,40}", name):
            raise Stop("a name is of letters, digits, _ and -")
        return self.folder / f"labels_{name}.csv"

    def next(self, name, skipped):
        """The next pair of a person that fewer than `raters` people have labelled, or None; how many the
        person has done, and how many are left."""
        with self.lock:
            mine = set(self.said.get(name, ()))
            count = Counter(pair for labels in self.said.values() for pair in labels)
        left = [pair for pair in self.pairs if pair not in mine and count[pair] < self.raters]
        new = [pair for pair in left if list(pair) not in skipped] or left
        return (new[0] if new else None), len(mine), len(left)

    def add(self, name, pair, level, note):
        """Appends a person's label; Stop for a pair that has one."""
        path = self.path(name)
        if pair not in self.pairs:
            raise Stop("this pair is not in the queue")
        with self.lock:
            mine = self.said.setdefault(name, {})
            if pair in mine:
                raise Stop("labelled before")
            line = io.StringIO()
            rows = csv.writer(line, lineterminator="\n")
            rows.writerows([COLUMNS] * (not path.exists()) + [(*pair, level, name, " ".join(note.split()))])
            with open(path, "a", encoding="utf-8") as file:
                file.write(line.getvalue())
                file.flush()
                os.fsync(file.fileno())
            mine[pair] = level

    def undo(self, name):
        """Takes a person's last label back; returns its pair, or None."""
        path = self.path(name)
        with self.lock:
            if not self.said.get(name):
                return None
            pair, _ = self.said[name].popitem()
            with open(path, newline="", encoding="utf-8") as file:
                rows = [*csv.reader(file)][:-1]
            with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
            return pair

    def agreement(self):
        """Of all pairs of people on pairs that both have labelled: how many, share of equal labels, quadratic
        weighted kappa (None where it does not exist)."""
        two = []
        with self.lock:
            for one, other in itertools.combinations(self.said.values(), 2):
                two += [(one[pair], other[pair]) for pair in one.keys() & other.keys()]
        a, b = np.array(two).reshape(-1, 2).T
        kappa = cohen_kappa_score(a, b, labels=[*LEVELS], weights="quadratic") if len({*a, *b}) > 1 else None
        return {"pairs": len(two), "exact": float((a == b).mean()) if two else None, "kappa": kappa}
