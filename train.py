"""Fine-tunes a Gemma 3.

python train.py --config small.toml [--set section.key=value ...] [--resume | --plan [GIB] | --explain-batch]
python train.py --config small.toml --check-data [--rank-by base|ADAPTER] [--html FILE] [--json]
python train.py --config small.toml --sweep section.key=value,value ...
"""

import argparse
import sys
import time

from common.errors import DONE, run

MODES = {
    "--resume": "continue the run from its newest checkpoint",
    "--plan": "estimate the memory of the run and the largest batch that fits; train nothing; "
    "--plan 24: on a GPU of 24 GiB, which need not be here",
    "--explain-batch": "print the first micro-batch token by token, and what was left out; train nothing",
    "--check-data": "look for defects of the rows, such as duplicates; exit code 1 if they would spoil a run",
}
CHECKS = {
    "--rank-by": ("base|ADAPTER", "rank the rows by the loss of the base or of an adapter's folder"),
    "--html": ("FILE", "write a page with the rows"),
}


def main(argv: list[str] | None = None) -> int:
    """Parses the command line `argv`, does what it asks, and returns the exit code of the process."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Fine-tune a Gemma 3 model with LoRA and report what it gained."
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a TOML file: small.toml, or one of configs/")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override one key; may be repeated")  # fmt: skip
    add("--sweep", action="append", default=[], metavar="SECTION.KEY=VALUE,VALUE",
        help="train once for each value and compare the runs; may be repeated: all combinations")  # fmt: skip
    modes = parser.add_mutually_exclusive_group()
    for flag, text in MODES.items():
        if flag == "--plan":  # without a value it is 0: this machine
            modes.add_argument(flag, nargs="?", type=gibibytes, const=0.0, metavar="GIB", help=text)
        else:
            modes.add_argument(flag, action="store_true", help=text)
    for flag, (value, text) in CHECKS.items():
        add(flag, default="", metavar=value, help=f"with --check-data: {text}")
    add("--json", action="store_true", help="with --check-data: print one JSON object")
    args = parser.parse_args(argv)
    if args.sweep and (args.plan is not None or args.explain_batch or args.check_data):
        parser.error("--sweep trains; leave out --plan, --explain-batch and --check-data")
    if not args.check_data and (args.rank_by or args.html or args.json):
        parser.error("--rank-by, --html and --json belong to --check-data")
    return run(
        lambda: sweep(args) if args.sweep else train(args),
        stopped=lambda: f"stopped; continue with:\n    {resume_command(args)}",
    )


def sweep(args: argparse.Namespace) -> int:
    """Trains each combination of values in a folder of its own; the same command continues it."""
    from training.sweep import sweep

    return sweep(args.config, args.overrides, args.sweep, resume_command(args))


def gibibytes(text: str) -> float:
    """Returns the size that `text` names; argparse reports the ValueError."""
    if not 0 < float(text) < 2**20:
        raise ValueError
    return float(text)


def train(args: argparse.Namespace) -> int:
    """Trains, or only prints what another mode of MODES asks for; returns the exit code."""
    from training.config import load_config

    started = time.perf_counter()
    cfg = load_config(args.config, args.overrides)  # before the imports below, which load torch
    from training import check_data, explain, memory, trainer

    if args.check_data:
        return check_data.check_data(cfg, args.rank_by, args.html, args.json)
    if args.plan is not None:
        memory.plan(cfg, args.plan)
        return DONE
    if args.explain_batch:
        explain.explain_batch(cfg)
        return DONE
    run = trainer.load(trainer.open_run(cfg, args.resume))
    args.resume = True  # from here on the folder holds this run
    before = trainer.measure_before(run)
    code, state = trainer.fit(run, resume_command(args))
    if code == DONE:
        before, after = trainer.measure_after(run, before)
        with trainer.writing_results(run):
            trainer.report(run, state, before, after, time.perf_counter() - started)
    return code


def resume_command(args: argparse.Namespace) -> str:
    """Returns the same command line as shell text, with --resume if `args.resume` is true."""
    import shlex

    sets = [word for override in args.overrides for word in ("--set", override)]
    sets += [word for option in args.sweep for word in ("--sweep", option)]
    flags = [flag for flag in MODES if _value(args, flag)]
    flags += [word for flag in CHECKS if (value := _value(args, flag)) for word in (flag, value)]
    if args.json:
        flags.append("--json")
    if args.plan is not None:
        flags = ["--plan", f"{args.plan:g}"] if args.plan else ["--plan"]
    return shlex.join(["python", "train.py", "--config", args.config, *sets, *flags])


def _value(args: argparse.Namespace, flag: str) -> str:
    """Returns the value of an option, such as that of "--rank-by"."""
    return getattr(args, flag.strip("-").replace("-", "_"))


if __name__ == "__main__":
    sys.exit(main())
