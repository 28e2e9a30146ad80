#!/usr/bin/env bash
# The code's form (ruff), then every test, two files at a time (`-n 0`: one after another, in this process).
# Arguments go to pytest: bash runs/tests.sh tests/test_metrics.py
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Many short processes, some at once: OpenMP threads that wait for each other must not keep the cores.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT-1000}" OMP_NUM_THREADS="${OMP_NUM_THREADS-1}"
run ruff check --quiet .
run ruff format --check --quiet .
run python -m pytest -n 2 --dist loadfile "$@"
