#!/bin/bash
# What to run first on a machine with a GPU: eight minutes, no network, no kernel.
#
#   workflow/gpu_check.sh                     all of it, with the settings of profile `paper`
#   workflow/gpu_check.sh --small             in a minute, on a CPU too: does it run at all?
#   COVIDSEV_DATA=... workflow/gpu_check.sh   with real slices, else with phantoms
#
# PYTHON names an interpreter (3.11 or newer) with torch, numpy, scipy, pandas and matplotlib. What else the library
# needs to train (safetensors, tqdm, jinja2) may be carried along: WHEELS names a folder of .whl files.
# What it measured is one file to commit, results/gpu_check/<name of the GPU>.json, written anew after each part.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -n "${WHEELS:-}" ]; then
  more=$(mktemp -d)
  trap 'rm -rf "$more"' EXIT
  "${PYTHON:-python3}" -m pip install --quiet --no-index --no-deps --target "$more" "$WHEELS"/*.whl
fi
export PYTHONPATH="$root:${more:-}:${PYTHONPATH:-}" MPLBACKEND=agg COVIDSEV_QUIET=1
timeout -k 10 480 "${PYTHON:-python3}" "$root/workflow/gpu_check.py" "$@"
