#!/usr/bin/env bash
# The whole method on the toy dataset, into outputs/toy or RUN: two CPU cores, 4 GB, minutes (README.md). Run
# it again at any time: finished stages say so and do nothing, a killed one continues.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
RUN="${RUN:-outputs/toy}"
run python data/toy/make_toy.py
SECONDS=0
run python 01_build_features.py --run "$RUN"                # captions, texts, embeddings, match features
run python 02_train_teacher.py --run "$RUN"                 # QLoRA on 6,000 English human labels
run python 03_label.py --run "$RUN"                         # soft labels for 40,000 impressions, 4 languages
run python 04_train_student.py --run "$RUN" --labels human  # the baseline: human labels alone
run python 04_train_student.py --run "$RUN"                 # the student
run python 05_evaluate.py --run "$RUN"                      # every system on the human evaluation labels
echo; echo "five stages: $SECONDS s"
