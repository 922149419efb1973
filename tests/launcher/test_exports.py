"""Which variables go along to other machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from launcher.deepspeed_launcher import deepspeed_command
from launcher.exports import exports, is_secret

HOSTS = {"h1": 1, "h2": 1}


def test_only_named_prefixes_go_along():
    environment = {
        "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "PYTHONPATH": "/x", "HF_TOKEN": "t", "AWS_SECRET_ACCESS_KEY": "s",
        "NCCL_SECRET": "s", "HOME": "/root", "MILLSTREAM_SSH_ARGS": "-i id",
    }  # fmt: skip
    assert exports(environment) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "PYTHONPATH": "/x"}


def test_deepspeeds_file_of_variables_goes_along_and_goes_first(tmp_path):
    file = tmp_path / "variables"
    file.write_text("# for all hosts\nNCCL_DEBUG=WARN\nMY_TOKEN=a=b\n\n")
    assert exports({"NCCL_DEBUG": "INFO", "DS_ENV_FILE": str(file)}) == {"NCCL_DEBUG": "WARN", "MY_TOKEN": "a=b"}


def test_line_that_is_no_variable_is_named_without_its_content(tmp_path):
    file = tmp_path / "variables"
    file.write_text("A=1\nhunter2\n")
    with pytest.raises(ConfigError, match=r"variables:2: expected NAME=value$"):
        exports({"DS_ENV_FILE": str(file)})


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD"])
def test_names_of_secrets(name):
    assert is_secret(name) and not is_secret("TOKENIZERS_PARALLELISM") and not is_secret("KEYBOARD")


def test_secret_is_refused_where_deepspeed_would_write_it_on_command_lines(tmp_path, monkeypatch):
    file = tmp_path / "variables"
    file.write_text("MY_TOKEN=hunter2\n")
    monkeypatch.setenv("DS_ENV_FILE", str(file))
    with pytest.raises(ConfigError, match=r"variable MY_TOKEN would stand on the command line .* --launcher pdsh") as e:
        deepspeed_command("pdsh", tmp_path, HOSTS, [])
    assert "hunter2" not in str(e.value)


def test_deepspeed_gets_the_hosts_and_their_variables_in_files(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MASTER_PORT", "4242")
    command = deepspeed_command("pdsh", tmp_path, HOSTS, ["pretrain.train", "/runs/mine"])
    assert (tmp_path / "hosts").read_text() == "h1 slots=1\nh2 slots=1\n"
    variables = Path(tmp_path / "variables").read_text().splitlines()
    assert {"NCCL_DEBUG=INFO", "MASTER_ADDR=h1", "MASTER_PORT=4242"} <= set(variables)
    assert "--force_multi" in command  # one host of a hostfile may be another machine than this
