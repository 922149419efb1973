"""Which variables of this environment go along to other machines: those of named prefixes, and those of a file.

The file is deepspeed's: `NAME=value` a line, in `.deepspeed_env` of the home or of the working directory, or where
DS_ENV_FILE says. Nothing else leaves this machine, so a token that happens to be in the environment stays here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from configs.errors import ConfigError

PREFIXES = (
    "NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "OMP_", "MKL_", "KMP_", "DS_ACCELERATOR", "PYTHONPATH",
    "LD_LIBRARY_PATH", "TOKENIZERS_", "HF_HOME", "HF_HUB_OFFLINE", "TRITON_", "MILLSTREAM_",
)  # fmt: skip
STAYS = ("MILLSTREAM_SSH_ARGS",)
SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY)(_|$)", re.IGNORECASE)


def exports(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set on other machines. Raises ConfigError for a line of the file that is none."""
    chosen = {
        name: value for name, value in environment.items()
        if name.startswith(PREFIXES) and name not in STAYS and not is_secret(name)
    }  # fmt: skip
    for file in files(environment):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            name, equals, value = line.partition("=")
            if not line.strip() or line.startswith("#"):
                continue
            if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
                raise ConfigError(f"{file}:{number}: expected NAME=value")  # not the line: it may hold a secret
            chosen[name.strip()] = value.strip()
    return chosen


def files(environment: Mapping[str, str]) -> list[Path]:
    """deepspeed's files of variables, those that exist; the later one goes first."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    found = [path for folder in (Path.home(), Path.cwd()) if (path := Path(os.path.join(folder, name))).is_file()]
    return list(dict.fromkeys(found))


def is_secret(name: str) -> bool:
    """Whether the name of a variable says that others must not see its value."""
    return bool(SECRET.search(name))
