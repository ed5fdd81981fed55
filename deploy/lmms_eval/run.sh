#!/usr/bin/env bash
# Public benchmarks (POPE, GQA, VQAv2, ...) of whatever is served, by lmms-eval in an environment of its own:
#
#     llava-pipeline serve &
#     bash deploy/lmms_eval/run.sh pope gqa                # from the hub
#     bash deploy/lmms_eval/run.sh scenes                  # our own held-out scenes: nothing to download
#
# URL=http://127.0.0.1:8000, MODEL=champion, API_KEY=none and LIMIT=100 (questions of each) may be set.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
root=$(cd ../.. && pwd)
venv=$root/.venv-lmms-eval
torch=$(sed -n 's/^TORCH_VERSION=//p' ../setup.sh)
[ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

if [ ! -e "$venv/done" ]; then
    echo "lmms-eval: installing it into $venv (a gigabyte) ..." >&2
    python3 -m venv "$venv"
    # The build that the pipeline itself has: lmms-eval asks for any torch, which would be the one for CUDA.
    "$venv/bin/pip" install --quiet "torch==$torch" --extra-index-url https://download.pytorch.org/whl/cpu
    # lmms-eval 0.7.3 imports filelock._api, which newer ones do not have.
    "$venv/bin/pip" install --quiet "torch==$torch" lmms-eval==0.7.3 "filelock<3.21"
    # Asking a server needs no torchvision, and one of another build than torch's keeps transformers from being imported.
    "$venv/bin/pip" uninstall --quiet --yes torchvision
    touch "$venv/done"
fi

if [[ " $* " == *" scenes "* ]]; then
    "$root/.venv/bin/python" scenes.py tasks/scenes.parquet
fi
names=$*
export OPENAI_API_KEY=${API_KEY:-none} # in the environment: anybody can read a command line
exec "$venv/bin/python" -m lmms_eval --model openai --tasks "${names// /,}" --include_path tasks \
    --model_args "base_url=${URL:-http://127.0.0.1:8000}/v1,model_version=${MODEL:-champion},num_concurrent=8,timeout=120" \
    --batch_size 1 ${LIMIT:+--limit "$LIMIT"} --output_path "$root/lmms-eval-results"
