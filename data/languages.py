"""Guesses the language of a text by its script and its most frequent words, and says "unknown" otherwise."""

import re

CHARACTERS = 600  # of a text are looked at
MIN_WORDS = 2  # Fewer frequent words of a language may be there by chance.
_SCRIPTS = {
    "ja": "\u3040-\u30ff",  # kana: a text with Han characters too is Japanese
    "ko": "\uac00-\ud7af\u1100-\u11ff",
    "zh": "\u4e00-\u9fff",
    "th": "\u0e00-\u0e7f",
    "ar": "\u0600-\u06ff",
    "he": "\u0590-\u05ff",
    "hi": "\u0900-\u097f",
    "el": "\u0370-\u03ff",
    "ru": "\u0400-\u04ff",  # or another language in Cyrillic
}
_SCRIPT_TEXT = {language: re.compile(f"[{letters}]") for language, letters in _SCRIPTS.items()}
_NON_LATIN = re.compile(f"[{''.join(_SCRIPTS.values())}]")
_WORD = re.compile(r"[^\W\d_]+")
_FREQUENT = {
    "en": "the and of to is in that it was for you with on are this not have be at my your we he from what",
    "de": "der die das und ist nicht ich sie ein eine zu mit den auf für von wir es im dem war wie auch sich",
    "fr": "le la les et est un une des pas je vous que du pour dans il elle nous ne sur avec au qui ce mon à "
    "ai votre notre sont cette mais ou suis été sa son ses par plus très aux",
    "es": "el la los las es un una de que no en por con para su se mi del lo al está como más pero muy y",
    "it": "il la di che è un una non per con sono del della mi si da le gli al ho ma come anche più nel lo "
    "ha dei alla questo i ed era",
    "nl": "de het een en is van ik niet dat in op te zijn met voor je wij we er maar was ook heb aan mijn",
    "pt": "os as é um uma de que não em por com para seu se do da no na eu mais como mas muito está à",
    "pl": "na nie to się jest do że jak po co tak za od ale mnie czy pan był dla przez w z",
}
_LANGUAGES: dict[str, list[str]] = {}
for _language, _words in _FREQUENT.items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_language)


def language(text: str) -> str:
    """Returns a code of ISO 639-1, or "unknown" if no language or several of them come to mind.

    Knows the Latin languages of _FREQUENT, and other languages by their script.
    """
    text = text[:CHARACTERS]
    words = _WORD.findall(text.lower())
    foreign = len(_NON_LATIN.findall(text))
    if 2 * foreign > sum(map(len, words)):
        found = {name: len(script.findall(text)) for name, script in _SCRIPT_TEXT.items()}
        return "ja" if found["ja"] else max(found, key=lambda name: found[name])
    votes = dict.fromkeys(_FREQUENT, 0)
    for word in words:
        for name in _LANGUAGES.get(word, ()):
            votes[name] += 1
    (best, most), (_, second) = sorted(votes.items(), key=lambda vote: -vote[1])[:2]
    return best if most >= MIN_WORDS and most > second else "unknown"
