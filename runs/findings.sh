#!/usr/bin/env bash
# The paper's four findings as experiments on a run, by default the toy's; runs/findings.py says what and how.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[ -n "$*" ] || [ -e outputs/toy/report/metrics.json ] || bash runs/toy.sh
run python -m runs.findings "$@"
