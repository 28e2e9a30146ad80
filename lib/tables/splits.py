"""Which queries are held out: by a hash of their text, the same on every machine, and all rows of a query on
one side."""

import hashlib
import unicodedata

import numpy as np

MOST_ROWS = 0.1  # of a training set are held out at most


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


def hash_split(keys, rows, share, salt):
    """{"share", "salt"} of in_hash_split that hold out about `share` of the queries, but at most a tenth of
    the rows: of a small data set none. keys [Q]: of the queries; rows [Q]: how many each has."""
    rows_of = {}
    for key, count in zip(keys, rows):
        rows_of[key] = rows_of.get(key, 0) + int(count)
    held_out, most = 0, MOST_ROWS * sum(rows_of.values())
    for position, count in sorted((hash_position(key, salt), n) for key, n in rows_of.items() if n):
        held_out += count
        if position >= share or held_out > most:
            return {"share": min(position, share), "salt": salt}
    return {"share": share, "salt": salt}
