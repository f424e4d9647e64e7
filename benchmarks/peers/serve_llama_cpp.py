"""Serves a model with llama.cpp's own server, `llama-server`, built at first use from the source of llama-cpp-python.

    benchmarks/peers/run.sh serve llama_cpp --model DIR --port P [--clients N] [--context N] [--bits 16|8|4]
        [--kv-bits 32|16]

It has a slot for each client, and continuous batching. Nothing of a prompt is kept for the next one. Building takes
some ten minutes, needs cmake and a compiler of C++, and is done by clang where it is installed, as that of
llama-cpp-python.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from common import convert, fail, physical_cores, serving_parser
from run_llama_cpp import add_bits, gguf_file, kv_bits, llama_cpp_source

BUILD_OPTIONS = ("BUILD_SHARED_LIBS=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=ON")


def main() -> None:
    options = serving_parser(__doc__)
    add_bits(options)
    args = options.parse_args()
    model, cache = gguf_file(args.model, args.bits, args.threads), f"f{kv_bits(args)}"
    command = [built_server(), "--model", model, "--host", "127.0.0.1", "--port", args.port, "--no-webui"]
    command += ["--parallel", args.clients, "--ctx-size", args.context * args.clients, "--cache-ram", 0]
    command += ["--threads", args.threads, "--threads-batch", args.threads, "--no-cache-prompt", "--flash-attn", "on"]
    command += ["--cache-type-k", cache, "--cache-type-v", cache]
    words = [str(word) for word in command]
    os.execv(words[0], words)


def built_server() -> Path:
    """The server's program in this environment, built if it is not there yet."""
    program = Path(sys.prefix) / "bin" / "llama-server"
    if program.exists():
        return program
    cmake = shutil.which("cmake")
    if cmake is None:
        fail("llama.cpp's server is built with cmake, and there is none: install it")
    if "CC" not in os.environ and shutil.which("clang++"):
        os.environ |= {"CC": "clang", "CXX": "clang++"}
    print("building llama.cpp's server, which takes some ten minutes", file=sys.stderr)
    with llama_cpp_source() as source:
        build = source / "build"
        asked = [f"-D{option}" for option in ("CMAKE_BUILD_TYPE=Release", *BUILD_OPTIONS)]
        convert([cmake, "-S", source, "-B", build, *asked], "cmake cannot prepare llama.cpp's server")
        command = [cmake, "--build", build, "--target", "llama-server", "--parallel", str(physical_cores())]
        convert(command, "llama.cpp's server does not build")
        part = program.with_suffix(".part")
        shutil.copy2(build / "bin" / "llama-server", part)
        part.replace(program)
    return program


if __name__ == "__main__":
    main()
