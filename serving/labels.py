"""People's labels of pairs: a queue, a file a person, how far people agree."""

import csv
import itertools
import re
import threading
from collections import Counter

import numpy as np
from sklearn.metrics import cohen_kappa_score

from common import LEVELS
from lib.stages.files import whole_file
from lib.stages.terminal import Stop
from lib.tables.files import plain_cell
from lib.tables.result_lists import read_columns

COLUMNS = ("query_id", "pin_id", "label", "rater", "note")


class Labels:
    """The queue of pairs, and what people have said of them, in their order: {name: {(query_id, pin_id):
    (level, note)}}, each in a file of its own."""

    def __init__(self, queue, folder, raters):
        self.folder, self.raters, self.lock = folder, raters, threading.Lock()
        table = read_columns(queue, {"pin_id": "id"}).to_pylist() if queue else []
        self.pairs = list(dict.fromkeys((row["query_id"], row["pin_id"]) for row in table))
        self.said = {}
        for path in sorted(folder.glob("labels_*.csv")) if queue else ():
            mine = self.said[path.stem.removeprefix("labels_")] = {}
            for row in read_columns(path, {"pin_id": "id", "label": "text", "note": "text"}).to_pylist():
                label = row.get("label")
                if label and label not in map(str, LEVELS):
                    raise Stop(f"{path}: the label {label!r} of {row['pin_id']!r} is none of 1, 2, 3, 4, 5")
                if label:  # a cell that is empty is no label
                    mine[row["query_id"], row["pin_id"]] = int(label), row.get("note")

    def save(self, name, mine):
        """Writes what a person has said: the file is whole, and on the disk."""
        with whole_file(self.path(name)) as temporary, open(temporary, "w", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerows([COLUMNS, *((*pair, level, name, note) for pair, (level, note) in mine.items())])
        self.said[name] = mine

    def path(self, name):
        """The file of a person. Stop for a name that is none."""
        if not re.fullmatch(r"[\w-]{1,40}", name):
            raise Stop("a name is of letters, digits, _ and -")
        return self.folder / f"labels_{name}.csv"

    def next(self, name, skipped):
        """The next pair of a person that fewer than `raters` people have labelled, or None; how many the
        person has done, and how many are left."""
        self.path(name)
        mine, count = self.said.get(name, {}), Counter(itertools.chain(*self.said.values()))
        left = [pair for pair in self.pairs if pair not in mine and count[pair] < self.raters]
        new = [pair for pair in left if pair not in skipped] or left
        return (new[0] if new else None), len(mine), len(left)

    def add(self, name, pair, level, note):
        """Takes a person's label; Stop for a pair that has one."""
        if pair not in self.pairs:
            raise Stop("this pair is not in the queue")
        note = " ".join(note.replace("\0", " ").split())  # with a NUL the file could not be read again
        with self.lock:
            mine = self.said.get(name, {})
            if pair in mine:
                raise Stop("labelled before")
            self.save(name, mine | {pair: (level, plain_cell(note))})

    def undo(self, name):
        """Takes a person's last label back; returns its pair, or None."""
        with self.lock:
            mine = dict(self.said.get(name, {}))
            if not mine:
                return None
            pair, _ = mine.popitem()
            self.save(name, mine)
            return pair

    def agreement(self):
        """Of all pairs of people on pairs that both have labelled: how many, share of equal labels, quadratic
        weighted kappa (None where it does not exist)."""
        two = []
        for one, other in itertools.combinations([*self.said.values()], 2):
            two += [(one[pair][0], other[pair][0]) for pair in one.keys() & other.keys()]
        a, b = np.array(two).reshape(-1, 2).T
        kappa = cohen_kappa_score(a, b, labels=[*LEVELS], weights="quadratic") if len({*a, *b}) > 1 else None
        return {"pairs": len(two), "exact": float((a == b).mean()) if two else None, "kappa": kappa}
