"""What stage 01's features depend on; and, on a dataset that has grown, what the features that are there
still give, and how far the dataset has drifted from their statistics.

Rows keep their numbers, and what is new comes after them; the
statistics of BM25 and the axes of the graph embedding stay, byte for byte, so that a student trained on the
old features can read the new ones.
"""

import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common import MATCH_FEATURES
from lib import models
from lib.inputs.encoders import captioner_config, encoder_config
from lib.inputs.student_inputs import OUR_COLUMNS, TABLES
from lib.stages.files import link_or_copy
from lib.stages.finished import check_files, hold, read_about
from lib.stages.stage import Stage, aside_of, bring_back
from lib.stages.terminal import Stop
from lib.tables.embeddings import own_fingerprint
from lib.tables.images import pictures_fingerprint

BUILT_ON = "earlier features"  # among the inputs: identity of the folder that --update replaced
DRIFT_LIMIT = 0.1  # our choice; beyond it the statistics should be made anew


def inputs_of(raw, settings, own, pictures, hardware):
    """Fingerprints of everything that the result depends on. own: names of the user's embeddings."""
    found = raw.fingerprints() | {f"embeddings/{name}": own_fingerprint(raw.folder, name) for name in own}
    if pictures["image"].null_count < len(pictures):
        captioner_config(settings.caption_model)  # before the work of hours
        found["images"] = pictures_fingerprint(pictures)
        found["caption model"] = models.model_fingerprint(settings.caption_model)
        found["precision"] = hardware
    if not {"query_text", "pin_text"} <= set(own):
        encoder_config(settings.text_encoder, settings.text_tokens)  # likewise
        found["text encoder"] = models.model_fingerprint(settings.text_encoder)
        found["precision"] = hardware
    return found


def models_used(settings, inputs):
    """Name and fingerprint of the text encoder and the captioner, where the features come from them."""
    names = {"text encoder": settings.text_encoder, "caption model": settings.caption_model}
    used = [kind for kind in names if kind in inputs]
    return {kind: {"name": names[kind], "fingerprint": inputs[kind]} for kind in used}


def open_features(settings, inputs):
    """Stage 01's Stage, and what --update builds on: OldFeatures, or None."""
    folder = settings.run / "features"
    command = f"01_build_features.py --run {settings.run}"
    if settings.update and settings.overwrite:
        raise Stop("--update keeps what --overwrite makes anew: give one of them")
    if settings.update and folder.is_symlink():
        owner = folder.resolve()
        raise Stop(f"{folder} is a link to {owner}: update it there (--run {owner.parent})")
    before = None if settings.overwrite else finished_before(folder)
    if before is None:
        if settings.update:
            raise Stop(f"{folder}: missing or unfinished, nothing to update; make it with: python {command}")
        return Stage(folder, settings, inputs), None
    built_on = before["inputs"].get(BUILT_ON)
    if settings.update and has_changed(before, settings, inputs):
        built_on = before["identity"]
    if built_on is not None:
        inputs = {**inputs, BUILT_ON: built_on}
    work = Stage(folder, settings, inputs, grows=may_change(before, inputs))
    if work.old is None:
        return work, None
    check_files(folder, before, ["*"], command)
    return work, OldFeatures(folder, before)


def finished_before(folder):
    """stage.json of the features that are there, or None. A process that was killed while it swapped folders
    may have left them aside."""
    if aside_of(folder).exists() and not folder.exists():
        lock = hold(folder, "write")
        bring_back(folder)
        del lock
    return read_about(folder) if (folder / "stage.json").exists() else None


def has_changed(before, settings, inputs):
    """Is anything new since the features (stage.json `before`) were made?"""
    then = {name: value for name, value in before["inputs"].items() if name != BUILT_ON}
    as_of = settings.as_of and str(settings.as_of)
    return then != inputs or before["arguments"].get("as_of") != as_of


def may_change(before, inputs):
    """What --update takes in: other content of what was there before, and a later end of the window."""
    both = sorted(before["inputs"].keys() & inputs.keys())
    grows = [name for name in both if name == "images" or name.startswith(("table ", "embeddings/"))]
    logs = [f"table {name}" for name in ("engagements", "link_visits")]  # they may come, and go
    return [*dict.fromkeys([*grows, *logs, "--as-of", BUILT_ON])]


