#!/usr/bin/env bash
# Every test. Arguments go to pytest: bash runs/tests.sh tests/test_metrics.py
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT-1000}"  # many short processes, some at once: OpenMP threads that wait for each other must not keep the cores
run python -m pytest "$@"
