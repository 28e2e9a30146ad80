"""The run that a run builds on (01 --base): a day is a run of its own, on the statistics of another one, so
that a student trained there reads these features. Captions, embeddings and labels are looked up by content,
which changes no result."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.inputs.inherited import require
from lib.inputs.match import MATCH_FEATURES, match_names
from lib.inputs.student_inputs import TABLES, frequent_values, further_columns, read_column
from lib.levels import side_of
from lib.stages.files import link
from lib.stages.finished import read_about
from lib.stages.settings import refuse
from lib.stages.stage import changes_between
from lib.stages.streams import new_matrix
from lib.stages.terminal import Stop
from lib.tables.embeddings import NAMES, open_vectors

READS = ("bm25.parquet", "graph.parquet", "pins.parquet", "queries.parquet", "*_text_embedding.npy")
# Flags and inputs of stage 01 that decide what a feature means, beside the statistics; the user's own
# embeddings that stand for ours.
FLAGS = {"--caption-tokens", "--text-tokens", "--top-tokens", "--graph-dim"}
INPUTS = {"caption model", "text encoder", "precision", "rules"}
OWN = {f"embeddings/{name}" for name in NAMES}
DRIFT_LIMIT = 0.1  # our choice; beyond it the statistics should be fitted again


def bases_of(run):
    """The run that RUN's features build on, that run's own, and so on; the last may be there no more."""
    found = []
    while (run / "features" / "stage.json").exists():
        base = read_about(run / "features").get("base")
        if base is None or Path(base) in found:
            break
        run = Path(base)
        found.append(run)
    return found


def open_base(settings, inputs):
    """The Base that --base names, or None; its features become one of the `inputs`. Stop, naming what
    differs, if ours would mean something else."""
    if settings.base is None:
        return None
    run = settings.base.resolve()
    if run == settings.run.resolve():
        refuse(f"--base {settings.base}: a run cannot build on itself")
    about = require(run / "features", READS)
    before = about["inputs"]
    for earlier in bases_of(run):  # a day without pictures says nothing of a captioner
        before = read_about(earlier / "features", damaged_is_fine=True).get("inputs", {}) | before
    both, now = before.keys() & inputs.keys(), {"arguments": vars(settings), "inputs": inputs}
    changes = changes_between({**about, "inputs": before}, now)
    meant = FLAGS | (INPUTS & both) | (OWN - both)
    if changes := "; ".join(why for what, why in changes.items() if what in meant):
        raise Stop(f"{run}: its features mean something else ({changes}); without --base all is fitted again")
    for path in sorted((run / "features").glob("*_embedding.npy")):
        name = path.name.removesuffix("_embedding.npy")
        if f"embeddings/{name}" in inputs:
            source = settings.data / "embeddings" / f"{name}.npy"
            ours, theirs = open_vectors(source).shape[1], np.load(path, mmap_mode="r").shape[1]
            if ours != theirs:
                raise Stop(f"{source}: {ours} wide, that of {run} is {theirs} wide")
    inputs["base"] = about["identity"]
    return Base(run, about)


class Base:
    """The features that new ones build on, locked as long as `about`, their stage.json, lives. graph:
    graph.parquet (Arrow), or None; drift: {what: how far the new tables are from the base, as a share}."""

    def __init__(self, run, about):
        self.run, self.folder, self.about, self.drift = run, run / "features", about, {}
        has_graph = "graph.parquet" in about["outputs"]
        self.graph = pq.read_table(self.folder / "graph.parquet") if has_graph else None

    def bring(self, name, out):
        """The base's file, byte for byte, in the new folder; returns its path."""
        link(self.folder / name, out / name)
        return out / name

    def known_texts(self, side, texts, out):
        """Text embeddings of the base [M, D], and for each text of the new table [N] its row there, or -1.
        texts: path of a table -> stream of lists of texts."""
        here = digests(texts(out / TABLES[side]))
        there = digests(texts(self.folder / TABLES[side]))
        vectors = np.load(self.folder / f"{side}_text_embedding.npy", mmap_mode="r")
        return vectors, pc.index_in(here, there).fill_null(-1).to_numpy()

    def complete(self, out, numbers):
        """Says what a student of the base reads and the new tables lack: a column unknown for every row, an
        embedding of zeros. numbers: names of the numbers of pairs."""
        lacking, rows = [], {}
        for side, table in TABLES.items():
            ours, theirs = (further_columns(folder / table, side) for folder in (out, self.folder))
            rows[side] = pq.read_metadata(out / table).num_rows
            for name, kind in theirs.items():
                if name not in ours or (kind == "number" and ours[name] == "category"):
                    lacking.append(f"{side}_{name}")
                elif kind == "category":
                    # Digits alone are numbers in CSV; a student reads them as the texts that they were.
                    now, then = (read_column(folder / table, name) for folder in (out, self.folder))
                    now = now.cast(then.type)
                    known = pa.array(frequent_values(then), then.type)  # to a student of the base
                    was, is_now = (pc.mean(pc.is_in(values, known)).as_py() for values in (then, now))
                    self.drift[f"unknown values of {side}_{name}"] = max(was - is_now, 0.0)
        names = match_names(self.folder / "labelled.parquet")
        lacking += [name for name in names if name not in MATCH_FEATURES and name not in numbers]
        for path in sorted(self.folder.glob("*_embedding.npy")):
            vectors, name = np.load(path, mmap_mode="r"), path.name.removesuffix("_embedding.npy")
            if not (out / path.name).exists():
                lacking.append(name)
                shape = rows[side_of(name)], vectors.shape[1]
                with new_matrix(out / path.name, *shape, vectors.dtype):
                    pass
        if lacking:
            print(f"a student of {self.run} reads, and these tables lack: {', '.join(lacking)}")

    def note_boards(self, raw, titles):
        """Drift of the graph. titles: those that an SVD made today would take (Arrow)."""
        known, today = (pa.table({"text": column}) for column in (self.graph["board_title"], titles))
        missed = "FILTER (text IN (FROM today) AND text NOT IN (FROM known))"
        sql = f"SELECT coalesce(sum(n) {missed} / sum(n), 0) FROM saves SEMI JOIN pin_rows USING (pin_id)"
        [[share]] = raw.ask(sql, known=known, today=today)
        self.drift["board saves under a title that the graph does not know"] = share

    def report(self):
        """Prints the drift. Returns it and the base's place, for stage.json."""
        shares = ", ".join(f"{what} {share:.1%}" for what, share in self.drift.items())
        verdict = f"all below {DRIFT_LIMIT:.0%}: the statistics serve"
        if max(self.drift.values()) >= DRIFT_LIMIT:
            verdict = f"not below {DRIFT_LIMIT:.0%}: fit them again (01 without --base, then 02 to 05)"
        print(f"drift from {self.run}: {shares}; {verdict}")
        drift = {what: round(share, 6) for what, share in self.drift.items()}
        return {"base": str(self.run), "drift": drift}


def digests(texts):
    """A stream of lists of texts -> an Arrow column of their hashes, 16 bytes each."""
    kind, hashed = pa.binary(16), functools.partial(hashlib.blake2b, digest_size=16)
    chunks = [pa.array([hashed(text.encode()).digest() for text in some], kind) for some in texts]
    return pa.chunked_array(chunks, kind)
