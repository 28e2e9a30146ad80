#!/usr/bin/env bash
# The code's form (ruff), then every test. Arguments go to pytest: bash runs/tests.sh tests/test_metrics.py
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# Many short processes, some at once: OpenMP threads that wait for each other must not keep the cores.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT-1000}"
run ruff check --quiet .
run ruff format --check --quiet .
# Two files of tests at a time, a thread each (`-n 0`: one after another, in this process).
export OMP_NUM_THREADS="${OMP_NUM_THREADS-1}"
run python -m pytest -n 2 --dist loadfile "$@"
