"""XQuAD-R: the same questions and passages in eleven languages -> raw tables.

    python data/from_xquad.py SOURCE_DIR --out data/xquad

Reads   SOURCE_DIR/LANGUAGE.json (or .json.gz), the folder xquad-r of
        github.com/google-research-datasets/lareqa (CC BY-SA 4.0: share-alike, no part of this project)
Writes  OUT/pins, queries, labels, impressions .parquet, skipped_questions.csv

    question        a query of its file's language
    sentence        a pin: its description; no title, for the articles' are English in every language
    level 5         the sentence with the answer (found by people)
          3         another sentence of its paragraph
          2         a sentence of another paragraph of its article
          1         a sentence of another article

A question is on one side in all languages, by a hash of its id: some train, in English alone, as the paper's
labels are; some evaluate, and some are unlabelled impressions, in every language. It is paired with one
sentence a level, of the same article and paragraph in every language. Two questions of the same text in some
language are one query: the later one is listed and left out.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import conversion  # the project's folder is on the path with it
from tyro.conf import Positional

from lib.stages.settings import ROOT, flags_read
from lib.stages.terminal import Stop, run_main, stop_on_error
from lib.tables.splits import query_key

HOME = "github.com/google-research-datasets/lareqa, folder xquad-r"
TRAIN_LANGUAGE = "en"
LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ru", "th", "tr", "vi", "zh")
PROBLEM = "missing in this language, or the text of an earlier question"


@dataclass(frozen=True)
class Settings:
    """Which questions are used, and as what."""

    source: Positional[Path]  # folder with LANGUAGE.json or .json.gz
    out: Path = ROOT / "data" / "xquad"  # dataset folder
    languages: tuple[Literal[LANGUAGES], ...] = LANGUAGES  # of the questions
    train_questions: int = 500  # train, 4 rows each
    eval_questions: int = 100  # evaluate, 4 rows each a language
    impression_questions: int = 150  # unlabelled, in every language


class Question(NamedTuple):
    """A question with its place: numbers of its article and paragraph, and of the sentences of the paragraph
    that hold a part of its answer."""

    text: str
    article: int
    paragraph: int
    answering: list


def read_language(folder, language):
    """A file -> articles, {question id: Question}. An article: its paragraphs, each a list of sentences."""
    path, articles, questions = folder / f"{language}.json", [], {}
    wrong = stop_on_error(f"{path}: not as XQuAD-R's files are", f"get it from {HOME}")
    with conversion.open_text(path, HOME) as file, wrong:
        for number, entry in enumerate(json.load(file)["data"]):
            articles.append([])
            for paragraph in entry["paragraphs"]:
                read_paragraph(paragraph, number, articles[number], questions)
    return articles, questions


def read_paragraph(paragraph, article, paragraphs, questions):
    """Adds a paragraph's sentences and questions to those of its article. A sentence without text is none."""
    context = paragraph["context"]
    breaks = [(start, end) for start, end in paragraph["sentence_breaks"] if context[start:end].strip()]
    for entry in paragraph["qas"]:
        first = entry["answers"][0]["answer_start"]
        last = first + len(entry["answers"][0]["text"])
        answering = [n for n, (start, end) in enumerate(breaks) if start < last and first < end]
        if not answering:
            raise ValueError(f"no sentence with the answer of question {entry['id']}")
        questions[entry["id"]] = Question(entry["question"].strip(), article, len(paragraphs), answering)
    if not breaks:
        raise ValueError("a paragraph without sentences")
    paragraphs.append([context[start:end].strip() for start, end in breaks])


def without_twins(by_language):
    """(ids of the questions to use, those left out: (id, language, text, why)). by_language: {language: {id:
    Question}}. A question that some language lacks is left out; of two of one text the later id."""
    used, left_out, taken = [], [], set()
    for question in sorted(set().union(*by_language.values())):
        asked = {language: questions.get(question) for language, questions in by_language.items()}
        texts = {language: found.text if found else "" for language, found in asked.items()}
        keys = {language: (language, query_key(text)) for language, text in texts.items()}
        problems = [language for language in texts if not texts[language] or keys[language] in taken]
        if problems:
            left_out.append((question, problems[0], texts[problems[0]], PROBLEM))
        else:
            used.append(question)
            taken.update(keys.values())
    return used, left_out


def graded_sentences(question_id, question, articles):
    """One sentence a level: [(article, paragraph, sentence, level)], numbers; a level without any sentence is
    left out. The draw of article and paragraph depends on the question's id alone."""
    rng = random.Random(question_id)
    _, a, p, answering = question
    other_paragraphs = [number for number in range(len(articles[a])) if number != p]
    other_articles = [number for number in range(len(articles)) if number != a]
    near = rng.choice(other_paragraphs) if other_paragraphs else None
    far = rng.choice(other_articles) if other_articles else None
    place = rng.random()  # where in an article or paragraph: as a share, since languages differ in length

    def pick(choices):
        return choices[int(place * len(choices))]

    others = [number for number in range(len(articles[a][p])) if number not in answering]
    found = [(a, p, answering[0], 5)]
    if others:
        found.append((a, p, pick(others), 3))
    if near is not None:
        found.append((a, near, pick(range(len(articles[a][near]))), 2))
    if far is not None:
        paragraph = pick(range(len(articles[far])))
        found.append((far, paragraph, pick(range(len(articles[far][paragraph]))), 1))
    return found


def deal(questions, settings):
    """Question ids -> {side: ids}, in the order of a hash of the id."""
    order = sorted(questions, key=lambda question: hashlib.blake2b(f"xquad:{question}".encode()).digest())
    sizes = [settings.train_questions, settings.eval_questions, settings.impression_questions]
    if min(sizes) < 1 or sum(sizes) > len(order):
        flags = "--train-questions, --eval-questions, --impression-questions"
        raise Stop(f"{flags}: {sizes}; at least 1 each, at most {len(order):,} together, as there are")
    first, second = sizes[0], sizes[0] + sizes[1]
    return {"train": order[:first], "eval": order[first:second], "hidden": order[second : sum(sizes)]}


def make_tables(settings):
    """The folder's files -> ({table: rows}, questions left out)."""
    files = {language: read_language(settings.source, language) for language in settings.languages}
    used, left_out = without_twins({language: questions for language, (_, questions) in files.items()})
    sides = deal(used, settings)
    pins, queries, labels, impressions = [], [], [], []
    for language, (articles, questions) in files.items():
        for a, paragraphs in enumerate(articles):
            for p, sentences in enumerate(paragraphs):
                pins += [(f"{language}-{a}-{p}-{s}", None, text) for s, text in enumerate(sentences)]
        for side, ids in sides.items():
            for question in ids if side != "train" or language == TRAIN_LANGUAGE else ():
                query = f"{language}-{question}"
                queries.append((query, questions[question].text, language))
                for a, p, s, level in graded_sentences(question, questions[question], articles):
                    pair = (query, f"{language}-{a}-{p}-{s}")
                    if side == "hidden":
                        impressions.append(pair)
                    else:
                        labels.append((*pair, level, side))
    return {"pins": pins, "queries": queries, "labels": labels, "impressions": impressions}, left_out


def main(argv=None):
    settings = flags_read(Settings, None, argv, __doc__.split("\n")[0])
    if TRAIN_LANGUAGE not in settings.languages:
        raise Stop(f"--languages: {TRAIN_LANGUAGE} trains, and must be among them")
    tables, left_out = make_tables(settings)
    columns = ("question_id", "language", "question")
    conversion.write_dataset(settings.out, tables, "skipped_questions.csv", columns, left_out)


if __name__ == "__main__":
    run_main(main)
