#!/usr/bin/env bash
# Preprocess a corpus on many nodes: a SLURM array of shards, then a job that merges them in order.
#
#   INPUT='/data/corpus/*.jsonl.zst' OUT=/data/tokens SHARDS=64 \
#       bash examples/slurm/preprocess_array.sh --append-eod \
#       --tokenizer-type HuggingFaceTokenizer --tokenizer-model /data/tokenizer
#
# Run it with bash on a login node, in the repository: it submits itself. Its flags go to
# tools/preprocess_data.py. The datasets are $OUT/${NAME}_${key}_document for each of $KEYS, the same
# as a single run's. A shard that fails keeps the merge from running. With INPUT, OUT and SHARDS as
# before and the same flags, run it again (a merge that was cut off too) with
#   sbatch --array=7 examples/slurm/preprocess_array.sh ...       then
#   sbatch examples/slurm/preprocess_array.sh merge
#SBATCH --open-mode=append
#SBATCH --requeue

set -euo pipefail

INPUT=${INPUT:-}                            # files and globs, separated by spaces
OUT=${OUT:-}                                # folder of the datasets, which all nodes see
NAME=${NAME:-corpus}                        # of the datasets
KEYS=${KEYS:-text}                          # JSON keys, separated by spaces: a dataset for each
SHARDS=${SHARDS:-${SLURM_ARRAY_TASK_COUNT:-16}}
AT_ONCE=${AT_ONCE:-$SHARDS}                 # shards that run at the same time
CPUS=${CPUS:-16}                            # of a shard: a worker process for each
MEMORY=${MEMORY:-32G}                       # of a shard
TIME=${TIME:-24:00:00}                      # of a shard, and of the merge
KEEP_PARTS=${KEEP_PARTS:-0}                 # 1: keep the shards' datasets after the merge
SITE_FLAGS=${SITE_FLAGS:-}                  # for sbatch: --account=... --partition=...
REPO=${REPO:-${SLURM_SUBMIT_DIR:-$PWD}}     # this repository, which all nodes see
PYTHON=${PYTHON:-$REPO/.venv/bin/python}

read -ra inputs <<<"$INPUT"
read -ra keys <<<"$KEYS"
read -ra site_flags <<<"$SITE_FLAGS"
parts_folder=$OUT/${NAME}_parts
logs=$OUT/${NAME}_logs
merged=$parts_folder/merged # says that the datasets are complete, so that parts may be missing

die() {
    echo "preprocess_array.sh: $*" >&2
    exit 1
}

part() {
    printf '%s/part_%05d' "$parts_folder" "$1"
}

submit() {
    local script array key flag
    script=$(realpath "${BASH_SOURCE[0]}")
    for flag in "$@"; do
        case $flag in
        --max-b* | --sp*) die "$flag: the merge does not find such datasets; run tools/preprocess_data.py itself" ;;
        esac
    done
    [ -x "$PYTHON" ] || die "$PYTHON is no program: run make install, or set PYTHON"
    for key in "${keys[@]}"; do
        [ ! -e "$OUT/${NAME}_${key}_document.idx" ] || die "$OUT/${NAME}_${key}_document.idx exists: set NAME"
    done
    mkdir -p "$parts_folder" "$logs"
    rm -f "$merged"
    export INPUT OUT NAME KEYS SHARDS CPUS KEEP_PARTS REPO PYTHON
    array=$(sbatch --parsable --job-name="preprocess-$NAME" --array="0-$((SHARDS - 1))%$AT_ONCE" \
        --nodes=1 --ntasks=1 --cpus-per-task="$CPUS" --mem="$MEMORY" --time="$TIME" \
        --output="$logs/shard_%a.log" "${site_flags[@]}" "$script" "$@")
    array=${array%%;*} # without the name of a cluster
    sbatch --job-name="merge-$NAME" --dependency="afterok:$array" --kill-on-invalid-dep=yes \
        --nodes=1 --ntasks=1 --cpus-per-task=2 --mem=8G --time="$TIME" \
        --output="$logs/merge.log" "${site_flags[@]}" "$script" merge
    echo "Job $array encodes $SHARDS shards, and the next merges them; logs: $logs"
}

shard() {
    rm -f "$merged"
    srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-$CPUS}" "$PYTHON" "$REPO/tools/preprocess_data.py" \
        --input "${inputs[@]}" --json-keys "${keys[@]}" \
        --output-prefix "$(part "$SLURM_ARRAY_TASK_ID")" --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" \
        --workers "${SLURM_CPUS_PER_TASK:-$CPUS}" --resume "$@"
}

merge() {
    local key i dataset parts all_parts=()
    for key in "${keys[@]}"; do
        dataset=$OUT/${NAME}_${key}_document
        parts=()
        for ((i = 0; i < SHARDS; i++)); do
            parts+=("$(part "$i")_${key}_document")
        done
        all_parts+=("${parts[@]}")
        [ -e "$merged" ] || srun "$PYTHON" "$REPO/tools/merge_datasets.py" --inputs "${parts[@]}" \
            --output-prefix "$dataset" --overwrite
        srun "$PYTHON" "$REPO/tools/inspect_dataset.py" "$dataset" --verify
    done
    touch "$merged"
    if [ "$KEEP_PARTS" != 1 ]; then
        rm -f "${all_parts[@]/%/.bin}" "${all_parts[@]/%/.idx}" "${all_parts[@]/%/.json}"
    fi
}

[ ${#inputs[@]} -gt 0 ] || die "set INPUT to the files of the corpus"
[ -n "$OUT" ] || die "set OUT to a folder that all nodes see"
[[ $SHARDS =~ ^[1-9][0-9]*$ ]] || die "SHARDS=$SHARDS is not a positive number"

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    shard "$@"
elif [ "${1:-}" = merge ]; then
    merge
else
    submit "$@"
fi
