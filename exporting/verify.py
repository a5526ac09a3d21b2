"""Does the file say what the trained model said? It is read back, rebuilt with our own dequantisers, and
asked.

Three models answer the same held-out tokens in float32, one layer in memory at a time: `adapter`, the base
with LoRA beside it as it was trained; `merged`, the weights that were to be written; `file`, what a reader of
the file finds, architecture included. T tokens of a packed stream, D hidden size, V words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exporting.gguf_model import LAYERS_27B, USUAL_PATTERN
from exporting.gguf_vocab import NORMAL, SPACE, SPMTokenizer
from exporting.merged import SLICE, MergedCheckpoint
from ggml.container import GGUFFile
from ggml.quantize import dequantize
from lora.inject import set_module
from model.attention import PackedAttention
from model.config import FULL, SLIDING, Gemma3Config
from model.gemma3 import Gemma3DecoderLayer
from model.gguf_names import gguf_name
from model.norm import Gemma3RMSNorm
from model.rope import rope_angles

# Root mean square of a tensor's error over that of its weights: what rounding to the type costs at worst, an
# outlier in every block; a tensor that was mixed up is off by 1 or more.
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
    "q5_k_m": (6.0, 0.2),
    "q5_k": (6.0, 0.2),
    "q5_0": (6.0, 0.2),
    "q5_1": (6.0, 0.2),
    "q4_k_m": (10.0, 0.4),
    "q4_k": (10.0, 0.4),
    "q4_0": (10.0, 0.6),
}
ADAPTER_BOUND = (0.01, 1e-5)  # between adapter and merged, both in float32
LLAMA_BOUNDS = BOUNDS | {"f32": (0.03, 1e-4)}  # llama.cpp looks its GELU up in a table of float16
LLAMA_POSITIONS = 8  # each is a request and an answer of the whole vocabulary
JUDGED, CONTEXT, STREAM = (
    64,
    1024,
    2048,
)  # tokens that are judged; of a document that may stand before them; of all documents
# A control token that somebody typed, characters of which only bytes are known, a run of blanks.
PROBE = "<bos> 😀\t日本  Ω"
TEXTS, TEXT_LENGTH = 200, 2000  # for the tokenizer: texts, and characters of each


class NotTheSame(RuntimeError):
    """The file does not say what the model says; the message tells where they part."""


@dataclass
class Sample:
    """Held-out documents as a packed stream, and the positions whose next token is judged; `texts` are for
    the tokenizer.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    texts: list[str]


def held_out(
    documents: list[tuple[list[int], list[int]]], ignored: int, texts: list[str], limit: int
) -> Sample | None:
    """The first documents (token ids, labels) that have something to judge, as one stream; None where there
    are none.

    ignored: the label that means none; limit: the positions that the model has.
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
    texts = [
        text[:TEXT_LENGTH] for text in texts[:TEXTS] if SPACE not in text
    ]  # which the two programs read differently when it is typed
    return Sample(
        torch.tensor([i for ids, _ in kept for i in ids]),
        position_ids,
        bounds,
        (labels != ignored).nonzero()[:JUDGED, 0],
        texts,
    )


@dataclass
class Difference:
    """How far one model's next-token distributions are from another's: max |delta log p|, mean KL (nats),
    share of equal likeliest tokens.
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
    sample: Sample,
    encode_ours: Callable[[str], list[int]],
    written: dict[str, str],
) -> list[Difference]:
    """Compares the file with the model: bytes, architecture, tokenizer, every tensor, then the answers;
    returns the differences, all within bounds.

    written: {HEADER or tensor: sha256 of the bytes that were handed to the disk}. Raises NotTheSame at the
    first thing that is not as it should be.
    """
    file = compare_bytes(path, written)
    compare_config(config_of(file), model.config)
    compare_tokenizer(file, sample.texts, encode_ours)
    shares = {gguf_name(name): compare_tensor(file, model, name) for name in model.names}
    adapter = log_probs(model.config, AdapterSource(model), sample)
    merged = log_probs(model.config, model, sample) if model.adapter else adapter
    written_file = log_probs(config_of(file), FileSource(file), sample)
    found = [difference("merged against adapter", adapter, merged, ADAPTER_BOUND)] if model.adapter else []
    found.append(
        difference(
            "file against adapter" if model.adapter else "file against model",
            adapter,
            written_file,
            BOUNDS[quant],
        )
    )
    for d in found:
        refuse_past_bound(
            d,
            f"; of the tensors, {max(shares, key=shares.get)} differs most, by {max(shares.values()):.3g} of "
            f"its size",
        )
    return found


def compare_bytes(path: str | Path, written: dict[str, str]) -> GGUFFile:
    """The file as it is on the disk; NotTheSame where its bytes are not those that were written."""
    try:
        file = GGUFFile(path)
    except ValueError as e:
        raise NotTheSame(str(e)) from None
    for name, digest in written.items():
        if file.digest(name) != digest:
            raise NotTheSame(
                f"{name}: the disk gives back other bytes than were written; the first place that differs"
            )
    return file


