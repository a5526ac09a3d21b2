"""Checks that a GGUF file computes what the trained model computes.

The file's bytes, config, tokenizer and tensors are compared first. Then models in float32, loaded one after
another, compute log-probabilities for the same held-out tokens, at 4 bytes of memory a parameter. They are
the base with its adapter, as it was trained; the merged weights before quantization, if there is an adapter;
and the weights in the GGUF file. If the base is a quantized GGUF file itself, the price of quantizing again
is measured too: of the base alone, and of the base with its adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.render import IGNORE_INDEX, Document, render
from data.rows import Sample
from exporting.gguf_vocab import NORMAL, SPACE, SPMTokenizer
from exporting.llama_cpp import Llama, llama
from exporting.merged import SLICE, MergedCheckpoint
from ggml.blocks import dequantize
from ggml.container import GGUFFile
from ggml.quantize import quantize
from lora.peft_io import load_adapter
from model.chat_template import CONVERSATIONS, wrong_turns
from model.config import Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from model.gguf_names import gguf_name
from model.gguf_weights import model_of, read_gguf_config, read_rows, read_tensor
from model.tokenizer import Tokenizer
from model.weights import load_model

# The largest root mean square of a tensor's error, relative to that of its weights: what rounding to the type
# costs with an outlier in every block. A wrong tensor has an error of 1 or more.
TENSOR_BOUNDS = {"f32": 0.0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 0.02, "q6_k": 0.05}
TENSOR_BOUNDS |= dict.fromkeys(("q5_0", "q5_1", "q5_k"), 0.12) | dict.fromkeys(("q4_0", "q4_k"), 0.25)
# (max |delta log p|, mean KL in nats) of each --quant.
BOUNDS = {"f32": (0.01, 1e-5), "f16": (0.06, 1e-4), "bf16": (0.5, 1e-3), "q8_0": (1.7, 0.01)}
BOUNDS |= {"q6_k": (4.0, 0.1)} | dict.fromkeys(("q5_k_m", "q5_k", "q5_0", "q5_1"), (6.0, 0.2))
BOUNDS |= {"q4_k_m": (10.0, 0.4), "q4_k": (10.0, 0.4), "q4_0": (10.0, 0.6)}
ADAPTER_BOUND = (0.01, 1e-5)  # Between adapter and merged, both in float32.
# llama.cpp rounds the inputs of quantized matrices to 8 bits. On the real 270M in Q4_K_M one unlikely token's
# log-probability differs by 3; the KL is 0.0005.
LORA_BOUND = (6.0, 0.01)
LLAMA_BOUNDS = BOUNDS | {"f32": (0.03, 1e-4)}  # llama.cpp reads its GELU from a table of float16.
LLAMA_POSITIONS = 8  # Each costs a request and a response with the whole vocabulary.
SAMPLES, POSITIONS = 200, 64  # At most so many samples are read, and positions compared.
CONTEXT, STREAM = 1024, 2048  # Tokens of one document and of all documents, at most.
TEXTS, TEXT_LENGTH = 200, 2000  # At most so many texts, of so many characters, are tokenized.
# A control token as text, characters that only bytes spell, and a run of blanks.
PROBE = "<bos> 😀\t日本  Ω"
EXAMPLE = (
    ("user", "Wie heißt die Hauptstadt von Österreich? Answer in one sentence, s'il vous plaît."),
    (
        "assistant",
        "La capital de Austria es Viena; in inglese <Vienna>, 1 900 000 people (2021) and 23 districts.",
    ),
)


class NotTheSame(RuntimeError):
    """The GGUF file differs from the model; the message says where."""


@dataclass
class HeldOut:
    """Packed documents of T tokens, the positions whose next-token predictions are compared, and texts."""

    tokens: torch.Tensor  # (T,)
    position_ids: torch.Tensor  # (T,)
    cu_seqlens: torch.Tensor  # (documents + 1,)
    positions: torch.Tensor  # (POSITIONS,) or fewer
    texts: list[str]

    def prompts(self) -> list[list[int]]:
        """Returns, for each position, the tokens of its document up to and including this position."""
        before = self.position_ids[self.positions]
        return [self.tokens[at - n : at + 1].tolist() for at, n in zip(self.positions, before, strict=True)]


def comparison_sample(samples: list[Sample], tokenizer: Tokenizer, limit: int) -> HeldOut:
    """Returns the first samples as one stream or, if they have no supervised token, EXAMPLE as a stream.

    Raises ValueError if `limit`, the model's largest number of positions, leaves EXAMPLE no supervised token.
    """
    for some in (samples[:SAMPLES], [Sample("example", EXAMPLE)]):
        turns = (turn for sample in some for turn in sample.messages or [("text", sample.text or "")])
        found = held_out([render(sample, tokenizer) for sample in some], [text for _, text in turns], limit)
        if found:
            return found
    raise ValueError(f"the model has {limit} positions, too few to compare one sentence; add --no-verify")


def held_out(documents: Sequence[Document], texts: list[str], limit: int) -> HeldOut | None:
    """Packs the first documents that have supervised tokens into one stream; returns None if none has.

    A document is cut to CONTEXT tokens or, if smaller, to `limit`, the model's largest number of positions.
    """
    cut = min(CONTEXT, limit)
    kept = [(d.input_ids[:cut], d.labels[:cut]) for d in documents]
    kept = [(ids, labels) for ids, labels in kept if any(label != IGNORE_INDEX for label in labels)]
    while sum(len(ids) for ids, _ in kept) > STREAM:
        kept.pop()
    if not kept:
        return None
    labels = torch.tensor([label for _, labels in kept for label in labels])
    return HeldOut(
        tokens=torch.tensor([i for ids, _ in kept for i in ids]),
        position_ids=torch.cat([torch.arange(len(ids)) for ids, _ in kept]),
        cu_seqlens=torch.tensor([0] + [len(ids) for ids, _ in kept]).cumsum(0).int(),
        positions=(labels != IGNORE_INDEX).nonzero()[:POSITIONS, 0],
        # The two programs tokenize a typed U+2581 differently.
        texts=[text[:TEXT_LENGTH] for text in texts[:TEXTS] if SPACE not in text],
    )


@dataclass
class Difference:
    """The difference between two models' next-token distributions, and the largest one that is allowed."""

    name: str
    max_delta: float  # max |delta log p|
    mean_kl: float  # in nats
    agreement: float  # the share of positions with the same greedy token
    bound: tuple[float, float]  # of max_delta and mean_kl

    def __str__(self) -> str:
        return f"{self.name:25} {self._figures(2)}, same greedy token {self.agreement:.1%}"

    def _figures(self, digits: int) -> str:
        delta, kl = f"{self.max_delta:.{digits}g}", f"{self.mean_kl:.{digits}g}"
        return f"max |delta log p| {delta} (bound {self.bound[0]:g}), mean KL {kl} (bound {self.bound[1]:g})"

    def within_bound(self, remark: str) -> "Difference":
        """Returns self; raises NotTheSame, with `remark`, if a figure is NaN or larger than its bound."""
        if self.max_delta <= self.bound[0] and self.mean_kl <= self.bound[1]:
            return self
        raise NotTheSame(f"{self.name}: {self._figures(3)}; {remark}")


