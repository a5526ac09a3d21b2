"""llama.cpp as a server in this process, to compare a GGUF file in the program that it is made for.

It comes with the package xllamacpp, which nothing else needs.
"""

import importlib.util
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def require() -> None:
    """Raises ValueError if xllamacpp is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ValueError("--verify llama.cpp needs llama.cpp: pip install xllamacpp, or leave the option out")


class Llama:
    """A running server, asked over HTTP."""

    def __init__(self, server: Any, vocab_size: int):
        self.server, self.vocab_size = server, vocab_size

    def post(self, path: str, body: dict | list) -> Any:
        """Returns the server's JSON response; raises RuntimeError if there is none within 600 seconds."""
        content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, content, headers)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy to this process
        try:
            with direct.open(request, timeout=600) as response:
                return json.load(response)
        except OSError as e:
            raise RuntimeError(f"llama.cpp did not answer {path}: {e}") from e

    def complete(self, prompt: list[int], n_predict: int, **options) -> dict:
        """Returns the greedy completion of token ids, computed without a cache of earlier requests."""
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": False}
        return self.post("/completion", body | options)

    def next_log_probs(self, prompts: list[list[int]], ascii_id: int) -> torch.Tensor:
        """Returns the log-probabilities of the token after each prompt, (prompts, V).

        The server leaves them out if the token that it samples is no text. A bias, which they do not
        include, makes it sample the ASCII token `ascii_id`.
        """
        found = torch.full((len(prompts), self.vocab_size), float("nan"))
        for row, prompt in zip(found, prompts, strict=True):
            said = self.complete(prompt, 1, n_probs=self.vocab_size, logit_bias=[[ascii_id, 1000]])
            for entry in said["completion_probabilities"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        return found


@contextmanager
def llama(path: Path, vocab_size: int, lora: Path | None = None, context: int = 1024) -> Iterator[Llama]:
    """Yields a server of a GGUF file, with the adapter of a LoRA GGUF file, for up to `context` tokens.

    It computes with one thread, with a cache of keys and values in float32, and without flash attention.
    Raises ValueError if xllamacpp is not installed.
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
        running.server = None  # Dropping the last reference stops the server.
