"""Make the tokenizer of the embedded base model: Gemma 3's kind of tokenizer.json, learnt from the corpus, with few pieces.

    python assets/tiny/recipe/make_tokenizer.py --corpus DIR --vocab 6144 --out assets/tiny

Ids as in Gemma 3 where it matters: <pad> 0, <eos> 1, <bos> 2, <unk> 3, <mask> 4, <start_of_turn> 105, <end_of_turn> 106, "\\n" from 107.
A space is "▁"; an unknown character falls back to its bytes. Pieces hold one kind of thing, so that a copy is spelled alike wherever the
text stands: letters with the space before them, one digit, or one sign. Capitals go in pieces of at most three, for unseen upper-case words.
"""

import argparse
import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

SPACE = "▁"
LONGEST_RUN = 16  # spaces in one token
CAPITALS = 3
SAMPLES = 40000
DAMPING = 0.6
# One space with letters after it; a digit; a sign, with a space before it or not; runs of spaces and line breaks.
WORDS = rf"{SPACE}{{2,}}|\n+|\t+|{SPACE}?[\p{{L}}\p{{M}}]+|\p{{N}}|{SPACE}?[^\s\p{{L}}\p{{M}}\p{{N}}{SPACE}]|{SPACE}|\s"
CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set lead = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set lead = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('turns must go user, model, user, model, after at most one system message') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' + (lead if loop.first else '') + turn['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}"""


def opening():
    """The first pieces in order of id: control tokens, line breaks, runs of spaces, bytes."""
    control = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        *(f"<unused{i}>" for i in range(100)),
        "<start_of_turn>",
        "<end_of_turn>",
    ]
    breaks = ["\n", "\n\n", "\n\n\n", "\t", "\t\t"]
    runs = [SPACE * n for n in range(2, LONGEST_RUN + 1)]
    return control, breaks, runs, [f"<0x{byte:02X}>" for byte in range(256)]


def training_text(corpus, seed=1):
    """Strings to learn from: the first samples of the corpus, and upper-case words of random letters."""
    rng = random.Random(seed)
    with open(corpus / "train.jsonl", encoding="utf-8") as file:
        for row in islice(file, SAMPLES):
            yield from json.loads(row).values()
    for _ in range(SAMPLES):
        consonant_vowel = "".join(
            rng.choice("BCDFGHKLMNPRSTVZ") + rng.choice("AEIOU") + rng.choice(("", "", "N", "R", "S", "L"))
            for _ in range(rng.randint(1, 5))
        )
        yield f"[{consonant_vowel}] [{''.join(rng.choice('ABCDEFGHIJKLMNOPQRSTUVWXYZ') for _ in range(rng.randint(2, 6)))}]"


def damped(texts, tokenizer):
    """The words of the texts, each as often as its count to the power of DAMPING, so that orders that recur do not take all the pieces."""
    counts = Counter()
    for text in texts:
        counts.update(
            word
            for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        )
    for word, count in counts.items():
        if count >= 3:
            yield from [word] * round(count**DAMPING)


def learn_pieces(corpus, count):
    """The learned pieces in the order of their merging: at most count, single characters first.

    Returns characters (list), pieces (list).
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    latin = [chr(code) for code in [*range(0x21, 0x7F), *range(0xA1, 0x100)] if code != 0xAD]
    words = list(damped(training_text(corpus), tokenizer))  # before the training, which locks the tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=count + 3000,
        min_frequency=2,
        limit_alphabet=320,
        initial_alphabet=[SPACE, *latin],
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    characters = [piece for piece in vocab if len(piece) == 1 and not piece.isspace()]
    pieces = [
        piece
        for piece in vocab
        if len(piece) > 1 and not set(piece) <= set("\n\t" + SPACE) and not has_long_capitals(piece)
    ]
    return characters, pieces


