#!/usr/bin/env bash
# Make the environments of engines that need pins of their own, each in a folder outside the clone; run again, it reuses what is there.
#
#   bash scripts/engines/make.sh [all | vllm]
#
# Where: $QWENCH_ENGINES, or qwench/engines in the user's cache folder. One folder per engine here: requirements.txt, and mends.py where it needs any.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
home=${QWENCH_ENGINES:-${XDG_CACHE_HOME:-$HOME/.cache}/qwench/engines}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}

make_engine() {
    local name=$1 proof=$2 wanted venv=$home/$1 ready=$home/$1/.ready
    wanted=$(cat "$here/$name/requirements.txt" "$here/$name/mends.py" | cksum)
    if [ -f "$ready" ] && [ "$(cat "$ready")" = "$wanted" ]; then
        echo "$name: $venv is ready"
        return
    fi
    mkdir -p "$home"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    echo "$name: installing into $venv (minutes, and gigabytes, the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/$name/requirements.txt"
    "$venv/bin/python" "$here/$name/mends.py"
    "$venv/bin/python" -c "$proof"
    echo "$wanted" >"$ready"
}

case ${1:-all} in
all | vllm) make_engine vllm 'import vllm, torchvision; print("vllm", vllm.__version__)' ;;
*)
    echo "there is no engine $1; known: vllm" >&2
    exit 2
    ;;
esac
