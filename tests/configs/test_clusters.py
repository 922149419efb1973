"""Clusters' files: shipped ones load, mistakes are named, walltimes and numbers of GPUs are SLURM's."""

from __future__ import annotations

import pytest

from configs.clusters import FOLDER, ClusterConfig, load_cluster, walltime_seconds
from configs.errors import ConfigError


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_shipped_cluster_loads_and_its_head_says_command_cost_and_result(name):
    assert load_cluster(name).time is not None
    head = (FOLDER / f"{name}.yaml").read_text().split("\n\n")[0:4]
    text = " ".join(head)
    assert "millstream submit slurm" in text and "Cost:" in text and "Expected:" in text


def test_without_a_file_slurms_defaults_hold_and_overrides_go_first(tmp_path):
    assert load_cluster(None) == ClusterConfig()
    (tmp_path / "mine.yaml").write_text("partition: a\ntime: 2:00:00\n")
    cluster = load_cluster(str(tmp_path / "mine.yaml"), ["partition=b"])
    assert (cluster.partition, cluster.time) == ("b", "2:00:00")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("1-0:0:5", None),
     ("1-00:00:05", 86405), ("1 day", None), ("1h", None), ("1:2:3", None), ("-1", None)],
)  # fmt: skip
def test_walltimes_are_slurms(time, seconds):
    if seconds is None:
        with pytest.raises(ConfigError, match="expected minutes"):
            load_cluster(None, [f"time='{time}'"])
    else:
        assert load_cluster(None, [f"time={time}", "save_seconds=10"]).time == time
        assert walltime_seconds(time) == seconds


@pytest.mark.parametrize(
    ("gres", "ranks"),
    [
        ("gpu:8", 8),
        ("gpu:h100:4", 4),
        ("gpu", 1),
        ("gpu:a100", 1),
        ("gpu:1g.5gb:3", 3),
        ("nvme:2,gpu:2", 2),
        ("nvme", 1),
    ],
)
def test_there_is_a_rank_for_each_gpu(gres, ranks):
    assert load_cluster(None, [f"gres='{gres}'"]).tasks_per_node == ranks
    assert load_cluster(None, [f"gres='{gres}'", "ranks_per_node=3"]).tasks_per_node == 3


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("partitoin=gpu", "did you mean `partition`?"),
        ("container.imagee=a", "did you mean `container.image`?"),
        ("export=[HF_TOKEN=abc]", "export takes names"),
        ("env.HF_TOKEN=abc", "HF_TOKEN looks like a secret"),
        ("setup=[export HF_TOKEN=abc]", "HF_TOKEN looks like a secret"),
        ("env={'A B': c}", "is no name"),
        ("time=1", "not longer than save_seconds=120"),
        ("requeues=-1", "requeues"),
        ("partition='a b'", "partition"),
        ("account='x;y'", "account"),
        ("options=[-p gpu]", "options"),
    ],
)
def test_mistakes_are_named(word, said):
    with pytest.raises(ConfigError) as error:
        load_cluster(None, [word])
    assert said in str(error.value) and "abc" not in str(error.value)


def test_unknown_cluster_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="--cluster gpux: no such file, and none of the shipped ones: container, cpu"):
        load_cluster("gpux")


def test_a_variable_that_only_sounds_like_a_token_may_be_set_and_a_secret_may_be_read_from_a_file():
    line = "export HF_TOKEN=$(cat ~/.token)"
    assert load_cluster(None, [f"setup=['{line}']"]).setup == [line]
    assert load_cluster(None, ["env.TOKENIZERS_PARALLELISM='false'"]).env == {"TOKENIZERS_PARALLELISM": "false"}