def difference(name: str, p: torch.Tensor, q: torch.Tensor, bound: tuple[float, float]) -> Difference:
    """Compares log-probabilities p and q, (positions, vocabulary entries); the divergence is KL(p || q)."""
    agreement = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return Difference(name, (p - q).abs().max().item(), kl, agreement, bound)


def verify(
    path: Path,
    model: MergedCheckpoint,
    quant: str,
    sample: HeldOut,
    tokenizer: Tokenizer,
    written: dict[str, str],
    in_llama_cpp: bool = False,
) -> list[Difference]:
    """Compares a GGUF file with the model written to it; returns the differences between their predictions.

    Args:
        sample: the held-out tokens to predict, and the texts to tokenize.
        written: the SHA-256 of the file's header and of each tensor, as write_gguf returned them.
        in_llama_cpp: also run the file in llama.cpp, and compare the first LLAMA_POSITIONS positions.

    Raises NotTheSame at the first difference that exceeds its bound.
    """
    file = compare_bytes(path, written)
    compare_config(read_gguf_config(file), model.config)
    compare_tokenizer(file, sample.texts, tokenizer)
    compare_chat(file, tokenizer)
    errors = {gguf_name(name): compare_tensor(file, model, name) for name in model.names}
    worst = max(errors, key=lambda name: errors[name])
    remark = f"the tensor with the largest error is {worst}, {errors[worst]:.3g} of its size"
    trained, kind = log_probs(trained_model(model), sample), "adapter" if model.adapter else "model"
    found = []
    if model.adapter:
        merged = log_probs(model_of(model.config, model.read), sample)
        found += [difference("merged against adapter", trained, merged, ADAPTER_BOUND).within_bound(remark)]
    read = log_probs(model_of(read_gguf_config(file), lambda name: read_tensor(file, name)), sample)
    found += [difference(f"file against {kind}", trained, read, BOUNDS[quant]).within_bound(remark)]
    if model.adapter and model.has_quantized_base:
        base = log_probs(load_model(model.folder, torch.float32), sample)
        again = log_probs(model_of(model.config, lambda name: requantized(model, file, name)), sample)
        found += [difference("base quantized again", base, again, BOUNDS[quant]).within_bound(remark)]
    if in_llama_cpp:
        with llama(path, model.config.vocab_size, context=len(sample.tokens) + 16) as server:
            compare_rendered(server, tokenizer)
            name = f"llama.cpp against {kind}"
            found += [compare_answers(name, server, sample, tokenizer, trained, LLAMA_BOUNDS[quant])]
    return found


