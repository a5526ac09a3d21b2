"""Does a GGUF file say what the trained model says? It is read back, loaded as a model, and compared.

Three models answer the same held-out tokens in float32, one after the other: `adapter`, the base with its
adapter as it was trained; `merged`, the weights that were to be written; `file`, what a reader of the file
finds, architecture included. Each is in memory as a whole, at 4 bytes a parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from exporting.gguf_vocab import NORMAL, SPACE, SPMTokenizer
from exporting.merged import SLICE, MergedCheckpoint
from ggml.container import GGUFFile
from lora.peft_io import load_adapter
from model.config import Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from model.gguf_names import gguf_name
from model.gguf_weights import model_of, read_gguf_config, read_rows, read_tensor
from model.weights import load_model

# Root mean square of a tensor's error over that of its weights: what rounding to the type costs at worst,
# with an outlier in every block. A tensor that was mixed up is off by 1 or more.
TENSOR_BOUNDS = {
    "f32": 0.0,
    "f16": 1e-3,
    "bf16": 4e-3,
    "q8_0": 0.02,
    "q6_k": 0.05,
    "q5_0": 0.12,
    "q5_1": 0.12,
    "q5_k": 0.12,
    "q4_0": 0.25,
    "q4_k": 0.25,
}
# (max |delta log p|, mean KL in nats) by --quant.
BOUNDS = {
    "f32": (0.01, 1e-5),
    "f16": (0.06, 1e-4),
    "bf16": (0.5, 1e-3),
    "q8_0": (1.7, 0.01),
    "q6_k": (4.0, 0.1),
    **dict.fromkeys(("q5_k_m", "q5_k", "q5_0", "q5_1"), (6.0, 0.2)),
    **dict.fromkeys(("q4_k_m", "q4_k"), (10.0, 0.4)),
    "q4_0": (10.0, 0.6),
}
ADAPTER_BOUND = (0.01, 1e-5)  # between adapter and merged, both in float32
LLAMA_BOUNDS = BOUNDS | {"f32": (0.03, 1e-4)}  # llama.cpp looks its GELU up in a table of float16
LLAMA_POSITIONS = 8  # each is a request and an answer of the whole vocabulary
POSITIONS = 64  # that are compared
CONTEXT, STREAM = 1024, 2048  # tokens of one document, and of all
# A control token that somebody typed, characters that only bytes spell, a run of blanks.
PROBE = "<bos> 😀\t日本  Ω"
TEXTS, TEXT_LENGTH = 200, 2000  # for the tokenizer: texts, and characters of each


class NotTheSame(RuntimeError):
    """The file does not say what the model says; the message tells where they part."""


@dataclass
class HeldOut:
    """Held-out documents as a packed stream, and the positions whose next token is compared; `texts` are for
    the tokenizer.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    texts: list[str]


def held_out(
    documents: list[tuple[list[int], list[int]]], ignored: int, texts: list[str], limit: int
) -> HeldOut | None:
    """Returns the first documents (token ids, labels) that have supervised positions, as one stream; None for
    none.

    Args:
        ignored: the label of an unsupervised position.
        limit: the positions that the model has.
    """
    kept = [(ids[:CONTEXT][:limit], labels[:CONTEXT][:limit]) for ids, labels in documents]
    kept = [document for document in kept if any(label != ignored for label in document[1])]
    while kept and sum(len(ids) for ids, _ in kept) > STREAM:
        kept.pop()
    if not kept:
        return None
    labels = torch.tensor([label for _, labels in kept for label in labels])
    bounds = torch.tensor([0] + [len(ids) for ids, _ in kept]).cumsum(0).int()
    position_ids = torch.cat([torch.arange(len(ids)) for ids, _ in kept])
    tokens = torch.tensor([i for ids, _ in kept for i in ids])
    # The two programs read a typed U+2581 differently.
    texts = [text[:TEXT_LENGTH] for text in texts[:TEXTS] if SPACE not in text]
    return HeldOut(tokens, position_ids, bounds, (labels != ignored).nonzero()[:POSITIONS, 0], texts)


@dataclass
class Difference:
    """How far two models' next-token distributions are apart: max |delta log p|, mean KL (nats), share of
    equal greedy tokens.
    """

    name: str
    max_delta: float
    mean_kl: float
    agreement: float
    bound: tuple[float, float]

    @property
    def within(self) -> bool:
        return self.max_delta <= self.bound[0] and self.mean_kl <= self.bound[1]  # False for NaN


def verify(
    path: str | Path,
    model: MergedCheckpoint,
    quant: str,
    sample: HeldOut,
    encode: Callable[[str], list[int]],
    written: dict[str, str],
) -> list[Difference]:
    """Compares bytes, config, tokenizer, every tensor, and then log-probabilities; returns differences within
    their bounds.

    `written` is {HEADER or tensor: sha256 of its bytes} as write_gguf returned it. Raises NotTheSame at the
    first difference.
    """
    file = compare_bytes(path, written)
    compare_config(read_gguf_config(file), model.config)
    compare_tokenizer(file, sample.texts, encode)
    shares = {gguf_name(name): compare_tensor(file, model, name) for name in model.names}
    worst = max(shares, key=lambda name: shares[name])
    adapter, found = log_probs(trained_model(model), sample), []
    if model.adapter:
        merged = log_probs(model_of(model.config, model.read), sample)
        found.append(difference("merged against adapter", adapter, merged, ADAPTER_BOUND))
    read = log_probs(model_of(read_gguf_config(file), lambda name: read_tensor(file, name)), sample)
    found.append(difference(f"file against {_kind(model)}", adapter, read, BOUNDS[quant]))
    for d in found:
        refuse_past_bound(d, f"; of the tensors, {worst} differs most, by {shares[worst]:.3g} of its size")
    return found


