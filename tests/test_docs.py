"""The pages say what is so: links resolve, names exist, quotations are the code's, snippets run and print
what the page shows.

How a page is read here:

    ```python                a snippet, run from the repository's root
    ```text                  right behind a snippet: what it prints, to the letter
    ```python model/loss.py  a quotation of that file; a line `...` stands for lines left out
    ```bash                  commands: their scripts, options, configs and --set keys must exist
    `data.packing.pack`      a name of the code, or a key of the config; `data/packing.py` a file

    python tests/test_docs.py     writes the config table of docs/your-own-model.md anew
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

from training.config import Config  # noqa: E402

PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if p.is_file()]
FOLDERS = {
    "common",
    "ggml",
    "model",
    "lora",
    "data",
    "tasks",
    "generation",
    "report",
    "training",
    "exporting",
    "assets",
    "tests",
    "docs",
    "configs",
}
SCRIPTS = {"train", "evaluate", "generate", "export"}
MADE_BY_RUNS = (
    "runs/",
    "corpus/",
    "out/",
    "data/lab/",
    "config.toml",
)  # git ignores these, or a run's folder holds them
SUFFIXES = ("py", "toml", "md", "json", "jsonl", "safetensors", "html", "gguf", "txt")
TABLE = ROOT / "docs" / "your-own-model.md"
START, END = (
    "<!-- made from training/config.py by: python tests/test_docs.py -->",
    "<!-- end of the table -->",
)


# --- reading a page


class Block(NamedTuple):
    """A fenced block: its first line's number, what stands behind the fence, its text, and the text block
    right behind it.
    """

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
        behind = found[i + 1] if i + 1 < len(found) else None
        close = behind and behind[1] == "text" and not "".join(lines[end + 1 : behind[0] - 2]).strip()
        out.append(Block(line, info, text, behind[2] if close else None))
    return out


def prose(page):
    """The page without fenced and indented blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return "\n".join(line for line in text.split("\n") if not line.startswith("    "))


def spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def named(page):
    return str(page.relative_to(ROOT))


def cases(wanted):
    return [
        pytest.param(page, b, id=f"{named(page)}:{b.line}")
        for page in PAGES
        for b in blocks(page)
        if wanted(b.info)
    ]


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
    missing = [
        p.name
        for p in (ROOT / "docs").glob("*.md")
        if p.name not in ("README.md", "benchmarks.md") and f"({p.name}" not in tour
    ]
    assert not missing


# --- names in backticks


def config_keys():
    return {
        f"{section.name}.{key.name}"
        for section in fields(Config)
        for key in fields(getattr(Config(), section.name))
    }


def members(node):
    """{name: node} of what a module or a class defines."""
    found = {}
    for child in node.body:
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        names = [n.id for t in targets for n in ast.walk(t or child) if t and isinstance(n, ast.Name)]
        for name in [getattr(child, "name", None), *names]:
            found[name] = child
    return found


def exists_in_code(dotted):
    """Whether room.module, room.module.name or room.module.Class.name is there."""
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
    """What is wrong with the text of one pair of backticks; None where it is right or means no name of ours."""
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
    return (
        None
        if dotted[1] in config_keys() or exists_in_code(dotted[1])
        else f"`{span}`: neither a name in the code nor a key of the config"
    )


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_and_name_in_backticks_exists(page):
    assert not [f for f in map(fault, spans(page)) if f]


@pytest.mark.parametrize("span", ["data/packing.py", "train.py", "configs/*.toml", "data.packing.pack", "data.packing.Batch.num_tokens", "data.max_length",
                                  "data.on_long = 'drop'", "model.safetensors", "runs/mine", "lora_A", "train.jsonl"])  # fmt: skip
def test_a_right_name_passes(span):
    assert fault(span) is None


@pytest.mark.parametrize(
    "span",
    [
        "data/pack.py",
        "trian.py",
        "configs/*.yaml",
        "data.packing.packs",
        "data.packing.Batch.tokenz",
        "data.max_lenght",
    ],
)
def test_a_wrong_name_is_seen(span):
    assert fault(span)


# --- blocks


@pytest.mark.parametrize(("page", "block"), cases(lambda info: info == "python"))
def test_a_snippet_runs_and_prints_what_the_page_shows(page, block, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), {"__name__": "__main__"})
    assert block.prints is None or out.getvalue().rstrip() == block.prints.rstrip()


