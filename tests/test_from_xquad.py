"""The XQuAD-R converter on three short articles in its schema."""

import csv
import gzip
import json

import from_xquad
import pyarrow.parquet as pq
import pytest
from helpers import stop_line

LANGUAGES = ("en", "de", "zh")
STOP = {"en": ". ", "de": ". ", "zh": "。"}


def sentence_breaks(sentences):
    """[start, end] of each sentence in their concatenation."""
    breaks, start = [], 0
    for sentence in sentences:
        breaks.append([start, start + len(sentence)])
        start += len(sentence)
    return breaks


def language_file(language, articles=3, paragraphs=3):
    """Each paragraph: two sentences in Chinese and three elsewhere, each with a question for its number; the
    last paragraph of the last article has one sentence."""
    data, number = [], 0
    for a in range(articles):
        entries = []
        for p in range(paragraphs):
            alone = (a, p) == (articles - 1, paragraphs - 1)
            sentences, qas = [], []
            for s in range(1 if alone else 2 if language == "zh" else 3):
                sentences.append(f"{language} sentence {a}{p}{s} says {1000 + number + s}{STOP[language]}")
            context = "".join(sentences)
            for s in range(1 if alone else 2):
                answer = {
                    "answer_start": context.index(f"{1000 + number + s}"),
                    "text": f"{1000 + number + s}",
                }
                text = f"{language} what says {a}{p}{s}?"
                qas.append({"id": f"id{number + s:03d}", "question": text, "answers": [answer]})
            number += 10
            entry = {"context": context, "qas": qas, "sentence_breaks": sentence_breaks(sentences)}
            entries.append({**entry, "sentences": sentences})
        data.append({"title": f"Article_number_{a}", "paragraphs": entries})
    return {"data": data, "version": "1.1"}


def source(folder, zipped=False, change=None):
    folder.mkdir()
    for language in LANGUAGES:
        content = language_file(language)
        if change:
            change(language, content["data"])
        text = json.dumps(content)
        if zipped:
            (folder / f"{language}.json.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{language}.json").write_text(text, encoding="utf-8")
    return folder


def argv(folder, out, *more, sizes=(7, 5, 5)):
    flags = ("--train-questions", "--eval-questions", "--impression-questions")
    sizes = [text for pair in zip(flags, map(str, sizes)) for text in pair]
    return [str(folder), "--out", str(out), "--languages", *LANGUAGES, *sizes, *more]


def read(folder, name):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xquad")
    from_xquad.main(argv(source(folder / "source"), folder / "out"))
    return folder / "out"


def test_levels_follow_from_the_answer(out):
    """By the texts alone: a question and a sentence name their article, paragraph and sentence."""
    questions = {row["query_id"]: row["query"] for row in read(out, "queries")}
    sentences = {row["pin_id"]: row["description"] for row in read(out, "pins")}
    levels = []
    for row in read(out, "labels"):
        asked = questions[row["query_id"]].split()[-1].rstrip("?")
        language, _, place, *_ = sentences[row["pin_id"]].split()
        assert questions[row["query_id"]].split()[0] == language
        same = [asked[:length] == place[:length] for length in (3, 2, 1)]  # sentence, paragraph, article
        assert row["label"] == (5, 3, 2, 1)[[*same, True].index(True)]
        levels.append(row["label"])
    assert {1, 2, 3, 5} == set(levels) and levels.count(5) == levels.count(1) == 7 + 5 * len(LANGUAGES)
    assert levels.count(5) - 3 <= levels.count(3) <= levels.count(5)  # one paragraph has one sentence


