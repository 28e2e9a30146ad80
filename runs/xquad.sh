#!/usr/bin/env bash
# English labels, eleven languages: the paper's third finding on real text, XQuAD-R (data/from_xquad.py).
#     bash runs/xquad.sh SOURCE_DIR MODEL ENCODER      two CPU cores, 6 GB; with Gemma 3 270M one to two hours
# SOURCE_DIR: the folder xquad-r. MODEL, the teacher, a folder or a hub id: google/gemma-3-270m (QLoRA),
# FacebookAI/xlm-roberta-base. ENCODER, of the student's embeddings, multilingual too:
# sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2. RUN: the run (default: outputs/xquad).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
USAGE="usage: bash runs/xquad.sh SOURCE_DIR MODEL ENCODER"
SOURCE="$(from_here "${1:?$USAGE}")"; MODEL="$(from_here "${2:?$USAGE}")"
ENCODER="$(from_here "${3:?$USAGE}")"; RUN="${RUN:-outputs/xquad}"
run python data/from_xquad.py "$SOURCE" --out data/xquad
run python 01_build_features.py --preset small --run "$RUN" --data data/xquad --text-encoder "$ENCODER"
the_stages small "$RUN" --model "$MODEL" --max-tokens 128 --fields description
