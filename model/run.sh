#!/usr/bin/env bash
# The model's whole story: from photos and labels to the bundle beside this file.
#
#   model/run.sh [DATA_DIR]     default ../shared/data/ham10000, seen from the repository
#
# Environment and caches lie in $WORK_DIR, outside the tree: photos never come near a commit.
set -euo pipefail
data=$(realpath "${1:-$(dirname "$0")/../../shared/data/ham10000}")
cd "$(dirname "$0")"
work=${WORK_DIR:-${TMPDIR:-/tmp}/lesion-model}
mkdir -p "$work"
: > "$work/times.txt"

export PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore::DeprecationWarning
# Threads that wait must not spin: on shared cores that costs several times the work itself.
export OMP_WAIT_POLICY=PASSIVE

step() {
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@"
    echo "$name $((SECONDS - start))" >> "$work/times.txt"
    echo "-- $name took $((SECONDS - start)) s"
}

install() {
    # pip comes last: without it an earlier try was cut off.
    [ -x "$work/venv/bin/pip" ] || python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check -r requirements.txt
}

python=$work/venv/bin/python
step install install
step prepare "$python" prepare.py "$data" "$work"
step train "$python" train.py "$work"
step draw "$python" draw.py "$work"
step calibrate "$python" calibrate.py "$work"
step export "$python" export.py "$work"
step evaluate "$python" evaluate.py "$data" "$work"

printf '\nMODEL_DIGEST %s\n' "$(sha256sum manifest.json | cut -d ' ' -f 1)"
