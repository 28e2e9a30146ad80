"""What makes a stage resumable: its folder and what identifies it.

A stage writes into a hidden folder, RUN/.NAME.unfinished-ID, which takes the place of RUN/NAME once it is
complete. ID is the hash of the stage's settings and of the content of what it reads: a killed stage continues
its own work and no other's, and RUN/NAME is always whole.
"""

import dataclasses
import importlib.metadata
import json
import os
import time
from pathlib import Path

from lib.stages.files import UNFINISHED, drop_damaged, hashed, link, list_files, read_json, remove, write_json
from lib.stages.finished import check_files, hold, read_about, sealed
from lib.stages.terminal import Stop

# These are not part of a folder's identity: a result hangs on none, but for rounding and, in 02, for which
# units dropout leaves out (batch_tokens) …
WITHOUT_EFFECT = {"preset", "run", "overwrite", "known", "given", "compile", "device", "workers", "memory"}
WITHOUT_EFFECT |= {"batch_tokens", "checkpoint_steps", "long_queries"}
# … and of these it is the content that counts, which stands among the inputs.
PLACES = {"base", "data", "teacher", "model", "caption_model", "text_encoder", "precision", "mean"}
PACKAGES = ("torch", "transformers", "numpy", "duckdb")  # whose versions are noted


