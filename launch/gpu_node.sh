#!/usr/bin/env bash
# One GPU node without a scheduler: one process drives all GPUs. After a crash the run restarts from its latest
# checkpoint. Ctrl-C and SIGTERM save and exit; the same command resumes.
#
#   jaxcoder launch gpu-node --config starcoderbase_1b --data STORE --output-dir runs/1b
set -uo pipefail

# --- variables
CONFIG=          # required: name of a configuration, or FILE.py:FUNCTION
RESTARTS=20      # maximum number of restarts
GPUS=            # GPU indices, such as 0,1,2,3; empty: all
ARGUMENTS=()     # arguments of `jaxcoder train`
# --- end of variables

: "${CONFIG:?is not set: edit this file, or use jaxcoder launch gpu-node --config NAME}"
if [ -n "$GPUS" ]; then export CUDA_VISIBLE_DEVICES="$GPUS"; fi

trap 'kill -TERM "$pid" 2>/dev/null' TERM
trap 'kill -INT "$pid" 2>/dev/null' INT
for ((fault = 0; fault <= RESTARTS; fault++)); do
  jaxcoder train "$CONFIG" "${ARGUMENTS[@]}" &
  pid=$!
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal interrupted the wait
    code=0
    wait "$pid" || code=$?
  done
  case $code in
    0 | 2 | 129 | 130 | 143) exit "$code" ;; # complete; user error; interrupted and saved
  esac
  echo "jaxcoder exited with code $code; restarting in 10 seconds ($((fault + 1)) of $RESTARTS)" >&2
  sleep 10
done
exit "$code"
