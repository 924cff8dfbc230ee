#!/usr/bin/env bash
# One node of GPUs without a scheduler. One process serves all cards; a run that was stopped by a fault goes on by itself
# from its newest checkpoint. Ctrl-C or SIGTERM save and end it; the same command continues.
#
#   jaxcoder launch gpu-node --config starcoderbase_1b --data STORE --output-dir runs/1b
set -uo pipefail

# --- fill in
CONFIG=          # required: a configuration by name, or FILE.py:FUNCTION
RESTARTS=20      # most faults in a row that are forgiven
GPUS=            # which cards, as 0,1,2,3; empty is all
ARGUMENTS=()     # options of `jaxcoder train`
# --- that is all

: "${CONFIG:?is not filled in: open this file, or use jaxcoder launch gpu-node --config NAME}"
if [ -n "$GPUS" ]; then export CUDA_VISIBLE_DEVICES="$GPUS"; fi

trap 'kill -TERM "$pid" 2>/dev/null' TERM
trap 'kill -INT "$pid" 2>/dev/null' INT
for ((fault = 0; fault <= RESTARTS; fault++)); do
  jaxcoder train "$CONFIG" "${ARGUMENTS[@]}" &
  pid=$!
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait, not the process
    code=0
    wait "$pid" || code=$?
  done
  case $code in
    0 | 2 | 130 | 143) exit "$code" ;; # finished; user error; interrupted after saving
  esac
  echo "jaxcoder ended with code $code; starting it again in 10 seconds ($((fault + 1)) of $RESTARTS)" >&2
  sleep 10
done
exit "$code"
