"""Fine-tune a Gemma 3: python train.py --config small.toml [--set section.key=value ...] [--resume]"""

import argparse
import os
import signal
import sys
import time


def main(argv: list[str] | None = None) -> int:
    """config -> model -> adapters -> data -> objective -> fit -> report.  Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    parser = argparse.ArgumentParser(prog="train.py", description="Fine-tune a Gemma 3 model with LoRA and report what it gained.")
    parser.add_argument("--config", required=True, metavar="FILE", help="a TOML file: small.toml, or one of configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help="override one key; may be repeated")
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    args = parser.parse_args(argv)
    from training.config import load_config

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # one way to stop; the loop takes both over while it runs
    stopped = "stopped"
    try:
        cfg = load_config(args.config, args.overrides)
        stopped += "; nothing was trained yet"
        return train(cfg, args)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except ValueError as e:
        if os.environ.get("LOUPE_TRACEBACK"):
            raise
        print(f"error: {e}", file=sys.stderr)
        return 2


def train(cfg, args) -> int:
    """The whole run; torch is loaded here, after the config was found good."""
    from training import session

    started = time.perf_counter()
    run = session.open_run(cfg, args.resume)
    base = session.load_base(run)
    data = session.load_data(run, base)
    before = session.measure_before(run, base, data)
    code = session.fit(run, base, data, resume_command(args))
    if code:
        return code
    after = session.measure_after(run, base, data)
    session.report(run, base, data, before, after, time.perf_counter() - started)
    return 0


def resume_command(args) -> str:
    """The command that continues this run."""
    import shlex

    sets = [word for override in args.overrides for word in ("--set", override)]
    return shlex.join(["python", "train.py", "--config", args.config, *sets, "--resume"])


if __name__ == "__main__":
    sys.exit(main())
