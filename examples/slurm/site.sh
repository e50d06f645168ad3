# shellcheck shell=bash disable=SC2034
# What your cluster needs: edit this file, or name another with SITE=FILE.
#
# Source it before sbatch, which reads the SBATCH_ variables; a job sources the copy in its folder.
# A value from the environment of sbatch wins.

# --- What sbatch asks for; its own flags win.
# export SBATCH_ACCOUNT=my-account
# export SBATCH_PARTITION=my-partition
# export SBATCH_GPUS_PER_NODE=8

# --- The programs: a virtual environment that all nodes see, or an image for pyxis and enroot.
PYTHON=${PYTHON:-$REPO/.venv/bin/python}        # in a container, usually python
IMAGE=${IMAGE:-}                                # a .sqsh file, or registry#name:tag; empty for no container
MOUNTS=${MOUNTS:-$REPO:$REPO}                   # host:container, separated by commas: repository, runs, data

# --- The network.
# export NCCL_SOCKET_IFNAME=bond0
# export NCCL_IB_HCA=mlx5
# export GLOO_SOCKET_IFNAME=bond0
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}      # of pretrain.sbatch: a rank for each GPU
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}                 # where the ranks meet, on the first node

# --- On each node's own disk.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$(id -un)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --- When to start again.
PLAN=${PLAN:-}                                  # a GPU such as h100-80: a run that can't fit it ends at once
DOCTOR=${DOCTOR:-1}                             # 0: no check of the nodes before training
DOCTOR_SECONDS=${DOCTOR_SECONDS:-600}           # a node that takes longer is bad
MAX_RESTARTS=${MAX_RESTARTS:-100}               # of a job
MAX_STALLS=${MAX_STALLS:-2}                     # starts in a row from the same checkpoint
