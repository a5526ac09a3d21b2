"""The pages are true: links resolve, names exist, quotations equal the code, snippets print what is shown.

What the parts of a page mean:

    ```python                a snippet, which is run in the repository's root
    ```text                  directly after a snippet: the exact output of the snippet
    ```python model/loss.py  a quotation of that file; a line `...` stands for lines left out
    ```bash                  commands: their scripts, options, configs and --set keys must exist
    `data.packing.pack`      a name in the code, or a key of the config; `data/packing.py` is a file

    python tests/test_docs.py     rewrites the config table of docs/your-own-model.md
"""

import ast
import contextlib
import io
import itertools
import json
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from tests.faults import table as faults  # noqa: E402
from training.config import Config  # noqa: E402

PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if p.is_file()]
ROOMS = "common ggml model lora data tasks generation report training exporting"
FOLDERS = {*ROOMS.split(), "assets", "tests", "docs", "configs"}
SCRIPTS = {"train", "evaluate", "generate", "export"}
# Git ignores these, or a run's folder holds them.
MADE_BY_RUNS = ("runs/", "corpus/", "out/", "data/lab/", "config.toml")
SUFFIXES = ("py", "toml", "md", "json", "jsonl", "safetensors", "html", "gguf", "txt")
TABLE = ROOT / "docs" / "your-own-model.md"
START = "<!-- made from training/config.py by: python tests/test_docs.py -->"
END = "<!-- end of the table -->"


# --- reading a page


class Block(NamedTuple):
    """A fenced block: its first line's number, the words after the fence, its text, and the output shown."""

    line: int
    info: str
    text: str
    prints: str | None


def blocks(page):
    lines, found, at = page.read_text(encoding="utf-8").split("\n"), [], 0
    while at < len(lines):
        if lines[at].startswith("```"):
            end = lines.index("```", at + 1)
            found.append((at + 2, lines[at][3:].strip(), "\n".join(lines[at + 1 : end]) + "\n", end))
            at = end
        at += 1
    out = []
    for i, (line, info, text, end) in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else None
        close = after and after[1] == "text" and not "".join(lines[end + 1 : after[0] - 2]).strip()
        out.append(Block(line, info, text, after[2] if close else None))
    return out


