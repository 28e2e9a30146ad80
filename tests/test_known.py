"""Labels by what decides them: keys, tables on disk, and what a process looks up."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import mark_finished, stop_line

from lib.inputs import known
from lib.inputs.known import (
    FILE,
    KEY,
    KnownLabels,
    LabelTable,
    batch_of,
    label_keys,
    merge_own,
    tables_of,
)
from lib.inputs.pairs import write_labels
from lib.results.summary import describe_labels
from lib.stages.finished import hold

DECIDED_BY = "0" * 32


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(known, "BATCH", 100)


def keys_and_labels(n, seed):
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**64, (n, 2), dtype=np.uint64).view(KEY)
    return np.unique(keys), rng.random((n, 5), dtype=np.float32)


def as_dict(table):
    keys, labels = map(np.concatenate, zip(*table.between(b"", b"\xff" * 16)))
    return {key: label.tolist() for key, label in zip(keys.tolist(), labels)}


def test_a_key_is_of_the_tokens_and_of_what_else_decides():
    rows = [np.array(row, np.int32) for row in ([1, 2], [3], [1, 2], [2, 1], [3, 0])]
    keys = label_keys(rows, DECIDED_BY)
    assert keys.shape == (5,) and len(np.unique(keys)) == 4
    assert keys[0] == keys[2] and not (keys == label_keys(rows, "1" * 32)).any()


def test_keys_that_end_or_differ_in_zeros_are_found(tmp_path):
    keys = np.sort(np.array([bytes(16), b"a" + bytes(15), bytes(15) + b"a", b"a" * 15 + bytes(1)], KEY))
    labels = np.arange(20, dtype=np.float32).reshape(4, 5)
    table = known.write_table(tmp_path / "zeros.arrow", [batch_of(keys, labels)], DECIDED_BY)
    asked, found = np.sort(np.append(keys, b"ab")), np.full((5, 5), -1, np.float32)
    assert table.find(asked, found).tolist() == [key != b"ab" for key in asked]
    np.testing.assert_array_equal(found[found[:, 0] >= 0], labels)


def test_tables_find_what_they_have_and_merge(tmp_path):
    (one, of_one), (two, of_two) = keys_and_labels(333, 1), keys_and_labels(250, 2)
    two, of_two = np.concatenate([two, one[:7]]), np.concatenate([of_two, of_one[:7] + 1])
    rows = np.argsort(two)
    two, of_two = two[rows], of_two[rows]
    expected = dict(zip(two.tolist(), of_two.tolist()))
    expected |= dict(zip(one.tolist(), of_one.tolist()))  # of the first table
    tables = [known.write_table(tmp_path / f"{name}.arrow", [batch_of(*rows)], DECIDED_BY)
              for name, rows in (("1", (one, of_one)), ("2", (two, of_two)))]  # fmt: skip
    merged = known.merge(tables, tmp_path / "both.arrow")
    assert merged.rows == len(expected) == 583 and len(merged.firsts) == 6 and as_dict(merged) == expected
    asked = np.unique(np.concatenate([one[::3], keys_and_labels(50, 3)[0]]))
    labels = np.zeros((len(asked), 5), np.float32)
    found = merged.find(asked, labels)
    assert found.sum() == 111
    assert all(labels[row].tolist() == expected[asked[row].item()] for row in np.flatnonzero(found))


def test_a_process_finds_its_own_and_earlier_labels(tmp_path):
    """Shard by shard; what was killed before its labels were written is not trusted."""
    keys, labels = keys_and_labels(900, 4)
    earlier = {
        "monday": known.write_table(tmp_path / "m.arrow", [batch_of(keys[:50], labels[:50])], DECIDED_BY)
    }
    own = tmp_path / "own"
    process = KnownLabels(earlier, own, DECIDED_BY, set())
    for shard in range(9):
        rows = slice(100 * shard, 100 * shard + 100)
        _, source = process.find(keys[rows])
        assert source.tolist() == [1] * 50 * (shard == 0) + [-1] * (50 if shard == 0 else 100)
        process.add(f"part-{shard:05d}", keys[rows], labels[rows])
    assert len(process.tables) < 5  # of nine shards: tables of one size are joined
    assert (process.find(keys)[1] == 0).all()
    again = KnownLabels(earlier, own, DECIDED_BY, {"part-00008"})
    assert again.covered == {f"part-{shard:05d}" for shard in range(8)}
    found, source = again.find(keys)
    assert (source[:800] == 0).all() and (source[800:] == -1).all()
    np.testing.assert_array_equal(found[:800], labels[:800])
    assert as_dict(merge_own(own, tmp_path / FILE)) == dict(zip(keys.tolist(), labels.tolist()))


def test_earlier_runs_whose_labels_do_not_serve_are_named(tmp_path):
    said = []
    for name in ("good", "other", "damaged", "old"):
        folder = tmp_path / name / "labels"
        folder.mkdir(parents=True)
        decided_by = "1" * 32 if name == "other" else DECIDED_BY
        if name != "old":
            known.write_table(folder / FILE, [batch_of(*keys_and_labels(10, 5))], decided_by)
        mark_finished(folder)
    content = bytearray((tmp_path / "damaged" / "labels" / FILE).read_bytes())
    content[300] ^= 1
    (tmp_path / "damaged" / "labels" / FILE).write_bytes(content)
    runs = [tmp_path / name for name in ("damaged", "other", "good", "old", "gone")]
    tables, locks = tables_of(runs, tmp_path, DECIDED_BY, said.append)
    assert list(tables) == [str(tmp_path / "good")] and isinstance(tables[str(runs[2])], LabelTable)
    assert len(locks) == 1 and len(said) == 4
    for line, why in zip(
        said, ("not what its stage wrote", "another teacher", "version of stage 03", "missing")
    ):
        assert why in line and line.startswith("not looked up: ")


def test_labels_that_overwrite_replaces_are_known(tmp_path, monkeypatch):
    """`03 --overwrite`, which is what is advised where features are others, labelled every pair again."""
    folder = tmp_path / "run" / "labels"
    table = known.write_table(folder / FILE, [batch_of(*keys_and_labels(10, 5))], DECIDED_BY)
    mark_finished(folder)
    lock = hold(folder, "write")  # this process makes the folder
    found, _ = tables_of(None, tmp_path / "run", DECIDED_BY, print)
    assert {run: known.rows for run, known in found.items()} == {str(tmp_path / "run"): table.rows}
    monkeypatch.chdir(tmp_path)
    for same in (Path("run"), tmp_path / "run" / ".." / "run"):  # --known, written in another way
        assert [*tables_of((same,), tmp_path / "run", DECIDED_BY)[0]] == [str(same)]
    assert not tables_of((), tmp_path / "run", DECIDED_BY, print)[0]
    assert not tables_of(None, tmp_path / "run", "1" * 32, print)[0]
    content = bytearray((folder / FILE).read_bytes())
    content[300] ^= 1
    (folder / FILE).write_bytes(content)
    assert not tables_of(None, tmp_path / "run", DECIDED_BY, print)[0]
    del lock


def test_the_mean_label_is_of_all_shards(tmp_path, capsys):
    """Rows of level 1 in two shards of one row and of nine, of level 5 in ten shards of one."""
    paths = [tmp_path / f"part-{i:05d}.parquet" for i in range(12)]
    for path, rows in zip(paths, [1, 9, *[1] * 10]):
        labels = np.eye(5, dtype=np.float32)[[0 if path in paths[:2] else 4] * rows]
        write_labels(path, labels, {"rows": rows, "passes": rows, "looked_up": {}})
    describe_labels(paths, SimpleNamespace(path=paths[0], rows=2))
    assert "mean soft label: 1 highly irrelevant 50 %, 2 poor 0 %" in capsys.readouterr().out


def test_a_base_that_is_gone_is_named(tmp_path):
    (tmp_path / "run" / "features").mkdir(parents=True)
    mark_finished(tmp_path / "run" / "features", base=str(tmp_path / "monday"))
    line = stop_line(tables_of, None, tmp_path / "run", DECIDED_BY, print)
    assert str(tmp_path / "monday") in line and "--known" in line
