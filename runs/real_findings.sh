#!/usr/bin/env bash
# The paper's four findings on real text and labels: (a) teachers, (b) impressions and (d) pin text on MSRD,
# (c) languages on XQuAD-R; and the five stages with a Llama as teacher.
#     bash runs/real_findings.sh MSRD XQUAD ENCODER LLAMA MULTILINGUAL     a GPU, minutes; two CPU cores, days
# MSRD, XQUAD: as of runs/msrd.sh, runs/xquad.sh. Models, folders or ids: sentence-transformers/
# all-MiniLM-L6-v2, HuggingFaceTB/SmolLM2-135M-Instruct, google/gemma-3-270m. RUN: parent of the runs
# (outputs/real); SEEDS (0 1 2); JOBS, at a time (1; a GPU of 40 GB takes 8). Figures: experiments/RESULTS.md.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
USAGE="usage: bash runs/real_findings.sh MSRD XQUAD ENCODER LLAMA MULTILINGUAL"
MSRD="$(from_here "${1:?$USAGE}")"; XQUAD="$(from_here "${2:?$USAGE}")"; ENCODER="$(from_here "${3:?$USAGE}")"
LLAMA="$(from_here "${4:?$USAGE}")"; MULTILINGUAL="$(from_here "${5:?$USAGE}")"
PARENT="${RUN:-outputs/real}"; MOVIES="$PARENT/msrd"; WITH_LLAMA="$PARENT/llama"; LANGUAGES="$PARENT/xquad"
read -ra SEEDS <<< "${SEEDS:-0 1 2}"
findings() {
    run python -m experiments.findings "$@" --into "$PARENT/findings" --jobs "${JOBS:-1}" \
        --seeds "${SEEDS[@]}"
}

# The five stages, with 30 times the human labels in impressions; (a), (b), (d)
RUN="$MOVIES" IMPRESSIONS=84000 bash runs/msrd.sh "$MSRD" "$ENCODER"
findings --run "$MOVIES" --findings a b d --run-teacher MiniLM-22M --fields title description boards links \
    --models "SmolLM2-135M=$LLAMA" "Gemma-270M=$MULTILINGUAL"

# A Llama teaches: its soft labels of all impressions, and a student
mkdir -p "$WITH_LLAMA"
ln -sfn ../msrd/features "$WITH_LLAMA/features"
the_stages small "$WITH_LLAMA" --model "$LLAMA" --max-tokens 64

# (c). A teacher reads no embeddings: the toy's text encoder will do
run python data/from_xquad.py "$XQUAD" --out data/xquad_500 --train-questions 500 --eval-questions 150 \
    --impression-questions 10
run python 01_build_features.py --run "$LANGUAGES" --data data/xquad_500
run python 02_train_teacher.py --preset small --run "$LANGUAGES" --model "$MULTILINGUAL" --max-tokens 128 \
    --fields description
run python 03_label.py --preset small --run "$LANGUAGES" --only-labelled
findings --run "$LANGUAGES" --findings c --run-teacher Gemma-270M-languages
