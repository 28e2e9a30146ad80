"""benchmarks/plan.py: parameters counted against the sizes their makers state, the rows of a
dataset, hours."""

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
    "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2": 117.5,  # 117.7 with the pooler
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


def test_several_gpus_share_the_hours(capsys):
    llama = ["--model", "meta-llama/Meta-Llama-3-8B", "--price", "3", "--label-speed", "20000"]
    plan.main([*llama, "--gpus", "8", "--machines", "2"])
    out = capsys.readouterr().out
    cells = table(out)["meta-llama/Meta-Llama-3-8B"]
    hours = 30e6 * 200 / 20_000 / 3600
    assert float(cells[6]) == pytest.approx(hours / 16, abs=0.06) and cells[7] == f"{hours * 3:,.0f}"
    assert float(cells[3]) == pytest.approx(5.35 / 16, abs=0.06)
    assert "captions of 10,000,000 pictures: 1.0 h, 48 USD" in out
    plan.main([*llama, "--impressions", "0", "--pictures", "0"])
    out = capsys.readouterr().out
    assert "of 0 pictures: 0.0 h" in out and table(out)["meta-llama/Meta-Llama-3-8B"][6] == "0.0"


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--machines", "-1"], "--machines -1: must be at least 1"),
        (["--impressions", "-1"], "--impressions -1: must be at least 0"),
        (["--label-speed", "0"], "--label-speed 0.0: must be more than 0"),
        (["--pins", "many"], "--pins"),
    ],
)
def test_a_wrong_flag_is_one_line(wrong, line, capsys):
    with pytest.raises(SystemExit) as ended:
        plan.main(wrong)
    said = capsys.readouterr()
    assert ended.value.code == 2 and line in said.err and said.err.count("\n") == 1 and not said.out


def test_rows_are_those_of_the_dataset(toy, models, capsys, monkeypatch):
    monkeypatch.setattr(plan, "seconds_of", lambda step, at_least=0: (step(), 0.5)[1])
    plan.main(["--data", str(toy), "--model", str(models["bert"])])
    out = capsys.readouterr().out
    assert f"300 labelled, 2,000 impressions ({toy})" in out
    cells = table(out.partition("on this machine")[2])
    epochs = stage("02").passes_over(300, 32)
    minutes = 300 * epochs / 64 / 60  # 32 rows a step of half a second
    assert cells[f"02, {epochs} epochs"] == [f"{300 * epochs:,}", "64", f"{minutes:.1f}"]
    assert cells["04, 20 epochs"][:2] == ["46,000", "512"] and "captions are not in it" in out
    plan.main(["--data", str(toy), "--model", str(models["llama"])])
    assert "teacher is an encoder" in capsys.readouterr().out


def test_tokens_of_a_pair_are_reckoned_by_characters(toy):
    raw = plan.RawTables(toy)
    queries, pins = (raw.ask(f"SELECT * FROM raw_{name}") for name in ("queries", "pins"))
    query = sum(len(row[1]) for row in queries) / len(queries) / 4 + 2
    pin = sum(min(len(row[1] or "") + len(row[2] or ""), 512) for row in pins) / len(pins) / 4 + 2
    assert plan.mean_tokens(raw, 128) == [int(query), int(pin), int(query + pin)]
    assert plan.mean_tokens(raw, 5) == [5, 5, 5]


def test_a_model_that_is_not_the_papers(tmp_path, capsys):
    shape = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    write_json(tmp_path / "config.json", shape)
    plan.main(["--model", str(tmp_path)])
    assert "full" in table(capsys.readouterr().out)[str(tmp_path)][1]
