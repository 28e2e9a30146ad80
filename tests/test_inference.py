"""Stage 03's own functions: LoRA merged, bf16 on every CPU, shards tokenized ahead by workers."""

import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import environment, stage, stop_line

from common import PairText, Teacher
from lib import models as loading
from lib.inputs.rows import PairShards, tokenized
from lib.stages.terminal import Stop

labeller = stage("03")


def rows_of(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(4, 30, n).astype(np.int32) for n in lengths]


def teacher_of(folder, dtype=torch.float32):
    torch.manual_seed(1)
    backbone = loading.load_backbone(folder, dtype)
    return Teacher(backbone, loading.backbone_kind(backbone.config), dtype).eval()


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_bf16_works_on_every_cpu(models, kind):
    rows = rows_of(range(3, 43))
    exact = labeller.soft_labels(teacher_of(models[kind]), rows, 0, 128)
    rounded = labeller.soft_labels(teacher_of(models[kind], torch.bfloat16), rows, 0, 128)
    assert 0 < np.abs(exact - rounded).max() < 0.05


@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_is_the_formula(models, tmp_path, dtype, quantize):
    """W + (alpha / R) B A to the last bit, W out of NF4; rotary frequencies stay fp32."""
    import bitsandbytes.functional as bnb
    from peft import LoraConfig, get_peft_model

    backbone = loading.load_backbone(models["llama"], dtype, quantize)
    lora = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    teacher = Teacher(get_peft_model(backbone, lora), "decoder", dtype).eval()
    teacher.backbone.save_pretrained(tmp_path)
    layer = teacher.backbone.base_model.model.layers[1].mlp.down_proj
    weight = layer.base_layer.weight
    if quantize:
        weight = bnb.dequantize_4bit(weight.data, weight.quant_state)
    A, B = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    expected = (weight.float() + 3 * (B @ A)).to(dtype)
    exact = teacher.backbone.base_model.model.rotary_emb.inv_freq.clone()
    labeller.merge_lora(teacher, tmp_path)
    assert torch.equal(teacher.backbone.layers[1].mlp.down_proj.weight, expected)
    assert {p.dtype for p in teacher.backbone.parameters()} == {dtype}
    assert exact.dtype == torch.float32 and torch.equal(teacher.backbone.rotary_emb.inv_freq, exact)


@pytest.fixture
def shards(features, models):
    tokenizer = loading.load_tokenizer(models["bert"], loading.load_config(models["bert"]))
    text = PairText(tokenizer, "encoder", ("title", "boards"), 48)
    return PairShards(features, text, sorted(features.glob("impressions/part-*.parquet")))


def test_shards_tokenized_by_workers_are_those_of_none(shards):
    alone, ahead = (list(tokenized(shards, workers)) for workers in (0, 2))
    assert [path for path, _ in alone] == [path for path, _ in ahead] == shards.paths
    for (path, one), (_, other) in zip(alone, ahead):
        assert len(one) == len(other) == pq.read_metadata(path).num_rows
        assert all(np.array_equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_in_a_worker_is_one_line(shards, workers):
    shards.text.max_tokens = 3
    line = stop_line(lambda: list(tokenized(shards, workers)))
    assert "tokens" in line and "Traceback" not in line
    assert issubclass(Stop, Exception)


KILLED = {
    "03": """
import pickle
from lib.inputs.rows import tokenized
made = tokenized(pickle.load(open(sys.argv[1], "rb")), workers=1)
""",
    "01": """
from lib.inputs.bm25 import mapped
made = mapped(len, ["pin" * 1_000_000] * 50, workers=2)
""",
}


@pytest.mark.parametrize("which", KILLED)
def test_workers_end_with_a_stage_that_is_killed(shards, tmp_path, which):
    """Also one whose next shard nobody takes: more than a pipe holds. The pipe of the stage's output is at
    its end only when nobody has it any more."""
    pairs = pa.table({"query_index": np.zeros(20_000, np.int32), "pin_index": np.zeros(20_000, np.int32)})
    pq.write_table(pairs, tmp_path / "part.parquet")
    shards.paths = [tmp_path / "part.parquet"] * 9
    (tmp_path / "shards").write_bytes(pickle.dumps(shards))
    code = "import sys" + KILLED[which] + "next(made)\nprint('made', flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "shards")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment(1), text=True) as killed:
        assert killed.stdout.readline() == "made\n"
        killed.kill()
        assert killed.communicate(timeout=60)[0] == ""


def test_a_worker_that_is_killed_is_one_line(shards, tmp_path):
    shards.paths = shards.paths * 9
    (tmp_path / "shards").write_bytes(pickle.dumps(shards))
    code = """
import multiprocessing, os, pickle, signal, sys
from lib.inputs.rows import tokenized
from lib.stages.terminal import run_main

def main():
    made = tokenized(pickle.load(open(sys.argv[1], "rb")), workers=1)
    next(made)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    list(made)

run_main(main)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "shards")]
    done = subprocess.run(command, env=environment(1), text=True, capture_output=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: DataLoader worker") and "--workers" in done.stderr


def test_pins_are_read_group_by_group(shards):
    pins = pq.read_table(shards.features / "pins.parquet")
    some = np.array([0, 3, 4, 50, 99])
    assert shards.read_pins(some) == {name: pins[name].take(some).to_pylist() for name in ("title", "boards")}
