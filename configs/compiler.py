"""Whether torch.compile can work on this machine, without importing torch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def what_compile_lacks() -> str | None:
    """What torch.compile needs and does not find here, and the cure; None where nothing is missing.

    It builds what it generates with a C++ compiler (CXX, or g++) and Python's header files; on a GPU the code that
    starts its kernels.
    """
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        return f"a C++ compiler, and there is no {compiler} on this machine: install g++, or let CXX name a compiler"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"Python's header files, and there is no {header}: install them (Debian's package is python3-dev)"
    return None
