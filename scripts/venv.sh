# Sourced by the other scripts from the repository root: `need_venv base|dev` makes or refreshes .venv.
# The stamp holds what the environment was made from; an equal stamp means start at once.

find_python() {
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    echo "hpt_torch needs Python 3.11 or newer; found: $(python3 --version 2>&1 || echo none)." >&2
    echo "Install one (for example 'apt-get install python3.11 python3.11-venv' or from python.org)," >&2
    echo "or name it: PYTHON=/path/to/python3.11 sh $0" >&2
    return 1
}

need_venv() {
    kind=$1
    stamp=".venv/stamp-$kind"
    want=$(cat pyproject.toml scripts/constraints.txt | cksum)
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] &&
        .venv/bin/python -c '' 2>/dev/null; then
        return 0
    fi
    python=$(find_python) || return 1
    echo "Preparing .venv ($kind) with $("$python" --version) - once, about 6 GB with PyTorch's CUDA build ..."
    if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        rm -rf .venv
        "$python" -m venv .venv || {
            echo "Could not make .venv: is the venv module installed (Debian: apt-get install python3-venv)?" >&2
            return 1
        }
    fi
    extra=""
    [ "$kind" = dev ] && extra="[dev]"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c scripts/constraints.txt -e ".$extra" || return 1
    echo "$want" >"$stamp"
}
