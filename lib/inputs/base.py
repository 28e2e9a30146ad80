"""The run that a run builds on (01 --base): a day is a run of its own, on the statistics of another one.

From the base come the statistics that decide what a feature means, BM25's and the axes of the graph
embedding: a student trained there reads these features. Captions, embeddings and labels are looked up by
content, which changes no result.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.inputs.inherited import require
from lib.inputs.match import MATCH_FEATURES, match_names
from lib.inputs.student_inputs import TABLES, further_columns, read_column
from lib.levels import side_of
from lib.stages.files import link_whole
from lib.stages.finished import read_about
from lib.stages.stage import changes_between
from lib.stages.streams import new_matrix
from lib.stages.terminal import Stop

READS = ("bm25.parquet", "graph.parquet", "pins.parquet", "queries.parquet", "*_text_embedding.npy")
# Settings, and inputs of stage 01, that decide what a feature means, beside the statistics.
MEANING = ("caption_tokens", "text_tokens", "top_tokens", "graph_dim")
MEANING += ("caption model", "text encoder", "precision", "rules")
OWN = ("query_text", "pin_text", "pin_visual", "pin_graph")  # the user's own of these stand for ours
DRIFT_LIMIT = 0.1  # our choice; beyond it the statistics should be fitted again


def bases_of(run):
    """The run that RUN's features build on, the one that this one builds on, and so on; the last one may not
    be there any more."""
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
    differs, if features made with these settings would mean something else than the base's."""
    if settings.base is None:
        return None
    run = settings.base.resolve()
    if run == settings.run.resolve():
        raise Stop(f"--base {settings.base}: a run cannot build on itself")
    about = require(run / "features", READS)
    both = about["inputs"].keys() & inputs.keys()
    meanings = []
    for arguments, found in ((about["arguments"], about["inputs"]), (vars(settings), inputs)):
        own = {f"embeddings/{name}": f"embeddings/{name}" in found for name in OWN}
        here = {name: found[name] for name in MEANING if name in both}
        told = {name: arguments.get(name) for name in MEANING if name in vars(settings)}
        meanings.append({"arguments": told, "inputs": own | here})
    changes = "; ".join(changes_between(*meanings).values())
    if changes:
        raise Stop(f"{run}: its features mean something else ({changes}); without --base all is fitted again")
    inputs["base"] = about["identity"]
    return Base(run, about)


class Base:
    """The features that new ones build on. about: their stage.json; graph: graph.parquet (Arrow), or None;
    drift: {what: how far the new tables are from the statistics, as a share}; unknown: in words, how many
    values of categories the base does not have."""

    def __init__(self, run, about):
        self.run, self.folder, self.about = run, run / "features", about
        self.drift, self.unknown = {}, []
        has_graph = "graph.parquet" in about["outputs"]
        self.graph = pq.read_table(self.folder / "graph.parquet") if has_graph else None

    def bring(self, name, out):
        """The base's file, byte for byte, in the new folder; returns its path."""
        link_whole(self.folder / name, out / name)
        return out / name

    def known_texts(self, side, texts, out):
        """Text embeddings of the base [M, D], and for each text of the new table [N] its row there, or -1.
        texts: path of a table -> stream of lists of texts."""
        here = digests(texts(out / TABLES[side]))
        there = digests(texts(self.folder / TABLES[side]))
        vectors = np.load(self.folder / f"{side}_text_embedding.npy", mmap_mode="r")
        return vectors, pc.index_in(here, there).fill_null(-1).to_numpy()

    def complete(self, out, numbers):
        """Says what a student of the base reads and the new tables lack. A column is then unknown for every
        row; an embedding is made here, of zeros. numbers: names of the numbers of pairs."""
        lacking, rows = [], {}
        for side, table in TABLES.items():
            ours, theirs = (further_columns(folder / table, side) for folder in (out, self.folder))
            rows[side] = pq.read_metadata(out / table).num_rows
            for name, kind in theirs.items():
                if ours.get(name) != kind:
                    lacking.append(f"{side}_{name}")
                elif kind == "category":
                    self.note_unknown(f"{side}_{name}", out / table, name)
        names = match_names(self.folder / "labelled.parquet")
        lacking += [name for name in names if name not in MATCH_FEATURES and name not in numbers]
        for path in sorted(self.folder.glob("*_embedding.npy")):
            vectors, name = np.load(path, mmap_mode="r"), path.name.removesuffix("_embedding.npy")
            if not (out / path.name).exists():
                lacking.append(name)
                shape = rows[side_of(name)], vectors.shape[1]
                with new_matrix(out / path.name, *shape, vectors.dtype):
                    pass
            width = np.load(out / path.name, mmap_mode="r").shape[1]
            if width != vectors.shape[1]:
                raise Stop(f"{path.name}: {width} wide, that of {self.run} is {vectors.shape[1]} wide")
        if lacking:
            print(f"a student of {self.run} reads, and these tables lack: {', '.join(lacking)}")

    def note_unknown(self, what, path, name):
        """Values of a category, the column `name` of a table, that the base does not have."""
        now = pc.unique(read_column(path, name)).drop_null()
        then = pc.unique(read_column(self.folder / path.name, name))
        new = pc.sum(pc.invert(pc.is_in(now, then))).as_py()
        if new:
            self.unknown.append(f"{new:,} of {what}")

    def note_boards(self, raw, titles, explained):
        """Drift of the graph. titles: those that an SVD made today would take (Arrow); explained: share of
        today's matrix that the base's axes hold."""
        known = pa.table({"text": self.graph["board_title"]})
        today = pa.table({"text": titles})
        missed = "FILTER (text IN (FROM today) AND text NOT IN (FROM known))"
        sql = f"SELECT coalesce(sum(n) {missed} / sum(n), 0) FROM saves SEMI JOIN pin_rows USING (pin_id)"
        then = float(self.graph.schema.metadata[b"explained"])
        share = raw.ask(sql, known=known, today=today)[0][0]
        self.drift["board saves under a title that the graph does not know"] = share
        self.drift["loss of what its axes hold"] = max(0.0, 1 - explained / then) if then else 0.0

    def report(self):
        """Prints the drift, and how many values of categories the base does not have. Returns the drift and
        the base's place, for stage.json."""
        shares = ", ".join(f"{what} {share:.1%}" for what, share in self.drift.items())
        verdict = f"all below {DRIFT_LIMIT:.0%}: the statistics serve"
        if max(self.drift.values()) >= DRIFT_LIMIT:
            verdict = f"not below {DRIFT_LIMIT:.0%}: fit them again (01 without --base, then 02 to 05)"
        new = f"; category values that the base does not have: {', '.join(self.unknown)}" * bool(self.unknown)
        print(f"drift from the statistics of {self.run}: {shares}; {verdict}{new}")
        drift = {what: round(share, 6) for what, share in self.drift.items()}
        return {"base": str(self.run), "drift": drift}


def digests(texts):
    """A stream of lists of texts -> an Arrow column of their hashes, 16 bytes each."""

    def hashes(some):
        made = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in some]
        return pa.array(made, pa.binary(16))

    return pa.chunked_array([hashes(some) for some in texts], pa.binary(16))
