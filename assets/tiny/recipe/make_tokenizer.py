"""Makes the tokenizer of the embedded base model: a small tokenizer.json of Gemma 3's kind.

    python assets/tiny/recipe/make_tokenizer.py --corpus DIR --vocab 6144 --out assets/tiny

The pieces are learned from the corpus. Control tokens have the ids of Gemma 3: <pad> 0, <eos> 1, <bos> 2,
<unk> 3, <mask> 4, <start_of_turn> 105, <end_of_turn> 106, "\\n" 107. A space is "▁"; an unknown character
falls back to its bytes. A piece is letters with the space before them, one digit, or one sign, so that a word
has the same tokens in every context. A piece has at most three upper-case letters in a row, for unseen
upper-case words.
"""

import argparse
import json
import random
import string
from collections import Counter
from itertools import islice
from pathlib import Path

SPACE = "▁"
LONGEST_RUN = 16  # The most spaces in one token.
CAPITALS = 3  # The most upper-case letters in a row in one piece.
SAMPLES = 40000
DAMPING = 0.6
# Runs of spaces and line breaks; letters with or without a space before them; a digit; a sign, likewise.
WORDS = (
    rf"{SPACE}{{2,}}|\n+|\t+|{SPACE}?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf"{SPACE}?[^\s\p{{L}}\p{{M}}\p{{N}}{SPACE}]|{SPACE}|\s"
)
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
    {{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' \
+ (lead if loop.first else '') + turn['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}"""


def fixed_pieces():
    """Returns the first pieces in order: control tokens, line breaks, runs of spaces, bytes."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<unused{i}>" for i in range(100))]
    control += ["<start_of_turn>", "<end_of_turn>"]
    breaks = ["\n", "\n\n", "\n\n\n", "\t", "\t\t"]
    runs = [SPACE * n for n in range(2, LONGEST_RUN + 1)]
    return control, breaks, runs, [f"<0x{byte:02X}>" for byte in range(256)]


def training_text(corpus, seed=1):
    """Yields the first samples of the corpus, and upper-case words of random letters."""
    rng = random.Random(seed)
    with open(corpus / "train.jsonl", encoding="utf-8") as file:
        for row in islice(file, SAMPLES):
            yield from json.loads(row).values()

    def syllable():
        onset, vowel = rng.choice("BCDFGHKLMNPRSTVZ"), rng.choice("AEIOU")
        return onset + vowel + rng.choice(("", "", "N", "R", "S", "L"))

    for _ in range(SAMPLES):
        word = "".join(syllable() for _ in range(rng.randint(1, 5)))
        letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.randint(2, 6)))
        yield f"[{word}] [{letters}]"


def damped(texts, tokenizer):
    """Yields each word count**DAMPING times, so that frequent instructions do not take all the pieces."""
    counts = Counter()
    for text in texts:
        text = tokenizer.normalizer.normalize_str(text)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    for word, count in counts.items():
        if count >= 3:
            yield from [word] * round(count**DAMPING)


def learn_pieces(corpus, count):
    """Learns the pieces; returns the single characters, and the pieces in the order of their merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    latin = [chr(code) for code in [*range(0x21, 0x7F), *range(0xA1, 0x100)] if code != 0xAD]
    words = list(damped(training_text(corpus), tokenizer))  # A list, because training locks the tokenizer.
    alphabet = {"limit_alphabet": 320, "initial_alphabet": [SPACE, *latin]}
    settings = {"vocab_size": count + 3000, "min_frequency": 2, "show_progress": False}
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(**settings, **alphabet))
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    characters = [piece for piece in vocab if len(piece) == 1 and not piece.isspace()]
    longer = [piece for piece in vocab if len(piece) > 1 and not set(piece) <= set("\n\t" + SPACE)]
    return characters, [piece for piece in longer if not has_long_capitals(piece)]


def has_long_capitals(piece):
    """Returns whether the piece has more than CAPITALS upper-case letters in a row."""
    runs = "".join(character if character.isupper() else " " for character in piece).split()
    return any(len(run) > CAPITALS for run in runs)


def reachable(pieces, known):
    """Returns the pieces, in order, that two earlier ones make; some pieces have been dropped before."""
    known, kept = set(known), []
    for piece in pieces:
        if any(piece[:i] in known and piece[i:] in known for i in range(1, len(piece))):
            known.add(piece)
            kept.append(piece)
    return kept


def merges_of(pieces, runs, breaks, vocab):
    """Returns all pairs that make a piece, in the order of Gemma's file: the longest run of spaces first.

    Every split of a piece is a merge, so that programs that use the scores of pieces (llama.cpp) and programs
    that use the merges agree.
    """
    merges = []
    for piece in [*reversed([piece for piece in breaks if len(piece) > 1]), *reversed(runs), *pieces]:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def added(content, index, special):
    """Returns an entry of `added_tokens`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": special}


