"""The peers' own environment: `python -m benchmarks.peers` makes it, or a benchmark does, when it first needs it.

The peers want other versions of some packages than we do, or packages that would pull a CUDA build of torch. So they
live in `.bench-peers/`, beside `.venv`; what has no version here has that of constraints.txt. mosaicml-streaming
imports torchvision, for images only, which has no build for this torch: `stand_in_for_torchvision` takes its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".bench-peers"
TORCH = ["torch==2.13.0"]  # first, exactly pinned; TORCH_PIP_ARGS as for `make venv` where pip's default is CUDA's
PEERS = ["mosaicml-streaming==0.13.0", "litdata==0.2.76", "megatron-core==0.16.1"]  # without what they depend on
NEEDED = [  # what those parts of them import that read and write datasets, and the other peers
    "boto3",
    "Brotli",
    "catalogue==2.0.10",
    "datasets",
    "lightning-utilities==0.15.3",
    "pillow",
    "python-snappy==0.7.3",
    "tiktoken",
    "transformers",
    "xxhash",
    "zstandard",
    "zstd==1.5.7.2",
]


def main() -> None:
    print(python())


def python() -> str:
    """The interpreter of the peers' environment, which is made if it is not there."""
    interpreter, done = FOLDER / "bin" / "python", FOLDER / "done"
    wanted = "\n".join([*TORCH, *PEERS, *NEEDED])
    if done.exists() and done.read_text() == wanted:
        return str(interpreter)
    print(f"making {FOLDER} with the peers: some minutes", file=sys.stderr)
    venv.create(FOLDER, with_pip=True, clear=True)
    pip = [interpreter, "-m", "pip", "install", "-c", "constraints.txt"]
    for packages in ([*os.environ.get("TORCH_PIP_ARGS", "").split(), *TORCH], ["--no-deps", *PEERS], NEEDED):
        # pip says that the peers ask for other packages too: those are for images and for other clouds
        result = subprocess.run([*pip, *packages], cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"pip install {' '.join(packages)} failed:\n{result.stderr[-3000:]}")
    done.write_text(wanted)
    return str(interpreter)


def stand_in_for_torchvision() -> None:
    """Modules that mosaicml-streaming's imports find in the place of torchvision's."""
    import transformers  # noqa: F401  looks for torchvision itself, and must not find these

    for name in ("", ".transforms", ".transforms.functional", ".datasets"):
        sys.modules[f"torchvision{name}"] = types.ModuleType(f"torchvision{name}")
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
