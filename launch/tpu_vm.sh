#!/usr/bin/env bash
# TPU VMs of Google Cloud, by a queued resource: waits for the TPUs, installs, trains; and asks again when they are taken
# away, until the run is done. Needs `gcloud`, signed in. STORE and the output directory are gs:// addresses.
#
#   jaxcoder launch tpu-vm --config starcoderbase_1b --name run1 --zone us-east5-a --accelerator v5p-128 \
#       --data gs://BUCKET/store --output-dir gs://BUCKET/runs/1b
set -uo pipefail

# --- fill in
CONFIG=                           # required: a configuration by name, or FILE.py:FUNCTION
NAME=                             # required: of the queued resource and its TPU
ZONE=                             # required: as us-east5-a
ACCELERATOR=                      # required: type and size as Google sells them: v5p-128, v6e-256
RUNTIME=v2-alpha-tpuv5            # of the TPU: v2-alpha-tpuv5, v2-alpha-tpuv6e, v2-alpha-tpuv5-lite, tpu-ubuntu2204-base
PROJECT=                          # empty is gcloud's default
SPOT=1                            # 1 is cheaper and may be taken away, 0 is neither
INSTALL='jaxcoder[tpu,gcs]'       # what pip installs: a version, a wheel on gs://, or git+https://...
ARGUMENTS=()                      # options of `jaxcoder train`
# --- that is all

for name in CONFIG NAME ZONE ACCELERATOR; do
  if [ -z "${!name}" ]; then
    echo "$name is not filled in: open this file, or use jaxcoder launch tpu-vm --${name,,} ..." >&2
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
      echo "the TPUs of $NAME are gone: asking for others" >&2
      delete || exit 1
      ;;
    ACTIVE)
      if on_all_hosts "python3 -m pip install --quiet --upgrade '$INSTALL'"; then
        code=0
        # Every host runs the same command; JAX finds out from the machines which host is which.
        on_all_hosts "JAXCODER_TPU_POD=1 python3 -m jaxcoder.cli.main train ${CONFIG@Q} ${ARGUMENTS[*]@Q}" || code=$?
        case $code in
          0 | 2 | 130)
            echo "the run ended with code $code; its TPUs are given back" >&2
            delete
            exit "$code"
            ;;
        esac
        echo "the run ended with code $code: starting it again" >&2
      fi
      ;;
  esac
  sleep 30
done