def tokenizer_json(corpus, size):
    """Returns the content of tokenizer.json with `size` pieces; raises ValueError if size is too small."""
    control, breaks, runs, byte_pieces = fixed_pieces()
    fixed = [*control, *breaks, *runs, *byte_pieces]
    characters, learned = learn_pieces(corpus, size)
    least = len(fixed) + len(characters)
    if size < least:
        pieces = f"{len(fixed)} fixed pieces and {len(characters)} characters"
        raise ValueError(f"--vocab {size} has no room for {pieces}; use at least {least + 1000}")
    pieces = reachable(learned, characters)[: size - least]
    vocab = {piece: i for i, piece in enumerate([*fixed, *pieces, *characters])}
    added_tokens = [added(piece, i, True) for i, piece in enumerate(control)]
    added_tokens += [added(piece, vocab[piece], False) for piece in [*breaks, *runs]]
    space = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    single, second = (
        [{"SpecialToken": {"id": "<bos>", "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
        for i, name in enumerate("AB")
    )
    template = {"type": "TemplateProcessing", "single": single, "pair": single + second}
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    model |= {"vocab": vocab, "merges": [list(pair) for pair in merges_of(pieces, runs, breaks, vocab)]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": space,
        "post_processor": template
        | {"special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}},
        "decoder": {"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }


def tokenizer_config():
    """Returns the content of tokenizer_config.json."""
    return {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")},
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "use_default_system_prompt": False,
        "sp_model_kwargs": None,
        "model_max_length": 1000000000000000019884624838656,
        "chat_template": CHAT_TEMPLATE,
    }


def check(content, corpus, lines=2000):
    """Raises ValueError if the tokenizer joins words that the training kept apart, or changes a text."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    shipped, apart = Tokenizer.from_str(json.dumps(content)), Tokenizer.from_str(json.dumps(content))
    apart.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    with open(corpus / "train.jsonl", encoding="utf-8") as file:
        texts = [text for row in islice(file, lines) for text in json.loads(row).values()]
    texts += ["  two  spaces   three" + " " * 40 + "forty", "\n\n\n\n\tline\t\t\n"]
    texts += ["naïve 😀🇪🇺 漢字 \u200b Ω", "[GLAMBOR_12], x=3.14;{ok}"]

    def ids(tokenizer, text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    joined = [text for text in texts if ids(shipped, text) != ids(apart, text)]
    changed = [text for text in texts if shipped.decode(shipped.encode(text).ids) != text]
    if joined or changed:
        problems = f"{len(joined)} texts have pieces across words, first {joined[:1]!r}; "
        problems += f"{len(changed)} are not decoded to themselves, first {changed[:1]!r}"
        raise ValueError(f"{problems}; correct WORDS or the merges")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path, help="folder with train.jsonl")
    parser.add_argument("--vocab", type=int, default=6144, help="number of pieces")
    files = "folder for tokenizer.json and tokenizer_config.json"
    parser.add_argument("--out", required=True, type=Path, help=files)
    args = parser.parse_args()
    content = tokenizer_json(args.corpus, args.vocab)
    check(content, args.corpus)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, data, indent in (("tokenizer", content, 1), ("tokenizer_config", tokenizer_config(), 2)):
        text = json.dumps(data, ensure_ascii=False, indent=indent) + "\n"
        (args.out / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"{len(content['model']['vocab'])} pieces, {len(content['model']['merges'])} merges in {args.out}")


if __name__ == "__main__":
    main()
