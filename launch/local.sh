#!/usr/bin/env bash
# Several CPU processes on this machine over loopback: tests that a configuration starts, saves and resumes with many
# processes, as on a pod.
#
#   jaxcoder launch local --config smoke --processes 2 --data synthetic --steps 20
set -euo pipefail

# --- variables
CONFIG=          # required: name of a configuration, or FILE.py:FUNCTION
PROCESSES=2      # number of processes
DEVICES=2        # CPU devices per process
PORT=61439       # a free port
GRACE=60         # seconds to exit after another process has failed
ARGUMENTS=()     # arguments of `jaxcoder train`
# --- end of variables

: "${CONFIG:?is not set: edit this file, or use jaxcoder launch local --config NAME}"
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$DEVICES"
export JAXCODER_COORDINATOR="127.0.0.1:$PORT" JAXCODER_NUM_PROCESSES="$PROCESSES"

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT # every process saves and exits
for ((id = 0; id < PROCESSES; id++)); do
  JAXCODER_PROCESS_ID=$id jaxcoder train "$CONFIG" "${ARGUMENTS[@]}" &
  pids+=($!)
done

code=0
killer=
for pid in "${pids[@]}"; do
  one=0
  wait "$pid" || one=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || one=$?; done # a signal interrupted the wait
  if ((one != 0 && code == 0)); then
    code=$one
    kill -TERM "${pids[@]}" 2>/dev/null || true # the others would wait for the failed process
    (sleep "$GRACE" && kill -KILL "${pids[@]}") >/dev/null 2>&1 & # a stuck process ignores SIGTERM
    killer=$!
  fi
done
if [ -n "$killer" ]; then kill "$killer" 2>/dev/null || true; fi
exit "$code"