class OldFeatures:
    """The folder that --update is going to replace. changed: {side: which rows are new, or have another text
    or text embedding than before [N]}; drift: {what: how far the dataset is from the statistics, as a share};
    graph: graph.parquet (Arrow), or None; unknown: category values that no old row has, in words."""

    def __init__(self, folder, about):
        self.folder, self.about = folder, about
        self.changed, self.drift, self.unknown, self.shards = {}, {}, [], 0
        has_graph = "graph.parquet" in about["outputs"]
        self.graph = pq.read_table(folder / "graph.parquet") if has_graph else None
        if has_graph and b"explained" not in (self.graph.schema.metadata or {}):
            raise Stop(f"{folder}: made by an older stage 01, which kept less; --overwrite makes it anew")

    # Rows

    def keep_order(self, raw, pictures):
        """Gives query_rows and pin_rows the row numbers of before; new rows come after them. Returns
        `pictures` (of read_pictures) in that order. Stop if a row is gone."""
        for side, file in TABLES.items():
            ids = pq.read_table(self.folder / file, columns=[f"{side}_id"])[f"{side}_id"]
            known = pa.table({"id": ids, "place": np.arange(len(ids), dtype=np.int32)})
            sql = f"SELECT count(*), first(id) FROM known ANTI JOIN {side}_rows ON id = {side}_id"
            count, first = raw.ask(sql, known=known)[0]
            if count:
                name = file.removesuffix(".parquet")
                gone = f"{count:,} {name} of {self.folder} are not there any more, the first: {first!r}"
                raise Stop(f"{raw.name[name]}: {gone}; leave them in, or use --overwrite instead of --update")
            number = f"row_number() OVER (ORDER BY place NULLS LAST, {side}_index) - 1"
            renumbered = f"""
                CREATE OR REPLACE TABLE {side}_rows AS
                SELECT ({number})::INTEGER AS {side}_index, ours.* EXCLUDE ({side}_index)
                FROM {side}_rows ours LEFT JOIN known ON known.id = ours.{side}_id"""
            raw.ask(renumbered, known=known)
        order = raw.table("SELECT pin_id FROM pin_rows ORDER BY pin_index")["pin_id"]
        return pictures.take(pc.index_in(order, pictures["pin_id"]))

    def compare_tables(self, out, numbers, texts):
        """Finds the rows that have another text. numbers: names of the numbers of pairs; texts: {side:
        path -> stream of lists of texts}. Stop if columns differ from before."""
        was = pq.read_schema(self.folder / "labelled.parquet").names
        was = dict.fromkeys(was[was.index("split") + 1 + len(MATCH_FEATURES) :], "there")
        same_columns("numbers of labels and impressions", was, dict.fromkeys(numbers, "there"))
        for side, file in TABLES.items():
            was, now = pq.read_schema(self.folder / file), pq.read_schema(out / file)
            same_columns(
                f"columns of {file}", *({f.name: str(f.type) for f in fields} for fields in (was, now))
            )
            self.changed[side] = changed_texts(self.folder / file, out / file, texts[side])
            for field in now:
                if field.name not in OUR_COLUMNS[side] and pa.types.is_string(field.type):
                    self.note_values(side, field.name, out / file)

    def note_values(self, side, column, path):
        """Notes how many values of a category no old row has."""
        then, now = (
            pc.unique(pq.read_table(file, columns=[column])[column])
            for file in (self.folder / path.name, path)
        )
        new = now.drop_null().filter(pc.invert(pc.is_in(now.drop_null(), then)))
        if len(new):
            self.unknown.append(f"{len(new):,} of {side}_{column}")

    def compare_embeddings(self, out):
        """Finds the rows that have another text embedding, as the user's own may. Stop if widths differ."""
        was, now = (
            {path.name: f"{np.load(path, mmap_mode='r').shape[1]} wide" for path in folder.glob("*.npy")}
            for folder in (self.folder, out)
        )
        same_columns("embeddings", was, now)
        for side, changed in self.changed.items():
            before, here = self.vectors(side), np.load(out / f"{side}_text_embedding.npy", mmap_mode="r")
            for start in range(0, len(before), 65_536):
                block = before[start : start + 65_536]
                changed[start : start + len(block)] |= (block != here[start : start + len(block)]).any(axis=1)

    def vectors(self, side):
        """Text embeddings of the old rows [N, D]."""
        return np.load(self.folder / f"{side}_text_embedding.npy", mmap_mode="r")

    # Files

    def bring(self, name, out):
        """The old file, byte for byte, in the new folder, if nothing is there; returns its path."""
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            temporary = target.with_name(f".{target.name}.tmp")
            link_or_copy(self.folder / name, temporary)
            os.replace(temporary, target)
        return target

    def bring_shards(self, shards, numbers, out):
        """Hands on shards of pairs (index_pairs); one that is as before is brought first, so that it is not
        made again. numbers: names of the numbers of pairs."""
        for number, shard in enumerate(shards):
            name = f"impressions/part-{number:05d}.parquet"
            if self.holds(name, shard, numbers):
                self.bring(name, out)
                self.shards += 1
            yield shard

    def holds(self, name, shard, numbers):
        """Has the old shard these pairs, with these features?"""
        if not (self.folder / name).exists():
            return False
        columns = ["query_index", "pin_index", *numbers]
        before = pq.read_table(self.folder / name, columns=[*columns, "engagement"])
        engagement = np.log1p(shard["engaged"].to_numpy()).astype(np.float32)
        if not np.array_equal(before["engagement"].to_numpy(), engagement):
            return False
        if not all(before[column].equals(shard[column]) for column in columns):
            return False
        return not any(rows[shard[f"{side}_index"].to_numpy()].any() for side, rows in self.changed.items())

    # Drift

    def note_boards(self, raw, titles, explained):
        """Drift of the graph. titles: those that an SVD made today would take (Arrow); explained: share of
        today's matrix that the old axes hold."""
        known, today = pa.table({"text": self.graph["board_title"]}), pa.table({"text": titles})
        missed = "FILTER (text IN (FROM today) AND text NOT IN (FROM known))"
        sql = f"SELECT coalesce(sum(n) {missed} / sum(n), 0) FROM saves SEMI JOIN pin_rows USING (pin_id)"
        share = raw.ask(sql, known=known, today=today)[0][0]
        then = float(self.graph.schema.metadata[b"explained"])
        self.drift["board saves under a title that the graph does not know"] = share
        self.drift["loss of what its axes hold"] = max(0.0, 1 - explained / then) if then else 0.0

    def report(self, shards):
        """Prints what was kept of how many shards, and the drift; returns the drift."""
        kept = [
            f"the text of {(~rows).sum():,} of {len(rows):,} {side} rows"
            for side, rows in self.changed.items()
        ]
        print(f"as before: {', '.join(kept)}; {self.shards:,} of {shards:,} shards of impressions")
        shares = ", ".join(f"{what} {share:.1%}" for what, share in self.drift.items())
        verdict = f"all below {DRIFT_LIMIT:.0%}: keep the statistics"
        if max(self.drift.values()) >= DRIFT_LIMIT:
            verdict = f"not below {DRIFT_LIMIT:.0%}: make the statistics anew (--overwrite, then 03, 04, 05)"
        unknown = f"; category values that no old row has: {', '.join(self.unknown)}" * bool(self.unknown)
        print(f"drift from bm25.parquet and graph.parquet: {shares}; {verdict}{unknown}")
        return {what: round(share, 6) for what, share in self.drift.items()}


def same_columns(what, was, now):
    """Stop if two {name: type} are not equal."""
    names = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    if names:
        changes = ", ".join(
            f"{name} was {was.get(name, 'absent')}, is {now.get(name, 'absent')}" for name in names
        )
        raise Stop(f"the {what} differ from before ({changes}); that takes --overwrite instead of --update")


def changed_texts(old, new, texts):
    """Which rows of the table `new` [N] have another text than the table `old`, or are not in it."""
    changed, start = np.ones(pq.read_metadata(new).num_rows, bool), 0
    for before, now in zip(texts(old), texts(new)):
        for place, (text, other) in enumerate(zip(before, now), start):
            changed[place] = text != other
        start += len(before)
    return changed