def misquoted(quotation, source):
    """The first lines of the quotation that the source does not have, in order and with their indentation; ""
    where it has all.
    """
    lines, at = [line.rstrip() for line in source.split("\n") if line.strip()], 0
    for chunk in re.split(r"^\s*\.\.\.\n", textwrap.dedent(quotation), flags=re.M):
        wanted = [line.rstrip() for line in textwrap.dedent(chunk).split("\n") if line.strip()]
        places = range(at, len(lines) - len(wanted) + 1)
        found = next(
            (
                i
                for i in places
                if textwrap.dedent("\n".join(lines[i : i + len(wanted)])) == "\n".join(wanted)
            ),
            None,
        )
        if found is None:
            return "\n".join(wanted[:2])
        at = found + len(wanted)
    return ""


@pytest.mark.parametrize(("page", "block"), cases(lambda info: re.fullmatch(r"python \S+\.py", info)))
def test_a_quotation_is_what_the_file_says(page, block):
    file = ROOT / block.info.split()[1]
    wrong = misquoted(block.text, file.read_text(encoding="utf-8"))
    assert not wrong, f"{block.info.split()[1]} changed; quote it anew in {named(page)}:{block.line}"


def test_a_quotation_may_leave_out_lines_but_not_swap_or_change_them():
    source = "def f(x):\n    a = 1\n\n    b = 2\n    return a\n"
    assert not misquoted("a = 1\nb = 2\n", source) and not misquoted("def f(x):\n...\n    return a\n", source)
    assert (
        misquoted("b = 2\na = 1\n", source)
        and misquoted("a = 2\n", source)
        and misquoted("b = 2\n...\na = 1\n", source)
    )


def command_faults(text):
    """What in the commands is not there: scripts, their options, configs, keys of --set."""
    bad = []
    for command in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = command.split("#")[0].split()
        script = next((w for w in words if w.endswith(".py") and not w.startswith("/")), None)
        if script and not (ROOT / script).is_file():
            bad.append(f"{script}: no such script")
        elif script:
            source = "".join(
                (ROOT / file).read_text(encoding="utf-8") for file in (script, "generation/load.py")
            )
            bad += [
                f"{script} has no {w}"
                for w in words
                if re.fullmatch(r"--[a-z-]+", w) and f'"{w}"' not in source
            ]
        bad += [
            f"{w}: no such config"
            for w in words
            if re.fullmatch(r"[\w/-]+\.toml", w) and not w.startswith("my") and not (ROOT / w).is_file()
        ]
        keys = [w.partition("=")[0] for before, w in itertools.pairwise(words) if before == "--set"]
        bad += [f"--set {key}: no such key" for key in keys if key not in config_keys()]
    return bad


@pytest.mark.parametrize(("page", "block"), cases(lambda info: info == "bash"))
def test_commands_name_scripts_options_configs_and_keys_that_exist(page, block):
    assert not command_faults(block.text)


def test_a_wrong_command_is_seen():
    wrong = "python trane.py\npython train.py --conf x\npython train.py --config configs/no.toml --set train.epoch=1  # python no.py\n"
    assert [f.split(":")[0] for f in command_faults(wrong)] == [
        "trane.py",
        "train.py has no --conf",
        "configs/no.toml",
        "--set train.epoch",
    ]


# --- the config table


def config_table():
    """training/config.py's sections, keys, defaults and docstrings as a Markdown table."""
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
                rows.append(
                    f"| `{section.name}.{key}` | `{default}` | {values_of(declared.annotation)} | {meaning} |"
                )
    return "\n".join(rows)


def values_of(annotation):
    text = ast.unparse(annotation)
    if text.startswith("Literal["):
        return ", ".join(f"`{json.dumps(value)}`" for value in ast.literal_eval(text.removeprefix("Literal")))
    return {
        "str": "text",
        "list[str]": "texts",
        "int": "whole number",
        "float": "number",
        "bool": "`true`, `false`",
    }[text]


def test_the_config_table_is_made_from_the_config():
    _, _, rest = TABLE.read_text(encoding="utf-8").partition(START)
    table = rest.partition(END)[0].strip()
    assert set(re.findall(r"^\| `(\w+\.\w+)`", table, flags=re.M)) == config_keys()
    assert table == config_table(), "training/config.py changed; run: python tests/test_docs.py"


if __name__ == "__main__":
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(START)
    TABLE.write_text(
        f"{before}{START}\n\n{config_table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
    )
    print(f"{TABLE.relative_to(ROOT)}: {len(config_keys())} keys")
