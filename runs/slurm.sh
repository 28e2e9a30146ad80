#!/usr/bin/env bash
#SBATCH --job-name=relevance
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# The paper's models on your own tables, on any number of nodes under Slurm: 01, 02 and 03 on every GPU.
#     sbatch --nodes=4 runs/slurm.sh DATASET_DIR RUN_DIR        from the project's folder; absolute paths
# Before: the virtual environment is active when you submit (`bash runs/toy.sh` makes one in .venv); models
# are in the hub's cache (HF_HOME), for nodes often have no network. All nodes share, under the same path,
# this folder, the environment, DATASET_DIR, RUN_DIR and HF_HOME, on a file system with locks.
# A task a node: accelerate launch, which starts a process a GPU. 01 is CPU work most of the time: where
# pictures are few, run it first with --nodes=1. A dead node, process or GPU ends the step
# (--kill-on-bad-exit), and Slurm begins this script again (--requeue): each stage continues, with equal
# results. After another fault, or a time limit too short: sbatch the same line again, or other --nodes.
set -euo pipefail
DATA="${1:?usage: sbatch --nodes=N runs/slurm.sh DATASET_DIR RUN_DIR}" RUN="${2:?RUN_DIR}"
cd "$SLURM_SUBMIT_DIR"  # sbatch runs a copy of this script that lies elsewhere
export MAIN PORT GPUS HF_HUB_OFFLINE=1
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over from sbatch since Slurm 22.05
MAIN="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
PORT=$((20000 + SLURM_JOB_ID % 10000))  # another job on the node has another one
GPUS="${SLURM_GPUS_ON_NODE:?no GPU: --gpus-per-node}"

launch() {  # a stage on every GPU of every node
    echo "+ $*"
    # shellcheck disable=SC2016  # each node puts its own SLURM_NODEID in
    srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --multi_gpu \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" --main_process_port "$PORT" \
        --mixed_precision no --dynamo_backend no "$@"' launch "$@"
}
alone() {  # a stage on the first node
    echo "+ $*"
    srun --nodes=1 --ntasks=1 --nodelist="$MAIN" python "$@"
}
launch 01_build_features.py --preset paper --run "$RUN" --data "$DATA"    # pictures and texts are dealt out
launch 02_train_teacher.py --preset paper --run "$RUN"                    # a batch is dealt out
launch 03_label.py --preset paper --run "$RUN"                            # shards are dealt out
alone 04_train_student.py --preset paper --run "$RUN" --labels human      # what the teacher must beat
alone 04_train_student.py --preset paper --run "$RUN"
alone 05_evaluate.py --preset paper --run "$RUN"