def requantized(model: MergedCheckpoint, file: GGUFFile, name: str) -> torch.Tensor:
    """Returns a tensor of the base in float32, rounded to the type that it has in the exported file."""
    if name.removesuffix(".weight") not in model.layers:
        return read_tensor(file, name)
    type, rows = file.tensors[gguf_name(name)].type, model.checkpoint.read(name).float()
    return dequantize(torch.from_numpy(quantize(rows.numpy(), type)), type)


def compare_answers(
    name: str,
    server: Llama,
    sample: HeldOut,
    tokenizer: Tokenizer,
    trained: torch.Tensor,
    bound: tuple[float, float],
) -> Difference:
    """Compares the first rows of `trained` with what llama.cpp computes; raises NotTheSame beyond the bound.

    `trained` has log-probabilities (positions, vocabulary entries).
    """
    few = replace(sample, positions=sample.positions[:LLAMA_POSITIONS])
    theirs = server.next_log_probs(few.prompts(), tokenizer.encode("a")[0])
    found = difference(name, trained[:LLAMA_POSITIONS], theirs, bound)
    return found.within_bound("llama.cpp computes something else")


def trained_model(model: MergedCheckpoint) -> Gemma3ForCausalLM:
    """Returns the model in float32 as it was trained: the base and its adapter, not merged."""
    trained = load_model(model.folder, torch.float32)
    if model.adapter_folder is not None:
        load_adapter(trained, model.adapter_folder)
    return trained


@torch.no_grad()
def log_probs(model: Gemma3ForCausalLM, sample: HeldOut) -> torch.Tensor:
    """Returns the next token's log-probabilities at sample.positions, (positions, vocabulary entries)."""
    stream = (sample.tokens, sample.position_ids, sample.cu_seqlens)
    return model.logits(model.eval()(*stream, output_positions=sample.positions)).log_softmax(-1)


def compare_bytes(path: Path, written: dict[str, str]) -> GGUFFile:
    """Opens the file and returns it; raises NotTheSame if a part's SHA-256 is not the one in `written`."""
    try:
        file = GGUFFile(path)
    except ValueError as e:
        raise NotTheSame(str(e)) from None
    for name, digest in written.items():
        if file.digest(name) != digest:
            raise NotTheSame(f"{name} is the first part whose bytes on the disk differ from those written")
    return file


