#!/usr/bin/env bash
# The paper's four findings, as experiments on a run directory that has been through the five stages (runs/toy.sh makes the toy's if it is missing).
#
#   bash runs/findings.sh [RUN]           default: outputs/toy; results in outputs/findings: findings.md, findings.json, finding_a.png … finding_d.png
#
#   (a) teachers BERT, T5, DeBERTa, Llama      (b) students on more and more impressions, beside the student on human labels alone
#   (c) teacher and student by language, the student also without impressions in other languages      (d) the teacher's pin text, field by field
#
# Hardware: two CPU cores, 4 GB. Time on the toy: see README.md; at most 40 minutes. Killed or run again, it continues: finished stages say so and do nothing.
# Every experiment borrows RUN's (or MORE's) features by a symbolic link. RUN itself stands for the first seed of the arms that equal it.
#
# Settings, as environment variables:
#   SEEDS="0 1 2"           seeds of students;  TEACHER_SEEDS: of teachers (default: the same)
#   MODELS="BERT=PATH …"    teachers of (a) beside RUN's own, which is called RUN_TEACHER (Llama); PATH or hub id
#   MORE=DIR                run directory for (b), with the same human labels and more impressions (default: RUN; for the toy, which has only six impressions a
#                           human label, outputs/toy_more: the same world with 120,000 impressions, made here)
#   FIELDS="title …"        pin-text fields of (d), in the order they are added; RUN's teacher must have read all of them
#   HOME_LANGUAGE=en        language of the human training labels
#   TEACHER_FLAGS, STUDENT_FLAGS    further flags of 02 and 04: those that RUN was made with, so that arms differ in one thing only
#   INTO=DIR                where experiments and results go;  JOBS=2: experiments at a time (1 where there is a GPU)
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
RUN="${1:-${RUN:-outputs/toy}}"
export INTO="${INTO:-$(dirname "$RUN")/findings}" TEACHER_FLAGS="${TEACHER_FLAGS:-}" STUDENT_FLAGS="${STUDENT_FLAGS:-}"
SEEDS="${SEEDS:-0 1 2}"; TEACHER_SEEDS="${TEACHER_SEEDS:-$SEEDS}"
RUN_TEACHER="${RUN_TEACHER:-Llama}"
MODELS="${MODELS:-BERT=data/toy_models/bert T5=data/toy_models/t5 DeBERTa=data/toy_models/deberta}"
FIELDS="${FIELDS:-title description caption queries boards links}"
HOME_LANGUAGE="${HOME_LANGUAGE:-en}"
JOBS="${JOBS:-$(command -v nvidia-smi > /dev/null && echo 1 || echo 2)}"

[ "$RUN" != outputs/toy ] || [ -e outputs/toy/report/metrics.json ] || bash runs/toy.sh
for stage in features teacher labels student_human_labels student; do
    [ -e "$RUN/$stage/stage.json" ] || { echo "error: $RUN/$stage is missing: take RUN through the five stages first, as runs/toy.sh does"; exit 1; }
done
SECONDS=0
if [ "$RUN" = outputs/toy ] && [ -z "${MORE:-}" ]; then
    MORE=outputs/toy_more
    run python data/make_toy.py --impressions 120000 --out data/toy_more
    run python 01_build_features.py --run "$MORE" --data data/toy_more
    run python 02_train_teacher.py --run "$MORE"
    run python 03_label.py --run "$MORE"
fi
MORE="${MORE:-$RUN}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + JOBS - 1) / JOBS ))}"

# --- Experiments: `later NAME COMMAND…` notes one, `work` does all that were noted, JOBS at a time, each with its log in INTO/logs.