def refuse_past_bound(d: Difference, more: str = "") -> None:
    if not d.within:
        raise NotTheSame(
            f"{d.name}: max |delta log p| {d.max_delta:.3g} (bound {d.bound[0]:g}), mean KL {d.mean_kl:.3g} "
            f"(bound {d.bound[1]:g}){more}"
        )


def verify_in_llama_cpp(
    path: str | Path, model: MergedCheckpoint, quant: str, sample: Sample, ascii_id: int
) -> Difference:
    """Asks llama.cpp itself for the next-token probabilities at LLAMA_POSITIONS of the sample's positions;
    raises NotTheSame past the type's bound.
    """
    from exporting.llama_cpp import llama

    positions = sample.positions[:LLAMA_POSITIONS]
    few = Sample(sample.tokens, sample.position_ids, sample.cu_seqlens, positions, [])
    adapter = log_probs(model.config, AdapterSource(model), few)
    with llama(path, model.config.vocab_size, context=len(sample.tokens) + 16) as server:
        theirs = server.next_log_probs(sample, ascii_id, positions.tolist())
    d = difference(
        "llama.cpp against adapter" if model.adapter else "llama.cpp against model",
        adapter,
        theirs,
        LLAMA_BOUNDS[quant],
    )
    refuse_past_bound(d)
    return d


def config_of(file: GGUFFile) -> Gemma3Config:
    """The architecture as llama.cpp reads it from the keys, with its defaults for those that are not there
    (src/models/gemma3.cpp).
    """
    get = {key.removeprefix("gemma3."): value for key, value in file.metadata.items()}.get
    layers, hidden, heads, head_dim = (
        get("block_count"),
        get("embedding_length"),
        get("attention.head_count"),
        get("attention.key_length"),
    )
    sliding = get("attention.sliding_window_pattern") or [(i + 1) % USUAL_PATTERN != 0 for i in range(layers)]
    if not get("attention.sliding_window"):
        sliding = [False] * layers
    return Gemma3Config(
        hidden_size=hidden, intermediate_size=get("feed_forward_length"), num_hidden_layers=layers, vocab_size=len(get("tokenizer.ggml.tokens")),
        num_attention_heads=heads, num_key_value_heads=get("attention.head_count_kv"), head_dim=head_dim, max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"), query_pre_attn_scalar=hidden / heads if layers == LAYERS_27B else head_dim,
        sliding_window=get("attention.sliding_window") or 1, layer_types=[SLIDING if s else FULL for s in sliding], rope_theta=get("rope.freq_base", 1e4),
        rope_local_base_freq=get("rope.freq_base_swa", 1e4), rope_linear_factor=get("rope.scaling.factor", 1.0),
        final_logit_softcapping=get("final_logit_softcapping"), tie_word_embeddings="output.weight" not in file.tensors)  # fmt: skip


def compare_config(theirs: Gemma3Config, ours: Gemma3Config) -> None:
    """NotTheSame with every key of the architecture that the file says otherwise; numbers are float32 there."""
    wrong = []
    for key, value in vars(ours).items():
        other = getattr(theirs, key)
        same = (
            np.float32(value) == np.float32(other)
            if isinstance(value, float) and other is not None
            else value == other
        )
        if not same and not key.endswith("_token_id"):
            wrong.append(f"{key} is {other} in the file and {value} in the model")
    if wrong:
        raise NotTheSame("; ".join(wrong))


