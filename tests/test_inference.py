"""Work that labelling leaves out does not show in the labels: masks without effect, the last layer's other tokens, MKL's products."""

import numpy as np
import pytest
import torch

import common
from common import PackedRows, Teacher


def rows_of(lengths):
    rng = np.random.default_rng(0)
    return PackedRows(rng.integers(4, 30, n).tolist() for n in lengths)


def teacher_of(folder, dtype=torch.float32):
    torch.manual_seed(1)
    backbone = common.load_backbone(folder, dtype)
    return Teacher(backbone, common.backbone_kind(backbone.config)).eval()


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_a_mask_that_does_not_matter(models, kind):
    teacher = teacher_of(models[kind])
    uneven, even = rows_of([3, 9, 17, 17]), rows_of([12] * 4)
    with torch.inference_mode():
        for rows, side, matters in ((even, "right", False), (uneven, "right", kind != "llama"), (uneven, "left", True)):
            ids, mask = rows.batch(np.arange(4), 0, side=side)
            assert teacher.mask_matters(mask) == matters
            if not matters:
                assert torch.allclose(teacher(ids, mask, False), teacher(ids, mask), atol=1e-6)
    if kind != "llama":  # and where it matters, leaving it out shows
        ids, mask = uneven.batch(np.arange(4), 0)
        with torch.inference_mode():
            assert not torch.allclose(teacher(ids, mask, False), teacher(ids, mask), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_ready_for_inference(models, kind, dtype):
    teacher, rows = teacher_of(models[kind], dtype), rows_of(range(3, 43))
    before = common.soft_labels(teacher, rows, 0, 128, "cpu", dtype)
    seen = []
    common.for_inference(teacher, "cpu", dtype)
    if kind in ("bert", "deberta"):
        teacher.backbone.encoder.layer[-1].output.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    after = common.soft_labels(teacher, rows, 0, 128, "cpu", dtype)
    assert np.abs(after - before).max() < (1e-6 if dtype == torch.float32 else 5e-3)
    assert set(seen) <= {1} and bool(seen) == (kind in ("bert", "deberta"))


def test_onednn_layer_takes_what_autocast_would_cast():
    """A norm under autocast hands fp32 to a bf16 layer. Where the CPU has no bf16 products, the operator says so and onednn_multiplies() knew it."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(32, 48).bfloat16(), torch.randn(2, 7, 32)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = linear(x)
        linear.__class__ = common.OneDnnLinear
        if not common.onednn_multiplies(torch.bfloat16):
            with pytest.raises(RuntimeError, match="primitive"):
                linear(x)
            return
        assert torch.allclose(linear(x).float(), expected.float(), atol=2e-2) and linear(x).dtype == expected.dtype == torch.bfloat16


def test_without_bf16_products_no_layer_is_given_to_onednn(models, monkeypatch):
    monkeypatch.setattr(common, "onednn_multiplies", lambda dtype: dtype != torch.bfloat16)
    teacher, rows = teacher_of(models["llama"], torch.bfloat16), rows_of(range(3, 43))
    before = common.soft_labels(teacher, rows, 0, 128, "cpu", torch.bfloat16)
    common.for_inference(teacher, "cpu", torch.bfloat16)
    assert not any(type(m) is common.OneDnnLinear for m in teacher.modules())
    assert np.array_equal(common.soft_labels(teacher, rows, 0, 128, "cpu", torch.bfloat16), before)


def test_fp8_layer():
    """Beside the definition: round to e4m3 with a scale a row, multiply exactly, scale back."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(32, 48).bfloat16(), 10 * torch.randn(2, 7, 32).bfloat16()
    rounded = lambda a: (a.double() / (s := a.abs().amax(-1, keepdim=True).double() / 448)).float().to(torch.float8_e4m3fn).double() * s
    expected = rounded(x) @ rounded(linear.weight.data).T + linear.bias.double()
    with torch.inference_mode():
        assert torch.allclose(common.Fp8Linear(linear)(x).double(), expected, rtol=1e-2, atol=2e-2)
        assert not torch.allclose(linear(x).double(), expected, rtol=1e-2, atol=2e-2)
        assert common.Fp8Linear(linear)(torch.zeros_like(x)).isfinite().all()


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5", "llama"])
def test_fp8(models, kind):
    teacher, rows = teacher_of(models[kind], torch.bfloat16), rows_of(range(3, 43))
    before = common.soft_labels(teacher, rows, 0, 128, "cpu", torch.bfloat16)
    common.use_fp8(teacher)
    assert not any(type(m) is torch.nn.Linear for m in teacher.backbone.modules()) and teacher.head[0].weight.dtype == torch.float32
    after = common.soft_labels(common.for_inference(teacher, "cpu", torch.bfloat16), rows, 0, 128, "cpu", torch.bfloat16)
    assert 0 < np.abs(after - before).max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_rotary_frequencies_in_fp32(models, dtype):
    from peft import LoraConfig, get_peft_model

    backbone = get_peft_model(common.load_backbone(models["llama"], dtype), LoraConfig(r=2, target_modules="all-linear"))
    exact = backbone.base_model.model.rotary_emb.inv_freq.clone()
    teacher = Teacher(backbone, "decoder").eval()
    common.merge_lora(teacher, dtype)
    assert {p.dtype for p in teacher.backbone.parameters()} == {dtype}
    assert exact.dtype == torch.float32 and torch.equal(teacher.backbone.rotary_emb.inv_freq, exact)
