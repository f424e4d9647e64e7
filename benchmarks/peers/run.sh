#!/bin/sh
# Runs another program on the prompts of a finished benchmark, or its server, in an environment of its own, which it makes:
#
#     benchmarks/peers/run.sh llama_cpp|economize|vllm_cpu|openvino_genai RUN_FOLDER --model DIR [options]
#     benchmarks/peers/run.sh serve llama_cpp|vllm_cpu --model DIR --port P [options]
#
# See docs/benchmarking.md; --help after the program's name lists its options.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kind=run
if [ "${1:-}" = serve ]; then
    kind=serve
    shift
fi
peer=${1:-}
wanted="$here/requirements/$peer.txt"
if [ -z "$peer" ] || [ ! -f "$wanted" ]; then
    echo "error: there is no program '$peer': choose llama_cpp, economize, vllm_cpu or openvino_genai" >&2
    exit 2
fi
if [ ! -f "$here/${kind}_$peer.py" ]; then
    echo "error: there is no server of '$peer' here: choose llama_cpp or vllm_cpu" >&2
    exit 2
fi
shift
venv="$here/../../.venv-peers/$peer"
if [ ! "$venv/.ready" -nt "$wanted" ]; then
    if [ "$peer" = llama_cpp ] && [ -z "${CC:-}" ] && command -v clang++ >/dev/null; then
        export CC=clang CXX=clang++ # built by GCC 12 for a tile unit, 8 and 4 bits end with an illegal instruction
    fi
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --requirement "$wanted"
    bare="$here/requirements/$peer.no-deps.txt"
    if [ -f "$bare" ]; then
        "$venv/bin/python" -m pip install --quiet --no-deps --requirement "$bare"
    fi
    touch "$venv/.ready"
fi
exec "$venv/bin/python" "$here/${kind}_$peer.py" "$@"
