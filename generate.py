"""Prompt a Gemma 3, or chat with it: python generate.py --model DIR|hub-id|tiny [--adapter DIR] [--prompt TEXT]"""

import argparse
import json
import os
import sys


def main(argv: list[str] | None = None) -> int:
    """model -> adapter -> one answer, or a chat until Ctrl-D.  Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    args = parse_arguments(argv)
    try:
        bot = load(args)
        return answer(bot, args) if args.prompt is not None else chat(bot, args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError) as e:
        if os.environ.get("LOUPE_TRACEBACK"):
            raise
        print(f"error: {e}", file=sys.stderr)
        return 2


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="generate.py", description="Prompt a Gemma 3 model; without --prompt, chat with it (Ctrl-D ends).")
    parser.add_argument("--model", required=True, metavar="M", help="tiny (the embedded one), a folder, or a hub id such as google/gemma-3-270m-it")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA or DoRA adapter: a run's adapter/ folder, or PEFT's")
    parser.add_argument("--prompt", metavar="TEXT", help="what the user says")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token (default); 1: as the model has it")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest tokens that make up this share (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    parser.add_argument("--raw", action="store_true", help="no chat turns: the model continues <bos> and the prompt")
    parser.add_argument("--json", action="store_true", help='print one object: {"text", "token_ids", "stop_reason"}')
    parser.add_argument("--device", default="auto", help='"auto" (CUDA where there is one), "cpu", "cuda:1", ...')
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                        help="type of the weights and sums (default: by device)")
    args = parser.parse_args(argv)
    if args.prompt is None and (args.raw or args.json):
        parser.error("--raw and --json go with --prompt")
    return args


class Bot:
    """A model, its tokenizer, and how its tokens are chosen."""

    def __init__(self, model, tokenizer, stop_ids, precision, args):
        self.model, self.tokenizer, self.stop_ids, self.precision = model, tokenizer, stop_ids, precision
        self.settings = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}

    def complete(self, prompt: list[int], seed: int, show: bool):
        """The Completion of a prompt; `show` writes its text to stdout as it comes, without a newline at the end."""
        from model.generate import generate
        from model.tokenizer import TextStream

        stream = TextStream(self.tokenizer)

        def on_token(row: int, token: int) -> None:
            print(stream.push(token), end="", flush=True)

        with self.precision.autocast():
            done = generate(self.model, [prompt], stop_ids=self.stop_ids, seed=seed, on_token=on_token if show else None, **self.settings)[0]
        if show:
            print(stream.flush(), end="")
        return done


def load(args: argparse.Namespace) -> Bot:
    """Torch and the weights are loaded here, after the command line was found good."""
    from model.hub import resolve
    from model.tokenizer import Tokenizer, read_generation_stops
    from model.weights import load_model
    from training.precision import Precision, pick_device, pick_precision

    device = pick_device(args.device)
    precision = Precision(pick_precision({"float32": "fp32", "bfloat16": "bf16"}.get(args.dtype, "auto"), device), device)
    folder = resolve(args.model)
    tokenizer = Tokenizer(folder)
    model = load_model(folder, precision.dtype, device)
    if args.adapter:
        from lora.peft_io import load_adapter

        load_adapter(model, args.adapter)
    return Bot(model, tokenizer, tokenizer.stop_ids | read_generation_stops(folder), precision, args)


def answer(bot: Bot, args: argparse.Namespace) -> int:
    """One prompt, one answer: streamed to a terminal, whole to anything else."""
    tokenizer = bot.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode(args.prompt)] if args.raw else tokenizer.render_prompt([("user", args.prompt)])
    stream = sys.stdout.isatty() and not args.json
    done = bot.complete(prompt, args.seed, stream)
    text = tokenizer.decode(done.token_ids)
    if args.json:
        print(json.dumps({"text": text, "token_ids": done.token_ids, "stop_reason": done.stop_reason}, ensure_ascii=False))
    else:
        print("" if stream else text)
    return 0


def chat(bot: Bot, args: argparse.Namespace) -> int:
    """Reads lines until Ctrl-D; the model sees the whole conversation each time."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (input() then knows the arrow keys)
    messages: list[tuple[str, str]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not line.strip():
            continue
        messages.append(("user", line))
        done = bot.complete(bot.tokenizer.render_prompt(messages), args.seed + len(messages), show=True)
        print(flush=True)
        messages.append(("assistant", bot.tokenizer.decode(done.token_ids)))


if __name__ == "__main__":
    sys.exit(main())
