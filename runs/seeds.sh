#!/usr/bin/env bash
# The same run with other seeds, over the same features: how much of a result is chance.
#     bash runs/seeds.sh RUN 1 2      makes RUN.seed1 and RUN.seed2, and shows all reports' tables
# Also RUN.mean: a student of the mean of their labels, which err less than one teacher's.
# PRESET (default: small); FLAGS: of stage 02, as RUN was made with (--model, --max-tokens, …).
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
USAGE="usage: bash runs/seeds.sh RUN SEED …"
FIRST="$(from_here "${1:?$USAGE}")"; FIRST="${FIRST%/}"; shift; : "${1:?$USAGE}"
read -ra OF_02 <<< "${FLAGS:-}"
over_the_features() {
    mkdir -p "$1"
    [ -e "$1/features" ] || ln -s "$(realpath "$FIRST/features")" "$1/features"
}
for SEED in "$@"; do
    over_the_features "$FIRST.seed$SEED"
    the_stages "${PRESET:-small}" "$FIRST.seed$SEED" ${OF_02[@]+"${OF_02[@]}"}
done
over_the_features "$FIRST.mean"
OF_MEAN=(--preset "${PRESET:-small}" --run "$FIRST.mean")
run python 03_label.py "${OF_MEAN[@]}" --mean "$FIRST" "${@/#/$FIRST.seed}"
SEED="" the_students "${OF_MEAN[@]}"
for EACH in "$FIRST" "$FIRST".seed* "$FIRST.mean"; do
    echo; echo "$EACH"
    sed -n '/^| system/,/^$/{p;/^$/q;}' "$EACH/report/report.md"
done
