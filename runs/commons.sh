#!/usr/bin/env bash
# The five stages on image searches that people typed and rated: Wikimedia Commons (data/from_commons.py).
#     bash runs/commons.sh SOURCE ENCODER [PICTURES BLIP]      two CPU cores, 4 GB, a quarter of an hour
# SOURCE: ratedSearchResult_20211207.sql, or a CSV of it. ENCODER, teacher and text encoder: a folder or a hub
# id, such as sentence-transformers/all-MiniLM-L6-v2. PICTURES: a folder of them under their Commons names;
# BLIP: such as Salesforce/blip-image-captioning-base. Without, a file's name is all that is known of it.
# RUN: the run (default: outputs/commons); EPOCHS: of stage 02.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
USAGE="usage: bash runs/commons.sh SOURCE ENCODER [PICTURES BLIP]"
SOURCE="$(from_here "${1:?$USAGE}")"; ENCODER="$(from_here "${2:?$USAGE}")"; RUN="${RUN:-outputs/commons}"
IMAGES=(); CAPTIONER=()
if [ -n "${3:-}" ]; then
    IMAGES=(--images "$(from_here "$3")")
    CAPTIONER=(--caption-model "$(from_here "${4:?$USAGE}")")
fi
run python data/from_commons.py "$SOURCE" --out data/commons ${IMAGES[@]+"${IMAGES[@]}"}
run python 01_build_features.py --preset small --run "$RUN" --data data/commons --text-encoder "$ENCODER" \
    ${CAPTIONER[@]+"${CAPTIONER[@]}"}
the_stages small "$RUN" --model "$ENCODER" --max-tokens 64 ${EPOCHS:+--epochs "$EPOCHS"}
