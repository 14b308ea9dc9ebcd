#!/usr/bin/env bash
# Holds the shipped bundle to its own figures: scores the val photos and drawn pictures, and fails where evaluation.json,
# manifest.json or README.md says otherwise. Needs no training library.
#
#   model/check.sh [DATA_DIR] [--parity DIR]
#
# DATA_DIR is ../shared/data/ham10000, seen from the repository; where it is missing, what takes photos is left out.
# --parity writes the val photos as PNGs and their probabilities into DIR, for a test in tests/pipeline/models.rs.
set -euo pipefail
here=$(realpath "$(dirname "$0")")

venv=$here/../.cache/model-check-$(sha256sum "$here/requirements-check.txt" | cut -c 1-12)
if [[ ! -e $venv/installed ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements-check.txt"
    touch "$venv/installed"
fi
export ORT_DISABLE_TELEMETRY=1
"$venv/bin/python" -B "$here/check_test.py" --quiet
exec "$venv/bin/python" -B "$here/check.py" "$@"