def compare_tokenizer(file: GGUFFile, texts: list[str], encode_ours: Callable[[str], list[int]]) -> None:
    """NotTheSame with the first text that the file's pieces and scores cut otherwise than tokenizer.json
    does.
    """
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}.get
    tokens = get("tokens")
    cutter = SPMTokenizer(
        tokens,
        get("scores", [0.0] * len(tokens)),
        get("token_type", [NORMAL] * len(tokens)),
        get("add_space_prefix", True),
    )
    for text in [*texts, PROBE]:
        theirs, ours = cutter.encode(text), encode_ours(text)
        if theirs != ours:
            at = next(
                (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
                min(len(theirs), len(ours)),
            )
            raise NotTheSame(
                f"tokenizer.ggml: {text!r} is cut otherwise from token {at}: {theirs[at : at + 3]} and not "
                f"{ours[at : at + 3]}; "
                "if your tokenizer is meant to differ from Gemma's, --no-verify writes the file all the same"
            )


def compare_tensor(file: GGUFFile, model: MergedCheckpoint, name: str) -> float:
    """Root mean square of a tensor's error over that of its weights; NotTheSame where that is more than the
    type's rounding explains.
    """
    tensor, source, error, size, start = file.tensors[gguf_name(name)], FileSource(file), 0.0, 0.0, 0
    if source.shape(name) != model.shapes[name]:
        raise NotTheSame(
            f"{tensor.name}: has the shape {source.shape(name)} and not {model.shapes[name]}; first tensor "
            f"that differs"
        )
    step = max(1, SLICE // tensor.shape[-1])
    for ours in (
        model.read_rows(name, step) if len(tensor.shape) > 1 else [model.read(name)[None] + 1.0]
    ):  # a norm as the file has it
        theirs = source.rows(name, start, start + step)
        error, size, start = (
            error + (theirs - ours).square().sum().item(),
            size + ours.square().sum().item(),
            start + step,
        )
    share = (error / size) ** 0.5 if size else error
    if not share <= TENSOR_BOUNDS[tensor.type]:  # NaN is no less than anything
        raise NotTheSame(
            f"{tensor.name}: differs by {share:.3g} of its size, {tensor.type} explains "
            f"{TENSOR_BOUNDS[tensor.type]:g}; first tensor that differs"
        )
    return share


class FileSource:
    """The tensors of a GGUF by our names, in float32."""

    def __init__(self, file: GGUFFile):
        self.file = file

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[gguf_name(name)].shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self.file.tensors[gguf_name(name)]
        return torch.from_numpy(dequantize(self.file.data(tensor.name)[start:stop], tensor.type))

    def read(self, name: str) -> torch.Tensor:
        if len(self.shape(name)) == 1:
            return self.rows(name, 0, 1)[0] - 1.0
        return self.rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, rows: int):
        for start in range(0, self.shape(name)[0], rows):
            yield self.rows(name, start, start + rows)


class AdapterSource:
    """The base's tensors, and LoRA layers where the adapter has some."""

    def __init__(self, model: MergedCheckpoint):
        self.model, self.read_rows = model, model.read_rows

    def read(self, name: str) -> torch.Tensor | nn.Module:
        path = name.removesuffix(".weight")
        return self.model.layer(path) if path in self.model.layers else self.model.read(name)


@torch.no_grad()
def log_probs(cfg: Gemma3Config, source, sample: Sample) -> torch.Tensor:
    """(positions, V) log-probabilities of the next token in float32, with one layer's weights in memory at a
    time.
    """
    x = picked_rows(source, "model.embed_tokens.weight", sample.tokens) * cfg.hidden_size**0.5  # (T, D)
    attend = PackedAttention(
        sample.cu_seqlens,
        len(sample.tokens),
        cfg.sliding_window,
        cfg.attention_scale,
        cfg.attn_logit_softcapping,
    )
    angles = {
        FULL: rope_angles(sample.position_ids, cfg.head_dim, cfg.rope_theta, cfg.rope_linear_factor),
        SLIDING: rope_angles(sample.position_ids, cfg.head_dim, cfg.rope_local_base_freq),
    }
    for i in range(cfg.num_hidden_layers):
        with torch.device("meta"):
            layer = Gemma3DecoderLayer(cfg, i)
        fill(layer, f"model.layers.{i}.", source)
        x = layer(x, *angles[layer.kind], attend)
    norm = Gemma3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
    fill(norm, "model.norm.", source)
    x = norm(x[sample.positions])
    head = "model.embed_tokens.weight" if cfg.tie_word_embeddings else "lm_head.weight"
    z = torch.cat([x @ rows.T for rows in source.read_rows(head, max(1, SLICE // cfg.hidden_size))], dim=1)
    cap = cfg.final_logit_softcapping
    return (z if cap is None else cap * torch.tanh(z / cap)).log_softmax(-1)


def fill(module: nn.Module, prefix: str, source) -> None:
    """Puts the source's tensors, or whole layers, in the place of the module's parameters."""
    for name, _ in list(module.named_parameters()):
        weight, (path, _, leaf) = source.read(prefix + name), name.rpartition(".")
        if isinstance(weight, nn.Module):
            set_module(module, path, weight)
        else:
            setattr(module.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))


def picked_rows(source, name: str, ids: torch.Tensor) -> torch.Tensor:
    """(T, D) the rows `ids` of a matrix that is read in slices."""
    out, start = None, 0
    for rows in source.read_rows(name, 2**14):
        out = torch.empty(len(ids), rows.shape[1]) if out is None else out
        here = (ids >= start) & (ids < start + len(rows))
        out[here] = rows[ids[here] - start]
        start += len(rows)
    return out


def difference(name: str, p: torch.Tensor, q: torch.Tensor, bound: tuple[float, float]) -> Difference:
    """Compares log-probabilities p and q, (positions, V) each; KL(p || q)."""
    return Difference(
        name,
        (p - q).abs().max().item(),
        (p.exp() * (p - q)).sum(-1).mean().item(),
        (p.argmax(-1) == q.argmax(-1)).float().mean().item(),
        bound,
    )
