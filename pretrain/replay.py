"""Runs the batch of one step again and shows where numbers go wrong: `millstream replay RUN_DIR|CONFIG STEP`.

Batches are functions of the step, so any step of a run can be looked at. The weights are those that the step had: of
the newest checkpoint before it, and the steps in between are made again (`exact=false`: the checkpoint's weights as
they are). Of a run that the guard has stopped, batch and weights come from RUN_DIR/stopped. Nothing of the run is
changed; all numbers are also in RUN_DIR/replay/step-00000123.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from configs.deepspeed_json import deepspeed_json
from configs.load import ConfigError, load_pretrain
from configs.schema import PretrainConfig
from data_pipeline.shards import DataError
from data_pipeline.stream import Batch, Stream, open_stream
from data_pipeline.tokenizer import load_tokenizer
from pretrain import batch_dump, checkpoint, engine, runtime
from pretrain.checkpoint import CheckpointError
from pretrain.load import begin, load
from pretrain.metrics import read_metrics
from pretrain.models import build_model
from pretrain.models.compiled import use_uncompiled
from pretrain.not_finite import count_not_finite, watch
from pretrain.objective import count_targets, global_mean
from pretrain.runtime import Runtime
from pretrain.state import batch_number
from pretrain.step import add_up_gradient, train_step

NUM_SAMPLES, NUM_TEXTS, NUM_GRADIENTS = 16, 5, 12  # shown; the JSON file has all
TEXT_TOKENS, TEXT_CHARACTERS = 48, 100
OWN_WORDS = ("step", "exact")


def main() -> int:
    file, words = runtime.launch_arguments(__doc__.splitlines()[0])
    own = dict(word.split("=", 1) for word in words if word.partition("=")[0] in OWN_WORDS)
    overrides = [word for word in words if word.partition("=")[0] not in OWN_WORDS]
    try:
        config = load_pretrain(file, [*overrides, "log.trace=false", "guard.verify_every_steps=null"])
        found = replay(config, int(own["step"]), own.get("exact", "true") != "false", runtime.start())
    except (ConfigError, DataError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    if found is not None:
        show(found)
    return 0


def replay(config: PretrainConfig, number: int, is_exact: bool, ranks: Runtime) -> dict[str, Any] | None:
    """Run the batch of the step that metrics.jsonl counts as `number`; on the first rank all there is to say of it."""
    run_dir, step = Path(config.run_dir), number - 1
    data = open_stream(config, "train")
    runtime.seed_all(config.train.seed)
    model = engine.initialize(
        lambda: build_model(config.model, data.vocab_size, config.train.longest_seq_len),
        config.train.optimizer,
        deepspeed_json(config, ranks.world_size),
    )
    batch, origin = fill(config, model, data, step, is_exact, ranks)
    weights = count_not_finite(engine.fragments(model))
    batches, batch_origin = batches_of_step(run_dir, data, batch, ranks)
    runtime.seed_all(config.train.seed, step, ranks.rank)
    model.train()
    use_uncompiled(model.module)  # inside of a compiled block nothing can be watched
    with watch(model.module) as seen:
        losses = add_up_gradient(config, model, batches, step, ranks)
    gradients = {name: gradient.float().norm().item() for name, gradient in engine.gradients(model)}
    samples = losses_of_samples(config, model, batch, ranks)
    told: list[Any] = ranks.gather((weights, samples, seen))
    data.close()
    ranks.barrier()
    if not ranks.is_first:
        return None
    found = {
        "step": number,
        "weights": origin,
        "batch": batch_origin,
        "losses": losses,
        "grad_norm": math.sqrt(sum(norm**2 for norm in gradients.values())),
        "in_metrics": line_of(run_dir, number),
        "weights_not_finite": added(weights for weights, *_ in told),
        "modules_not_finite": [
            {"rank": rank, "pass": direction, **vars(place)}
            for rank, (*_, seen) in enumerate(told)
            for direction, place in seen.items()
        ],
        "samples": [sample for _, samples, _ in told for sample in samples],
        "gradient_norms": gradients,
    }
    folder = run_dir / "replay"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step-{number:08d}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return found


def fill(
    config: PretrainConfig, model: Any, data: Stream, step: int, is_exact: bool, ranks: Runtime
) -> tuple[int, str]:
    """Give the model the weights that `step` begins with; returns the number of its batch and where they come from."""
    run_dir = Path(config.run_dir)
    say = print if ranks.is_first else lambda text: None
    found = checkpoint.newest_valid(run_dir, say, ranks, last=step)
    state = load(found, config, model, data, say) if found else begin(config, model, data, say)
    reached, batch = state.step, batch_number(step, state.passed_over)
    origin = str(found.path) if found else f"{config.model.init_from or 'drawn anew'}, as at the start of the run"
    if reached == step or not is_exact:
        return batch, origin if reached == step else f"{origin}, {step - reached} steps earlier"
    say(f"making {step - reached} steps again, from step {reached}")
    for earlier, share in zip(range(reached, step), shares_of_steps(config, reached, step), strict=True):
        train_step(config, model, data, earlier, ranks, share, state.passed_over)
    return batch, f"{origin}, {step - reached} steps made again from there"


def shares_of_steps(config: PretrainConfig, first: int, last: int) -> list[float]:
    """`train_step`'s time_share in the steps from `first` to before `last`: with a budget as metrics.jsonl has them."""
    if config.train.budget is None:
        return [0.0] * (last - first)
    logged = {line["step"]: line["time_share"] for line in read_metrics(Path(config.run_dir)) if "time_share" in line}
    if missing := [step + 1 for step in range(first, last) if step + 1 not in logged]:
        raise ConfigError(
            f"{config.run_dir}/metrics.jsonl has no time_share of step {missing[0]}, and with train.budget the rate of "
            f"a step follows the clock; give exact=false to take the weights of the checkpoint before it"
        )
    return [logged[step + 1] for step in range(first, last)]


