"""Settings of a script: one frozen dataclass, its comments the help, its instances the presets."""

import argparse
import contextlib
import dataclasses
import io
import re
import sys
import typing
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lib.stages.terminal import first_line

ROOT = Path(__file__).resolve().parents[2]


class Range(typing.NamedTuple):
    """Bounds of a setting, as metadata of its type: at least `low` and below `high`."""

    low: float
    high: float


TINY = 1e-31  # far within fp32, as is its inverse
Count = Annotated[int, Range(1, 10**9)]
Size = Annotated[int, Range(0, 10**9)]
Width = Annotated[int, Range(1, 10**6)]
Positive = Annotated[float, Range(TINY, 1 / TINY)]
NonNegative = Annotated[float, Range(0, 1 / TINY)]
Share = Annotated[float, Range(0, 1)]
Ratio = Annotated[float, Range(TINY, 2)]
Temperature = Annotated[float, Range(0.01, 100)]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]
# tyro's words for a value that an optional setting cannot hold
NO_TYPE = r"no type matching \{None\}\|\{?([^}]+?)\}? could be instantiated from \[(.*)\]"


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """Settings of every stage."""

    preset: Literal["toy", "small", "paper"] = "toy"  # settings for flags not given
    run: Path = ROOT / "outputs" / "toy"  # run directory (default: outputs/PRESET)
    given: tyro.conf.Suppress[
        tuple[str, ...]
    ] = ()  # other flags than --run and --overwrite, for advice; parse() notes them
    overwrite: bool = False  # rebuild this stage's folder; the old one stays until the new one is finished


@dataclasses.dataclass(frozen=True)
class DeviceSettings(StageSettings):
    """Settings of every stage that runs a model."""

    device: Device = "auto"  # where models run


@dataclasses.dataclass(frozen=True)
class ModelSettings(DeviceSettings):
    """Settings of every stage that runs pre-trained models."""

    precision: Precision = "fp32"  # of computation and frozen weights; auto: bf16 where the hardware has it


def parse(presets, argv=None, description=""):
    """Settings from the command line: flags given, else the preset's values. `presets`: {name: settings}."""
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="toy", nargs="?", const="toy")  # none is for tyro to tell
    name = first.parse_known_args(argv)[0].preset
    default = presets.get(name, presets["toy"])
    if default is not presets["toy"] and default.run == presets["toy"].run:
        default = dataclasses.replace(default, run=default.run.with_name(name))
    refuse_empty(argv, default)
    settings = flags_read(type(default), default, argv, description.split("\n")[0])
    if not hasattr(settings, "given"):
        return settings
    other = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    other.add_argument("--run")
    other.add_argument("--overwrite", action="store_true")
    return dataclasses.replace(settings, given=tuple(other.parse_known_args(argv)[1]))


def refuse_empty(argv, default):
    """Refuses an empty value, as of a shell variable that is not set: as a path it is the working folder."""
    words = [word for argument in argv for word in argument.split("=", argument.startswith("--"))]
    for flag, value in zip(["", *words], words):
        if not value and getattr(default, flag.strip("-").replace("-", "_"), None) != "":
            refuse(f"{flag or 'an argument'} '': an empty value")


def typed(settings, *names):
    """Those of some flags that stand on the command line, whatever a preset says of the others: a text."""
    words = {word.partition("=")[0].replace("_", "-") for word in settings.given}
    return " ".join(f"--{name}" for name in names if f"--{name}" in words)


def refuse(problem):
    """Ends with a message and exit status 2."""
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def flags_read(kind, default, argv, description):
    """Settings by tyro, each in its range. What is wrong, which tyro tells on a page, becomes one line."""
    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page):
            settings = tyro.cli(kind, default=default, args=argv, description=description)
    except SystemExit as end:
        if end.code:
            text = re.sub("[│╭╮╰╯]", " ", page.getvalue())  # a frame around a title, what is wrong, and help
            title, *parts = re.split("[─-]{8,}", text)
            said = " ".join((parts or [title])[0].split("Got errors:")[0].split())
            said = re.sub(NO_TYPE, r"needs \1 or None, not \2", said)
            said = re.sub(r", not \.?$", "; no value is given", said)
            refuse(f"{first_line(said).rstrip(' .')}; --help shows all flags")
        raise
    for field, hint in typing.get_type_hints(kind, include_extras=True).items():
        value = getattr(settings, field)
        for bounds in ranges_of(hint):
            for each in value if isinstance(value, tuple) else [value]:
                if each is not None and not bounds.low <= each < bounds.high:
                    low = "more than 0" if bounds.low == TINY else f"at least {bounds.low:g}"
                    refuse(f"--{field.replace('_', '-')} {each}: must be {low} and below {bounds.high:g}")
    return settings


def ranges_of(hint):
    """The Range objects anywhere inside a type: tuple[Count, ...] | None -> [Range(1)]."""
    if isinstance(hint, Range):
        return [hint]
    return [found for inner in typing.get_args(hint) for found in ranges_of(inner)]
