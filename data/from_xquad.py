"""XQuAD-R: the same questions and passages in eleven languages -> raw tables.

    python data/from_xquad.py SOURCE_DIR --out data/xquad
    python data/from_xquad.py SOURCE_DIR --out data/xquad --train-questions 250 --eval-questions 75

Reads   SOURCE_DIR/LANGUAGE.json (or .json.gz), the folder xquad-r of
        github.com/google-research-datasets/lareqa (CC BY-SA 4.0: share-alike, no part of this project)
Writes  OUT/pins, queries, labels, impressions .parquet, skipped_questions.csv

    question        a query of its file's language
    sentence        a pin: its description. No title, unless --titles
    level 5         the sentence with the answer (found by people)
          3         another sentence of its paragraph
          2         a sentence of another paragraph of its article
          1         a sentence of another article

The articles' titles are English in every language. With them a teacher would read English beside an Arabic
sentence; without them what carries over to Arabic is all the model's own.

A question has one id in all languages and is on one side in all of them: by a hash of the ids the first
--train-questions train, in English alone, as the paper's labels are; the next --eval-questions evaluate, in
every language; the next --impression-questions are unlabelled impressions in every language. Each question
is paired with one sentence a level, of the same article and paragraph in every language, so that levels are
equally frequent and languages can be compared. Two questions of the same text in some language (in English
"Who won Super Bowl XLIX?" stands there twice) are one query: the later one is listed and left out.
"""

import argparse
import csv
import gzip
import hashlib
import json
import random
import sys
import unicodedata
from collections import Counter, namedtuple
from pathlib import Path

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.stages.files import whole_file, write_parquet  # noqa: E402
from lib.stages.settings import ROOT  # noqa: E402
from lib.stages.terminal import Stop, run_main  # noqa: E402

HOME = "github.com/google-research-datasets/lareqa, folder xquad-r"
LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ru", "th", "tr", "vi", "zh")

# A question with its place: numbers of its article and paragraph, and the place of its answer in the text.
Question = namedtuple("Question", "text article paragraph start end")


# ------------------------------------------------------------------------------------------------------------
# The source


def read_language(folder, language):
    """A file -> articles, {question id: Question}. An article: its title and its paragraphs, each a list of
    sentences (start, end, text)."""
    path = folder / f"{language}.json"
    zipped = folder / f"{language}.json.gz"
    if not path.exists() and not zipped.exists():
        raise Stop(f"{path}: missing; get it from {HOME}")
    content = path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    articles, questions = [], {}
    try:
        for number, entry in enumerate(json.loads(content)["data"]):
            articles.append((entry["title"].replace("_", " "), []))
            for paragraph in entry["paragraphs"]:
                read_paragraph(paragraph, number, articles[number][1], questions)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Stop(f"{path}: not as XQuAD-R's files are ({error!r}); get it from {HOME}") from None
    return articles, questions


def read_paragraph(paragraph, article, paragraphs, questions):
    """Adds a paragraph's sentences and questions to those of its article. A sentence without text is none."""
    context = paragraph["context"]
    sentences = []
    for start, end in paragraph["sentence_breaks"]:
        text = context[start:end].strip()
        if text:
            sentences.append((start, end, text))
    if not sentences:
        raise ValueError("a paragraph without sentences")
    for entry in paragraph["qas"]:
        start = entry["answers"][0]["answer_start"]
        end = start + len(entry["answers"][0]["text"])
        question = Question(entry["question"].strip(), article, len(paragraphs), start, end)
        if not any(holds_answer(sentence, question) for sentence in sentences):
            raise ValueError(f"no sentence with the answer of question {entry['id']}")
        questions[entry["id"]] = question
    paragraphs.append(sentences)


def holds_answer(sentence, question):
    """Does a sentence (start, end, text) of the question's paragraph have a part of the answer in it?"""
    start, end, _ = sentence
    return start < question.end and question.start < end


def without_twins(by_language):
    """(ids of the questions to use, those left out: (id, language, text)). by_language: {language: {id:
    Question}}. A question that some language lacks is left out; of two of one text the later id."""
    used, left_out, taken = [], [], set()
    for question in sorted(set().union(*by_language.values())):
        texts = []
        for language, questions in by_language.items():
            text = questions[question].text if question in questions else ""
            texts.append((language, unicodedata.normalize("NFC", text).strip().lower()))
        problem = [(language, text) for language, text in texts if not text or (language, text) in taken]
        if problem:
            left_out.append((question, *problem[0]))
        else:
            used.append(question)
            taken.update(texts)
    return used, left_out


def deal(questions, sizes):
    """Question ids -> {split: ids}, in the order of a hash of the id. sizes: {split: number of questions}."""
    keys = {question: hashlib.blake2b(f"xquad:{question}".encode()).digest() for question in questions}
    order = sorted(questions, key=keys.get)
    split, start = {}, 0
    for name, size in sizes.items():
        split[name] = order[start : start + size]
        start += size
    return split


# ------------------------------------------------------------------------------------------------------------
# Pairs


