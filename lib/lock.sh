#!/usr/bin/env bash
# Renew constraints.txt: the version of every package, and of what each of them needs, for Python 3.10 and newer on
# Linux, macOS and Windows, with a torch for CUDA or without.
#
#   bash lib/lock.sh             after a change of constraints.in or requirements*.txt: other versions stay as they are
#   bash lib/lock.sh --upgrade   the newest versions that constraints.in allows
#
# Needs the network and uv (pip install uv); UV names another one. uv only resolves here: it installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
UV="${UV:-uv}"

complete=() nodeps=()
for file in requirements*.txt; do
    case "$file" in *-nodeps.txt) nodeps+=("$file") ;; *) complete+=("$file") ;; esac
done

# resolve ARGUMENTS FILE...: the lines that lock every FILE, as the present lock does wherever that is still possible
resolve() {
    cp constraints.txt "$work/resolved"
    "$UV" --no-config pip compile -q --universal --python-version 3.10 --no-header --annotation-style line \
        --constraint constraints.in --output-file "$work/resolved" "$@"
    sed -E 's/ +# via .*//' "$work/resolved"
}

work="$(mktemp -d)"
trap 'rm -r "$work"' EXIT
{
    echo "# Every package that requirements*.txt bring, complete: the versions that the tests and every figure in the"
    echo "# README were run with. Made from constraints.in and requirements*.txt by: bash lib/lock.sh"
    resolve "$@" "${complete[@]}"
    echo "# Installed without what they declare (*-nodeps.txt):"
    resolve "$@" --no-deps "${nodeps[@]}"
} >"$work/lock"
cp "$work/lock" constraints.txt