class Stage:
    """A stage's folder while it is made. `done`: finished before, nothing to do; `folder`: where to write;
    `old`: the finished folder that is going to be replaced, or None. stage.json holds `arguments` and
    `inputs` (fingerprints of what is read), its identity: another one is refused unless --overwrite."""

    def __init__(self, folder, settings, inputs):
        self.place, self.start = Path(folder), time.time()
        self.done, self.old = False, None
        self.about = describe(self.place.name, settings, inputs)
        unfinished = f".{self.place.name}{UNFINISHED}{self.about['identity'][:8]}"
        self.folder = self.place.with_name(unfinished)
        self.aside = self.place.with_name(f".{self.place.name}.old")  # while another takes its place
        if os.path.lexists(self.folder) and (self.folder.is_symlink() or not self.folder.is_dir()):
            raise Stop(f"{self.folder}: a link or a file where a stage puts its work: remove it")
        if self.place.is_symlink() and settings.overwrite:
            owner = self.place.resolve()
            raise Stop(f"{folder} is a link to {owner}: rebuild it there (--run {owner.parent})")
        if self.place.exists() and not (self.place / "stage.json").exists() and any(self.place.iterdir()):
            raise Stop(f"{folder} is there and no stage made it: move it away, or use another --run")
        self.lock = hold(self.place, "write")
        try:
            self.begin(settings)
        except BaseException:
            self.lock = None
            raise

    def begin(self, settings):
        """Finds out whether anything is left to do, and makes the work folder ready for it."""
        if read_about(self.folder, damaged_is_fine=True):  # killed before it was in its place
            self.move_into_place()
        if self.aside.exists() and not self.place.exists():  # killed before the new one was in its place
            os.replace(self.aside, self.place)
        remove(self.aside)
        if self.place.exists():
            if not settings.overwrite:
                before = read_about(self.place)
                if before["identity"] != self.about["identity"]:
                    changes = "; ".join(changes_between(before, self.about).values())
                    advice = "--overwrite rebuilds it, another --run keeps both"
                    raise Stop(f"{self.place} was made with other settings or inputs ({changes}); {advice}")
                check_files(self.place, before, ["*"])
                self.done = True
                same = "finished before with the same arguments and inputs, nothing to do"
                print(f"{self.place}: {same} (--overwrite rebuilds it)")
                self.clear_up()
                return
            self.old = self.place
        for other in self.unfinished():
            if other != self.folder and (other / "stage.json").is_file():
                print(f"{other}: begun with other settings or inputs; it goes when this one is finished")
        drop_damaged(self.folder)
        write_json(self.folder / "stage.json", self.about)

    def unfinished(self):
        """Folders of unfinished work on this one, of whatever settings."""
        return sorted(self.place.parent.glob(f".{self.place.name}{UNFINISHED}*"))

    def link(self, other):
        """Is done if the folder `other`, of another run, is what is asked for: its files become ours."""
        if self.done or not (other / "stage.json").exists():
            return
        about = read_about(other)
        if about["identity"] == self.about["identity"]:
            lock, linked = hold(other, "read"), self.folder.with_name(f"{self.folder.name}-linked")
            check_files(other, about, ["*"])
            remove(linked)
            for name in about["outputs"]:
                link(other / name, linked / name)
            del lock
            write_json(linked / "stage.json", about)
            remove(self.folder)  # nothing is written over a file that is another run's too
            os.replace(linked, self.folder)
            self.move_into_place()
            self.done = True
            print(f"{self.place}: the same as {other}, linked")

    def made_from(self, read, spare):
        """Notes the stamps of what is read. What was begun when they were others goes, but for the folder
        `spare`."""
        note = self.folder / "work" / "read.json"
        if note.exists() and read_json(note) != read:
            print(f"{self.folder}: its inputs were written again since: made again, but for {spare}")
            for path in self.folder.glob("[!.]*"):
                if path.name not in (spare, "stage.json"):
                    remove(path)
        write_json(note, read)

    def refuse_changed(self, read, now):
        """Stop if what was read was written meanwhile: what was made of it goes. read, now: stamps."""
        changed = [stamp[0] for stamp in read if stamp not in now]
        if changed or len(now) != len(read):
            remove(self.folder)
            raise Stop(f"{', '.join(changed) or 'a table'}: written while this stage read it; run it again")

    def finish(self, without=(), **facts):
        """Writes the final stage.json, `facts` and the hash of every file, and puts the folder into its
        place. without: intermediate results, which go."""
        mode = (self.folder / "stage.json").stat().st_mode  # as umask has it; libraries write 0600
        for path in self.folder.rglob("*"):
            if path.is_file() and path.stat().st_mode != mode:
                path.chmod(mode)
        outputs = list_files(self.folder, without)
        seconds = round(time.time() - self.start, 1)
        finished = {**self.about, **facts, "finished": True, "seconds": seconds, "outputs": outputs}
        write_json(self.folder / "stage.json", sealed(finished))
        self.move_into_place()
        self.lock = None
        print(f"wrote {self.place}  ({seconds:.0f} s)")

    def move_into_place(self):
        """The finished work folder, less its intermediate results, takes the place of what was there."""
        listed = {"stage.json", *read_about(self.folder)["outputs"]}
        for path in sorted(self.folder.rglob("*"), reverse=True):  # a folder comes after what is in it
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif path.is_file() and str(path.relative_to(self.folder)) not in listed:
                path.unlink()
        if self.place.exists():
            remove(self.aside)
            os.replace(self.place, self.aside)
        os.replace(self.folder, self.place)
        remove(self.aside)
        self.clear_up()

    def clear_up(self):
        """Removes unfinished work that is older than the folder, of whatever settings."""
        made = (self.place / "stage.json").stat().st_mtime
        for other in self.unfinished():
            begun = other / "stage.json"
            if not begun.is_file() or begun.stat().st_mtime <= made:
                remove(other)


def describe(stage, settings, inputs):
    """What stage.json says before the work begins. stage: its folder's name."""
    told = {k: v for k, v in sorted(dataclasses.asdict(settings).items()) if k not in WITHOUT_EFFECT}
    arguments = json.loads(json.dumps(told, default=str))
    # A switch that is off counts as one that there is not.
    decisive = {k: v for k, v in arguments.items() if k not in PLACES and v is not False}
    return {
        "stage": stage,
        "finished": False,
        "command": [*settings.given],
        "arguments": arguments,
        "inputs": inputs,
        "identity": hashed([decisive, inputs]),
        "seed": arguments.get("seed"),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def changes_between(before, now):
    """{flag of an argument, or input: "it was …, is …"} of all that differs between two stage.json."""
    changes = {}
    for group, absent in (("arguments", False), ("inputs", None)):
        for name in sorted({*before[group], *now[group]}):
            was, is_now = (about[group].get(name, absent) for about in (before, now))
            if was != is_now:
                told = f"--{name.replace('_', '-')}" if group == "arguments" else name
                changes[told] = f"{told} was {was!r}, is {is_now!r}"
    return changes
