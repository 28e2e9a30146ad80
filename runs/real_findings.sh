#!/usr/bin/env bash
# The paper's four findings on real text and labels: (a) teachers, (b) amount of impressions and (d) pin text on
# movie searches with few human labels (MSRD); (c) English labels, eleven languages (XQuAD-R).
#
#   bash runs/real_findings.sh MSRD XQUAD ENCODER LLAMA MULTILINGUAL
#
# MSRD:         folder with movies-corpus.jsonl.gz and movies-judgments.tsv.gz   (data/from_msrd.py)
# XQUAD:        the folder xquad-r, one JSON file a language                     (data/from_xquad.py)
# ENCODER:      sentence-transformers/all-MiniLM-L6-v2, or its folder
# LLAMA:        HuggingFaceTB/SmolLM2-135M-Instruct, or its folder
# MULTILINGUAL: google/gemma-3-270m, or its folder
#
# Into outputs/real/findings: findings.md, findings.json, pictures. Hardware: two CPU cores, 6 GB, some hours; a
# GPU: minutes. Figures: README.md, notebooks/paper_findings.ipynb.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
USAGE="usage: bash runs/real_findings.sh MSRD XQUAD ENCODER LLAMA MULTILINGUAL"
MSRD="$(from_here "${1:?$USAGE}")"; XQUAD="$(from_here "${2:?$USAGE}")"; ENCODER="$(from_here "${3:?$USAGE}")"
LLAMA="$(from_here "${4:?$USAGE}")"; MULTILINGUAL="$(from_here "${5:?$USAGE}")"
PARENT="${RUN:-outputs/real}"
FEW="$PARENT/msrd_few"; LANGUAGES="$PARENT/xquad"; INTO="$PARENT/findings"

# (a), (d): 518 human labels. A teacher reads no embeddings: the toy's text encoder will do
run python data/from_msrd.py "$MSRD" --out data/msrd_few --train-share 0.0015 --eval-share 0.0085 \
    --max-impressions 20000
run python 01_build_features.py --run "$FEW" --data data/msrd_few
run python 02_train_teacher.py --preset small --run "$FEW" --model "$ENCODER" --max-tokens 64
run python 03_label.py --preset small --run "$FEW" --only-labelled
run python -m runs.findings --run "$FEW" --into "$INTO" --findings a --run-teacher MiniLM-22M --jobs 1 \
    --models "SmolLM2-135M=$LLAMA" --teacher-seeds 0 \
    --teacher-flags "--preset small --max-tokens 64"
run python -m runs.findings --run "$FEW" --into "$INTO" --findings d --teacher-seeds 0 --jobs 1 \
    --fields title description boards links --teacher-flags "--preset small --max-tokens 64"

# (b): on the run of runs/msrd.sh
[ -e outputs/msrd/report/metrics.json ] || bash runs/msrd.sh "$MSRD" "$ENCODER"
run python -m runs.findings --run outputs/msrd --into "$INTO" --findings b --student-flags "--preset small"

# (c): English labels, eleven languages
run python data/from_xquad.py "$XQUAD" --out data/xquad --train-questions 250 --eval-questions 50 \
    --impression-questions 10
run python 01_build_features.py --run "$LANGUAGES" --data data/xquad
run python 02_train_teacher.py --preset small --run "$LANGUAGES" --model "$MULTILINGUAL" --max-tokens 128 \
    --fields description --epochs 2 --head-lr 2e-4
run python 03_label.py --preset small --run "$LANGUAGES" --only-labelled
run python -m runs.findings --run "$LANGUAGES" --into "$INTO" --findings c
