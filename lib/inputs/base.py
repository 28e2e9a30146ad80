"""The run that a run builds on (01 --base)."""

from pathlib import Path

from lib.stages.finished import read_about
from lib.stages.terminal import Stop


def bases_of(run):
    """The run that RUN's features build on, the one that this one builds on, and so on, as far as they are
    there. Stop if the first one is not."""
    found = []
    while (run / "features" / "stage.json").exists():
        base = read_about(run / "features").get("base")
        if base is None or Path(base) in found:
            break
        run = Path(base)
        found.append(run)
    if len(found) == 1 and not run.exists():
        raise Stop(f"{run}: the base of these features, is not there; --known says where labels are")
    return found