teacher() { # NAME FLAGS…: a teacher on RUN's human labels, and its labels of the human-labelled rows
    python 02_train_teacher.py --run "$INTO/$1" "${@:2}" $TEACHER_FLAGS &&
    python 03_label.py --run "$INTO/$1" --only-labelled
}
student() { # DIR:NAME FLAGS…: a student, from the soft labels of RUN (DIR is students) or of MORE (DIR is more) unless the flags say otherwise
    python 04_train_student.py --run "$INTO/${1%%:*}" --name "${1#*:}" "${@:2}" $STUDENT_FLAGS
}
job() { # NAME COMMAND
    start=$SECONDS
    if eval "$2" > "$INTO/logs/$1.txt" 2>&1; then echo "  $1: $((SECONDS - start)) s"
    else echo "  $1 failed:"; tail -n 5 "$INTO/logs/$1.txt"; exit 255; fi  # 255: xargs starts no further one
}
export -f teacher student job
TODO=()
later() { TODO+=("$2" "$(printf '%q ' "$@")"); }
work() {
    echo; echo "+ $(( ${#TODO[@]} / 2 )) experiments, $JOBS at a time, $OMP_NUM_THREADS threads each"
    [ ${#TODO[@]} = 0 ] || printf '%s\0' "${TODO[@]}" | xargs -0 -n 2 -P "$JOBS" bash -c 'job "$0" "$1"'
    TODO=()
}
link() { mkdir -p "$INTO/$1"; ln -sfn "$(cd "$RUN/$2" && pwd)" "$INTO/$1/$2"; }
fact() { python -c 'import json, sys; d = json.load(open(sys.argv[1])); print(d["rows"][sys.argv[2]])' "$1/stage.json" "$2"; }
arm() { # LABEL SEEDS NAME_{seed} [PATTERN of the run that stands for the first seed]: an ARM of 05_evaluate.py --compare; {} is the seed
    local runs="" seed
    for seed in $2; do runs+="${runs:+,}$([ -n "${4:-}" ] && [ "$seed" = "${2%% *}" ] && echo "$4" || echo "$INTO/${3//\{\}/$seed}")"; done
    echo "$1=$runs"
}
not_first() { [ "$1" != "${2%% *}" ]; }
mkdir -p "$INTO/logs"

# --- Teachers of (a) and (d); further seeds of RUN's own
A=() D=() read_so_far=""
for entry in $MODELS; do
    for seed in $TEACHER_SEEDS; do
        link "teacher_${entry%%=*}_$seed" features
        later teacher "teacher_${entry%%=*}_$seed" --model "${entry#*=}" --seed "$seed"
    done
    A+=("$(arm "${entry%%=*}" "$TEACHER_SEEDS" "teacher_${entry%%=*}_{}")")
done
MODEL="$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["model"])' "$RUN/teacher/teacher.json")"
for seed in $TEACHER_SEEDS; do
    if not_first "$seed" "$TEACHER_SEEDS"; then
        link "teacher_${RUN_TEACHER}_$seed" features
        later teacher "teacher_${RUN_TEACHER}_$seed" --model "$MODEL" --seed "$seed"
    fi
done
OWN="$(arm "" "$TEACHER_SEEDS" "teacher_${RUN_TEACHER}_{}" "$RUN")"
A+=("$RUN_TEACHER$OWN")
for field in $FIELDS; do
    label="${read_so_far:++ }$field"
    read_so_far+="${read_so_far:+,}$field"
    if [ "$field" = "${FIELDS##* }" ]; then D+=("$label$OWN"); continue; fi
    for seed in $TEACHER_SEEDS; do
        link "fields_to_${field}_$seed" features
        later teacher "fields_to_${field}_$seed" --model "$MODEL" --seed "$seed" --fields "$read_so_far"
    done
    D+=("$(arm "$label" "$TEACHER_SEEDS" "fields_to_${field}_{}")")
done

# --- Students of (b) and (c). Sizes of (b): 1, 3, 10, 30, 100 times the human set as far as the impressions go (a tenth of all if not even ten times), and all.
# All take as many optimiser steps as RUN's student: at equal epochs the small sets would be trained too little, and the curve would show that instead.
HUMAN="$(fact "$RUN/features" labelled_train)" ALL="$(fact "$RUN/student" train)" MORE_ALL="$(fact "$MORE/features" impressions)" B=()
SIZES="$(python -c 'import sys; h, a = map(int, sys.argv[1:]); print(*sorted({n * h for n in (1, 3, 10, 30, 100) if n * h < 0.9 * a} | ({a // 10} if 10 * h >= 0.9 * a else set())))' "$HUMAN" "$MORE_ALL")"
epochs() { # ROWS
    python -c 'import json, sys; e = json.load(open(sys.argv[1]))["arguments"]["epochs"]; print(max(1, round(e * int(sys.argv[2]) / int(sys.argv[3]))))' "$RUN/student/stage.json" "$ALL" "$1"
}
link students features; link students labels
mkdir -p "$INTO/more"; for folder in features labels; do ln -sfn "$(cd "$MORE/$folder" && pwd)" "$INTO/more/$folder"; done
B+=("$(arm "student on human labels" "$SEEDS" "students:student_human_{}")")
ALL_ARM="$(arm "" "$SEEDS" "students:student_all_{}" "$RUN:student")"
HOME_ROWS="$(python -c '
import glob, sys
import pyarrow.compute as pc, pyarrow.parquet as pq
home = pc.equal(pq.read_table(sys.argv[1] + "/queries.parquet")["language"], sys.argv[2])
print(sum(pc.sum(home.take(pq.read_table(p, columns=["query_index"])["query_index"])).as_py() for p in glob.glob(sys.argv[1] + "/impressions/part-*.parquet")))
' "$RUN/features" "$HOME_LANGUAGE")"
for seed in $SEEDS; do
    if not_first "$seed" "$SEEDS"; then
        later student "students:student_all_$seed" --seed "$seed"
    fi
    [ "$MORE" = "$RUN" ] || later student "more:student_all_$seed" --seed "$seed" --epochs "$(epochs "$MORE_ALL")"
    later student "students:student_human_$seed" --seed "$seed" --labels human --epochs "$(epochs "$(fact "$RUN/student_human_labels" train)")"
    for n in $SIZES; do later student "more:student_${n}_$seed" --seed "$seed" --rows "$n" --epochs "$(epochs "$n")"; done
    later student "students:student_home_$seed" --seed "$seed" --languages "$HOME_LANGUAGE" --epochs "$(epochs "$HOME_ROWS")"
done
for n in $SIZES; do B+=("$(arm "$n impressions" "$SEEDS" "more:student_${n}_{}")"); done
B+=("all impressions$([ "$MORE" = "$RUN" ] && echo "$ALL_ARM" || arm "" "$SEEDS" "more:student_all_{}")")
work

for seed in $SEEDS; do  # as few rows as in HOME_LANGUAGE alone, of all languages: tells fewer rows from fewer languages
    later student "students:student_fewer_$seed" --seed "$seed" --rows "$(fact "$INTO/students/student_home_$seed" train)" --epochs "$(epochs "$HOME_ROWS")"
done
work
C=("teacher$OWN" "student$ALL_ARM" "$(arm "student, fewer impressions" "$SEEDS" "students:student_fewer_{}")"
   "$(arm "student, fewer, $HOME_LANGUAGE only" "$SEEDS" "students:student_home_{}")")

# --- The four tables
unset OMP_NUM_THREADS
run python 05_evaluate.py --into "$INTO" --finding a --compare "${A[@]}"
run python 05_evaluate.py --into "$INTO" --finding b --compare "${B[@]}"
run python 05_evaluate.py --into "$INTO" --finding c --compare "${C[@]}"
run python 05_evaluate.py --into "$INTO" --finding d --compare "${D[@]}"
echo; cat "$INTO/findings.md"
echo; echo "findings: $SECONDS s"
