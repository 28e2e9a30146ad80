"""What --device and --precision are on this machine."""

import torch

from lib.stages.terminal import Stop


def pick_device(name):
    """'auto' -> cuda where there is one, else cpu. Stop for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise Stop("--device cuda: PyTorch sees no GPU here; --device cpu or auto")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def pick_dtype(name, device):
    """'auto' -> bf16 on a GPU and on a CPU that multiplies bf16 in hardware (AVX512-BF16, AMX), else fp32."""
    if name == "auto":
        on_gpu = torch.device(device).type == "cuda"
        fast = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def pick_hardware(settings):
    """The device and the dtype that a stage computes with, and both in words: "bfloat16 on cuda"."""
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.precision, device)
    return device, dtype, f"{dtype} on {device.type}".removeprefix("torch.")