def prose(page):
    """The page without fenced and indented blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return "\n".join(line for line in text.split("\n") if not line.startswith("    "))


def spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def named(page):
    return str(page.relative_to(ROOT))


def each_block(pattern):
    """Parametrizes a test with page and block, for the blocks whose words after the fence match."""
    found = [(page, block) for page in PAGES for block in blocks(page) if re.fullmatch(pattern, block.info)]
    ids = [f"{named(page)}:{block.line}" for page, block in found]
    return pytest.mark.parametrize(("page", "block"), found, ids=ids)


# --- links


def broken_links(page):
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    bad = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or not file.is_relative_to(ROOT):
            bad.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            bad.append(f"{target}: no such heading; there are {', '.join(anchors(file))}")
    return bad


def anchors(page):
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_resolves(page):
    assert not broken_links(page)


def test_the_tour_leads_to_every_page():
    tour = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md", "benchmarks.md"}
    assert not [page for page in pages if f"({page}" not in tour]


# --- names in backticks


def config_keys():
    sections = {section.name: getattr(Config(), section.name) for section in fields(Config)}
    return {f"{name}.{key.name}" for name, section in sections.items() for key in fields(section)}


def members(node):
    """Returns {name: node} of what a module or a class defines."""
    found = {}
    for child in node.body:
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        names = [n.id for t in targets for n in ast.walk(t or child) if t and isinstance(n, ast.Name)]
        for name in [getattr(child, "name", None), *names]:
            found[name] = child
    return found


def exists_in_code(dotted):
    """Returns whether room.module, room.module.name or room.module.Class.name exists."""
    parts = dotted.split(".")
    for i in range(len(parts), 0, -1):
        file = ROOT.joinpath(*parts[:i]).with_suffix(".py")
        if file.is_file():
            node = ast.parse(file.read_text(encoding="utf-8"))
            for name in parts[i:]:
                node = members(node).get(name) if hasattr(node, "body") else None
                if node is None:
                    return False
            return True
    return ROOT.joinpath(*parts).is_dir()


def fault(span):
    """Returns what is wrong with a text in backticks; None if it is right or means no name of ours."""
    if span.startswith(MADE_BY_RUNS) or re.search(r"[<>{}]", span):
        return None
    first, _, rest = span.partition("/")
    bare_file = re.fullmatch(r"[\w-]+\.(py|toml|md)", span)
    if bare_file or (rest and first in FOLDERS and re.fullmatch(r"[\w./*-]+", span)):
        return None if any(ROOT.glob(span.rstrip("/"))) else f"`{span}`: no such file"
    dotted = re.fullmatch(r"((\w+)(?:\.\w+)+)(\(.*\)| = .*)?", span)
    if not dotted or dotted[1].rpartition(".")[2] in SUFFIXES:
        return None
    if dotted[2] not in FOLDERS | SCRIPTS | {f.name for f in fields(Config)}:
        return None
    if dotted[1] in config_keys() or exists_in_code(dotted[1]):
        return None
    return f"`{span}`: neither a name in the code nor a key of the config"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_and_name_in_backticks_exists(page):
    assert not [f for f in map(fault, spans(page)) if f]


RIGHT = [
    "data/packing.py",
    "train.py",
    "configs/*.toml",
    "data.packing.pack",
    "data.packing.Batch.num_tokens",
]
RIGHT += [
    "data.max_length",
    "data.on_long = 'drop'",
    "model.safetensors",
    "runs/mine",
    "lora_A",
    "train.jsonl",
]
WRONG = ["data/pack.py", "trian.py", "configs/*.yaml", "data.packing.packs", "data.packing.Batch.tokenz"]
WRONG += ["data.max_lenght"]


@pytest.mark.parametrize("span", RIGHT)
def test_a_right_name_passes(span):
    assert fault(span) is None


@pytest.mark.parametrize("span", WRONG)
def test_a_wrong_name_is_seen(span):
    assert fault(span)


# --- blocks


@each_block("python")
def test_a_snippet_runs_and_prints_what_the_page_shows(page, block, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), {"__name__": "__main__"})
    assert block.prints is None or out.getvalue().rstrip() == block.prints.rstrip()


def misquoted(quotation, source):
    """Returns the first lines of the part that the source does not have; "" if it has all.

    The parts must stand in the source in their order, with equal indentation inside a part.
    """
    lines, at = [line.rstrip() for line in source.split("\n") if line.strip()], 0
    for chunk in re.split(r"^\s*\.\.\.\n", textwrap.dedent(quotation), flags=re.M):
        wanted = [line.rstrip() for line in textwrap.dedent(chunk).split("\n") if line.strip()]
        n, text = len(wanted), "\n".join(wanted)
        while at + n <= len(lines) and textwrap.dedent("\n".join(lines[at : at + n])) != text:
            at += 1
        if at + n > len(lines):
            return "\n".join(wanted[:2])
        at += n
    return ""


@each_block(r"python \S+\.py")
def test_a_quotation_is_what_the_file_says(page, block):
    file = ROOT / block.info.split()[1]
    wrong = misquoted(block.text, file.read_text(encoding="utf-8"))
    assert not wrong, f"{block.info.split()[1]} changed; update the quotation in {named(page)}:{block.line}"


def test_a_quotation_may_leave_out_lines_but_not_swap_or_change_them():
    source = "def f(x):\n    a = 1\n\n    b = 2\n    return a\n"
    assert not misquoted("a = 1\nb = 2\n", source) and not misquoted("def f(x):\n...\n    return a\n", source)
    for wrong in ("b = 2\na = 1\n", "a = 2\n", "b = 2\n...\na = 1\n"):
        assert misquoted(wrong, source)


def command_faults(text):
    """Returns the scripts, options, configs and keys of --set in the commands that do not exist."""
    bad = []
    for command in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = command.split("#")[0].split()
        scripts = [w for w in words if w.endswith(".py") and not w.startswith("/")]
        missing = [script for script in scripts if not (ROOT / script).is_file()]
        bad += [f"{script}: no such script" for script in missing]
        if scripts and not missing:
            script = scripts[-1]  # benchmarks/busy.py runs the script after it
            files = (script, "generation/load.py")
            source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
            options = [w for w in words if re.fullmatch(r"--[a-z-]+", w)]
            bad += [f"{script} has no {w}" for w in options if f'"{w}"' not in source]
        configs = [w for w in words if re.fullmatch(r"(?!my)[\w/-]+\.toml", w)]
        bad += [f"{w}: no such config" for w in configs if not (ROOT / w).is_file()]
        keys = [w.partition("=")[0] for before, w in itertools.pairwise(words) if before == "--set"]
        bad += [f"--set {key}: no such key" for key in keys if key not in config_keys()]
    return bad


@each_block("bash")
def test_commands_name_scripts_options_configs_and_keys_that_exist(page, block):
    assert not command_faults(block.text)


def test_a_wrong_command_is_seen():
    wrong = "python trane.py\npython train.py --conf x\n"
    wrong += "python train.py --config configs/no.toml --set train.epoch=1  # python no.py\n"
    faults = ["trane.py", "train.py has no --conf", "configs/no.toml", "--set train.epoch"]
    assert [f.split(":")[0] for f in command_faults(wrong)] == faults


# --- the config table


def config_table():
    """Returns the sections, keys, defaults and docstrings of training/config.py as a Markdown table."""
    tree = ast.parse((ROOT / "training" / "config.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for section in fields(Config):
        part = getattr(Config(), section.name)
        body = classes[type(part).__name__].body
        for declared, doc in itertools.pairwise(body):
            if isinstance(declared, ast.AnnAssign):
                key, default = declared.target.id, json.dumps(getattr(part, declared.target.id))
                meaning = " ".join(doc.value.value.split()).replace("|", "\\|").replace("<", "&lt;")
                values = values_of(declared.annotation)
                rows.append(f"| `{section.name}.{key}` | `{default}` | {values} | {meaning} |")
    return "\n".join(rows)


def values_of(annotation):
    text = ast.unparse(annotation)
    if text.startswith("Literal["):
        return ", ".join(f"`{json.dumps(value)}`" for value in ast.literal_eval(text.removeprefix("Literal")))
    numbers = {"int": "whole number", "float": "number", "bool": "`true`, `false`"}
    return (numbers | {"str": "text", "list[str]": "texts", "list[float]": "numbers"})[text]


def test_the_config_table_is_made_from_the_config():
    _, _, rest = TABLE.read_text(encoding="utf-8").partition(START)
    table = rest.partition(END)[0].strip()
    assert set(re.findall(r"^\| `(\w+\.\w+)`", table, flags=re.M)) == config_keys()
    assert table == config_table(), "training/config.py changed; run: python tests/test_docs.py"


def test_every_fault_has_a_test_and_the_page_of_reliability_is_made_from_their_marks():
    made = "tests changed; run: python tests/faults/table.py"
    assert (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8") == faults.page(), made


if __name__ == "__main__":
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(START)
    text = f"{before}{START}\n\n{config_table()}\n\n{END}{rest.partition(END)[2]}"
    TABLE.write_text(text, encoding="utf-8")
    print(f"{TABLE.relative_to(ROOT)}: {len(config_keys())} keys")
