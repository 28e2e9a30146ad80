#!/usr/bin/env bash
# Every test. Arguments go to pytest: bash runs/tests.sh tests/test_metrics.py
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run python -m pytest "$@"
