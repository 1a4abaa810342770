#!/bin/bash
# One machine's share of a run over several: start it on each of them, with the same arguments as one launch has.
#
#   MACHINES=2 MACHINE=0 HEAD=10.0.0.1 PORT=29500 PROCESSES=8 bash train_stages/slurm/machine.sh STAGE.yaml [--set ...]
#
# MACHINES how many there are; MACHINE the number of this one, from 0; HEAD, PORT where machine 0 is reached;
# PROCESSES accelerators of each; CONFIG a launch file (zero2.yaml). Messages and metrics.jsonl come from rank 0.
# `out` must lie on a disk that all machines share: every rank writes its part of a checkpoint there. `data_root` may
# be a copy on each machine's own disk: which samples a rank reads follows from (seed, step, rank) alone.
set -euo pipefail
# How long the launcher waits, once told to stop, for a checkpoint to be written; by itself it would kill after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}
: "${MACHINES:?}" "${MACHINE:?}" "${HEAD:?}" "${PORT:?}" "${PROCESSES:?}"
exec accelerate launch --config_file "${CONFIG:-train_stages/accelerate/zero2.yaml}" \
    --num_machines "$MACHINES" --machine_rank "$MACHINE" --main_process_ip "$HEAD" --main_process_port "$PORT" \
    --num_processes "$((MACHINES * PROCESSES))" --deepspeed_multinode_launcher standard \
    -m xseg.train "$@"
