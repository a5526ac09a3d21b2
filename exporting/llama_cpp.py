"""Runs llama.cpp as a server in this process, to check or evaluate a GGUF file in llama.cpp itself.

llama.cpp comes with the Python package xllamacpp, an optional dependency.
"""

import importlib.util
import json
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def require(option: str = "--verify") -> None:
    """Raises ValueError if xllamacpp, which the value "llama.cpp" of `option` needs, is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ValueError(
            f"{option} llama.cpp needs llama.cpp: pip install xllamacpp, or leave the option out"
        )


class Llama:
    """A llama.cpp server that runs in this process and is asked over HTTP."""

    def __init__(self, server: Any, vocab_size: int):
        self.server, self.vocab_size = server, vocab_size

    def post(self, path: str, body: dict | list) -> Any:
        """Posts `body` as JSON, returns the JSON response; raises RuntimeError on errors or after 600 s."""
        content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, content, headers)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy to this process
        try:
            with direct.open(request, timeout=600) as response:
                return json.load(response)
        except OSError as e:
            raise RuntimeError(f"llama.cpp did not answer {path}: {e}") from e

    def complete(self, prompt: list[int], n_predict: int, **options: Any) -> dict:
        """Returns the greedy completion of `prompt` (token ids), without the server's prompt cache."""
        body = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "cache_prompt": False}
        return self.post("/completion", body | options)

    def hidden_states(self, prompt: list[int]) -> torch.Tensor:
        """Returns the outputs of the final norm, (tokens, hidden size); needs a server with `embedding`."""
        answer = self.post("/embeddings", {"content": prompt, "embd_normalize": -1})
        return torch.tensor(answer[0]["embedding"])

    def next_log_probs(self, prompts: list[list[int]], ascii_id: int) -> torch.Tensor:
        """Returns the log-probabilities of the token after each prompt, (prompts, vocabulary entries).

        The server reports them only if the token that it samples is text. A bias of 1,000 on `ascii_id`, the
        id of an ASCII token, makes it sample that token. The reported values do not include the bias.
        """
        found = torch.full((len(prompts), self.vocab_size), float("nan"))
        for row, prompt in zip(found, prompts, strict=True):
            said = self.complete(prompt, 1, n_probs=self.vocab_size, logit_bias=[[ascii_id, 1000]])
            for entry in said["completion_probabilities"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        return found


@contextmanager
def llama(
    path: Path, vocab_size: int, lora: Path | None = None, context: int = 1024, embedding: bool = False
) -> Iterator[Llama]:
    """Starts a llama.cpp server for the GGUF file `path`, yields it, and stops it when the block ends.

    `lora` is the path of a LoRA GGUF file, `context` the most tokens of a prompt and its completion, and
    `embedding` lets it answer hidden_states. The server uses one thread, a float32 KV cache and no flash
    attention. Raises ValueError without xllamacpp.
    """
    require()
    import xllamacpp as x

    p = x.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.n_gpu_layers, p.verbosity = str(path), context, 1, 0, 0
    p.warmup = p.fit_params = False
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if embedding:
        p.embedding, p.pooling_type = True, x.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        p.n_batch = p.n_ubatch = context  # a batch of embeddings is computed at once
    if lora:
        p.lora_adapters = [x.CommonAdapterLoraInfo(str(lora), 1.0)]
    running = Llama(x.Server(p), vocab_size)
    try:
        yield running
    finally:
        running.server = None  # Dropping the last reference stops the server.


def respond(
    path: Path,
    vocab_size: int,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    on_done: Callable[[], object],
) -> tuple[list[str], list[bool]]:
    """Returns the greedy responses of the GGUF file `path` to prompts (token ids), and whether each ended.

    A response that was cut off has max_new_tokens tokens and no end of turn. on_done is called after each.
    Raises ValueError without xllamacpp.
    """
    texts, ended = [], []
    context = max(map(len, prompts)) + max_new_tokens
    with llama(path, vocab_size, context=context) as server:
        for prompt in prompts:
            said = server.complete(prompt, max_new_tokens)
            texts.append(said["content"])
            ended.append(said["stop_type"] != "limit")
            on_done()
    return texts, ended
