#!/usr/bin/env bash
# The paper's four findings as experiments on a run, by default the toy's (experiments/findings.py).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ -z "$*" ]; then  # for (b): the toy world with 20 impressions a human label, where the toy run has six
    [ -e outputs/toy/report/metrics.json ] || bash runs/toy.sh
    run python data/toy/make_toy.py --impressions 120000 --out data/toy/more
    run python 01_build_features.py --run outputs/toy_more --data data/toy/more
    run python 02_train_teacher.py --run outputs/toy_more
    run python 03_label.py --run outputs/toy_more
    set -- --more outputs/toy_more
fi
run python -m experiments.findings "$@"
