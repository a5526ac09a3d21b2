"""Fine-tune a Gemma 3: python train.py --config small.toml [--set section.key=value ...] [--resume | --plan]"""

import argparse
import sys
import time

from common.errors import DONE, run


def main(argv: list[str] | None = None) -> int:
    """config -> model -> adapters -> data -> objective -> fit -> report.  Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Fine-tune a Gemma 3 model with LoRA and report what it gained."
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a TOML file: small.toml, or one of configs/"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override one key; may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print how much memory the run will take, and the largest batch that fits, without a start",
    )
    args = parser.parse_args(argv)
    return run(lambda: train(args), stopped=lambda: f"stopped; continue with:\n    {resume_command(args)}")


def train(args) -> int:
    """The whole run; torch is loaded here, after the config was found good."""
    from training.config import load_config

    started = time.perf_counter()
    cfg = load_config(args.config, args.overrides)
    if args.plan:
        from training import memory

        memory.plan(cfg)
        return DONE
    from training import session

    run = session.open_run(cfg, args.resume)
    base, data = session.load(run)
    args.resume = True  # from here on the folder holds this run
    before = session.measure_before(run, base, data)
    code = session.fit(run, base, data, resume_command(args))
    if code == DONE:
        after = session.measure_after(run, base, data)
        before = before or session.measure_without_adapter(run, base, data)
        session.report(run, base, data, before, after, time.perf_counter() - started)
    return code


def resume_command(args) -> str:
    """The command that continues this run, or starts it again where it had not begun."""
    import shlex

    sets = [word for override in args.overrides for word in ("--set", override)]
    flags = [flag for flag, given in (("--resume", args.resume), ("--plan", args.plan)) if given]
    return shlex.join(["python", "train.py", "--config", args.config, *sets, *flags])


if __name__ == "__main__":
    sys.exit(main())
