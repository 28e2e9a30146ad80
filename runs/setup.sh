# shellcheck shell=bash
# Sourced by the other recipes: goes to the project's folder and makes `python` one that has requirements.txt,
# of the active virtual or conda environment if there is one, else of .venv, which it makes.
set -euo pipefail
HERE="$PWD"  # where the user stands: relative paths are meant from there
from_here() {  # a hub id stays as it is
    if [[ "$1" = /* || ! -e "$HERE/$1" ]]; then echo "$1"; else echo "$HERE/$1"; fi
}
if [[ -n "${RUN:-}" && "$RUN" != /* ]]; then RUN="$HERE/$RUN"; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    [ -d .venv ] || python3 -m venv .venv
    # shellcheck disable=SC1091  # made just above
    . .venv/bin/activate
fi
echo "+ python: $(command -v python)"
python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: needs Python 3.11 or newer" >&2
    exit 2
}
# A stamp keeps a second run from asking the package index again.
stamp="$(python -c 'import sys; print(sys.prefix)')/.requirements-$(cksum < requirements.txt | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "+ pip install -r requirements.txt"
    python -m pip install --quiet -r requirements.txt
    touch "$stamp"
fi
run() { echo; echo "+ $*"; "$@"; }
launch() {  # a script, one process a GPU (GPUS: how many)
    GPUS="${GPUS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
    if [ "$GPUS" -gt 1 ]; then
        run accelerate launch --multi_gpu --num_processes "$GPUS" --num_machines 1 --mixed_precision no \
            --dynamo_backend no "$@"
    else
        run python "$@"
    fi
}
# 02 to 05 over the features of a run: the_stages PRESET RUN FLAG_OF_02 …
# SEED: of 02 and 04; OF_05: an array of flags of 05.
the_stages() {
    local flags=(--preset "$1" --run "$2")
    shift 2
    launch 02_train_teacher.py "${flags[@]}" ${SEED:+--seed "$SEED"} "$@"
    launch 03_label.py "${flags[@]}"
    the_students "${flags[@]}"
    echo; echo "all: $SECONDS s"
}
the_students() {  # 04 and 05, with these flags
    run python 04_train_student.py "$@" ${SEED:+--seed "$SEED"} --labels human  # the baseline
    run python 04_train_student.py "$@" ${SEED:+--seed "$SEED"}
    run python 05_evaluate.py "$@" ${OF_05[@]+"${OF_05[@]}"}
}
