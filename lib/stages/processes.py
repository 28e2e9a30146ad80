"""Stages 01 to 03 as several processes, by accelerate launch or torchrun, on machines that share a folder."""

import os
import sys
import time
from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, wait_for_everyone
from torch.distributed.distributed_c10d import _set_pg_timeout

from lib.stages.hardware import pick_hardware
from lib.stages.stage import Stage
from lib.stages.terminal import Stop, stop_on_error

LAUNCHER = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_DEEPSPEED")
LAUNCHER += ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
NO = ("no", "false", "0", "")
MEET = timedelta(minutes=10)  # how long a process waits for the others to start …
WORK = timedelta(days=7)  # … and for their work: one may have an hour's shard more to label
SEEN = 120  # seconds until a file of one machine is seen on another: NFS keeps what it knows for up to 60


def start_processes(settings):
    """The Accelerator: this process and those launched with it; their dtype; device and dtype in words."""
    device, dtype, hardware = pick_hardware(settings)
    refuse_launcher()
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        launch = "torchrun --nproc_per_node N -- SCRIPT --run RUN"
        raise Stop(f"accelerate launch --cpu starts one process where N were asked for; on CPUs: {launch}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and os.environ.get("RANK", "0") == "0":
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        print(f"WORLD_SIZE is {world}: waits for {world - 1} more process(es) at {where}", flush=True)
    AcceleratorState._reset_state()  # of another library in this process, such as a trainer in bf16
    with stop_on_error(f"{world} processes do not come together", "WORLD_SIZE=1 runs one alone"):
        options = {"mixed_precision": "no", "dynamo_backend": "no"}
        meet = InitProcessGroupKwargs(timeout=MEET)
        accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[meet], **options)
    if accelerator.num_processes > 1:
        _set_pg_timeout(WORK)
    return accelerator, dtype, hardware


def refuse_launcher():
    """Stop if accelerate launch, or its config file, asks for what would change the result."""
    given = {name: os.environ.get(name, "no") for name in LAUNCHER}
    asked = ", ".join(f"{name}={value}" for name, value in given.items() if value.lower() not in NO)
    if asked:
        advice = "launch without these, or with --config_file /dev/null"
        raise Stop(f"accelerate launch asks for {asked}: --precision says what is computed with; {advice}")


def start_stage(accelerator, place, settings, inputs, earlier=()):
    """The Stage, of which the main process takes the lock and decides for all (None on the others), and the
    folder to write into (None: nothing to do). earlier: runs; what one of them has that is the same is
    linked."""
    stage, folder, failed = None, None, True
    try:
        if accelerator.is_main_process:
            stage = Stage(place, settings, inputs)
            for run in () if settings.overwrite else earlier:
                stage.link(run / stage.place.name)
            folder = None if stage.done else stage.folder
        failed = False
    finally:
        folder, failed = broadcast_object_list([folder, failed])
    if failed:
        sys.exit(1)  # the main process says why
    return stage, folder


def lead(accelerator, work, jobs):
    """work(share) in the main process. There share(name, *args) has every process call jobs[name](part,
    *args), part = (this process, of how many), and returns the files that they write together."""
    part, end = (accelerator.process_index, accelerator.num_processes), "failed"

    def do(order):
        name, args = of_main(order)
        if args == "failed":
            sys.exit(1)  # the main process says why
        if name is None:
            return None
        files = jobs[name](part, *args)
        wait_for_all(accelerator, files)
        return files

    def share(name, *args):
        nonlocal end
        end = None  # where one fails now the others wait for something else, until the launcher ends them
        files = do((name, args))
        end = "failed"
        return files

    if not accelerator.is_main_process:
        while do(None) is not None:
            pass
        return
    try:
        work(share)
        end = "well"
    finally:
        if end:
            of_main((None, end))


def of_main(value):
    """A value of the main process, on all, once all have come for it."""
    with stop_on_error("another process has ended", "the same command continues"):
        broadcast_object_list(values := [value])
        wait_for_everyone()
    return values[0]


def wait_for_all(accelerator, files):
    """Waits until all processes are here, and the files that they have written are seen, else Stop."""
    with stop_on_error("another process has ended", "the same command continues"):
        accelerator.wait_for_everyone()
    end = time.monotonic() + SEEN
    for path in files:
        while not path.exists():
            if time.monotonic() > end:
                raise Stop(f"{path}: of another process, not seen here: --run must be a shared folder")
            time.sleep(0.5)
