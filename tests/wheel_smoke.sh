#!/usr/bin/env bash
# Builds the sdist and from it the wheel, installs that into a clean environment, and chats from a
# folder far away; then has the sdist's own C sources compiled at their first use.
# An unlisted package works in an editable install and is missing from the wheel: this finds it.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

rm -rf "$repository"/{build,vkv.egg-info}  # else a file that has gone would still be packed
"${BUILDER:-python3}" -m build --outdir "$scratch/dist" "$repository" >"$scratch/build.log" 2>&1 ||
  { cat "$scratch/build.log"; exit 1; }
wheel=$(ls "$scratch"/dist/vkv-*.whl)

"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check \
  -c "$repository/constraints.txt" "$wheel"

cd "$scratch"
mkdir sdist
tar -xzf dist/vkv-*.tar.gz --strip-components=1 -C sdist
XDG_CACHE_HOME="$scratch/cache" venv/bin/python - "$repository" sdist from_sdist <<'PY'
import shutil
import sys
import tomllib
from pathlib import Path

repository, sdist, root = map(Path, sys.argv[1:])
FOLDERS = ("attention_backends", "quant/kernels", "runtime/cpu_kernels")
for folder in FOLDERS:
    found, wanted = (
        sorted(path.name for path in (home / folder / "native").glob("*.[ch]"))
        for home in (sdist, repository)
    )
    assert found == wanted, f"the sdist has {found} of {folder}/native: {wanted}"
assert not list(sdist.rglob("*.so")), "the sdist has compiled libraries"

settings = tomllib.loads((sdist / "pyproject.toml").read_text())["tool"]["setuptools"]
for package, folder in settings["package-dir"].items():  # what an install without a compiler does
    shutil.copytree(sdist / folder, root.joinpath(*package.split(".")), dirs_exist_ok=True)
sys.path.insert(0, str(root.resolve()))

from vkv.attention_backends import native as attention_kernels
from vkv.quant.kernels import native as int4_kernels
from vkv.runtime.cpu_kernels import kernels as cpu_kernels

MODULES = attention_kernels, int4_kernels, cpu_kernels

for module in MODULES:
    assert root.resolve() in Path(module.__file__).resolve().parents, module.__file__
    module.library()
with open("/proc/self/maps") as lines:
    mapped = {line.split()[-1] for line in lines if "/cache/vkv/" in line}
assert len(mapped) == len(FOLDERS), f"of {len(FOLDERS)} libraries, {mapped} were compiled"
PY
echo "the sdist's kernels compile at their first use"

venv/bin/python - "$wheel" <<'PY'
import sys
import zipfile
from importlib import metadata

names = zipfile.ZipFile(sys.argv[1]).namelist()
strays = {name.split("/")[0] for name in names} - {"vkv", f"vkv-{metadata.version('vkv')}.dist-info"}
assert not strays, f"the wheel puts {strays} into site-packages"
import vkv

assert "site-packages" in vkv.__path__[0], vkv.__path__
from vkv.attention_backends import native as attention_kernels
from vkv.quant.kernels import native as int4_kernels
from vkv.runtime.cpu_kernels import kernels as cpu_kernels

MODULES = attention_kernels, int4_kernels, cpu_kernels

for module in MODULES:
    module.library()
with open("/proc/self/maps") as lines:
    mapped = lines.read()
for folder in ("attention_backends", "quant/kernels", "runtime/cpu_kernels"):
    assert f"site-packages/vkv/{folder}/_native" in mapped, (
        f"{folder}'s kernels are compiled anew: the wheel lacks them, or they look older than "
        "their source"
    )
PY
venv/bin/vkv info >/dev/null
told=$(venv/bin/vkv serve 2>&1) && { echo "vkv serve ran without its extra: $told"; exit 1; }
case "$told" in
  *"pip install 'vkv[serve]'"*) ;;
  *) echo "vkv serve does not say what it lacks: $told"; exit 1 ;;
esac
answer=$(printf 'my gate code is 4821\nwhat is my gate code?\n' | venv/bin/vkv chat --device cpu | tail -n 1)
echo "the wheel, on its own, answers: $answer"
case "$answer" in
  *4821*) echo "wheel smoke test passed" ;;
  *) echo "wheel smoke test FAILED: the answer lacks 4821"; exit 1 ;;
esac