def has_long_capitals(piece):
    """Whether more than three capitals stand in a row in the piece."""
    row = 0
    for character in piece:
        row = row + 1 if character.isupper() else 0
        if row > CAPITALS:
            return True
    return False


def reachable(pieces, known):
    """The pieces that two earlier ones make, in order: what is left when some have been dropped."""
    known, kept = set(known), []
    for piece in pieces:
        if any(piece[:i] in known and piece[i:] in known for i in range(1, len(piece))):
            known.add(piece)
            kept.append(piece)
    return kept


def merges_of(pieces, runs, breaks, vocab):
    """All pairs that make a piece, runs of spaces longest first, then the pieces in order (as in Gemma's own file).

    Every split of a piece is a merge, so that a reader that goes by scores of pieces (llama.cpp) and one that goes by merges agree.
    """
    merges = []
    for piece in [*reversed([piece for piece in breaks if len(piece) > 1]), *reversed(runs), *pieces]:
        pairs = [
            (piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab
        ]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def added(content, index, special):
    """An entry of `added_tokens`."""
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def tokenizer_json(corpus, size):
    """The content of tokenizer.json with size pieces. Raises ValueError where the size has no room for the fixed pieces."""
    control, breaks, runs, byte_pieces = opening()
    fixed = [*control, *breaks, *runs, *byte_pieces]
    characters, learned = learn_pieces(corpus, size)
    if size < len(fixed) + len(characters):
        raise ValueError(
            f"--vocab {size} has no room for {len(fixed)} fixed pieces and {len(characters)} characters; remedy: at least {len(fixed) + len(characters) + 1000}"
        )
    pieces = reachable(learned, characters)[: size - len(fixed) - len(characters)]
    vocab = {piece: i for i, piece in enumerate([*fixed, *pieces, *characters])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(piece, i, True) for i, piece in enumerate(control)] + [added(piece, vocab[piece], False) for piece in [*breaks, *runs]],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<bos>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": [list(pair) for pair in merges_of(pieces, runs, breaks, vocab)],
        },
    }  # fmt: skip


def tokenizer_config():
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False, "use_default_system_prompt": False, "sp_model_kwargs": None, "model_max_length": 1000000000000000019884624838656,
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip


def check(content, corpus, lines=2000):
    """Raise ValueError where the file as shipped splits other than with the words of the training kept apart, or does not give a line back."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    shipped, apart = Tokenizer.from_str(json.dumps(content)), Tokenizer.from_str(json.dumps(content))
    apart.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    with open(corpus / "train.jsonl", encoding="utf-8") as file:
        texts = [text for row in islice(file, lines) for text in json.loads(row).values()]
    texts += [
        "  two  spaces   three" + " " * 40 + "forty",
        "\n\n\n\n\tline\t\t\n",
        "naïve 😀🇪🇺 漢字 \u200b Ω",
        "[GLAMBOR_12], x=3.14;{ok}",
    ]
    wrong = [
        text
        for text in texts
        if shipped.encode(text, add_special_tokens=False).ids
        != apart.encode(text, add_special_tokens=False).ids
    ]
    lost = [text for text in texts if shipped.decode(shipped.encode(text).ids) != text]
    if wrong or lost:
        raise ValueError(
            f"{len(wrong)} texts split across words, first {wrong[:1]!r}; {len(lost)} do not come back, first {lost[:1]!r}; remedy: mend WORDS or the merges"
        )


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, type=Path, help="folder with train.jsonl")
    parser.add_argument("--vocab", type=int, default=6144, help="number of pieces")
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for tokenizer.json and tokenizer_config.json"
    )
    args = parser.parse_args()
    content = tokenizer_json(args.corpus, args.vocab)
    check(content, args.corpus)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokenizer.json").write_text(
        json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    (args.out / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    print(f"{len(content['model']['vocab'])} pieces, {len(content['model']['merges'])} merges in {args.out}")


if __name__ == "__main__":
    main()