def verify_in_llama_cpp(
    path: str | Path, model: MergedCheckpoint, quant: str, sample: HeldOut, ascii_id: int
) -> Difference:
    """Compares some of the positions with llama.cpp itself; raises NotTheSame past the type's bound."""
    from exporting.llama_cpp import llama

    few = HeldOut(
        sample.tokens, sample.position_ids, sample.cu_seqlens, sample.positions[:LLAMA_POSITIONS], []
    )
    adapter = log_probs(trained_model(model), few)
    with llama(path, model.config.vocab_size, context=len(sample.tokens) + 16) as server:
        theirs = server.next_log_probs(sample, ascii_id, few.positions.tolist())
    d = difference(f"llama.cpp against {_kind(model)}", adapter, theirs, LLAMA_BOUNDS[quant])
    refuse_past_bound(d)
    return d


def _kind(model: MergedCheckpoint) -> str:
    return "adapter" if model.adapter else "model"


def trained_model(model: MergedCheckpoint) -> Gemma3ForCausalLM:
    """Returns the model in float32 as it was trained, its adapter beside the base."""
    trained = load_model(model.folder, torch.float32)
    if model.adapter_folder is not None:
        load_adapter(trained, model.adapter_folder)
    return trained


@torch.no_grad()
def log_probs(model: Gemma3ForCausalLM, sample: HeldOut) -> torch.Tensor:
    """Returns the log-probabilities of the next token, (positions, V) in float32."""
    hidden = model.eval()(
        sample.tokens, sample.position_ids, sample.cu_seqlens, output_positions=sample.positions
    )
    return model.logits(hidden).log_softmax(-1)


def difference(name: str, p: torch.Tensor, q: torch.Tensor, bound: tuple[float, float]) -> Difference:
    """Compares log-probabilities p and q, (positions, V) each; KL(p || q)."""
    agreement = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return Difference(name, (p - q).abs().max().item(), kl, agreement, bound)


def refuse_past_bound(d: Difference, more: str = "") -> None:
    """Raises NotTheSame for a difference that is not within its bound."""
    if not d.within:
        delta, kl = (f"{x:.3g} (bound {b:g})" for x, b in zip((d.max_delta, d.mean_kl), d.bound, strict=True))
        raise NotTheSame(f"{d.name}: max |delta log p| {delta}, mean KL {kl}{more}")


def compare_bytes(path: str | Path, written: dict[str, str]) -> GGUFFile:
    """Returns the file as it is on the disk; raises NotTheSame if other bytes than these were written."""
    try:
        file = GGUFFile(path)
    except ValueError as e:
        raise NotTheSame(str(e)) from None
    for name, digest in written.items():
        if file.digest(name) != digest:
            raise NotTheSame(
                f"{name}: the disk gives back other bytes than were written; the first difference"
            )
    return file


def compare_config(theirs: Gemma3Config, ours: Gemma3Config) -> None:
    """Raises NotTheSame with every key of the architecture that differs; a file's floating-point values are
    float32.
    """
    wrong = []
    for key, value in vars(ours).items():
        other = getattr(theirs, key)
        if isinstance(value, float) and other is not None:
            same = np.float32(value) == np.float32(other)
        else:
            same = value == other
        if not same and not key.endswith("_token_id"):
            wrong.append(f"{key} is {other} in the file and {value} in the model")
    if wrong:
        raise NotTheSame("; ".join(wrong))


def compare_tokenizer(file: GGUFFile, texts: list[str], encode: Callable[[str], list[int]]) -> None:
    """Raises NotTheSame with the first text that the file's pieces and scores tokenize otherwise than
    tokenizer.json.
    """
    known = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    tokens = known["tokens"]
    scores = known.get("scores", [0.0] * len(tokens))
    types = known.get("token_type", [NORMAL] * len(tokens))
    theirs_of = SPMTokenizer(tokens, scores, types, known.get("add_space_prefix", True)).encode
    for text in [*texts, PROBE]:
        theirs, ours = theirs_of(text), encode(text)
        if theirs != ours:
            pairs = enumerate(zip(theirs, ours, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
            raise NotTheSame(
                f"tokenizer.ggml: {text!r} is cut otherwise from token {at}: {theirs[at : at + 3]} and not "
                f"{ours[at : at + 3]}; if your tokenizer is meant to differ from Gemma's, --no-verify writes "
                "the file all the same"
            )


def compare_tensor(file: GGUFFile, model: MergedCheckpoint, name: str) -> float:
    """Returns the root mean square of a tensor's error over that of its weights.

    Raises NotTheSame where rounding to the type does not explain it.
    """
    tensor, error, size, start = file.tensors[gguf_name(name)], 0.0, 0.0, 0
    if tensor.shape != model.shapes[name]:
        shapes = f"{tensor.shape} and not {model.shapes[name]}"
        raise NotTheSame(f"{tensor.name}: has the shape {shapes}; first tensor that differs")
    step = max(1, SLICE // tensor.shape[-1])
    # A norm is compared as the file has it: near -1 its own size is too small a measure.
    for ours in model.read_rows(name, step) if len(tensor.shape) > 1 else [model.read(name)[None] + 1.0]:
        theirs = read_rows(file, name, start, start + step) + (len(tensor.shape) == 1)
        error, size = error + (theirs - ours).square().sum().item(), size + ours.square().sum().item()
        start += step
    share = (error / size) ** 0.5 if size else error
    if not share <= TENSOR_BOUNDS[tensor.type]:  # NaN is no less than anything
        explained = f"{tensor.type} explains {TENSOR_BOUNDS[tensor.type]:g}"
        raise NotTheSame(
            f"{tensor.name}: differs by {share:.3g} of its size, {explained}; first tensor that differs"
        )
    return share
