"""Ranks and the address of the first one, from the variables that real launchers set."""

from __future__ import annotations

import pytest

from pretrain.placement import (
    FIRST_PORT,
    NUM_PORTS,
    Placement,
    address,
    complete,
    expand_counts,
    first_host,
    placement,
)

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "1234567",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_STEP_NODELIST": "gpu[007-009]",
}  # fmt: skip


def test_process_that_nobody_placed_is_alone():
    assert placement({"HOME": "/root"}) is None


def test_batch_script_of_slurm_is_alone_although_slurm_counts_it():
    assert placement({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]"}) is None


def test_task_of_srun_finds_its_place_and_the_first_node():
    found = placement(SRUN)
    assert found == Placement("5", "6", "1", "2", "gpu007", found.master_port)
    assert FIRST_PORT <= int(found.master_port) < FIRST_PORT + NUM_PORTS
    assert found.variables() == {
        "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu007",
        "MASTER_PORT": found.master_port,
    }  # fmt: skip


def test_port_is_that_of_the_step_and_not_of_the_rank():
    ports = [
        placement(SRUN | changed).master_port
        for changed in ({"SLURM_PROCID": "0"}, {"SLURM_PROCID": "1"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "78"})
    ]
    assert ports[0] == ports[1] and len(set(ports)) == 3


def test_ranks_of_open_mpi_on_one_machine_meet_there():
    found = placement(OPEN_MPI)
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == ("3", "4", "3", "4")
    assert found.master_addr == "127.0.0.1"
    assert found.master_port == placement(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"}).master_port


def test_ranks_of_mpich_on_one_machine_meet_there():
    found = placement({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"})
    assert found == Placement("1", "2", "1", "2", "127.0.0.1", "29500")


def test_mpirun_on_several_machines_leaves_open_which_is_the_first():
    several = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert placement(several).master_addr == ""
    assert placement(several | {"MASTER_ADDR": "first"}).master_addr == "first"
    assert placement(several | {"SLURM_JOB_NODELIST": "n[3-4]"}).master_addr == "n3"


def test_rank_without_a_local_one_is_alone_on_its_machine_as_a_pod_of_kubernetes():
    assert complete({"RANK": "3", "WORLD_SIZE": "4"}) == {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert complete({"RANK": "3", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}) == {"LOCAL_WORLD_SIZE": "2"}  # deepspeed
    assert complete({"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == {}  # torchrun


def test_mpirun_goes_before_the_srun_that_has_started_its_daemons():
    assert placement(SRUN | OPEN_MPI).world_size == "4"


def test_address_and_port_that_are_set_stay():
    own = {"MASTER_ADDR": "head", "MASTER_PORT": "4242"}
    for environment in (SRUN, OPEN_MPI):
        found = placement(environment | own)
        assert (found.master_addr, found.master_port) == ("head", "4242")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"), ("n1,n2", "n1"), ("gpu[007-012,020],cpu1", "gpu007"), ("a-[3,5]", "a-3"),
        ("rack[1-2]node[04-05]", "rack1node04"), ("n[12]", "n12"), ("", ""),
    ],
)  # fmt: skip
def test_first_host_of_slurms_lists(nodes, first):
    assert first_host(nodes) == first


def test_tasks_of_each_node_are_expanded():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1] and expand_counts("4") == [4]


def test_name_that_is_a_machines_is_its_address():
    assert address("localhost") == "localhost"
    assert address("no-such-machine.invalid") == "no-such-machine.invalid"
