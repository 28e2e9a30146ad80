"""Stage 03's own functions: LoRA merged, bf16 on every CPU, shards tokenized ahead."""

import functools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import environment, stage, stop_line

from common import PairText, Teacher
from lib import models as loading
from lib.inputs.rows import read_fields, tokenized_shards
from lib.stages.streams import ahead

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


def test_a_query_that_does_not_fit_is_one_line_from_the_thread_too(features, models):
    tokenizer = loading.load_tokenizer(models["bert"], loading.load_config(models["bert"]))
    text = PairText(tokenizer, "encoder", ("title", "boards"), 3)
    shards = tokenized_shards(features, text, sorted(features.glob("impressions/part-*.parquet")))
    assert "tokens" in stop_line(lambda: list(ahead(shards, depth=1)))


def test_processes_that_count_words_end_with_a_stage_that_is_killed():
    """The pipe of the stage's output is at its end only when nobody has it any more."""
    code = """if True:
    import sys
    from lib.inputs.bm25 import mapped
    made = mapped(len, ["pin" * 1_000_000] * 50, workers=2)
    next(made)
    print('made', flush=True)
    sys.stdin.read()"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes, env=environment(1), text=True) as killed:
        assert killed.stdout.readline() == "made\n"
        killed.kill()
        assert killed.communicate(timeout=60)[0] == ""


def test_pins_are_read_group_by_group(features):
    path, fields = features / "pins.parquet", ("title", "boards")
    pins, some = pq.read_table(path), np.array([0, 3, 4, 50, 99])
    assert read_fields(path, fields, some) == {name: pins[name].take(some).to_pylist() for name in fields}


def test_compiled_layers_give_the_same_labels_of_any_shape_from_few_compilations(models, monkeypatch, capsys):
    """One code for both layers, with a mask and without. Traced and run as it stands: a C++ compiler would
    take half a minute for its kernels."""
    from torch._dynamo.utils import counters

    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    teacher, rows = teacher_of(models["llama"]), rows_of([*range(3, 43), 7, 7, 7, 90])
    exact, process = labeller.soft_labels(teacher, rows, 0, 128), SimpleNamespace(print=print)
    process.device = torch.device("cpu")
    for compile, compiled in (("off", 0), ("auto", 0), ("on", 1)):
        settings = labeller.Settings(compile=compile, batch_tokens=128)
        counters.clear()
        labeller.compile_layers(teacher, rows[:8], 0, settings, process)
        assert capsys.readouterr().out.count("layers compiled in") == compiled
    np.testing.assert_allclose(labeller.soft_labels(teacher, rows, 0, 128), exact, atol=1e-6)
    assert 1 <= counters["stats"]["unique_graphs"] <= 4  # of more than twenty shapes


def test_labels_that_compiling_would_change_end_in_one_line(models, monkeypatch):
    teacher, rows = teacher_of(models["llama"]), rows_of(range(3, 11))
    process = SimpleNamespace(print=print, device=torch.device("cpu"))
    broken = lambda layer, dynamic: layer.register_forward_hook(lambda module, args, out: 2 * out)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    settings = labeller.Settings(compile="on")
    assert "--compile off" in stop_line(labeller.compile_layers, teacher, rows, 0, settings, process)
