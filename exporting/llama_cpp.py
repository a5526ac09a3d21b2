"""A llama.cpp server of one GGUF in this process, asked over its HTTP interface: the last word on what a file
says.

It comes with xllamacpp, which nothing else here needs; who has it can have every export checked in the
program that it is made for.
"""

import importlib.util
import json
import urllib.request
from contextlib import contextmanager

import torch


def require() -> None:
    """ValueError with the remedy where xllamacpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ValueError("--verify llama.cpp needs llama.cpp: pip install xllamacpp, or leave the option out")


class Llama:
    """The answers of a running server; all arithmetic in float32 where the file has it, one thread, no cache
    between requests.
    """

    def __init__(self, server, vocab_size: int):
        self.server, self.vocab_size = server, vocab_size

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                request, timeout=600
            ) as answer:  # no proxy to this very process
                return json.load(answer)
        except OSError as e:
            raise RuntimeError(f"llama.cpp did not answer {path}: {e}") from e

    def tokenize(self, text: str) -> list[int]:
        return self.post("/tokenize", {"content": text, "add_special": False, "parse_special": False})[
            "tokens"
        ]

    def log_probs(self, ids: list[int], ascii_id: int) -> torch.Tensor:
        """(V,) log-probabilities of the next token; the bias makes the server sample an ASCII token, or it
        would leave the field out, and is not in it.
        """
        body = {
            "prompt": ids,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": self.vocab_size,
            "cache_prompt": False,
            "logit_bias": [[ascii_id, 1000]],
        }
        found = torch.full((self.vocab_size,), float("nan"))
        for entry in self.post("/completion", body)["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def next_log_probs(self, sample, ascii_id: int, positions: list[int]) -> torch.Tensor:
        """(positions, V) for a sample of one or more documents, one request each."""
        starts = sample.cu_seqlens.tolist()
        document = [max(s for s in starts if s <= at) for at in positions]
        return torch.stack(
            [
                self.log_probs(sample.tokens[start : at + 1].tolist(), ascii_id)
                for start, at in zip(document, positions, strict=True)
            ]
        )

    def greedy(self, ids: list[int], count: int) -> list[int]:
        body = {
            "prompt": ids,
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        return self.post("/completion", body)["tokens"]

    def answer(self, ids: list[int], count: int) -> str:
        return self.post(
            "/completion", {"prompt": ids, "n_predict": count, "temperature": 0, "cache_prompt": False}
        )["content"]

    def scale_lora(self, scale: float) -> None:
        self.post("/lora-adapters", [{"id": 0, "scale": scale}])


@contextmanager
def llama(path, vocab_size: int, lora=None, context: int = 1024):
    """A server of the file at `path`, with an adapter's file beside it where one is given; raises ValueError
    where xllamacpp is not installed.
    """
    require()
    import xllamacpp as x

    p = x.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.n_gpu_layers, p.verbosity = str(path), context, 1, 0, 0
    p.warmup = p.fit_params = False
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora:
        p.lora_adapters = [x.CommonAdapterLoraInfo(str(lora), 1.0)]
    running = Llama(x.Server(p), vocab_size)
    try:
        yield running
    finally:
        running.server = None  # the last reference: it stops
