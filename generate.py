"""Prompt a Gemma 3, or chat with it: python generate.py --model DIR|hub-id|tiny [--adapter DIR] [--prompt TEXT]"""

import argparse
import contextlib
import importlib
import json
import sys

from training.cli import Loaded, add_model_arguments, load, run


def main(argv: list[str] | None = None) -> int:
    """model -> adapter -> one answer, or a chat until Ctrl-D.  Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped."""
    args = parse_arguments(argv)
    return run(lambda: speak(args))


def speak(args: argparse.Namespace) -> int:
    bot = Bot(load(args), args)
    return answer(bot, args) if args.prompt is not None else chat(bot, args)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="generate.py", description="Prompt a Gemma 3 model; without --prompt, chat with it (Ctrl-D ends).")
    add_model_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what the user says")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer, in tokens (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest token (default); 1: as the model has it")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest tokens that make up this share (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    parser.add_argument("--raw", action="store_true", help="no chat turns: the model continues <bos> and the prompt")
    parser.add_argument("--json", action="store_true", help='print one object: {"text", "token_ids", "stop_reason"}')
    args = parser.parse_args(argv)
    if args.prompt is None and (args.raw or args.json):
        parser.error("--raw and --json go with --prompt")
    return args


class Bot:
    """A model, its tokenizer, and how its tokens are chosen."""

    def __init__(self, loaded: Loaded, args: argparse.Namespace):
        self.model, self.tokenizer, self.precision = loaded.model, loaded.tokenizer, loaded.precision
        self.stop_ids = loaded.tokenizer.stop_ids
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
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # being loaded is all that it takes: input() then knows the arrow keys
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