def test_sides(out):
    """Training in English alone; evaluation and impressions in all languages; a question on one side."""
    ids = {"train": set(), "eval": set(), "hidden": set()}
    languages = {side: set() for side in ids}
    labels = [(row["query_id"], row["split"]) for row in read(out, "labels")]
    for query, side in labels + [(row["query_id"], "hidden") for row in read(out, "impressions")]:
        language, question = query.split("-")
        ids[side].add(question)
        languages[side].add(language)
    assert [len(ids[side]) for side in ids] == [7, 5, 5] and len(set().union(*ids.values())) == 17
    assert languages == {"train": {"en"}, "eval": set(LANGUAGES), "hidden": set(LANGUAGES)}
    assert {row["language"] for row in read(out, "queries")} == set(LANGUAGES)
    assert len(read(out, "queries")) == 7 + 10 * len(LANGUAGES)


def test_languages_have_the_same_pairs(out):
    """Article and paragraph of a question's pairs are those of the other languages."""
    pairs = {language: set() for language in LANGUAGES}
    for row in read(out, "labels"):
        if row["split"] == "eval":
            language, question = row["query_id"].split("-")
            _, article, paragraph, _ = row["pin_id"].split("-")
            pairs[language].add((question, article, paragraph, row["label"]))
    assert pairs["en"] == pairs["de"]
    assert {pair for pair in pairs["en"] if pair[3] > 1} == {pair for pair in pairs["zh"] if pair[3] > 1}


def test_zipped_and_again(out, tmp_path):
    folder = source(tmp_path / "source", zipped=True)
    assert {row["title"] for row in read(out, "pins")} == {None}
    from_xquad.main(argv(folder, tmp_path / "again"))
    for path in sorted(out.glob("*.parquet")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_stage_01_takes_it(out, tmp_path):
    from lib.tables.raw import RawTables

    RawTables(out, spill=tmp_path / "spill").check()


def test_twins_and_fragments(tmp_path):
    """Two questions of one text in one language are one query; a sentence without text is no pin; an answer
    that goes over a sentence's end belongs to the sentence where it begins."""

    def change(language, data):
        first, second = data[0]["paragraphs"][0]["qas"]
        if language == "de":
            second["question"] = f"  i{first['question'].upper()} "
            first["question"] = f"İ{first['question']}"  # one letter to query_key, two to lower()
        paragraph = data[1]["paragraphs"][0]
        end = len(paragraph["context"])
        paragraph["context"] += "  "
        paragraph["sentence_breaks"].append([end, end + 2])
        boundary = data[1]["paragraphs"][1]
        boundary["qas"][0]["answers"][0]["text"] = boundary["context"][
            boundary["qas"][0]["answers"][0]["answer_start"] : boundary["sentence_breaks"][1][0] + 4
        ]

    folder = source(tmp_path / "source", change=change)
    assert "16" in stop_line(from_xquad.main, argv(folder, tmp_path / "out"))  # 17 are asked for
    assert "[7, 5, -5]" in stop_line(from_xquad.main, argv(folder, tmp_path / "out", sizes=(7, 5, -5)))
    from_xquad.main(argv(folder, tmp_path / "out", sizes=(6, 5, 5)))
    with open(tmp_path / "out" / "skipped_questions.csv", newline="", encoding="utf-8") as f:
        assert [(row["question_id"], row["language"]) for row in csv.DictReader(f)] == [("id001", "de")]
    assert all(row["description"].strip() for row in read(tmp_path / "out", "pins"))
    rows = read(tmp_path / "out", "labels") + read(tmp_path / "out", "impressions")
    pins = [row["pin_id"] for row in rows if row["query_id"] == "en-id040"]
    assert "en-1-1-0" in pins and "en-1-1-1" not in pins  # neither 5 nor 3


def test_wrong_input_is_one_line(tmp_path):
    folder = source(tmp_path / "source")
    (folder / "zh.json").write_text('{"data": [{"title": "x"}]}')
    line = stop_line(from_xquad.main, argv(folder, tmp_path / "out"))
    assert "zh.json" in line and "paragraphs" in line
    (folder / "zh.json").unlink()
    assert "lareqa" in stop_line(from_xquad.main, argv(folder, tmp_path / "out"))
    assert "en trains" in stop_line(from_xquad.main, [str(folder), "--languages", "de"])
