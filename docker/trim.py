"""Takes out of an environment what no machine without a GPU loads: triton, and CUDA libraries that torch opens later.

PyPI's torch is the CUDA build. Importing it maps the libraries that it is linked to and cannot do without; those that
it would open on a GPU lie beside them. A CPU build of torch brings none, and nothing is removed.
"""

from __future__ import annotations

import importlib
import shutil
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))


def main() -> None:
    """Removes them, and prints how much that was."""
    for module in ("torch", "torchvision", "transformers"):
        importlib.import_module(module)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    libraries = [file for file in SITE.glob("nvidia/**/*.so*") if str(file.resolve()) not in mapped]
    freed = 0
    for file in libraries:
        freed += file.stat().st_size if not file.is_symlink() else 0
        file.unlink()
    for folder in (SITE / "triton", *SITE.glob("nvidia/*/include"), SITE / "torch" / "include"):
        freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
        shutil.rmtree(folder, ignore_errors=True)
    print(f"Removed {freed / 1e9:.2f} GB that is for GPUs")


if __name__ == "__main__":
    main()