def compare_config(theirs: Gemma3Config, ours: Gemma3Config) -> None:
    """Raises NotTheSame that lists the keys that differ; compares floats in float32, and no token ids."""
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


def compare_tokenizer(file: GGUFFile, texts: list[str], tokenizer: Tokenizer) -> None:
    """Raises NotTheSame at the first text that the file's vocabulary tokenizes otherwise than `tokenizer`."""
    known = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    tokens = known["tokens"]
    scores = known.get("scores", [0.0] * len(tokens))
    types = known.get("token_type", [NORMAL] * len(tokens))
    scored = SPMTokenizer(tokens, scores, types, known.get("add_space_prefix", True))
    for text in [*texts, PROBE]:
        theirs, ours = scored.encode(text), tokenizer.encode(text)
        if theirs != ours:
            pairs = enumerate(zip(theirs, ours, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
            raise NotTheSame(
                f"tokenizer.ggml: {text!r} is tokenized differently from token {at}: {theirs[at : at + 3]} "
                f"and not {ours[at : at + 3]}; add --no-verify if it differs from Gemma's on purpose"
            )


def compare_chat(file: GGUFFile, tokenizer: Tokenizer) -> None:
    """Raises NotTheSame if the file's chat template renders other turns, or other tokens end an answer."""
    if found := wrong_turns(file.metadata.get("tokenizer.chat_template", ""), tokenizer):
        raise NotTheSame(f"tokenizer.chat_template {found}")
    for name, ours in (("eos", tokenizer.eos_id), ("eot", tokenizer.end_of_turn_id)):
        theirs = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if theirs != ours:
            raise NotTheSame(
                f"tokenizer.ggml.{name}_token_id is {theirs} in the file and {ours} in the model"
            )


def compare_rendered(server: Llama, tokenizer: Tokenizer) -> None:
    """Raises NotTheSame at the first conversation that llama.cpp renders otherwise than `tokenizer`."""
    for messages in CONVERSATIONS:
        if messages[-1][0] == "assistant":
            continue  # llama.cpp's server would let the model go on with this turn.
        asked = {"messages": [{"role": role, "content": content} for role, content in messages]}
        text = server.post("/apply-template", asked)["prompt"]
        how = {"content": text, "add_special": True, "parse_special": True}
        if server.post("/tokenize", how)["tokens"] != tokenizer.render_prompt(messages):
            raise NotTheSame(f"llama.cpp renders {messages} as {text!r}, which was not trained")


def compare_tensor(file: GGUFFile, model: MergedCheckpoint, name: str) -> float:
    """Returns a tensor's relative error: root mean square of (file - model), divided by that of the model.

    Raises NotTheSame if the shape differs, or the error exceeds the bound of the tensor's type.
    """
    tensor, error, size, start = file.tensors[gguf_name(name)], 0.0, 0.0, 0
    first = f"{tensor.name} is the first tensor that differs"
    if tensor.shape != model.shapes[name]:
        raise NotTheSame(f"{first}: it has the shape {tensor.shape} and not {model.shapes[name]}")
    step, is_norm = max(1, SLICE // tensor.shape[-1]), len(tensor.shape) == 1
    # A norm is compared as 1 + weight, which the file holds: adding 1 rounds the weight.
    for ours in [model.read(name)[None] + 1.0] if is_norm else model.read_rows(name, step):
        theirs = read_rows(file, name, start, start + step) + is_norm
        error, size = error + (theirs - ours).square().sum().item(), size + ours.square().sum().item()
        start += step
    relative, bound = (error / size) ** 0.5 if size else error, TENSOR_BOUNDS[tensor.type]
    if not relative <= bound:  # True for NaN
        explained = f"{tensor.type} explains {bound:g}"
        raise NotTheSame(f"{first}: its error is {relative:.3g} of its size, {explained}")
    return relative
