"""What a script says at the terminal, and how it ends: one line on what is wrong, progress bars."""

import contextlib
import errno
import os
import sys
import warnings

from tqdm import tqdm


class Stop(Exception):
    """Ends a stage with one line: what is wrong, where, and what to do."""


def run_main(main):
    """Runs a script's main(). What went wrong: one line and exit status 1 (DEBUG=1: a traceback)."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    if os.environ.get("DEBUG"):
        return main()
    try:
        main()
    except Stop as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            sys.exit("error: the disk is full; what was finished is whole, the same command continues")
        if "MemoryError" in type(error).__name__ or "can't allocate memory" in str(error):
            sys.exit(f"error: not enough memory ({first_line(error)}): smaller batches or models need less")
        if number and getattr(error, "filename", None):
            sys.exit(f"error: {error.filename}: cannot be read or written ({error.strerror})")
        raise


@contextlib.contextmanager
def stop_on_error(what, advice=""):
    """An exception inside the block, of whatever kind but a Stop, becomes one: `what` went wrong, its first
    line, `advice`."""
    try:
        yield
    except Stop:
        raise
    except BaseException as error:
        # A panic of the tokenizers' Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise Stop(f"{what} ({first_line(error)})" + f"; {advice}" * bool(advice)) from error


def first_line(error):
    """The first line of an exception's text, without control characters."""
    text = "no " * isinstance(error, KeyError) + str(error)
    text = text.strip().split("\n")[0] or type(error).__name__
    return "".join(c for c in text if c.isprintable())[:300]


def progress_bar(**options):
    """tqdm; into a file a line every half minute, and none before."""
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed}, {rate_fmt}{postfix}\n"
        options = {"delay": 30, "mininterval": 30, "maxinterval": 60, "bar_format": line, **options}
    return tqdm(**options)
