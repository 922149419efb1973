"""What a run will need and take: `make_plan`, and `fit`, which chooses how to run it. Pure: numbers in, numbers out.

plan_job.py has the run as numbers, plan_memory.py and plan_time.py the models, plan_command.py the command.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from configs.errors import ConfigError
from configs.hardware import Gpu, network
from configs.model_sizes import GPT_SIZES
from launcher.plan_job import Cluster, Job, count_parameters, make_cluster
from launcher.plan_memory import Memory, memory
from launcher.plan_probe import Probe, probed_fragmentation, probed_step_time
from launcher.plan_time import StepTime, mfu, model_flops_per_token, step_time

MEMORY_SHARE = 0.95  # of a GPU's memory that a plan may fill
TABLE_MODELS = (
    "gpt2", "gpt2-medium", "gpt2-xl", "gpt3-2.7b", "gpt3-6.7b", "gpt3-13b", "gpt3-175b",
)  # fmt: skip
TABLE_BATCH_TOKENS = 524_288  # of a step in the table: what GPT-3's middle sizes had; 175B had 3.2 million
TOKENS_PER_PARAMETER = 20  # of a compute-optimal run (Hoffmann et al. 2022, "Chinchilla")


@dataclass(frozen=True)
class Plan:
    """A run on a cluster, in numbers: bytes, seconds, US dollars."""

    job: Job
    cluster: Cluster
    memory: Memory
    time: StepTime
    is_probed: bool

    @property
    def fits(self) -> bool:
        return self.memory.total <= MEMORY_SHARE * self.cluster.gpu.memory

    @property
    def tokens_per_second(self) -> float:
        return self.job.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        return mfu(self.job, self.cluster, self.time.total)

    @property
    def hours(self) -> float:
        """Steps that have shorter sequences or a smaller batch take less in proportion."""
        return self.num_tokens / self.tokens_per_second / 3600

    @property
    def num_tokens(self) -> float:
        """Of the run: of all its steps, or as many as its budget allows."""
        budget = self.job.budget_seconds
        return min(self.job.num_tokens, float("inf") if budget is None else budget * self.tokens_per_second)

    @property
    def kilowatt_hours(self) -> float:
        """At the boards' power limit; hosts and cooling come on top, usually a half more."""
        return self.hours * self.cluster.num_gpus * self.cluster.gpu.watts / 1000

    @property
    def dollars(self) -> float:
        return self.hours * self.cluster.num_gpus * self.cluster.gpu.price

    @property
    def flops(self) -> float:
        """Of the whole run, as the model needs them."""
        return self.num_tokens * model_flops_per_token(self.job)

    @property
    def checkpoint_bytes(self) -> float:
        """Of one checkpoint: fp32 weights and optimizer state, over all ranks."""
        return (4 + self.job.state_bytes) * count_parameters(self.job)

    @property
    def data_bytes(self) -> float:
        """Of the token shards if no token is seen twice."""
        return self.num_tokens * (2 if self.job.shape.vocab_size <= 65_536 else 4)


def make_plan(job: Job, cluster: Cluster, probe: Probe | None = None, saves_before_end: bool = True) -> Plan:
    """The numbers of `job` on `cluster`; with a `probe`, by its rates instead of the table's."""
    on_cpu = cluster.gpu.is_cpu
    if probe is None:
        found = memory(job, on_cpu, saves_before_end=saves_before_end)
        return Plan(job, cluster, found, step_time(job, cluster), False)
    fragmentation = probed_fragmentation(job, probe)
    found = memory(job, on_cpu, probe.context_bytes, fragmentation, saves_before_end)
    return Plan(job, cluster, found, probed_step_time(job, cluster, probe), True)


def fit(job: Job, cluster: Cluster, saves_before_end: bool = True) -> Plan:
    """The fastest plan that fits: micro batch, ZeRO stage and checkpointing are chosen, the global batch stays.

    Of plans within two percent the one at the lowest stage, with the smallest micro batch. Raises ConfigError where
    nothing fits, with what the smallest one would need.
    """
    plans = [make_plan(choice, cluster, None, saves_before_end) for choice in choices(job)]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        least = min(plans, key=lambda plan: plan.memory.total)
        raise ConfigError(
            f"nothing fits: at ZeRO stage {least.job.stage} with checkpointing and a micro batch of "
            f"{least.job.micro_batch_size}, one of {cluster.num_gpus} GPUs would need {least.memory.total / 1e9:.1f} "
            f"GB of its {cluster.gpu.memory / 1e9:.1f}; take more GPUs (--gpus), or ones with more memory. What does "
            f"not shrink with more GPUs: {least.memory.parts['activations'] / 1e9:.1f} GB of activations"
        )
    best = min(plan.time.total for plan in fitting)
    near = [plan for plan in fitting if plan.time.total <= 1.02 * best]
    return min(near, key=lambda plan: (plan.job.stage, plan.job.checkpointing, plan.job.micro_batch_size))


def choices(job: Job) -> Iterator[Job]:
    """Every way to run `job`: stages of its precision, with and without checkpointing, micro batches that divide."""
    share = job.global_batch_size // job.num_gpus
    for micro in (size for size in range(1, min(share, 512) + 1) if share % size == 0):
        for stage in (0, 1, 2, 3) if job.element_bytes == 4 else (1, 2, 3):
            for checkpointing in (False, True):
                yield replace(job, micro_batch_size=micro, stage=stage, checkpointing=checkpointing)


def smallest_cluster(preset: str, gpu: Gpu, network_name: str | None = None) -> Plan | None:
    """The plan on the fewest GPUs, doubled from one, that can train GPT `preset`, to 20 tokens a parameter."""
    shape = GPT_SIZES[preset]
    for num_gpus in (2**power for power in range(13)):
        batch = max(num_gpus, TABLE_BATCH_TOKENS // shape.max_seq_len)
        job = Job(
            shape=shape, seq_len=shape.max_seq_len, micro_batch_size=1, global_batch_size=batch, num_gpus=num_gpus,
            num_steps=1, num_tokens=1, budget_seconds=None, element_bytes=2, stage=3,
            bucket_elements=50_000_000, state_bytes=8, checkpointing=False, dropout=0.0, attention_dropout=0.0,
            target_share=1.0,
        )  # fmt: skip
        job = replace(job, num_tokens=TOKENS_PER_PARAMETER * count_parameters(job))
        cluster = make_cluster(num_gpus, None, gpu, network(network_name or gpu.network))
        try:
            return fit(job, cluster)
        except ConfigError:
            continue
    return None
