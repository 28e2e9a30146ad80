#!/usr/bin/env bash
# English labels, eleven languages: the paper's third finding on real text. XQuAD-R, questions and sentences
# (data/from_xquad.py says what it is, where to get it, and its licence).
#
#   bash runs/xquad.sh SOURCE_DIR MODEL ENCODER
#
# SOURCE_DIR: the folder xquad-r, one JSON file a language
# MODEL:      the teacher, a multilingual language model: a folder or a hub id, such as google/gemma-3-270m
#             (QLoRA) or FacebookAI/xlm-roberta-base
# ENCODER:    the text encoder behind the student, multilingual too, such as
#             sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2
#
# Hardware: two CPU cores, 6 GB. Time with Gemma 3 270M: one to two hours, half of it training.
# Faster: fewer questions (--train-questions, --eval-questions, --impression-questions of data/from_xquad.py).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
USAGE="usage: bash runs/xquad.sh SOURCE_DIR MODEL ENCODER"
SOURCE="$(from_here "${1:?$USAGE}")"
MODEL="$(from_here "${2:?$USAGE}")"
ENCODER="$(from_here "${3:?$USAGE}")"
RUN="${RUN:-outputs/xquad}"

SECONDS=0
run python data/from_xquad.py "$SOURCE" --out data/xquad
run python 01_build_features.py --preset small --run "$RUN" --data data/xquad --text-encoder "$ENCODER"
the_stages small "$RUN" --model "$MODEL" --max-tokens 128 --fields description
echo; echo "all: $SECONDS s"
