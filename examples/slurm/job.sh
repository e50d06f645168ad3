# shellcheck shell=bash disable=SC2034,SC2154,SC2329
# What pretrain.sbatch and pretrain_srun.sbatch share. They define launch() and job, and source this
# file with RUN FLAGS...; docs/cluster.md says what is promised.
#
#   RUN/checkpoints, RUN/tensorboard
#   RUN/jobs/JOB/code, flags, environment, site.sh      as they were when the job first started
#   RUN/jobs/JOB/history                                each start: restart, iteration, time, nodes
#   RUN/jobs/JOB/restart_N/NODE.log                     of each start and node

set -uo pipefail

die() {
    echo "error: $*" >&2
    exit 1
}

say() {
    echo "$(date '+%F %T') job $job, restart $restart: $*"
}

given() { # the value of a flag of pretraining, "" without it: given FLAG
    local i value=''
    local -a words
    eval "words=($(<"$job_folder/flags"))" # quoted by shlex
    for i in "${!words[@]}"; do
        case ${words[i]} in
            "$1") value=${words[i + 1]:-} ;;
            "$1="*) value=${words[i]#*=} ;;
        esac
    done
    echo "$value"
}

newest() { # the iteration of the last checkpoint, persistent or not, as Megatron looks; "" without one
    local named file newest='' places=("$run/checkpoints") local_folder
    case $(given --non-persistent-ckpt-type) in
        global)
            named=$(given --non-persistent-global-ckpt-dir)
            places+=("${named:-$run/checkpoints/non_persistent}")
            ;;
        local) # what this node has: if it is new to the job, others may have more
            local_folder=$(given --non-persistent-local-ckpt-dir)
            for file in "$local_folder"/*/iter_*_local.pt; do
                file=${file##*/iter_}
                [[ $file =~ ^([0-9]+)_[0-9]+_local\.pt$ ]] && places+=("iteration ${BASH_REMATCH[1]}")
            done
            ;;
    esac
    for file in "${places[@]}"; do
        named=''
        if [[ $file == "iteration "* ]]; then
            named=${file#iteration }
        elif [ -e "$file/$tracker" ]; then
            read -r named <"$file/$tracker"
            [[ $named =~ ^[0-9]+$ ]] || named=0
        fi
        [ -n "$named" ] || continue
        named=$((10#$named)) # a number with leading zeros is no octal one
        ((named <= ${newest:--1})) || newest=$named
    done
    echo "$newest"
}

iteration() { # of the last checkpoint; 0 without one
    local saved
    saved=$(newest)
    echo "${saved:-0}"
}

stalls() { # how many starts in a row, up to the last, were from this iteration
    tac "$job_folder/history" 2>/dev/null | awk -v now="$1" '$2 != now { exit } { print }' | wc -l
}

snapshot() { # code, flags, environment: whole, or not there
    local new=$job_folder.new
    rm -rf "$new"
    mkdir -p "$new/code/examples" || die "$run can't be written: give a folder that all nodes see"
    cp -r "$REPO/megatron_periln" "$new/code/" || die "$REPO is not the repository: submit from it, or set REPO"
    cp -r "$REPO/examples/slurm" "$new/code/examples/"
    cp "$SITE" "$new/site.sh"
    PYTHONPATH=$new/code "${srun[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 "$PYTHON" -c '
import shlex, sys
from megatron_periln import errors, flag_files
try:
    print(*map(shlex.quote, flag_files.expand(sys.argv[1:])), sep="\n")
except errors.UsageError as error:
    sys.exit(f"error: {error}")' "$@" >"$new/flags" || die "the flags can't be read, or $PYTHON can't run"
    (
        umask 077
        {
            echo "REVISION=$(git -C "$REPO" describe --always --dirty 2>/dev/null)"
            env -0 | tr '\n\0' ' \n' | sort
        } | sed -E 's/^([^=]*(KEY|TOKEN|SECRET|PASSW)[^=]*)=.*/\1=(not kept)/I' >"$new/environment"
    )
    sync "$new/flags" "$new/site.sh" "$new/environment"
    mv -T "$new" "$job_folder"
}

superseded() { # a node that comes back finds its job running elsewhere
    [ -d "$job_folder/restart_$((restart + 1))" ]
}

ask_to_stop() { # the ranks save after their step and end; those that don't listen yet are asked again
    stop=$1
    superseded && return
    say "$stop: the ranks are asked to save"
    scancel --signal=TERM "$job"
    [ -n "$asker" ] || {
        while sleep 30; do scancel --signal=TERM "$job"; done >/dev/null 2>&1 &
        asker=$!
    }
}

await() { # the end of a child, whatever signals come
    local status
    while
        wait "$1"
        status=$?
        kill -0 "$1" 2>/dev/null
    do :; done
    return "$status"
}

requeue() { # without the nodes given
    local excluded
    trap '' TERM # with which SLURM ends a job that is requeued: scontrol would die of it, too
    scontrol requeue "$job"
    [ $# -gt 0 ] || return 0
    # Only a pending job can be told, as it is now; it starts after the end of this script.
    excluded=$(scontrol -o show job "$job" | grep -oP '\bExcNodeList=\K[^ (]+')
    scontrol update "JobId=$job" "ExcNodeList=$(IFS=,; echo "$*")${excluded:+,$excluded}"
}

start_again_or_stop() { # exit status, why, bad nodes
    local status=$1 why=$2 now
    shift 2
    now=$(iteration)
    if superseded; then
        say "$why; the job has been started again elsewhere"
    elif [ "$restart" -ge "$MAX_RESTARTS" ]; then
        say "$why; not started again: MAX_RESTARTS is $MAX_RESTARTS"
    elif [ "$(stalls "$now")" -ge "$MAX_STALLS" ]; then
        say "$why; not started again: $MAX_STALLS starts in a row came no further than iteration $now"
    else
        say "$why; goes on from iteration $now${*:+ without $*}"
        requeue "$@"
    fi
    exit "$((status ? status : 1))"
}

plan() { # whether each kind of rank fits its GPU; says so in one line
    local ranks=${ranks_per_node:-$RANKS_PER_NODE}
    timeout "$DOCTOR_SECONDS" "${srun[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$cpus" \
        "$PYTHON" -m megatron_periln.plan --world-size "$((SLURM_JOB_NUM_NODES * ranks))" \
        --nodes-of "$ranks" --gpu "$PLAN" --brief "${flags[@]}"
}

check_nodes() { # one step for each, so that a dead node spoils no other's
    local i nodes checks=() bad=()
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for i in "${nodes[@]}"; do
        timeout "$DOCTOR_SECONDS" "${srun[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 \
            --cpus-per-task="$cpus" --nodelist="$i" --output="$folder/doctor_$i.log" \
            "$PYTHON" -m megatron_periln.doctor "${flags[@]}" &
        checks+=($!)
    done
    for i in "${!nodes[@]}"; do
        await "${checks[i]}" || bad+=("${nodes[i]}")
    done
    [ -z "$stop" ] && [ ${#bad[@]} -gt 0 ] || return
    for i in "${bad[@]}"; do
        tail -n 30 "$folder/doctor_$i.log"
    done
    [ ${#bad[@]} -lt ${#nodes[@]} ] || die "no node passes the check: see $folder/doctor_*.log"
    start_again_or_stop 1 "bad nodes" "${bad[@]}"
}

[ $# -gt 1 ] || die "usage: sbatch --nodes=N $(basename "$0") RUN FLAGS...; FLAGS are those of megatron_periln.pretrain"
run=$(realpath -m "$1")
shift
restart=${SLURM_RESTART_COUNT:-0}
tracker=latest_checkpointed_iteration.txt
job_folder=$run/jobs/$job
folder=$job_folder/restart_$restart
SITE=${SITE:-$REPO/examples/slurm/site.sh}
[ ! -e "$job_folder/site.sh" ] || SITE=$job_folder/site.sh
# shellcheck source=examples/slurm/site.sh
. "$SITE" || die "$SITE: give SITE=FILE"

srun=(srun --kill-on-bad-exit=1 --wait=0 --open-mode=append)
[ -z "$IMAGE" ] || srun+=(--container-image="$IMAGE" --container-mounts="$MOUNTS" --container-workdir="$PWD"
    --no-container-mount-home)
cpus=${SLURM_CPUS_ON_NODE:-1} # srun doesn't take it from the job
export PYTHONSAFEPATH=1       # the snapshot, not the folder that the job was submitted from
[ -d "$job_folder" ] || snapshot "$@"
export PYTHONPATH=$job_folder/code${PYTHONPATH:+:$PYTHONPATH}

stop='' asker=''
trap 'ask_to_stop "time limit"' USR1
trap 'ask_to_stop SIGTERM' TERM
trap '[ -z "$asker" ] || kill "$asker"' EXIT

began=$(iteration)
mkdir -p "$folder"
if [ "$(stalls "$began")" -ge "$MAX_STALLS" ]; then
    die "$MAX_STALLS starts in a row came no further than iteration $began: see the logs in $job_folder"
fi
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
flags=(--tensorboard-dir "$run/tensorboard" "@$job_folder/flags" --save "$run/checkpoints"
    --exit-signal-handler --exit-signal SIGTERM)
# Other nodes may have local checkpoints where this one has none.
if [ -n "$(newest)" ] || { [ "$restart" -gt 0 ] && [ "$(given --non-persistent-ckpt-type)" = local ]; }; then
    flags+=(--load "$run/checkpoints")
fi
if [ -n "$PLAN" ] && [ "$restart" = 0 ]; then
    plan || exit 1
fi
[ "$DOCTOR" = 0 ] || check_nodes
status=1
if [ -z "$stop" ]; then
    echo "$restart $began $(date +%s) $SLURM_JOB_NODELIST" >>"$job_folder/history"
    say "starts from iteration $began on $SLURM_JOB_NODELIST; logs: $folder"
    launch &
    await $!
    status=$?
fi
if [ "$status" = 0 ]; then
    if ! grep -qs "exiting program after receiving SIGTERM" "$folder"/*.log; then
        say "done at iteration $(iteration)"
        exit 0
    fi
    stop=${stop:-SIGTERM}
fi
if [ "$stop" = SIGTERM ]; then
    say "stopped; the last checkpoint is of iteration $(iteration)"
    exit 143
fi
start_again_or_stop "$status" "${stop:-exit status $status}"
