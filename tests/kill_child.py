"""A stage in a process of its own that can be killed. The fork server imports this module, so that a child
begins at once."""

import os
import signal

import accelerate  # noqa: F401
import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import sklearn.decomposition  # noqa: F401
import sklearn.feature_extraction.text  # noqa: F401
import torch
from helpers import STAGES, stage
from peft import PeftModel  # noqa: F401
from transformers import AutoProcessor, BertModel, BlipForConditionalGeneration, LlamaModel  # noqa: F401

from common import Teacher
from lib.stages import checkpoint, streams
from lib.stages.terminal import run_main

for number in STAGES:
    stage(number)


def work(number, argv, log, rename=None):
    """main(argv) of a stage. rename = (n, "before" or "after"): killed at its n-th rename of a file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    module, replace, done = stage(number), os.replace, 0
    module.CHUNK = 16  # pins a file of stage 01's cache

    def counted(*paths):
        nonlocal done
        done += 1
        if rename == (done, "before"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
        if rename == (done, "after"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    run_main(lambda: module.main(argv))
    os.write(1, f"renames: {done}\n".encode())


def work_as(rank, port, number, argv, log, die_at=0):
    """main(argv) of a stage as one of two processes, without dropout, which is drawn per process. die_at: it
    dies after its n-th checkpoint of 02, or chunk of 01."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    Teacher.__init__.__defaults__ = (*Teacher.__init__.__defaults__[:-1], 0.0)
    stage("01").CHUNK, done = 16, 0

    def counted(write):
        def written(*args):
            nonlocal done
            write(*args)
            done += 1
            if done == die_at:
                os._exit(9)

        return written

    checkpoint.Checkpoints.save = counted(checkpoint.Checkpoints.save)
    streams.write_parquet = counted(streams.write_parquet)
    run_main(lambda: stage(number).main(argv))
