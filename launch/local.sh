#!/usr/bin/env bash
# Several processes on this machine, as on a pod but on CPUs and over loopback: to see that a configuration starts, saves
# and goes on with many processes before a pod is paid for.
#
#   jaxcoder launch local --config smoke --processes 2 --data synthetic --steps 20
set -euo pipefail

# --- fill in
CONFIG=          # required: a configuration by name, or FILE.py:FUNCTION
PROCESSES=2      # how many
DEVICES=2        # CPU devices of each
PORT=61439       # one that is free
GRACE=60         # seconds to end in, after another process has failed
ARGUMENTS=()     # options of `jaxcoder train`
# --- that is all

: "${CONFIG:?is not filled in: open this file, or use jaxcoder launch local --config NAME}"
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$DEVICES"
export JAXCODER_COORDINATOR="127.0.0.1:$PORT" JAXCODER_NUM_PROCESSES="$PROCESSES"

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT # every process saves, and the wait below ends
for ((id = 0; id < PROCESSES; id++)); do
  JAXCODER_PROCESS_ID=$id jaxcoder train "$CONFIG" "${ARGUMENTS[@]}" &
  pids+=($!)
done

code=0
killer=
for pid in "${pids[@]}"; do
  one=0
  wait "$pid" || one=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || one=$?; done # a signal ended the wait, not the process
  if ((one != 0 && code == 0)); then
    code=$one
    kill -TERM "${pids[@]}" 2>/dev/null || true # the others would block on it
    (sleep "$GRACE" && kill -KILL "${pids[@]}") >/dev/null 2>&1 & # a process that hangs ignores SIGTERM
    killer=$!
  fi
done
if [ -n "$killer" ]; then kill "$killer" 2>/dev/null || true; fi
exit "$code"
