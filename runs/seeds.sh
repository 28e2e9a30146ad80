#!/usr/bin/env bash
# The same run with other seeds, over the same features: how much of a result is chance.
#     bash runs/seeds.sh RUN 1 2      makes RUN.seed1 and RUN.seed2, and shows all reports' tables
# PRESET (default: small); FLAGS: of stage 02, as RUN was made with (--model, --max-tokens, …).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
USAGE="usage: bash runs/seeds.sh RUN SEED …"
FIRST="$(from_here "${1:?$USAGE}")"; shift; : "${1:?$USAGE}"
read -ra OF_02 <<< "${FLAGS:-}"
for SEED in "$@"; do
    NEXT="$FIRST.seed$SEED"
    mkdir -p "$NEXT"
    [ -e "$NEXT/features" ] || ln -s "$(realpath "$FIRST/features")" "$NEXT/features"
    the_stages "${PRESET:-small}" "$NEXT" ${OF_02[@]+"${OF_02[@]}"}
done
for EACH in "$FIRST" "$FIRST".seed*; do
    echo; echo "$EACH"
    sed -n '/^| system/,/^$/p' "$EACH/report/report.md" | head -12
done
