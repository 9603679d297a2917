#!/usr/bin/env bash
# Make the environments of engines that need pins of their own, each in a folder outside the clone; run again, it reuses what is there.
#
#   bash scripts/engines/make.sh [all | vllm | gptqmodel | auto-round | llm-compressor]
#
# Where: $QWENCH_ENGINES, or qwench/engines in the user's cache folder. One folder per engine here:
#
#   requirements.txt   what pip resolves in one go
#   bare.txt           where there is any: installed after that, without its own requirements (one of them cannot be met) and with the build tools of the above
#   mends.py           where there is any: for what package indexes get wrong
#   proof.py           shows that the environment is whole
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
home=${QWENCH_ENGINES:-${XDG_CACHE_HOME:-$HOME/.cache}/qwench/engines}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
engines=(vllm gptqmodel auto-round llm-compressor)

make_engine() {
    local name=$1 venv=$home/$1 ready=$home/$1/.ready wanted
    wanted=$(for file in requirements.txt bare.txt mends.py; do [ ! -f "$here/$name/$file" ] || cat "$here/$name/$file"; done | cksum)
    if [ -f "$ready" ] && [ "$(cat "$ready")" = "$wanted" ]; then
        echo "$name: $venv is ready"
        return
    fi
    mkdir -p "$home"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    echo "$name: installing into $venv (minutes, and gigabytes, the first time)"
    install "$venv" -r "$here/$name/requirements.txt"
    [ ! -f "$here/$name/bare.txt" ] || install "$venv" --no-deps --no-build-isolation -r "$here/$name/bare.txt"
    [ ! -f "$here/$name/mends.py" ] || "$venv/bin/python" "$here/$name/mends.py"
    "$venv/bin/python" "$here/$name/proof.py"
    echo "$wanted" >"$ready"
}

install() {
    local venv=$1
    shift
    BUILD_CUDA_EXT=0 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

for name in "${@:-all}"; do
    if [ "$name" = all ]; then
        for each in "${engines[@]}"; do make_engine "$each"; done
    elif [[ " ${engines[*]} " == *" $name "* ]]; then
        make_engine "$name"
    else
        echo "there is no engine $name; known: ${engines[*]}" >&2
        exit 2
    fi
done
