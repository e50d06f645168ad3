#!/usr/bin/env bash
# torchrun on one node. On SIGTERM torchrun ends its ranks, in the middle of a save: it is kept from
# it, and the ranks get it, also where SLURM signals a step's first process alone.

# Ranks that hang after another failed are killed, also if they listen to SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-10}

trap 'kill -TERM $(cat "/proc/$torchrun/task/"*/children) 2>/dev/null' TERM # none are left, or not yet
(
    trap '' TERM
    exec "$@"
) &
torchrun=$!
while
    wait "$torchrun"
    status=$?
    kill -0 "$torchrun" 2>/dev/null
do :; done
exit "$status"
