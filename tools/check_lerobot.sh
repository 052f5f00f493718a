#!/bin/sh
# Does the real LeRobot read what actok writes? Needs the network; everything happens in a throwaway environment.
#
#     tools/check_lerobot.sh 0.4.4 [python]
#
# `python` is an interpreter with actok and its `torch` and `video` extras; its packages are borrowed, so that torch is
# not downloaded again. LeRobot is installed without its dependencies (they would replace torch), then what its datasets
# need. LeRobot 0.6 needs Python 3.12.
set -eu
release=${1:?which LeRobot, e.g. 0.4.4}
python=${2:-python}
here=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT INT TERM

"$python" -m venv "$scratch/venv"
site=$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' > "$site/borrowed.pth"
echo "$here/src" > "$site/actok.pth"
case $release in
    0.[123].*) datasets="datasets==3.6.0 requests" ;;
    *) datasets="datasets>=4" ;;
esac
# shellcheck disable=SC2086
"$scratch/venv/bin/pip" install --quiet $datasets jsonlines draccus==0.10.0 einops deepdiff imageio termcolor packaging \
    pyserial opencv-python-headless pandas
"$scratch/venv/bin/pip" install --quiet --no-deps "lerobot==$release" accelerate gymnasium==1.1.1 cloudpickle \
    farama-notifications psutil
HF_HOME="$scratch/hf" HF_HUB_OFFLINE=1 "$scratch/venv/bin/python" "$here/tools/check_lerobot.py"
