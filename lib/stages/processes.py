"""Stages 02 and 03 as several processes, by accelerate launch or torchrun."""

import os
import sys

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lib.stages.hardware import pick_hardware
from lib.stages.stage import Stage
from lib.stages.terminal import Stop


def start_processes(settings):
    """The Accelerator: this process and those that were launched with it, which on CPUs talk over gloo. Also
    the dtype that they compute with, and device and dtype in words."""
    device, dtype, hardware = pick_hardware(settings)
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        launch = "torchrun --nproc_per_node N -- SCRIPT --run RUN"
        raise Stop(f"accelerate launch --cpu starts one process where N were asked for; on CPUs: {launch}")
    return Accelerator(cpu=device.type == "cpu"), dtype, hardware


def start_stage(accelerator, place, settings, inputs, earlier=()):
    """The Stage of several processes: the main one takes the lock and decides for all. Returns it (None on
    the others) and the folder to write into (None: nothing to do). earlier: run directories; what one of them
    has that is the same is linked."""
    stage, error, folder = None, None, None
    if accelerator.is_main_process:
        try:
            stage = Stage(place, settings, inputs)
            for run in () if settings.overwrite else earlier:
                stage.link(run / stage.place.name)
            folder = None if stage.done else stage.folder
        except (Stop, OSError) as problem:
            error = problem
    shared = [folder, error is not None]
    broadcast_object_list(shared)
    if error is not None:
        try:
            raise error
        finally:
            error = None  # its traceback names this frame: a circle that would keep the locks of all frames
    folder, stopped = shared
    if stopped:
        sys.exit(1)  # the main process says why
    return stage, folder
