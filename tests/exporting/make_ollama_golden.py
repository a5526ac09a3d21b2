"""Writes ollama_golden.json: conversations, and the prompts that Go's template engine renders. Needs `go`.

python -m tests.exporting.make_ollama_golden
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from exporting.ollama import chat_template

HERE = Path(__file__).parent
GOLDEN = HERE / "ollama_golden.json"
CONVERSATIONS = [
    [("user", "Hello")],
    [("user", "Hello"), ("assistant", "Hi!"), ("user", "How are you?")],
    [("system", "Be brief."), ("user", "Hello")],
    [
        ("system", " Two lines,\nkept as they are \n"),
        ("user", "  A  "),
        ("assistant", "\n\nB\n"),
        ("user", "\t C \r\n"),
        ("assistant", "D "),
        ("user", "E"),
    ],
    [("user", ""), ("assistant", " \n "), ("user", "   ")],
    [("user", "x"), ("assistant", "y")],
    [("user", ' Zürich "{{ .System }}" <b>&amp;</b> `\\n` ŝ 😀 ')],
    [("user", "\x1c\x1d\x1e\x1f\v\fends\f\v\x1f\x1e\x1d\x1c")],
    [("user", "a \n\n b\n\t\nc")],
]


def render(conversations: list) -> list[str]:
    """Returns the prompts that `go run` prints."""
    asked = {
        "template": chat_template(),
        "conversations": [
            [{"role": role, "content": text} for role, text in turns] for turns in conversations
        ],
    }
    with tempfile.TemporaryDirectory() as cache:
        settings = os.environ | {"GO111MODULE": "off", "GOCACHE": cache, "GOPATH": cache, "HOME": cache}
        command = ["go", "run", str(HERE / "ollama_template.go")]
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, env=settings, timeout=300
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    golden = {"template": chat_template(), "conversations": CONVERSATIONS, "prompts": render(CONVERSATIONS)}
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
