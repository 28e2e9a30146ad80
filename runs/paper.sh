#!/usr/bin/env bash
# The paper's models on your own tables: BLIP-large captions, Llama-3-8B with QLoRA, 30 million soft labels.
#
#     bash runs/paper.sh DATASET_DIR        your raw tables (data/README.md); RUN=DIR puts the run elsewhere
#
# Access      Llama-3 is gated: ask for it on huggingface.co/meta-llama/Meta-Llama-3-8B, then `hf auth login`.
# Hardware    one GPU of 24 GB or more with bf16, or eight; 64 GB of memory, 200 GB of disk.
# Before      `DRY=1 bash runs/paper.sh DATASET_DIR` prints parameters, memory, hours, cost and disk for your
#             rows (benchmarks/plan.py).
# Expected    for 280,000 labels, two epochs, 30 million impressions of 200 tokens, as the dry run reckons
#             from speeds measured on one H200 (benchmarks/RESULTS.md): 02 5.3 hours, 03 54.2 hours.
# Memory      too small: 02 --batch-tokens 4096 (same result up to rounding); 03 --batch-tokens 8192, or
#             --no-merge (NF4, slower).
# Machines    several: runs/slurm.sh. Two processes on CPUs, of 01 to 03:
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
the_stages paper "$RUN"
