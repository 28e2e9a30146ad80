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

from runs.stage import run_main

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