def batches_of_step(run_dir: Path, data: Stream, batch: int, ranks: Runtime) -> tuple[list[Batch], str]:
    """This rank's micro batches, on its device: of a dump where there is one, else made; and where they come from."""
    made = data.micro_batches(batch, ranks.rank, ranks.world_size)
    about, origin = batch_dump.read_about(run_dir), "made by the data pipeline"
    if about is not None and about["batch"] == batch and about["world_size"] == ranks.world_size:
        dumped = batch_dump.read(run_dir, ranks.rank)
        now = "the same" if all(ranks.gather(same(dumped, made))) else "ANOTHER ONE"
        made, origin = dumped, f"dumped when the run was stopped; the data pipeline makes {now} now"
    return [data.expand(runtime.to_device(arrays, ranks.device)) for arrays in made], origin


def same(left: Sequence[Batch], right: Sequence[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


@torch.no_grad()
def losses_of_samples(config: PretrainConfig, model: Any, batch: int, ranks: Runtime) -> list[dict[str, Any]]:
    """For each sample of this rank {"rank", "source", "sample", "loss", "text"}; without dropout, one at a time."""
    padded = config.model_copy(update={"data": config.data.model_copy(update={"unpad": False, "num_workers": 0})})
    data = open_stream(padded, "train")
    tokenizer = load_tokenizer(data.tokenizer_dir)
    model.eval()
    names, samples = iter(data.samples.sample_ids(batch, ranks.rank, ranks.world_size)), []
    for made in data.micro_batches(batch, ranks.rank, ranks.world_size):
        rows = data.expand(runtime.to_device(made, ranks.device))
        for row in range(len(rows["input_ids"])):
            one = {name: tensor[row : row + 1] for name, tensor in rows.items()}
            source, sample = next(names)
            loss = global_mean(model(**one), count_targets([one])).item()
            text = tokenizer.decode(one["input_ids"][0, :TEXT_TOKENS].tolist(), skip_special_tokens=False)
            samples.append({"rank": ranks.rank, "source": source, "sample": sample, "loss": loss, "text": text})
    data.close()
    return samples


def line_of(run_dir: Path, number: int) -> dict[str, Any] | None:
    """The step's line of the run's metrics.jsonl; None where there is none (any more)."""
    for folder in (run_dir, run_dir.parent):  # RUN_DIR/stopped has none of its own
        if (folder / "metrics.jsonl").exists():
            lines = (line for line in read_metrics(folder) if line["step"] == number and "loss" in line)
            return next(lines, None)
    return None


def added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for of_rank in counts:
        for name, number in of_rank.items():
            total[name] = total.get(name, 0) + number
    return total


def show(found: dict[str, Any]) -> None:
    """Print what a person looks for first."""
    print(f"\nstep {found['step']}\n  weights  {found['weights']}\n  batch    {found['batch']}")
    in_metrics = found["in_metrics"] or {}
    for name, value in {**found["losses"], "grad_norm": found["grad_norm"]}.items():
        print(f"  {name:13}{value:<12.6g}" + (f"in metrics.jsonl {in_metrics[name]:.6g}" if name in in_metrics else ""))
    print("\nnumbers that are not finite")
    for name, count in found["weights_not_finite"].items():
        print(f"  in the weights: {name}, {count} of its elements")
    for place in found["modules_not_finite"]:
        print(f"  rank {place['rank']}, {place['pass']}: first {describe(place)}")
    if not found["weights_not_finite"] and not found["modules_not_finite"]:
        print("  none")
    show_samples(found["samples"])
    print("\ngradient norms, the largest first")
    ranked = sorted(found["gradient_norms"].items(), key=lambda item: -_rank_of(item[1]))
    for name, norm in ranked[:NUM_GRADIENTS]:
        print(f"  {norm:<12.5g}{name}")


def describe(place: dict[str, Any]) -> str:
    found = f"{place['module']} ({place['type']}): {place['count']} of {place['size']} elements"
    if place["pass"] == "backward":
        return f"{found} of the gradient of its output"
    cause = "what it was given was finite" if place["was_given_finite"] else "what it was given was not finite either"
    return f"{found} of its output; {cause}"


def show_samples(samples: list[dict[str, Any]]) -> None:
    ranked = sorted(samples, key=lambda sample: -_rank_of(sample["loss"]))
    print(f"\nsamples, the worst first ({min(NUM_SAMPLES, len(ranked))} of {len(ranked)}; loss without dropout)")
    print("  rank  source  sample      loss")
    for place, sample in enumerate(ranked[:NUM_SAMPLES]):
        text = " ".join(sample["text"].split())[:TEXT_CHARACTERS] if place < NUM_TEXTS else ""
        numbers = f"{sample['rank']:>6}{sample['source']:>8}{sample['sample']:>8}{sample['loss']:>10.4f}"
        print(f"{numbers}  {text}".rstrip())


def _rank_of(value: float) -> float:
    return value if math.isfinite(value) else math.inf


if __name__ == "__main__":
    runtime.run(main)
