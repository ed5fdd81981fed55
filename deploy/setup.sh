#!/usr/bin/env bash
# Builds .venv: the locked packages, the torch build that fits this machine, and the project itself (editable).
# Safe to repeat; when nothing changed it does nothing. PYTHON=... names an interpreter for a new .venv, FORCE=1 repeats every step.
set -euo pipefail

TORCH_VERSION=2.13.0
UV_VERSION=0.13.9
CPU_INDEX=https://download.pytorch.org/whl/cpu
REMEDY="apt-get install python3 python3-venv"

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=.venv
stamp=$venv/.setup-stamp

step() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }

accelerator() { if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo cuda; else echo cpu; fi; }

# The folder is part of the key: a virtual environment does not survive being moved.
fingerprint() {
    { printf '%s\n%s\n' "$root" "$accel"; cat requirements.lock benchmarks/requirements.txt pyproject.toml deploy/setup.sh; } | sha256 | cut -d' ' -f1
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3; do
        if command -v "$candidate" >/dev/null && supported "$candidate"; then printf '%s\n' "$candidate"; return; fi
    done
    return 1
}

can_make_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

apt_install() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null || return 1
    step "installing $* with apt-get"
    apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
}

make_venv() {
    local python version
    if ! python=$(find_python); then
        apt_install python3 python3-venv && python=$(find_python) ||
            die "no Python 3.11 to 3.14 found. Remedy: $REMEDY (or name an interpreter: PYTHON=/path/to/python make setup)"
    fi
    if ! can_make_venv "$python"; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        { apt_install "python$version-venv" || apt_install python3-venv; } && can_make_venv "$python" ||
            die "$python has no venv module. Remedy: $REMEDY"
    fi
    step "creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

venv_is_sound() {
    [ -x "$venv/bin/python" ] && supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        [ "$(cat "$venv/.setup-root" 2>/dev/null || printf '%s' "$root")" = "$root" ]
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
uv() { "$venv/bin/python" -m uv "$@"; }

# Prints "2.13.0 cpu" or "2.13.0 cuda"; nothing where torch is absent. Reads torch/version.py, without loading torch.
torch_build() {
    "$venv/bin/python" -c '
import importlib.util, pathlib, runpy
version = runpy.run_path(str(pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")))
print(version["__version__"].split("+")[0], "cuda" if version["cuda"] else "cpu")' 2>/dev/null || true
}

install_torch() {
    local have
    have=$(torch_build)
    if [ "$have" = "$TORCH_VERSION $accel" ] || { [ "$accel" = cpu ] && [ "$have" = "$TORCH_VERSION cuda" ]; }; then
        step "torch $have is installed"
        return
    fi
    step "installing torch $TORCH_VERSION for $accel"
    if [ "$accel" = cuda ]; then
        # "===" shuts out local builds such as 2.13.0+cpu, which "==" would prefer where pip can see one.
        pip install -q "torch===$TORCH_VERSION"
    else
        pip install -q "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
            pip install -q --extra-index-url "$CPU_INDEX" "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
            pip install -q "torch==$TORCH_VERSION"
    fi
    have=$(torch_build)
    case $have in
        "$TORCH_VERSION $accel" | "$TORCH_VERSION cuda") ;;
        *) die "torch $TORCH_VERSION ($accel) was asked for, but '$have' was installed" ;;
    esac
}

began=$SECONDS
accel=$(accelerator)
key=$(fingerprint)

if [ -z "${FORCE:-}" ] && venv_is_sound && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    step "up to date ($((SECONDS - began)) s)"
    exit 0
fi

if grep -qE '^(torch|triton|nvidia-[a-z0-9-]+)==' requirements.lock; then
    die "requirements.lock holds torch or CUDA packages; regenerate it with: make lock"
fi

export UV_NO_PROGRESS=1
venv_is_sound || make_venv
rm -f "$stamp"
printf '%s' "$root" >"$venv/.setup-root"

if [ "$("$venv/bin/python" -m uv --version 2>/dev/null | cut -d' ' -f2)" != "$UV_VERSION" ]; then
    step "installing uv $UV_VERSION"
    pip install -q "uv==$UV_VERSION"
fi

# The lock comes before torch, so that pip finds torch's own dependencies in place, at their locked versions. It is
# complete but for torch, which some of its packages ask for: --no-deps.
before=$(torch_build)
step "installing the locked packages"
uv pip install -q --python "$venv/bin/python" --no-deps --require-hashes -r requirements.lock
[ -z "$before" ] || [ "$(torch_build)" = "$before" ] || die "the locked packages replaced torch ($before)"

install_torch

step "installing what the benchmarks compare with"
uv pip install -q --python "$venv/bin/python" --no-deps --require-hashes -r benchmarks/requirements.txt

step "installing llava-pipeline (editable)"
uv pip install -q --python "$venv/bin/python" --no-deps -e .

printf '%s\n' "$key" >"$stamp"
step "done: torch $(torch_build), $((SECONDS - began)) s"
