# Sourced by the other recipes: goes to the project's folder and makes `python` one that has requirements.txt.
# Uses the active virtual or conda environment if there is one, otherwise .venv, which it makes.
set -euo pipefail
HERE="$PWD"  # where the user stands: relative paths are meant from there
from_here() { if [[ "$1" = /* || ! -e "$HERE/$1" ]]; then echo "$1"; else echo "$HERE/$1"; fi; }  # a hub id stays as it is
if [[ -n "${RUN:-}" && "$RUN" != /* ]]; then RUN="$HERE/$RUN"; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    if [ ! -d .venv ]; then
        echo "+ making .venv"
        python3 -m venv .venv
    fi
    . .venv/bin/activate
fi
echo "+ python: $(command -v python)"
# A stamp keeps a second run from asking the package index again.
stamp="$(python -c 'import sys; print(sys.prefix)')/.requirements-$(cksum < requirements.txt | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "+ pip install -r requirements.txt"
    python -m pip install --quiet -r requirements.txt
    touch "$stamp"
fi
run() { echo; echo "+ $*"; "$@"; }
