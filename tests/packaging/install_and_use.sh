#!/usr/bin/env bash
# Installs the given wheel into a new environment and uses it from a folder where no source lies.
set -euo pipefail

wheel=$(realpath "$1")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
cd "$work"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet -c "$root/constraints.txt")

"${pip[@]}" "$wheel"
"$work/venv/bin/python" "$here/use_installed.py"
echo "The installed wheel works: $(basename "$wheel")"
