"""train.py --explain-batch prints the first micro-batch of the training data, one token on each line."""

import os
import sys
from collections.abc import Iterator
from itertools import pairwise

from common.errors import SHOWN
from common.progress import printable, say
from data.packing import Batch
from data.render import IGNORE_INDEX, render
from model.hub import resolve
from model.tokenizer import Tokenizer
from training import build
from training.config import Config
from training.dataset import TrainingData, read, refuse_missing_files

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def explain_batch(cfg: Config) -> None:
    """Prints the samples left out, then the first micro-batch; loads no weights and writes no run folder."""
    refuse_missing_files(cfg)
    folder = resolve(cfg.model.name, cfg.model.revision, weights=False)
    files, data = read(cfg, build.make_objective(cfg), folder)
    loader = build.build_loader(cfg, data.documents)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line in left_out(data, files.tokenizer, cfg):
        say(line)
    say(f"\nmicro-batch 1 of {len(loader)} in the first epoch")
    for line in describe(next(iter(loader.batches(0))), files.tokenizer, colour):
        say(line)


def left_out(data: TrainingData, tokenizer: Tokenizer, cfg: Config) -> Iterator[str]:
    """Yields lines about the training samples that are left out or truncated, and why."""
    counts = data.counts
    if counts.truncated:
        yield f"truncated: {counts.truncated:,} samples end at data.max_length = {cfg.data.max_length}"
    if data.left_out:
        yield f"left out: {len(data.left_out):,} samples"
        yield f"  {counts.dropped:,} exceed data.max_length = {cfg.data.max_length}"
        yield f"  {counts.unsupervised:,} have no supervised token"
        end = cfg.data.max_length - 1 if cfg.data.on_long == "truncate" else None
        for sample in data.left_out[:SHOWN]:
            with tokenizer.parsing_special_tokens(cfg.data.special_tokens == "parse"):
                labels = render(sample, tokenizer, cfg.data.loss_on).labels
            supervised = sum(label != IGNORE_INDEX for label in labels[:end])
            yield f"  {sample.id}: {len(labels):,} tokens, {supervised:,} of those kept are supervised"
        if len(data.left_out) > SHOWN:
            yield f"  ... and {len(data.left_out) - SHOWN:,} more"


def describe(batch: Batch, tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    """Yields lines about a micro-batch: cu_seqlens, then position, id and text of each document's tokens.

    At a supervised position an arrow and the target token follow; the line is green if `colour` is true.
    """
    bounds = batch.cu_seqlens.tolist()
    prefixes = batch.shared_prefix or [-1] * (len(bounds) - 1)
    names = iter(batch.ids)
    targets = dict(zip(batch.target_positions.tolist(), batch.targets.tolist(), strict=True))
    tokens, positions = batch.tokens.tolist(), batch.position_ids.tolist()
    yield f"{len(tokens):,} tokens in {len(bounds) - 1} documents, {len(targets):,} supervised"
    yield f"cu_seqlens {bounds}"
    for d, (start, stop) in enumerate(pairwise(bounds)):
        sharing = [str(i) for i, prefix in enumerate(prefixes) if prefix == d]
        after = f", after the shared prefix in document {prefixes[d]}" if prefixes[d] >= 0 else ""
        name = f"shared prefix of documents {', '.join(sharing)}" if sharing else f"{next(names)}{after}"
        supervised = sum(i in targets for i in range(start, stop))
        yield f"\ndocument {d}: {name}; {stop - start:,} tokens, {supervised:,} supervised"
        yield f"{'position':>8} {'id':>7}  {'token':24} predicts"
        for i in range(start, stop):
            line = f"{positions[i]:>8} {tokens[i]:>7}  {_shown(tokenizer, tokens[i]):24}"
            if i in targets:
                line += f" -> {targets[i]} {_shown(tokenizer, targets[i])}"
            yield f"{GREEN}{line}{PLAIN}" if colour and i in targets else line.rstrip()


def _shown(tokenizer: Tokenizer, token: int) -> str:
    return f"'{printable(tokenizer.piece(token))}'"
