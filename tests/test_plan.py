"""--dry-run of 02 and 03: the published shapes, parameters counted against the sizes their makers state, and nothing is touched."""

import re

import pytest
import torch

import common
from helpers import stage


def plan(capsys, number, *argv):
    stage(number).main(["--dry-run", *map(str, argv)])
    return capsys.readouterr().out


@pytest.mark.parametrize("name, millions", [
    ("meta-llama/Meta-Llama-3-8B", 8_030.3 - 128_256 * 4_096 / 1e6),  # the model card's 8.03 B, without the language-model head
    ("google-bert/bert-base-multilingual-cased", 177.3),  # 177.9 with the pooler
    ("google-t5/t5-base", 109.6),  # its encoder
    ("microsoft/deberta-v3-base", 183.8)])  # the model card: 86 M and 98 M in the embeddings
def test_published_shapes(name, millions):
    kind, shape = common.PUBLISHED[name]
    from transformers import AutoConfig

    backbone = common.load_backbone(name, torch.float32, device="meta", config=AutoConfig.for_model(kind, **shape))
    assert all(p.device.type == "meta" for p in backbone.parameters())
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_paper_preset(tmp_path, capsys):
    run = tmp_path / "run"
    out = plan(capsys, "02", "--preset", "paper", "--run", run)
    assert "meta-llama/Meta-Llama-3-8B" in out and "280,000" in out
    trainable, share = re.search(r"([\d.]+) M trainable \(([\d.]+) %\)", out).groups()
    lora = 64 * 32 * (4 * 4096 + 2 * (4096 + 1024) + 4096 * 2 - 4096 * 2 + 2 * (4096 + 14336) + (14336 + 4096))  # r (in + out) of q, o; k, v; gate, up; down
    head = 4096 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 5 + 5
    assert float(trainable) == pytest.approx((lora + head) / 1e6, abs=0.06)
    assert float(re.search(r"memory:  ([\d.]+) GB", out).group(1)) < 20
    assert float(re.search(r"([\d.]+) GB  linear layers, NF4", out).group(1)) == pytest.approx(6.979 * 0.516, abs=0.02)
    hours = float(re.search(r"time:    ([\d.,]+) hours", out).group(1))
    assert hours == pytest.approx(280_000 * 200 * 2 / 2_413 / 3600, abs=0.01)
    assert f"{2 * 2188:,} of 128 rows" in out

    out = plan(capsys, "03", "--preset", "paper", "--run", run, "--tokens-per-second", 20_000)
    assert "30,000,000" in out and "83.33 hours" in out
    assert not run.exists()


def test_rows_come_from_the_features_unless_given(run, models, capsys):
    before = sorted(run.rglob("*"))
    out = plan(capsys, "02", "--run", run, "--model", models["bert"], "--device", "cpu")
    assert f"rows:    300 ({run / 'features' / 'labelled.parquet'})" in out and "(100.0 %)" in out
    assert "rows:    777 (--expect-rows), 10 tokens" in plan(capsys, "02", "--run", run, "--model", models["llama"], "--expect-rows", 777, "--expect-tokens", 10)
    assert "rows:    2,492" in plan(capsys, "03", "--run", run, "--expect-model", models["llama"])
    assert sorted(run.rglob("*")) == before
