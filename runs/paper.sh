#!/usr/bin/env bash
# The paper's models on your own tables: BLIP-large captions, Llama-3-8B with QLoRA, 30 million soft labels.
#
#     bash runs/paper.sh DATASET_DIR        your raw tables (data/README.md); RUN=DIR puts the run elsewhere
#
# Access      Llama-3 is gated: ask for it on huggingface.co/meta-llama/Meta-Llama-3-8B, then `hf auth login`
#             once on the machine.
# Hardware    one GPU of 24 GB or more with bf16 (RTX 4090, L40S, A100, H100), 64 GB of memory, 200 GB of
#             disk; or eight such GPUs.
# Before      `DRY=1 bash runs/paper.sh DATASET_DIR` prints parameters, memory, hours, cost and disk for your
#             rows, and ends (benchmarks/plan.py). Put your own speed into it: --train-speed and
#             --label-speed, from the first minutes of a run or from benchmarks/teacher.py.
#
# Expected: what the dry run reckons from speeds measured with random weights of Llama-3-8B's shape on one
# H200 (benchmarks/RESULTS.md), for 280,000 human labels, two epochs, 30 million impressions, 200 tokens a
# row. Cost: GPU hours at 2 USD, an example; put in your provider's price.
#
#     stage   speed of one H200                       one GPU     eight GPUs       cost
#     02      5,816 tokens/s   QLoRA                    5.3 h          0.7 h     11 USD
#     03      30,742 tokens/s  bf16, LoRA merged       54.2 h          6.8 h    108 USD
#
# The eight-GPU column assumes even scaling. Others report, of one GPU and much the same model: QLoRA at 2,413
# tokens/s on an RTX 4090 (torchtune's README), labelling at 10,000 on an A100 (Faire's engineering blog).
# 01's captions, a picture a pin at most, are its long part: 175 a second on that H200, dealt out to the GPUs
# too.
#
# Killed at any moment, the same command continues, also with another number of GPUs: 01 at its last chunk of
# 4,096 pictures or texts, 02 at its last checkpoint (every 200 steps), 03 at its last whole shard. A finished
# stage says so and does nothing.
#
# What to change
#     memory too small    02 --batch-tokens 4096 (same result up to rounding); 03 --batch-tokens 8192, or
#                         --no-merge (NF4, slower)
#     another teacher     02 --model google-bert/bert-base-multilingual-cased, google-t5/t5-base or
#                         microsoft/deberta-v3-base: trained in full
#     fewer impressions   a tenth of them costs a tenth in 03; 04 --rows N shows what more of them would bring
#     several machines    runs/slurm.sh; without Slurm, on each of them accelerate launch's own flags
#                         (--num_machines, --machine_rank, --main_process_ip), RUN on a shared disk
#     two processes on CPUs, of 01 to 03:
#         accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
#             --dynamo_backend no 03_label.py --device cpu
[ $# -ge 1 ] || { echo "usage: bash runs/paper.sh DATASET_DIR"; exit 2; }
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
DATA="$(from_here "$1")"
RUN="${RUN:-outputs/paper}"
if [ -n "${DRY:-}" ]; then
    run python benchmarks/plan.py --data "$DATA"
    exit
fi
run python 01_build_features.py --check --data "$DATA"                      # all that is wrong or odd
launch 01_build_features.py --preset paper --run "$RUN" --data "$DATA"      # texts, embeddings, features
launch 02_train_teacher.py --preset paper --run "$RUN"                      # the teacher, on the human labels
launch 03_label.py --preset paper --run "$RUN"                              # soft labels for every impression
run python 04_train_student.py --preset paper --run "$RUN" --labels human   # what the teacher must beat
run python 04_train_student.py --preset paper --run "$RUN"                  # the student
run python 05_evaluate.py --preset paper --run "$RUN"                       # every system on the human labels
