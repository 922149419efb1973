"""What one host's numbers mean for a run on it. Pure: facts (pretrain/host_facts.py) in, findings out."""

from __future__ import annotations

from typing import Any

from launcher.findings import Finding, State, amount

Facts = dict[str, Any]
LEAST_OPEN_FILES, GOOD_OPEN_FILES = 1024, 16_384
LEAST_SHM, GOOD_SHM = 64_000_000, 1_000_000_000
LEAST_FREE, GOOD_FREE = 2_000_000_000, 50_000_000_000
LEAST_FILES = 10_000
CORES_PER_GPU = 2


def judge_host(host: str, facts: Facts) -> list[Finding]:
    """Limits, memory, disks and cores; `judge_gpus` has the GPUs."""
    found = [open_files(facts), shm(facts), cores(facts), disk("disk: folder", facts["folder"])]
    found += [disk("disk: cache", facts["cache"])]
    if facts["infiniband"]:
        found.append(locked_memory(facts))
    return [Finding(f.check, f.state, f.text, f.cure, (host,), f.worst) for f in found]


def open_files(facts: Facts) -> Finding:
    """Each rank keeps a socket for every other one and maps the shards of its dataset."""
    soft, hard = (float("inf") if limit < 0 else limit for limit in facts["open_files"])
    text = f"{soft:,.0f} allowed" if soft < float("inf") else "no limit"
    if soft >= GOOD_OPEN_FILES:
        return Finding("open files", "ok", text, worst=soft)
    enough = "" if hard >= GOOD_OPEN_FILES else f" (root: the hard limit is {hard:,.0f}; /etc/security/limits.conf, or"
    enough += " LimitNOFILE= of slurmd or sshd)" if enough else ""
    state: State = "fail" if soft < LEAST_OPEN_FILES else "warn"
    return Finding("open files", state, text, f"ulimit -n {GOOD_OPEN_FILES}{enough}", worst=soft)


def shm(facts: Facts) -> Finding:
    """NCCL and gloo pass tensors between the ranks of a host there, workers their batches."""
    free, total = facts["shm"]["free"], facts["shm"]["total"]
    text = f"{amount(free)} free of {amount(total)}"
    if free >= GOOD_SHM:
        return Finding("/dev/shm", "ok", text, worst=free)
    cure = "mount -o remount,size=16G /dev/shm; of a container --shm-size=16g or --ipc=host; remove what old runs left"
    return Finding("/dev/shm", "fail" if free < LEAST_SHM else "warn", text, cure, worst=free)


def locked_memory(facts: Facts) -> Finding:
    """RDMA locks what it sends; only asked for where there is an InfiniBand device."""
    soft = facts["locked_memory"][0]
    devices = ", ".join(facts["infiniband"])
    if soft < 0:
        return Finding("locked memory", "ok", f"no limit, for {devices}")
    cure = "ulimit -l unlimited (root: memlock in /etc/security/limits.conf, LimitMEMLOCK=infinity of slurmd or sshd)"
    return Finding("locked memory", "fail", f"{amount(soft)} allowed, and {devices} needs more", cure, worst=soft)


def cores(facts: Facts) -> Finding:
    """What the process may use of the machine, and whether it starts more threads than that."""
    found = facts["cores"]
    usable = min(found["allowed"], found["quota"] or found["allowed"])
    num_gpus = len((facts["gpus"] or {}).get("rows", []))
    text = f"{usable:g} of {found['machine']} usable"
    threads = int(found["threads"]) if str(found["threads"]).isdigit() else None
    if found["quota"] and found["quota"] < found["allowed"]:
        text += " (the control group's quota)"
        if threads is None:
            cure = f"OMP_NUM_THREADS={max(1, int(usable))}: torch counts cores, not the quota; or raise the quota"
            return Finding("CPU cores", "warn", text, cure, worst=usable)
    if threads and threads > usable:
        text += f", OMP_NUM_THREADS={threads}"
        cure = f"OMP_NUM_THREADS={max(1, int(usable))} or more cores: threads that fight run at half the speed"
        return Finding("CPU cores", "warn", text, cure, worst=usable)
    if usable < CORES_PER_GPU * num_gpus:
        cure = f"--cpus-per-task (srun) or the container's --cpus: {CORES_PER_GPU} or more for each GPU"
        return Finding("CPU cores", "warn", f"{text} for {num_gpus} GPUs", cure, worst=usable)
    return Finding("CPU cores", "ok", text, worst=usable)


def disk(check: str, space: Facts) -> Finding:
    """Free space where checkpoints or shards go; a checkpoint that is there says how much the next one takes."""
    free, checkpoint = space["free"], space.get("checkpoint_bytes", 0)
    text = f"{amount(free)} free ({space['type']}) at {space['path']}"
    if not space["writable"]:
        cure = f"choose another folder, or have {space['existing']} made writable for you"
        return Finding(check, "fail", f"{space['path']}: {space['existing']} cannot be written", cure, worst=-1)
    if space["free_files"] is not None and space["free_files"] < LEAST_FILES:
        return Finding(check, "fail", f"{space['free_files']:,} files left (inodes) at {space['path']}", "remove files")
    if free < max(LEAST_FREE, checkpoint):
        more = f", a checkpoint takes {amount(checkpoint)}" if checkpoint else ""
        return Finding(check, "fail", text + more, "free space, or choose another folder", worst=free)
    if free < max(GOOD_FREE, 3 * checkpoint):
        more = f", a checkpoint takes {amount(checkpoint)}" if checkpoint else ""
        cure = "free space, or keep fewer checkpoints (checkpoint.keep_last)"
        if check == "disk: cache":
            cure = "free space, or a smaller data.cache.max_bytes if the data is at an http or s3 address"
        return Finding(check, "warn", text + more, cure, worst=free)
    if space["type"] in ("tmpfs", "ramfs"):
        return Finding(check, "warn", text, "choose a folder on a disk: this one is memory, empty after a reboot")
    return Finding(check, "ok", text, worst=free)
