"""The `millstream` command: `millstream VERB CONFIG [key=value ...]`.

It only starts things, so it imports nothing heavy: `--help` and `config` answer before torch could have been loaded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from launcher.restarts import Config
    from launcher.started import Rank

USAGE = """\
millstream: raw text in, a pretrained GPT or BERT out, fine-tuned for the task at hand

usage: millstream VERB CONFIG [key=value ...]

  data build CONFIG            raw text -> a dataset directory (data.dir); under mpirun on all of its ranks
  data inspect DIR|CONFIG      sizes, lengths, samples; of a configuration also its mixture and packing
  data head DIR                the first documents, decoded
  data verify DIR              compare every byte with its checksum
  data merge OUT DIR DIR ...   datasets of one tokenizer, one after the other, as one
  data import FORMAT SRC OUT   a dataset of megatron or mds -> a dataset directory (tokenizer=DIR)
  data export arrow DIR OUT    a dataset directory -> one that `datasets` loads
  plan CONFIG --gpus N --gpu h100-80g
                               memory, time and cost before a run: [--nodes N] [--network NAME] [--price DOLLARS]
                               --fit: choose micro batch, ZeRO stage, checkpointing; --probe: measure this machine
  plan table --gpu NAME        the smallest cluster for each size from 124M to 175B
  pretrain CONFIG              train; goes on from the newest checkpoint of run_dir
  submit slurm CONFIG          train in a SLURM queue until the run is done: --nodes 8 | 4-8, --cluster FILE, --dry-run
  prove loss CONFIG            ranks, ZeRO stages, packing, kernels, precision ... against plain float32 (steps=4)
  prove resume CONFIG          kills and resumes a short run and compares it with an undisturbed one (steps=8)
  prove kills CONFIG           the same with ranks killed at many random moments (kills=100 steps=40 seed=0)
  replay RUN_DIR|CONFIG STEP   runs the batch of that step again and shows where its numbers go wrong (exact=false)
  export RUN_DIR               newest checkpoint -> a Hugging Face directory (step=N, weights=ema, dtype=bf16, ...)
  import SOURCE DEST           anybody's GPT or BERT -> a directory that model.init_from goes on from
  finetune CONFIG              an exported directory -> a classifier, regression, question answering, tags, texts
  sweep CONFIG                 fine-tunings with settings chosen by Optuna, from the section `sweep` of CONFIG
  predict MODEL INPUT          what a fine-tuned model says to a new file, as lines of JSON (--output FILE)
  status RUN_DIR ...           does it run, how far is it, how did it end; of several runs a table
  logs RUN_DIR                 the first failing rank's traceback, then all ranks' logs; --rank N, --follow
  watch RUN_DIR ...            a live page of one run or several overlaid, at http://127.0.0.1:8642 (--host, --port);
                               --terminal: in the terminal; /metrics: for Prometheus
  stop RUN_DIR                 finish the step, save, end, under any launcher; --now: at once
  evaluate CONFIG              a GPT without training, zero-, one-, few-shot: choices, cloze, perplexity
  lm-eval MODEL --tasks NAMES  the same by EleutherAI's harness, on an exported directory; its own options may follow
  doctor [FOLDER]              checks this machine for a run; --hosts FILE: those of a hostfile, --slurm [srun options]:
                               nodes of SLURM, with the links between them and FOLDER, which they should share
  config CONFIG [key ...]      effective values and where each comes from; --deepspeed: the generated JSON

  --ranks N                    processes on this machine for pretrain, finetune, sweep and config --deepspeed
                               (default: one per GPU, or one)
  --hosts FILE                 pretrain and finetune on the hosts of a hostfile (lines `NAME slots=N`), over ssh
  --launcher NAME              ssh, or deepspeed's pdsh, openmpi, mpich, impi instead
  key=value                    any setting, for example train.num_steps=500; see configs/schema.py