def graded_sentences(question_id, question, articles):
    """One sentence a level: [(article, paragraph, sentence, level)], numbers; a level without any sentence
    (an answer's paragraph of one sentence has no 3) is left out. The draw of article and paragraph depends on
    the question's id alone."""
    rng = random.Random(question_id)
    a, p = question.article, question.paragraph
    other_paragraphs = [number for number in range(len(articles[a][1])) if number != p]
    other_articles = [number for number in range(len(articles)) if number != a]
    near = rng.choice(other_paragraphs) if other_paragraphs else None
    far = rng.choice(other_articles) if other_articles else None
    place = rng.random()  # where in an article or paragraph: as a share, since languages differ in length

    answering, others = [], []
    for number, sentence in enumerate(articles[a][1][p]):
        (answering if holds_answer(sentence, question) else others).append(number)
    found = [(a, p, answering[0], 5)]
    if others:
        found.append((a, p, pick(others, place), 3))
    if near is not None:
        found.append((a, near, pick(range(len(articles[a][1][near])), place), 2))
    if far is not None:
        paragraph = pick(range(len(articles[far][1])), place)
        sentence = pick(range(len(articles[far][1][paragraph])), place)
        found.append((far, paragraph, sentence, 1))
    return found


def pick(choices, place):
    """The choice that stands at `place`, a share of their number."""
    return choices[int(place * len(choices))]


# ------------------------------------------------------------------------------------------------------------


def pin_rows(language, articles, titles):
    """(pin_id, title, description) of a language's sentences."""
    rows = []
    for a, (title, paragraphs) in enumerate(articles):
        for p, sentences in enumerate(paragraphs):
            for s, (_, _, text) in enumerate(sentences):
                rows.append((pin_id(language, a, p, s), title if titles else None, text))
    return rows


def pin_id(language, article, paragraph, sentence):
    return f"{language}-{article}-{paragraph}-{sentence}"


def make_tables(source, args):
    """The folder's files -> ({table: {column: values}}, questions left out)."""
    articles, questions = {}, {}
    for language in args.languages:
        articles[language], questions[language] = read_language(source, language)
    used, left_out = without_twins(questions)
    sizes = {"train": args.train_questions, "eval": args.eval_questions, "hidden": args.impression_questions}
    splits = deal(used, sizes)
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(used):
        raise Stop(
            "--train-questions, --eval-questions, --impression-questions: at least 1 each, at most "
            f"{len(used):,} together, the questions of {source}; they are {list(sizes.values())}"
        )

    pins, queries, labels, impressions = [], [], [], []
    for language in args.languages:
        pins += pin_rows(language, articles[language], args.titles)
        for split, ids in splits.items():
            if split == "train" and language != args.train_language:
                continue
            for question_id in ids:
                query = f"{language}-{question_id}"
                question = questions[language][question_id]
                queries.append((query, question.text, language))
                for a, p, s, level in graded_sentences(question_id, question, articles[language]):
                    pin = pin_id(language, a, p, s)
                    if split == "hidden":
                        impressions.append((query, pin))
                    else:
                        labels.append((query, pin, level, split))
    tables = {
        "pins": as_columns(("pin_id", "title", "description"), pins),
        "queries": as_columns(("query_id", "query", "language"), queries),
        "labels": as_columns(("query_id", "pin_id", "label", "split"), labels),
        "impressions": as_columns(("query_id", "pin_id"), impressions),
    }
    return tables, left_out


def as_columns(names, rows):
    """Tuples -> {name: values}."""
    columns = dict(zip(names, zip(*rows)))
    if "title" in columns:
        columns["title"] = pa.array(columns["title"], pa.string())  # all may be null
    return columns


def summary(tables):
    """Rows a table; labels by split, language and level."""
    lines = [", ".join(f"{len(columns[next(iter(columns))]):,} {name}" for name, columns in tables.items())]
    labels = tables["labels"]
    counts = Counter()
    for query, level, split in zip(labels["query_id"], labels["label"], labels["split"]):
        counts[split, query.split("-")[0], level] += 1
    for split, language in sorted({(split, language) for split, language, _ in counts}):
        levels = [f"level {level} {counts[split, language, level]:,}" for level in (1, 2, 3, 5)]
        lines.append(f"{split} {language}: {', '.join(levels)}")
    return lines


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("source", type=Path, metavar="SOURCE_DIR", help="folder with LANGUAGE.json or .json.gz")
    p.add_argument("--out", type=Path, default=ROOT / "data" / "xquad", metavar="DIR", help="dataset folder")
    p.add_argument("--languages", nargs="+", default=LANGUAGES, choices=LANGUAGES, help="(all eleven)")
    p.add_argument("--train-language", default="en", choices=LANGUAGES, help="of the training labels (en)")
    p.add_argument("--train-questions", type=int, default=500, metavar="N", help="train, 4 rows each (500)")
    p.add_argument(
        "--eval-questions", type=int, default=100, metavar="N", help="evaluate, 4 rows each a language (100)"
    )
    p.add_argument(
        "--impression-questions",
        type=int,
        default=150,
        metavar="N",
        help="unlabelled, in every language (150)",
    )
    p.add_argument("--titles", action="store_true", help="pins have their article's English title")
    args = p.parse_args(argv)
    if args.train_language not in args.languages:
        raise Stop(f"--train-language {args.train_language} is not among --languages {args.languages}")
    return args


def main(argv=None):
    args = parse_args(argv)
    tables, left_out = make_tables(args.source, args)
    for name, columns in tables.items():
        write_parquet(args.out / f"{name}.parquet", columns)
    listed = args.out / "skipped_questions.csv"
    with whole_file(listed) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        rows = [(*row, "missing in this language, or the text of an earlier question") for row in left_out]
        csv.writer(f).writerows([("question_id", "language", "question", "reason"), *rows])
    print(f"wrote {args.out}: " + "\n  ".join(summary(tables)))
    print(f"  {len(left_out):,} questions left out, see {listed.name}")


if __name__ == "__main__":
    run_main(main)
