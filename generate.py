"""Prompt a Gemma 3, have it answer a file, or chat with it:

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

from common.errors import listed, run
from generation.load import LoadedModel, add_model_arguments, load_for_inference


def main(argv: list[str] | None = None) -> int:
    """model -> adapter -> one answer, a file of answers, or a chat until Ctrl-D.

    Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped.
    """
    args = parse_arguments(argv)
    again = shlex.join(["python", "generate.py", *(sys.argv[1:] if argv is None else argv)])
    return run(lambda: speak(args), lambda: f"stopped; go on with:\n    {again}" if args.input else "stopped")


def speak(args: argparse.Namespace) -> int:
    if args.input:
        return answer_file(args)
    bot = open_bot(args)
    return answer(bot, args) if args.prompt is not None else chat(bot, args)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Prompt a Gemma 3 model, or have it answer a file; else chat with it (Ctrl-D ends).",
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what the user says")
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="prompts: rows as for training, responses not needed, or a .txt file with one a line",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="JSONL, a row a prompt: {prompt, response, stop_reason, made_by}; goes on where a file breaks off",
    )
    parser.add_argument(
        "--instruction",
        metavar="TEXT",
        help='put before every prompt, with a blank line between; "redact" is that of the redaction samples',
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="prompts of a file that are answered at once (default %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="longest answer, in tokens (default %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: always the likeliest token (default); 1: as the model has it",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample among the K likeliest tokens; 0: all (default)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the likeliest tokens that make up this share (default 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    parser.add_argument(
        "--raw", action="store_true", help="no chat turns: the model continues <bos> and the prompt"
    )
    parser.add_argument(
        "--json", action="store_true", help='print one object: {"text", "token_ids", "stop_reason"}'
    )
    args = parser.parse_args(argv)
    if args.prompt is None and (args.raw or args.json):
        parser.error("--raw and --json go with --prompt")
    if bool(args.input) != bool(args.output) or (args.input and args.prompt is not None):
        parser.error("--input and --output go together, and without --prompt")
    if args.instruction and args.prompt is None and not args.input:
        parser.error("--instruction goes with --prompt or --input")
    if args.input and os.path.realpath(args.input) == os.path.realpath(args.output):
        parser.error("--output is the file of --input; name another")
    return args


class Bot:
    """A model, its tokenizer, and how its tokens are chosen."""

    def __init__(self, loaded: LoadedModel, args: argparse.Namespace):
        self.model, self.tokenizer, self.precision = loaded.model, loaded.tokenizer, loaded.precision
        self.stop_ids = loaded.tokenizer.stop_ids
        self.settings = {
            "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
        }

    def signature(self, seed: int) -> str:
        """A short hash of the config, the weights (by the first numbers of each), the adapters' scales, the
        type and the settings.
        """
        from lora.inject import adapters

        scales = {name: layer.scaling for name, layer in adapters(self.model).items()}
        known = [
            self.model.config.to_json(),
            scales,
            self.precision.name,
            self.settings,
            seed,
            sorted(self.stop_ids),
        ]
        found = hashlib.sha256(json.dumps(known).encode())
        for name, p in self.model.named_parameters():
            found.update(name.encode() + p.detach().flatten()[:4096].float().cpu().numpy().tobytes())
        return found.hexdigest()[:12]

    def complete(self, prompt: list[int], seed: int, show: bool):
        """The Completion of a prompt; `show` writes its text to stdout as it comes, without a newline at the
        end.
        """
        from generation.generate import generate
        from model.tokenizer import TextStream

        stream = TextStream(self.tokenizer)

        def on_token(row: int, token: int) -> None:
            print(stream.push(token), end="", flush=True)

        with self.precision.autocast():
            done = generate(
                self.model,
                [prompt],
                stop_ids=self.stop_ids,
                seed=seed,
                on_token=on_token if show else None,
                **self.settings,
            )[0]
        if show:
            print(stream.flush(), end="")
        return done


def open_bot(args: argparse.Namespace) -> Bot:
    """The model, ready to speak; before it is loaded, a ValueError lists every setting that nothing can be
    generated with.
    """
    from generation.generate import problems
    from generation.sampling import Sampling

    if found := problems(
        Sampling(args.temperature, args.top_k, args.top_p), args.max_new_tokens, args.batch_size
    ):
        raise ValueError("cannot generate: " + "; ".join(found))
    return Bot(load_for_inference(args), args)


def instructed(text: str, instruction: str | None) -> str:
    """The text behind the instruction, which "redact" is short for."""
    if instruction == "redact":
        from tasks.redaction import prompt_for

        return prompt_for(text)
    return f"{instruction}\n\n{text}" if instruction else text


def answer(bot: Bot, args: argparse.Namespace) -> int:
    """One prompt, one answer: streamed to a terminal, whole to anything else."""
    tokenizer, text = bot.tokenizer, instructed(args.prompt, args.instruction)
    prompt = (
        [tokenizer.bos_id, *tokenizer.encode(text)] if args.raw else tokenizer.render_prompt([("user", text)])
    )
    stream = sys.stdout.isatty() and not args.json
    done = bot.complete(prompt, args.seed, stream)
    text = tokenizer.decode(done.token_ids)
    if args.json:
        print(
            json.dumps(
                {"text": text, "token_ids": done.token_ids, "stop_reason": done.stop_reason},
                ensure_ascii=False,
            )
        )
    else:
        print("" if stream else text)
    return 0


def answer_file(args: argparse.Namespace) -> int:
    """Every row of a file answered, in order, and written as soon as it is."""
    from common.progress import bar, warn
    from data.rows import read_prompts
    from generation.answer_file import AnswerFile
    from generation.generate import generate

    samples = read_prompts(args.input)
    conversations = [
        (*s.messages[:-1], ("user", instructed(s.messages[-1][1], args.instruction))) for s in samples
    ]
    bot = open_bot(args)
    prompts = [bot.tokenizer.render_prompt(messages) for messages in conversations]
    refuse_long([s.id for s in samples], prompts, bot.model.config.max_position_embeddings)
    texts = ["\n\n".join(content for _, content in messages) for messages in conversations]
    cut = []
    with AnswerFile(args.output, texts, bot.signature(args.seed)) as file, bot.precision.autocast():
        missing = file.missing
        progress = bar(len(prompts), "answers", "row", initial=len(prompts) - len(missing))

        def on_done(row: int, done) -> None:
            file.add(missing[row], bot.tokenizer.decode(done.token_ids), done.stop_reason)
            cut.extend([missing[row]] * (done.stop_reason == "length"))
            progress.update()

        generate(
            bot.model,
            [prompts[number] for number in missing],
            stop_ids=bot.stop_ids,
            seed=args.seed,
            numbers=missing,
            batch_size=args.batch_size,
            on_done=on_done,
            **bot.settings,
        )
        progress.close()
    if cut:
        warn(
            f"{len(cut)} answers of this run were cut off at --max-new-tokens {args.max_new_tokens}, the "
            f"first in the file that of {samples[min(cut)].id}"
        )
    return 0


def refuse_long(ids: list[str], prompts: list[list[int]], positions: int) -> None:
    """ValueError that names every row without room for an answer."""
    long = [
        f"{name}: {len(prompt)} tokens"
        for name, prompt in zip(ids, prompts, strict=True)
        if len(prompt) >= positions
    ]
    if long:
        head = (
            f"{len(long)} prompts are too long for the model's {positions} positions; shorten or remove them:"
        )
        raise ValueError(listed(head, long))


def chat(bot: Bot, args: argparse.Namespace) -> int:
    """Reads lines until Ctrl-D; the model sees the whole conversation each time."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module(
                "readline"
            )  # being loaded is all that it takes: input() then knows the arrow keys
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
