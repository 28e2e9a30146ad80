"""Which queries are held out: by a hash of their text, the same on every machine, and all rows of a query on
one side."""

import hashlib
import unicodedata
from collections import Counter

import numpy as np

from lib.stages.terminal import Stop

MOST_ROWS = 0.1  # of a training set are held out at most
ENOUGH_EVAL = 50  # evaluation queries
ROUGH_WIDTH = 0.4  # half an interval of AUROC or nDCG, times the root of the queries (MSRD, Commons)


def query_key(text):
    """What makes two queries one: the same text but for its Unicode form, case, and spaces around it. The
    macro query_key of database.py says the same in SQL; sigma has one form here, dotted I becomes i."""
    text = unicodedata.normalize("NFC", text).strip()
    return text.replace("\u0130", "i").lower().replace("ς", "σ")


def hash_position(key, salt):
    """A key's place between 0 and 1, the same on every machine."""
    digest = hashlib.blake2b(f"{salt}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def in_hash_split(keys, share, salt):
    """Boolean mask [B]: does the query (its key) belong to the held-out `share`? By a hash, so that a query
    never stands on both sides."""
    held_out = {key: hash_position(key, salt) < share for key in set(keys)}
    return np.array([held_out[key] for key in keys], dtype=bool)


def held_out(keys, share, salt, rows=None):
    """Which queries are held out, and the {"share", "salt"} by which in_hash_split finds them again. keys
    [B]: of the queries; rows [B]: how many rows each stands for: at most a tenth of them are held out, of a
    small data set perhaps none. Without rows it is the share of the queries alone."""
    if rows is not None:
        rows_of, found = Counter(), 0
        for key, count in zip(keys, rows):
            rows_of[key] += int(count)
        places = [(hash_position(key, salt), n) for key, n in rows_of.items() if n]
        for position, count in sorted(places):
            found += count
            if position >= share or found > MOST_ROWS * rows_of.total():
                share = min(position, share)
                break
    return in_hash_split(keys, share, salt), {"share": share, "salt": salt}


def split_of(keys, given, share, name):
    """Split of each labelled row [B], train or eval: as given, else `share` of the queries go to eval, by a
    hash of the text. keys, given: query_key and split (or None) of each; name: of their table. Prints
    how many these are; returns also {split: rows}."""
    in_eval, _ = held_out(keys, share, "eval")
    split = [known or ("eval" if hashed else "train") for known, hashed in zip(given, in_eval)]
    rows, queries = Counter(split), Counter(side for side, _ in set(zip(split, keys)))
    for side, other in (("train", "smaller"), ("eval", "larger")):
        if not rows[side]:
            advice = f"a {other} --eval-share, or labels of more queries"
            if any(given):
                advice = "leave the column 'split' out, and a share of the queries is held out (--eval-share)"
            raise Stop(f"{name}: no row in the split {side!r}; both are needed: {advice}")
    sides = [f"{rows[side]:,} rows of {queries[side]:,} queries {side}" for side in ("train", "eval")]
    print("labelled:", ", ".join(sides))
    if queries["eval"] < ENOUGH_EVAL:
        width = ROUGH_WIDTH / queries["eval"] ** 0.5
        wide = f"intervals of AUROC and nDCG will be some ±{width:.2f}"
        print(f"only {queries['eval']} evaluation queries: {wide}; --eval-share holds out more")
    return split, dict(rows)
