#!/usr/bin/env bash
# Product search in English, Spanish and Japanese: Amazon's ESCI (data/from_esci.py says what it is and where
# to get it). English labels teach; the test split evaluates in all three languages.
#
#     bash runs/esci.sh SOURCE_DIR [TEACHER]      a folder or a hub id (default: FacebookAI/xlm-roberta-large)
#
# SOURCE_DIR  the folder with the two Parquet files. VERSION=large takes all judgments; the default is the
#             reduced version, of task 1 (ranking). TRAIN="us es" adds labels of another language.
# Hardware    one GPU, or several. A laptop: `PRESET=small SHARE=0.02`, a small teacher on that share of the
#             queries. Hours, memory and disk: `DRY=1 bash runs/esci.sh …`. Ours has not been measured.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
SOURCE="$(from_here "${1:?usage: bash runs/esci.sh SOURCE_DIR [TEACHER]}")"
PRESET="${PRESET:-paper}"; VERSION="${VERSION:-small}"; SHARE="${SHARE:-1}"; TRAIN="${TRAIN:-us}"
TEACHER="${2:+$(from_here "$2")}"
if [ -z "$TEACHER" ] && [ "$PRESET" = paper ]; then TEACHER=FacebookAI/xlm-roberta-large; fi
SET="esci_${VERSION}_${SHARE}_${TRAIN// /}"; DATA="data/$SET"
RUN="${RUN:-outputs/$SET/$PRESET-$(basename "${TEACHER:-preset}")}"
if [ ! -e "$DATA/impressions.parquet" ]; then
    read -ra LOCALES <<< "$TRAIN"
    run python data/from_esci.py "$SOURCE" --out "$DATA" --version "$VERSION" --share "$SHARE" \
        --train-locales "${LOCALES[@]}"
fi
if [ -n "${DRY:-}" ]; then
    run python benchmarks/plan.py --data "$DATA" --tokens 256 ${TEACHER:+--model "$TEACHER"}
    exit
fi
run python 01_build_features.py --preset "$PRESET" --run "$RUN" --data "$DATA"
OF_05=(--resamples 200 --gains 5=1,4=0.1,3=0.01)
the_stages "$PRESET" "$RUN" ${TEACHER:+--model "$TEACHER"}
