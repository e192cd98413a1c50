#!/usr/bin/env bash
# The wheel in dist, with the oldest and the newest Python and PyTorch that the package is for: the
# tests of operator, model and programs; all other packages are those of requirements.txt.
#
#   make wheel
#   tools/test_environments.sh [pytest options]      UV=... is the program uv
#
# Environments lie in .environments/NAME, about 6 GB each. What passed is not run again until a file
# changes; remove a folder for newer versions.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v "${UV:-uv}")
[[ $uv == /* ]] || uv=$PWD/$uv
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

sources() { git ls-files -z --cached --others --exclude-standard; }
lowest() { sed -nE "s/^ *\"$1>=([0-9.]+)\",.*/$1==\1.*/p" pyproject.toml; }
# Name, Python, PyTorch.
environments=(
    "oldest 3.11 $(lowest torch) $(lowest torchvision)"
    "newest 3.13 torch torchvision"
)
tests=(tests/layers tests/modeling tests/export tests/tools tests/test_*.py)
# CUDA's sources have nothing to do with the version of Python or PyTorch that runs here.
options=(-q -p no:cacheprovider --ignore-glob '*/test_cuda_*' "$@")
wheels=(dist/ddetr_d2-*.whl)
if [[ ${#wheels[@]} != 1 || ! -e ${wheels[0]} ]]; then
    echo "error: one wheel of ddetr_d2 is expected in dist: make wheel" >&2
    exit 2
fi

install() { # folder, Python, requirements of torch and torchvision
    local python=$1/venv/bin/python others=$1/requirements.txt
    "$uv" venv -q --seed --clear --python "$2" "$1/venv"
    # These follow from the version of torch.
    grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' requirements.txt > "$others"
    "$uv" pip install -q --python "$python" -r requirements-build.txt
    "$uv" pip install -q --python "$python" --no-build-isolation -r "$others" "${@:3}"
    "$python" third_party/detectron2/install.py > "$1/detectron2.log" 2>&1
    touch "$1/installed"
}

prepare_tests() { # folder
    local python=$PWD/$1/venv/bin/python
    rm -rf "$1/source"
    mkdir "$1/source"
    # Without the package, so that the one in the wheel is tested.
    sources | tar --exclude 'ddetr_d2/*' --null --files-from=- --ignore-failed-read -cf - |
        tar -xf - -C "$1/source"
    "$uv" pip install -q --python "$python" --no-deps --reinstall "${wheels[0]}"
}

run_tests() { # folder
    local python=$PWD/$1/venv/bin/python
    (
        cd "$1/source"
        "$python" -m pytest "${options[@]}" "${tests[@]}" > ../tests.log 2>&1
    )
}

versions() { # folder
    "$1/venv/bin/python" - << 'END'
import platform
from importlib.metadata import version

packages = ("torch", "torchvision", "numpy", "detectron2")
print(f"Python {platform.python_version()},", *(f"{name} {version(name)}" for name in packages))
END
}

changed_since() { # file
    while IFS= read -r -d '' source; do
        [[ ! $source -nt $1 ]] || echo "$source"
    done < <(sources)
}

failed=0
for environment in "${environments[@]}"; do
    read -r name python torch torchvision <<< "$environment"
    folder=.environments/$name
    mkdir -p "$folder"
    if [[ ! -e $folder/installed ]]; then
        if ! "$uv" python find --no-python-downloads -q "$python" > /dev/null 2>&1; then
            echo "$name: no Python $python was found:" \
                "put one on the PATH, or uv python install $python"
            failed=1
            continue
        fi
        echo "$name: installing into $folder"
        install "$folder" "$python" "$torch" "$torchvision"
    fi
    if [[ -e $folder/passed && -z $(changed_since "$folder/passed") ]]; then
        echo "$name: passed before: $(cat "$folder/passed")"
        continue
    fi
    echo "$name: testing"
    prepare_tests "$folder"
    if run_tests "$folder"; then
        echo "$(versions "$folder"): $(tail -n 1 "$folder/tests.log")" > "$folder/passed"
        echo "$name: passed: $(cat "$folder/passed")"
    else
        echo "$name: failed: $(versions "$folder"); see $folder/tests.log"
        failed=1
    fi
done
exit "$failed"
