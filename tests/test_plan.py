"""benchmarks/plan.py: parameters counted against the sizes their makers state, rows of the run or dataset,
and nothing is touched."""

import plan
import pytest
from helpers import stage

from lib.stages.files import write_json

# Millions of parameters without language-model head and pooler, head of ours included where noted.
SIZES = {
    "meta-llama/Meta-Llama-3-8B": 8_030.3 - 128_256 * 4_096 / 1e6,  # the model card's 8.03 B
    "google-bert/bert-base-multilingual-cased": 177.3,  # 177.9 with the pooler
    "google-t5/t5-base": 109.6,  # its encoder
    "microsoft/deberta-v3-base": 183.8,  # the model card: 86 M and 98 M in the embeddings
    "microsoft/mdeberta-v3-base": 278.2,  # the model card: 86 M and 190 M in the embeddings
    "FacebookAI/xlm-roberta-large": 558.8,  # 559.9 with the pooler
}


@pytest.mark.parametrize("name", SIZES)
def test_published_shapes(name):
    teacher, _ = plan.empty_teacher(name, stage("02").PRESETS["paper"])
    assert all(p.device.type == "meta" for p in teacher.parameters())
    weights = sum(p.numel() for key, p in teacher.backbone.named_parameters() if "lora_" not in key)
    assert weights / 1e6 == pytest.approx(SIZES[name], rel=2e-3)


def table(text):
    """{teacher: cells of its row}"""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_papers_rows_and_teachers(capsys):
    plan.main([])
    out = capsys.readouterr().out
    assert "280,000" in out and "30,000,000" in out and f"{2 * 2188:,} of 128 rows" in out
    rows = table(out)
    assert rows.keys() == SIZES.keys()
    size, trained, memory, hours, _, memory_03, hours_03, cost = rows["meta-llama/Meta-Llama-3-8B"]
    # r (in + out) of q and o; k and v; gate and up; down
    lora = 64 * 32 * (2 * 2 * 4096 + 2 * (4096 + 1024) + 2 * (4096 + 14336) + (14336 + 4096))
    head = 4096 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 5 + 5
    assert trained == f"{(lora + head) / 1e6:.1f} M, qlora"
    assert 8 < float(memory) < 20 and 21.7 < float(memory_03) < 24
    assert float(hours) == pytest.approx(280_000 * 200 * 2 / 5_816 / 3600, abs=0.1)
    assert float(hours_03) == pytest.approx(30e6 * 200 / 30_742 / 3600, abs=0.3) and cost == "108"
    assert rows["google-t5/t5-base"][1].endswith("full")


def test_several_gpus_share_shards_and_chunks(capsys):
    llama = ["--model", "meta-llama/Meta-Llama-3-8B", "--price", "3"]
    plan.main([*llama, "--gpus", "8", "--machines", "2"])
    out = capsys.readouterr().out
    cells = table(out)["meta-llama/Meta-Llama-3-8B"]
    hours = 30e6 * 200 / 30_742 / 3600
    assert float(cells[6]) == pytest.approx(hours * 8 / 120, abs=0.06)  # of 120 shards at most 8 a GPU
    assert cells[7] == f"{hours * 3:,.0f}" and float(cells[3]) == pytest.approx(5.35 / 16, abs=0.06)
    assert "captions of 10,000,000 pictures: 1.0 h, 48 USD" in out  # 153 of 2,442 chunks, of 15.9 h
    plan.main([*llama, "--impressions", "100", "--gpus", "8", "--pictures", "0"])
    out = capsys.readouterr().out
    assert "of 0 pictures: 0.0 h" in out and table(out)["meta-llama/Meta-Llama-3-8B"][6] == "0.0"


def test_one_teacher_in_parts_and_a_speed_of_ones_own(capsys):
    plan.main(["--model", "meta-llama/Meta-Llama-3-8B", "--label-speed", "20000"])
    out = capsys.readouterr().out
    nf4 = next(line for line in out.splitlines() if "NF4" in line)
    assert float(nf4.split()[1]) == pytest.approx(6.979 * 0.516, abs=0.02)
    assert float(table(out)["meta-llama/Meta-Llama-3-8B"][6]) == pytest.approx(83.3, abs=0.2)


def test_rows_are_those_of_the_run_or_of_the_dataset(run, toy, models, capsys, monkeypatch):
    before = sorted(run.rglob("*"))
    plan.main(["--run", str(run), "--model", str(models["llama"])])
    out = capsys.readouterr().out
    assert f"300 labelled, 2,000 impressions ({run / 'features'})" in out and str(models["llama"]) in out
    assert sorted(run.rglob("*")) == before
    monkeypatch.setattr(plan.this_machine, "seconds_of", lambda step, at_least=0: step() or 0.5)
    plan.main(["--data", str(toy), "--model", str(models["bert"])])
    out = capsys.readouterr().out
    assert f"300 labelled, 2,000 impressions ({toy})" in out
    cells = table(out.partition("on this machine")[2])
    epochs = stage("02").passes_over(300, 32)
    minutes = 300 * epochs / 64 / 60  # 32 rows a step of half a second
    assert cells[f"02, {epochs} epochs"] == [f"{300 * epochs:,}", "64", f"{minutes:.1f}"]
    assert cells["04, 20 epochs"][:2] == ["46,000", "512"] and "captions are not in it" in out
    plan.main(["--data", str(toy), "--model", str(models["llama"])])
    assert "has an encoder as teacher" in capsys.readouterr().out


def test_tokens_of_a_pair_are_reckoned_by_characters(toy):
    raw = plan.RawTables(toy)
    queries, pins = (raw.ask(f"SELECT * FROM raw_{name}") for name in ("queries", "pins"))
    query = sum(len(row[1]) for row in queries) / len(queries) / 4 + 2
    pin = sum(min(len(row[1] or "") + len(row[2] or ""), 512) for row in pins) / len(pins) / 4 + 2
    assert plan.this_machine.mean_tokens(raw, 128) == [int(query), int(pin), int(query + pin)]
    assert plan.this_machine.mean_tokens(raw, 5) == [5, 5, 5]


def test_a_model_that_is_not_the_papers(tmp_path, capsys):
    shape = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    write_json(tmp_path / "config.json", shape)
    plan.main(["--model", str(tmp_path)])
    assert "full" in table(capsys.readouterr().out)[str(tmp_path)][1]
