"""How byte-level BPE cuts text into words before it merges: one rule per name of `tokenizer.ggml.pre`.

A rule is a list of patterns in Oniguruma syntax. Each cuts the pieces its forerunner left into matches and the
text between them. The facts (which name cuts how, and `ignore_merges`: a word that is a token is not merged) are those
of llama.cpp, whose pieces also decide where it departs from the model's own tokenizer.json: contractions are ASCII
only, and a class of upper case letters holds every letter but a-z. Known to differ: letters that Unicode 16 added,
which are no letters yet in llama.cpp.
"""

from dataclasses import dataclass

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_CJK = "[\u4e00-\u9fa5\u3040-\u30ff]+"
_ASCII_SIGN = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACE}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACE}"
_DEEPSEEK3 = (
    rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}"
)


def _cased_words(ending: str) -> str:
    """Words cut where a capital follows a small letter (the o200k family)."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{_UPPER}*{_LOWER}+{ending}|{lead}{_UPPER}+{_LOWER}*{ending}"


def _o200k(words: str, digits: str) -> str:
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"


# Letters with case, of every script; not \p{L}, which also holds those without.
_CASED = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80"
    "-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class WordRule:
    """Patterns that cut text into words, one after the other."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False


# Digits in groups of three from the right; the first group keeps the text before it (so does llama.cpp).
# \G and the look-behind keep long texts and long numbers linear.
_DIGIT_GROUPS = r"\G[^\p{N}]*+(?:(?<!\p{N})\p{N}{1,2}(?=(?:\p{N}{3})*(?!\p{N}))|\p{N}{3})"
_ANY_CASE_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_CONTRACTION}?"
# Non-ASCII white space is in none of the explicit ranges, even where it lies between their ends.
_CJK_AND_BEYOND = "[\u0800-\u9fa5\uac00-\ud7ff&&\\S]+"
_ASIAN_SCRIPTS = (
    "[\u0e40-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2f00-\u2fdf\u3040-\u30ff\u3400-\u4dbf"
    "\u4e00-\ufaff\uff65-\uff9f]+"
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u30ff]+"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_SPACE_HALVES = "|".join(rf"\s{{{width}}}(?!\S)" for width in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))

_GPT2_RULE = WordRule((_GPT2,))
_DIGITS_RULE = WordRule((r"\p{N}", _GPT2))
_LLAMA3_RULE = WordRule((_LLAMA3,), ignore_merges=True)
_MERGED_LLAMA3_RULE = WordRule((_LLAMA3,))
_QWEN2_RULE = WordRule((_QWEN2,))
_DEEPSEEK3_RULE = WordRule((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))
_O200K_RULE = WordRule((_o200k(_cased_words(_CONTRACTION + "?"), r"\p{N}{1,3}"),))
_ANY_CASE_RULE = WordRule((_DIGIT_GROUPS, _o200k(_ANY_CASE_WORD, r"\p{N}{1,3}")))
_BLOOM_RULE = WordRule((_BLOOM,))
_BAILING_RULE = WordRule((rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",))

WORD_RULES: dict[str, WordRule] = {
    "default": WordRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais"), _GPT2_RULE),
    **dict.fromkeys(("trillion", "granite-docling"), _GPT2_RULE),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"), _DIGITS_RULE),
    **dict.fromkeys(("minerva-7b", "mellum2"), _DIGITS_RULE),
    "falcon": WordRule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), _LLAMA3_RULE),
    **dict.fromkeys(("midm-2.0", "lfm2", "glm4", "glm5"), _LLAMA3_RULE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _MERGED_LLAMA3_RULE),
    "jais-2": WordRule((rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|{_SPACE_HALVES}|\s",)),
    "minicpm5": WordRule(
        (r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SIGNS}|{_SPACE}"),
        ignore_merges=True,
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2"), _QWEN2_RULE),
    **dict.fromkeys(("hunyuan", "solar-open", "grok-2"), _QWEN2_RULE),
    "qwen35": WordRule(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}",
        )
    ),
    "ufakzeka": WordRule((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_SPACE}",)),
    "seed-coder": WordRule((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}",)),
    "laguna": WordRule((r"[^\n]+|\n+", _QWEN2)),
    "exaone-moe": WordRule(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING_RULE),
    "deepseek-llm": WordRule(
        (
            r"[\r\n]",
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+",
            r"\s+\z",
            _CJK_AND_BEYOND,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": WordRule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_AND_BEYOND, r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _DEEPSEEK3_RULE),
    "spark2_5": WordRule(
        (
            r"\p{N}{1,3}",
            _CJK,
            rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+|[\r\n]"
            r"|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "afmoe": WordRule((_DIGIT_GROUPS, _ASIAN_SCRIPTS, _DEEPSEEK3)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _O200K_RULE),
    "tekken": WordRule((_o200k(_cased_words(""), r"\p{N}"),), ignore_merges=True),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _ANY_CASE_RULE),
    "youtu": WordRule((_YOUTU_SCRIPTS, _o200k(_ANY_CASE_WORD, r"\p{N}")), ignore_merges=True),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), _BLOOM_RULE),
    "viking": WordRule((_BLOOM, r"\p{N}")),
    "chameleon": WordRule(
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        )
    ),
}