"""
LAUNCHERS = ("ssh", "pdsh", "openmpi", "mpich", "impi")
PACKAGES = ("configs", "data_pipeline", "pretrain", "finetune", "launcher")


def main(words: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    check_packages()
    from configs.errors import ConfigError

    try:
        return dispatch(words)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


def dispatch(words: list[str]) -> int:
    """Run one verb; returns its exit code. Raises ConfigError for what cannot be understood."""
    from configs.errors import ConfigError

    words, num_ranks = take_ranks(words)
    match words:
        case ["data", "build", *rest] if rest:
            return become_module("data_pipeline.build", rest)
        case ["data", "inspect" | "head" | "verify", _, *_]:
            return become_module("data_pipeline.show", words[1:])
        case ["data", "merge" | "import" | "export", _, _, *_]:
            return become_module("data_pipeline.exchange", words[1:])
        case ["pretrain", config, *overrides]:
            return start("pretrain.train", config, overrides, num_ranks)
        case ["finetune", config, *overrides]:
            return start("finetune.run", config, overrides, num_ranks)
        case ["sweep", config, *overrides]:
            from launcher.sweep import sweep

            return sweep(config, overrides, num_ranks)
        case ["predict", _, _, *_]:
            return become_module("finetune.predict", words[1:])
        case ["plan", *rest]:
            from launcher.plan_command import plan

            return plan(rest)
        case ["prove", "loss", config, *overrides]:
            from launcher.prove_loss import prove_loss

            return prove_loss(config, overrides, num_ranks)
        case ["prove", "resume", config, *overrides]:
            from launcher.prove import prove_resume

            return prove_resume(config, overrides, num_ranks)
        case ["prove", "kills", config, *overrides]:
            from launcher.prove_kills import prove_kills

            return prove_kills(config, overrides, num_ranks)
        case ["replay", place, step, *rest]:
            from launcher.replay import replay

            return replay(place, step, rest, num_ranks)
        case ["evaluate", *rest] if rest:
            return become_module("finetune.evaluation", rest)
        case ["lm-eval", model, *rest] if rest:
            from launcher.harness import harness_words

            return become_module("lm_eval", harness_words(model, rest))
        case ["doctor", *rest]:
            from launcher.doctor import doctor

            return doctor(rest)
        case ["submit", *rest] if rest:
            from launcher.slurm import submit

            if num_ranks is not None:
                raise ConfigError("--ranks is for this machine; a cluster's file has ranks_per_node")
            return submit(rest)
        case ["export", *rest] if rest:
            return run_module("pretrain.export", rest)
        case ["import", _, _, *_]:
            return run_module("pretrain.import_model", words[1:])
        case ["status" | "logs" | "stop" | "watch", *_]:
            return look_after(words)
        case ["config", config, *rest]:
            return show_config(config, rest, num_ranks or 1)
    raise ConfigError(f"not understood: millstream {' '.join(words)}\n\n{USAGE}")


def take_ranks(words: list[str]) -> tuple[list[str], int | None]:
    """Split off `--ranks N`."""
    from configs.errors import ConfigError

    if "--ranks" not in words:
        return words, None
    place = words.index("--ranks")
    value = words[place + 1] if place + 1 < len(words) else ""
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"--ranks {value}: expected a number of processes, 1 or more")
    return words[:place] + words[place + 2 :], int(value)


def take_hosts(words: list[str]) -> tuple[list[str], str | None, str]:
    """Split off `--hosts FILE` and `--launcher NAME`; the name is "ssh" where none is given."""
    from configs.errors import ConfigError

    words, found = list(words), {"--hosts": "", "--launcher": ""}
    for flag in found:
        if flag in words:
            place = words.index(flag)
            found[flag] = words[place + 1] if place + 1 < len(words) else ""
            if not found[flag]:
                raise ConfigError(f"{flag}: expected {'a hostfile' if flag == '--hosts' else 'a name'} after it")
            del words[place : place + 2]
    launcher, hostfile = found["--launcher"], found["--hosts"] or None
    if launcher and launcher not in LAUNCHERS:
        raise ConfigError(f"--launcher {launcher}: expected one of {', '.join(LAUNCHERS)}")
    if launcher and not hostfile:
        raise ConfigError(f"--launcher {launcher}: on which hosts? give --hosts FILE too")
    return words, hostfile, launcher or "ssh"


def start(module: str, config: str, overrides: list[str], num_ranks: int | None) -> int:
    """Check the configuration here, before any process is started, then run `module` on all ranks.

    A process that mpirun, srun or torchrun has started as one of a run's ranks becomes that rank.
    """
    from configs.errors import ConfigError
    from configs.load import load
    from launcher import restarts
    from launcher.started import started_as_rank, started_on_nodes

    overrides, hostfile, launcher = take_hosts(overrides)
    loaded = load(config, overrides).config
    words = ["--config", config, *overrides]
    if hostfile:
        return start_on_hosts(module, words, loaded, num_ranks, hostfile, launcher)
    if rank := started_as_rank(os.environ):
        if num_ranks:
            raise ConfigError(f"--ranks {num_ranks}: what has started this process says how many ranks there are")
        become_rank(module, words, Path(loaded.run_dir), rank)
    if node := started_on_nodes(os.environ):
        return restarts.run_on_node(module, words, loaded, num_ranks, node)
    return restarts.run(module, words, loaded, num_ranks)


def look_after(words: list[str]) -> int:
    """status, logs and stop, of runs that any launcher has started."""
    from configs.errors import ConfigError

    match words:
        case ["status", _, *_] if not any(word.startswith("-") for word in words):
            from launcher.status import show_status

            return show_status([Path(word) for word in words[1:]])
        case ["logs", *rest]:
            from launcher.show_logs import logs_command

            return logs_command(rest)
        case ["watch", *rest]:
            from launcher.watch_runs import watch_command

            return watch_command(rest)
        case ["stop", run_dir] | ["stop", run_dir, "--now"] | ["stop", "--now", run_dir]:
            from launcher.stop import stop_run

            return stop_run(Path(run_dir), "--now" in words)
    raise ConfigError(
        f"not understood: millstream {' '.join(words)}\nexpected status RUN_DIR ..., "
        "logs RUN_DIR [--rank N] [--follow], or stop RUN_DIR [--now]"
    )


def start_on_hosts(
    module: str, words: list[str], config: Config, num_ranks: int | None, hostfile: str, launcher: str
) -> int:
    from configs.errors import ConfigError
    from launcher import restarts
    from launcher.deepspeed_launcher import run_by_deepspeed
    from launcher.hosts import read_hostfile

    hosts = read_hostfile(hostfile)
    if num_ranks:
        raise ConfigError(f"--ranks {num_ranks}: {hostfile} says how many ranks there are, with slots=N")
    if launcher == "ssh":
        return restarts.run(module, words, config, None, hosts)
    return run_by_deepspeed(launcher, module, config, hosts)


def become_rank(module: str, words: list[str], run_dir: Path, rank: Rank) -> NoReturn:
    """Go on as this rank of the run; what it prints goes to its log file as well."""
    from launcher.local import make_logs
    from launcher.logs import begin_logs
    from launcher.rank import become
    from launcher.restarts import note_launch

    if rank.number == 0:
        note_launch(run_dir, rank.count, rank.kind)
    begin_logs(make_logs(run_dir), 1, rank.number)
    become(module, words, run_dir, rank.number)


def become_module(module: str, words: list[str]) -> NoReturn:
    """Go on as `python -m module words`: MPI and signals then see one process, not two."""
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    os.execve(sys.executable, [sys.executable, "-m", module, *words], os.environ | {"PYTHONPATH": paths})


def run_module(module: str, words: list[str]) -> int:
    import subprocess

    return subprocess.run([sys.executable, "-m", module, *words]).returncode


def show_config(path: str, rest: list[str], num_ranks: int) -> int:
    """Print a table of key, value, origin; with --deepspeed the generated JSON instead."""
    import json

    from configs.load import ConfigError, flatten, load

    flags = [word for word in rest if word.startswith("--")]
    keys = [word for word in rest if "=" not in word and word not in flags]
    if unknown := set(flags) - {"--deepspeed"}:
        raise ConfigError(f"unknown flag {sorted(unknown)[0]}; millstream config knows --deepspeed and --ranks N")
    loaded = load(path, [word for word in rest if "=" in word])
    if "--deepspeed" in flags:
        from configs.deepspeed_json import deepspeed_json

        print(json.dumps(deepspeed_json(loaded.config, num_ranks), indent=2))
        return 0
    values = {name: as_json(value) for name, value in flatten(loaded.config).items()}
    for key in keys:
        if not any(name == key or name.startswith(f"{key}.") for name in values):
            import difflib

            near = difflib.get_close_matches(key, values, n=1)
            raise ConfigError(f"no key `{key}`" + (f"; did you mean `{near[0]}`?" if near else ""))
    shown = [name for name in values if not keys or any(name == k or name.startswith(f"{k}.") for k in keys)]
    widths = [max(map(len, shown)), max(len(values[name]) for name in shown)]
    for name in shown:
        print(f"{name:{widths[0]}}  {values[name]:{min(widths[1], 40)}}  {loaded.origin(name)}")
    return 0


def as_json(value: object) -> str:
    """A setting's value on one line; of a dict of sections too."""
    import json

    return json.dumps(value, default=lambda section: section.model_dump(mode="json"))


def check_packages() -> None:
    """Stop if Python would import another distribution's package of the same name instead of ours."""
    root = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        where = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
        if where != root:
            sys.exit(
                f"the package `{name}` that Python finds lies in {where}, not in {root}: another distribution "
                f"installed one of that name. Use an environment of millstream's own (make venv)"
            )


if __name__ == "__main__":
    sys.exit(main())
