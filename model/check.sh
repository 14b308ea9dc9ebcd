#!/usr/bin/env bash
# Holds the shipped bundle to its own figures: scores the val photos and drawn non-lesions, and fails where they come
# out worse than manifest.json and evaluation.json say. Needs no training library.
#
#   model/check.sh [DATA_DIR]     default ../shared/data/ham10000, seen from the repository
set -euo pipefail
data=$(realpath "${1:-$(dirname "$0")/../../shared/data/ham10000}")
cd "$(dirname "$0")/.."

venv=.cache/model-check-$(sha256sum model/requirements-check.txt | cut -c 1-12)
if [[ ! -e $venv/installed ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r model/requirements-check.txt
    touch "$venv/installed"
fi
ORT_DISABLE_TELEMETRY=1 exec "$venv/bin/python" -B model/evaluate.py "$data" --check
