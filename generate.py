"""Generates the answer to a prompt, the answers to a file of prompts, or a chat.

python generate.py --model DIR|hub-id|tiny [--adapter DIR] [--prompt TEXT | --input FILE --output FILE]
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.errors import DONE, listed, run
from common.files import moved
from generation.load import LoadedModel, add_model_arguments, load_for_inference

if TYPE_CHECKING:  # --help must not wait for torch.
    from generation.generate import Completion


def main(argv: list[str] | None = None) -> int:
    """Answers one prompt, a file of prompts, or a chat; returns the exit code (common/errors.py)."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "generate.py", *(sys.argv[1:] if argv is None else argv)])
    stopped = f"stopped; continue with:\n    {command}" if args.input else "stopped"
    return run(lambda: answer_file(args) if args.input else talk(args), lambda: stopped)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options; exits with code 2 if they are wrong or exclude each other."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Answer a prompt or a file of prompts, or chat (Ctrl-D ends the chat).",
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="the user's message")
    add("--input", type=moved, metavar="FILE", help="prompts: rows as for training, or a .txt, one a line")
    add("--output", metavar="FILE", help="a JSONL file of the answers; an unfinished one is continued")
    add(
        "--instruction",
        metavar="TEXT",
        help='text before every prompt; "redact": that of the redaction samples',
    )
    add("--batch-size", type=int, default=64, metavar="N", help="prompts at once (default %(default)s)")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: greedy (default); 1: unchanged")
    add("--top-k", type=int, default=0, metavar="K", help="sample among the K most likely tokens; 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="... with a total probability of P; 1: all")
    add("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    add("--raw", action="store_true", help="no chat turns: the model continues <bos> and the prompt")
    add("--json", action="store_true", help='print one object: {"text", "token_ids", "stop_reason"}')
    args = parser.parse_args(argv)
    if args.prompt is None and (args.raw or args.json):
        parser.error("--raw and --json need --prompt")
    if bool(args.input) != bool(args.output) or (args.input and args.prompt is not None):
        parser.error("--input and --output need each other, and exclude --prompt")
    if args.instruction and args.prompt is None and not args.input:
        parser.error("--instruction needs --prompt or --input")
    if args.input and os.path.realpath(args.input) == os.path.realpath(args.output):
        parser.error("--output is the file of --input; name another")
    return args


class Bot:
    """A loaded model and the settings of its answers."""

    def __init__(self, loaded: LoadedModel, args: argparse.Namespace):
        self.model, self.tokenizer, self.precision = loaded.model, loaded.tokenizer, loaded.precision
        self.settings = {
            name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")
        }

    def signature(self, seed: int) -> str:
        """Returns a hash, 12 hex digits, of everything besides the prompt that determines an answer.

        It covers the model's config, the first 4,096 values of each weight, the scales of the adapters, the
        dtype, the stop ids, the seed and the settings.
        """
        from lora.inject import adapters

        scales = {name: layer.scaling for name, layer in adapters(self.model).items()}
        stops = sorted(self.tokenizer.stop_ids)
        known = [self.model.config.to_json(), scales, self.precision.name, self.settings, seed, stops]
        found = hashlib.sha256(json.dumps(known).encode())
        for name, p in self.model.named_parameters():
            found.update(name.encode() + p.detach().flatten()[:4096].float().cpu().numpy().tobytes())
        return found.hexdigest()[:12]

    def complete(self, prompt: list[int], seed: int, show: bool) -> "Completion":
        """Returns the completion of a prompt; `show` prints its text as it grows, without a final newline."""
        from model.tokenizer import TextStream

        stream = TextStream(self.tokenizer)

        def on_token(_: int, token: int) -> None:
            print(stream.push(token), end="", flush=True)

        (done,) = self.complete_all([prompt], seed=seed, on_token=on_token if show else None)
        if show:
            print(stream.flush(), end="")
        return done

    def complete_all(self, prompts: list[list[int]], **options: Any) -> list["Completion"]:
        """Returns the completions of prompts; `options` are those of generation.generate.generate."""
        from generation.generate import generate

        with self.precision.autocast():
            return generate(self.model, prompts, stop_ids=self.tokenizer.stop_ids, **self.settings, **options)


def open_bot(args: argparse.Namespace) -> Bot:
    """Loads the model. If settings are out of range, raises a ValueError that lists them, before loading."""
    from generation.generate import problems
    from generation.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    if found := problems(sampling, args.max_new_tokens, args.batch_size):
        raise ValueError("cannot generate: " + "; ".join(found))
    return Bot(load_for_inference(args), args)


def with_instruction(text: str, instruction: str | None) -> str:
    """Returns instruction, blank line and text. The instruction "redact" stands for that of redaction."""
    from tasks.choose import PROMPTS

    if instruction in PROMPTS:
        return PROMPTS[instruction](text)
    return f"{instruction}\n\n{text}" if instruction else text


def talk(args: argparse.Namespace) -> int:
    """Answers --prompt, or chats."""
    bot = open_bot(args)
    return chat(bot, args.seed) if args.prompt is None else answer(bot, args)


def answer(bot: Bot, args: argparse.Namespace) -> int:
    """Prints the answer to --prompt: token by token if stdout is a terminal, otherwise as a whole."""
    tokenizer, text = bot.tokenizer, with_instruction(args.prompt, args.instruction)
    raw = [tokenizer.bos_id, *tokenizer.encode(text)]
    stream = sys.stdout.isatty() and not args.json
    done = bot.complete(raw if args.raw else tokenizer.render_prompt([("user", text)]), args.seed, stream)
    text = tokenizer.decode(done.token_ids)
    if args.json:
        found = {"text": text, "token_ids": done.token_ids, "stop_reason": done.stop_reason}
        print(json.dumps(found, ensure_ascii=False))
    else:
        print("" if stream else text)
    return DONE


def answer_file(args: argparse.Namespace) -> int:
    """Answers those rows of --input that have no answer in --output yet, and writes them in their order."""
    from common.progress import bar, warn
    from data.rows import read_prompts
    from generation.answer_file import AnswerFile

    samples = read_prompts(args.input)
    conversations = []
    for *history, (_, text) in (sample.messages or () for sample in samples):
        conversations.append([*history, ("user", with_instruction(text, args.instruction))])
    bot = open_bot(args)
    prompts = [bot.tokenizer.render_prompt(messages) for messages in conversations]
    refuse_long([s.id for s in samples], prompts, bot.model.config.max_position_embeddings)
    texts = ["\n\n".join(content for _, content in messages) for messages in conversations]
    cut_off: list[int] = []
    unsaved = 0  # answers that a power failure could still take
    with AnswerFile(args.output, texts, bot.signature(args.seed)) as file:
        missing = file.missing
        progress = bar(len(prompts), "answers", "row", initial=len(prompts) - len(missing))

        def on_done(i: int, done: "Completion") -> None:
            nonlocal unsaved
            file.add(missing[i], bot.tokenizer.decode(done.token_ids), done.stop_reason)
            if done.stop_reason == "length":
                cut_off.append(missing[i])
            unsaved += 1
            if unsaved >= args.batch_size:
                file.sync()
                progress.update(unsaved)
                unsaved = 0

        todo = [prompts[row] for row in missing]
        options = {"seed": args.seed, "numbers": missing, "batch_size": args.batch_size}
        bot.complete_all(todo, on_done=on_done, **options)
        file.sync()
        progress.update(unsaved)
        progress.close()
    if cut_off:
        limit, first = args.max_new_tokens, samples[min(cut_off)].id
        warn(f"--max-new-tokens {limit} cut off {len(cut_off)} answers of this run, the first one of {first}")
    return DONE


def refuse_long(ids: Sequence[str], prompts: Sequence[list[int]], positions: int) -> None:
    """Raises a ValueError that lists every prompt that leaves no position for an answer."""
    long = [f"{id}: {len(p)} tokens" for id, p in zip(ids, prompts, strict=True) if len(p) >= positions]
    if long:
        rule = f"too long for the model's {positions} positions; shorten or remove them:"
        raise ValueError(listed(f"{len(long)} prompts are {rule}", long))


def chat(bot: Bot, seed: int) -> int:
    """Answers each line of stdin until Ctrl-D; the model sees the whole conversation each time."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has no readline.
            importlib.import_module("readline")  # Once it is loaded, input() understands the arrow keys.
    messages: list[tuple[str, str]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return DONE
        if not line.strip():
            continue
        messages.append(("user", line))
        done = bot.complete(bot.tokenizer.render_prompt(messages), seed + len(messages), show=True)
        print(flush=True)
        messages.append(("assistant", bot.tokenizer.decode(done.token_ids)))


if __name__ == "__main__":
    sys.exit(main())
