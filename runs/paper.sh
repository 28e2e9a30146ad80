#!/usr/bin/env bash
# The paper's models on your own tables: BLIP-large captions, Llama-3-8B with QLoRA, 30 million soft labels.
#     bash runs/paper.sh DATASET_DIR            raw tables (data/README.md); RUN=DIR puts the run elsewhere
#     DRY=1 bash runs/paper.sh DATASET_DIR      parameters, memory, hours, cost, disk (benchmarks/plan.py)
# Access: Llama-3 is gated; ask for it on huggingface.co/meta-llama/Meta-Llama-3-8B, then `hf auth login`.
# Hardware: a GPU of 24 GB or more with bf16, or eight; 64 GB of memory, 200 GB of disk. Of 280,000 labels and
# 30 million impressions of 200 tokens plan.py expects 5.3 hours of 02 and 54.2 of 03 on one H200. Memory too
# small: 02 --batch-tokens 4096; 03 --batch-tokens 8192, or --no-merge (NF4, slower).
# Several machines: runs/slurm.sh. Two processes on CPUs, of 01 to 03: accelerate launch --multi_gpu
#     --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no 03_label.py --device cpu
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
DATA="$(from_here "${1:?usage: bash runs/paper.sh DATASET_DIR}")"; RUN="${RUN:-outputs/paper}"
if [ -n "${DRY:-}" ]; then
    run python benchmarks/plan.py --data "$DATA"
    exit
fi
run python 01_build_features.py --check --data "$DATA"                      # all that is wrong or odd
launch 01_build_features.py --preset paper --run "$RUN" --data "$DATA"      # texts, embeddings, features
the_stages paper "$RUN"
