#!/usr/bin/env bash
# Google Cloud TPU VMs: requests a queued resource, waits for the TPUs, installs and trains; requests new TPUs after a
# preemption until the run is complete. Needs an authenticated `gcloud`. STORE and the output directory are on gs://.
#
#   jaxcoder launch tpu-vm --config starcoderbase_1b --name run1 --zone us-east5-a --accelerator v5p-128 \
#       --data gs://BUCKET/store --output-dir gs://BUCKET/runs/1b
set -uo pipefail

# --- variables
CONFIG=                           # required: name of a configuration, or FILE.py:FUNCTION
NAME=                             # required: name of the queued resource and its TPU
ZONE=                             # required: such as us-east5-a
ACCELERATOR=                      # required: accelerator type, such as v5p-128, v6e-256
RUNTIME=v2-alpha-tpuv5            # software: v2-alpha-tpuv5, v2-alpha-tpuv6e, v2-alpha-tpuv5-lite, tpu-ubuntu2204-base
PROJECT=                          # empty: gcloud's default
SPOT=1                            # 1: cheaper, but can be preempted
INSTALL='jaxcoder[tpu,gcs]'       # pip requirement: a version, a wheel on gs://, or git+https://...
ARGUMENTS=()                      # arguments of `jaxcoder train`
# --- end of variables

for name in CONFIG NAME ZONE ACCELERATOR; do
  if [ -z "${!name}" ]; then
    echo "$name is not set: edit this file, or use jaxcoder launch tpu-vm --${name,,} ..." >&2
    exit 2
  fi
done
common=(--zone "$ZONE" --quiet)
if [ -n "$PROJECT" ]; then common+=(--project "$PROJECT"); fi
create=(--node-id "$NAME" --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME")
if [ "$SPOT" = 1 ]; then create+=(--spot); fi

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${common[@]}" --format 'value(state.state)' 2>/dev/null
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" "${common[@]}" --force
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${common[@]}" --worker all --command "$1"
}

while true; do
  case "$(state)" in
    "")
      gcloud compute tpus queued-resources create "$NAME" "${common[@]}" "${create[@]}" || exit 2
      ;;
    SUSPENDED | SUSPENDING | FAILED)
      echo "the TPUs of $NAME are gone: requesting new ones" >&2
      delete || exit 1
      ;;
    ACTIVE)
      if on_all_hosts "python3 -m pip install --quiet --upgrade '$INSTALL'"; then
        code=0
        # Every host runs the same command; JAX reads the process ids from the metadata server.
        on_all_hosts "JAXCODER_TPU_POD=1 python3 -m jaxcoder train ${CONFIG@Q} ${ARGUMENTS[*]@Q}" || code=$?
        case $code in
          0 | 2 | 129 | 130)
            echo "the run exited with code $code; deleting its TPUs" >&2
            delete
            exit "$code"
            ;;
        esac
        echo "the run exited with code $code: restarting it" >&2
      fi
      ;;
  esac
  sleep 30
done
