"""The Modelfile that `ollama create` reads beside a GGUF file, with Gemma's chat turns as a Go template.

Source: ollama/ollama, docs/modelfile.mdx and parser/parser.go (the file), template/template.go (what a
template is given: .System, all system texts joined, and .Messages with .Role and .Content); Go's
text/template.

Where Ollama's prompt is not model/tokenizer.py's:
1. Only ASCII white space is stripped from the ends of a turn; Python strips Unicode's too.
2. A system text that is empty counts as none; Gemma's template writes its blank line.
3. Two messages of one role in a row are one, a blank line between them, before the template sees them;
Gemma's template refuses them.
4. <end_of_turn> typed by a user is the control token: Ollama tokenises the whole prompt as one text.
"""

from pathlib import Path

from model.tokenizer import END_OF_TURN, ROLES, START_OF_TURN

# What str.strip takes of ASCII, as Go's string literals.
WHITE_SPACE = r'" " "\t" "\n" "\v" "\f" "\r" "\x1c" "\x1d" "\x1e" "\x1f"'

# Go's templates have no trim: `strip` takes one byte from an end and calls itself. len (slice . 1) is the
# length less one; they cannot subtract either.
TEMPLATE = """\
{{- define "strip" }}{{ if . }}{{ $end := len (slice . 1) }}
{{- if eq (slice . 0 1) WHITE_SPACE }}{{ template "strip" slice . 1 }}
{{- else if eq (slice . $end) WHITE_SPACE }}{{ template "strip" slice . 0 $end }}
{{- else }}{{ . }}{{ end }}{{ end }}{{ end }}
{{- $system := .System }}
{{- range .Messages }}
{{- if eq .Role "user" }}START_OF_TURNUSER
{{ if $system }}{{ $system }}

{{ end }}{{ $system = "" }}{{ template "strip" .Content }}END_OF_TURN
{{ else if eq .Role "assistant" }}START_OF_TURNMODEL
{{ template "strip" .Content }}END_OF_TURN
{{ end }}
{{- end }}START_OF_TURNMODEL
"""


def chat_template() -> str:
    """Returns the Go template of Tokenizer.render_prompt without <bos>, which llama.cpp puts in front."""
    words = {
        "WHITE_SPACE": WHITE_SPACE,
        "START_OF_TURN": START_OF_TURN,
        "END_OF_TURN": END_OF_TURN,
        "USER": ROLES["user"],
        "MODEL": ROLES["assistant"],
    }
    template = TEMPLATE
    for word, text in words.items():
        template = template.replace(word, text)
    return template


def write_modelfile(
    folder: Path,
    gguf_name: str,
    *,
    adapter_name: str | None = None,
    stops: tuple[str, ...] = (END_OF_TURN,),
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 0.95,
) -> Path:
    """Writes folder/Modelfile for the GGUF file and, if there is one, the LoRA GGUF beside it; returns its
    path.

    stops: texts that end a response; temperature, top_k and top_p: Gemma's own generation settings. Then:
    ollama create NAME -f Modelfile. Raises ValueError for a file name that a Modelfile cannot hold.
    """
    for name in filter(None, (gguf_name, adapter_name)):
        if Path(name).name != name or not name.isprintable() or '"' in name or name != name.strip():
            raise ValueError(
                f"{name!r} cannot stand in a Modelfile; give a plain file name beside it, such as model.gguf"
            )
    lines = [
        f"FROM ./{gguf_name}",
        *([f"ADAPTER ./{adapter_name}"] if adapter_name else []),
        f'TEMPLATE """{chat_template()}"""',
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        f"PARAMETER temperature {temperature:g}",
        f"PARAMETER top_k {top_k}",
        f"PARAMETER top_p {top_p:g}",
    ]
    file = folder / "Modelfile"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return file
