"""Reading which response a thought concludes for, by rules.

The last line with a verdict decides. A verdict is a statement that one response is better (or worse, which speaks for
the other one) or is the answer; only where the whole text has none of those do "right" and "wrong" count. A bare number
is a verdict where it ends a sentence that says what was chosen ("I choose 2", "My choice: 2") or that concludes
("Therefore the answer is 1"); elsewhere "the answer is 2" may answer the question that the responses are about, and
counts as little as "right". Inside the deciding line a sentence that opens with a concluding word ("So", "Overall", …)
goes before the others; if what remains speaks for both responses, the thought has no conclusion. All patterns have
bounded repetitions, so the time is linear in the text.
"""

from __future__ import annotations

import re

_SUBJECT = (
    r"\b(?:(?:response|answer|option|candidate|assistant)\s{1,3}(?:no\.\s?|number\s|#)?(?P<who>1|2|one|two)\b"
    r"|(?:the\s)?(?P<whow>first|second)\s(?:response|answer|option|candidate|assistant|one)\b)"
)
_ADVERB = (
    r"(?:\s(?:\w{2,20}ly|far|much|even|still|overall|therefore|thus|also|indeed|by|a|bit|the|more|most|far|one|"
    r"response|answer)){0,4}"
)
_COPULA = r"\s(?:is|was|seems|appears|looks|remains|proves|(?:seems|appears)\sto\sbe|would\sbe|must\sbe|has\sto\sbe)"
_NOT = r"(?P<not>(?:\sis|\swas|\sdoes|\swould)?(?:\snot|n't|n’t)(?:\sbe|\sseem|\slook)?|\sis\sno|\sis\snever)"
_UP = r"better|best|superior|preferable|preferred|stronger|winner"
_DOWN = r"worse|worst|inferior|weaker|loser"
_RIGHT = r"right|correct|accurate|true"
_WRONG = r"wrong|incorrect|inaccurate|mistaken|false"


def _stated(up: str, down: str) -> re.Pattern[str]:
    """``Response 1 is clearly better``, ``the second one is not wrong``."""
    return re.compile(
        rf"{_SUBJECT}(?:{_NOT}|{_COPULA})(?P<not2>\snot)?{_ADVERB}\s(?:(?P<up>{up})|(?P<down>{down}))\b",
        re.IGNORECASE,
    )


_COMPARED = re.compile(
    rf"{_SUBJECT}{_ADVERB}\s(?:(?P<up>wins|beats|outperforms|surpasses)|(?P<down>loses|trails))\b",
    re.IGNORECASE,
)
_NAMED = re.compile(
    rf"\b(?:(?P<not>not|n't|never)\s)?(?:(?P<up>(?:{_UP})(?:\s(?:response|answer|option|candidate|choice|one))?(?:\sis:?|\s?[:=])"
    r"|(?:prefer|choose|pick|select|favou?r|go\swith|going\swith|in\sfavou?r\sof|preference\sfor))"
    rf"|(?P<down>(?:{_DOWN})(?:\s(?:response|answer|option|candidate|choice|one))?(?:\sis:?|\s?[:=])|reject))"
    rf"(?:\sthe)?\s{_SUBJECT}",
    re.IGNORECASE,
)
_OPENING = (
    r"(?:so|thus|hence|therefore|overall|finally|consequently|in\s(?:conclusion|summary|short|the\send)|"
    r"to\s(?:conclude|sum\sup))"
)
_CHOICE = r"(?:answer|choice|pick|selection|preference|verdict|decision|conclusion|judge?ment)"
_PRAISE = r"(?:(?:final|overall|correct|right|best|better|preferred)\s)?"
_IS = r"(?:\s(?:is|was|would\sbe|must\sbe|should\sbe|has\sto\sbe)(?P<not>\snot|n't|n’t)?:?\s|\s?[:=]\s?)"
_NUMBER = r"(?P<who>1|2|one|two)(?=[\s.!;,:)]{0,8}(?:</think>\s{0,8})?$)"

_ANSWERED = re.compile(
    rf"\b(?:(?:the|my|our)\s)?(?:(?P<down>(?:{_DOWN}|{_WRONG})\s{_CHOICE})|(?P<up>{_PRAISE}{_CHOICE})){_IS}(?:the\s)?"
    rf"{_SUBJECT}(?!\s(?:or|and)\b)",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    rf"^\s*(?P<up>(?:(?:{_OPENING}|(?:I|we)\sconclude(?:\sthat)?)[,:]?\s(?:(?:the|my|our)\s)?{_PRAISE}"
    rf"|(?:the\s)?final\s|(?:my|our)\s(?:final\s)?){_CHOICE}){_IS}{_NUMBER}",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    rf"(?:^\s*{_OPENING}[,:]?\s|\b(?:I|we)\s)(?:(?:would|will|must|should|do|therefore|thus|hence)\s){{0,2}}"
    rf"(?:(?P<not>not|never)\s)?(?P<up>choose|pick|select|prefer|go\swith)\s{_NUMBER}",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    rf"(?:^\s*|,\s)(?P<up>(?:the\s)?(?:correct\s|right\s)?(?:answer|choice)){_IS}{_NUMBER}", re.IGNORECASE
)
_STRONG = (_stated(_UP, _DOWN), _COMPARED, _NAMED, _ANSWERED, _CONCLUDED, _CHOSEN)
_WEAK = (_stated(_RIGHT, _WRONG), _ANSWER)
_UNASSERTED = re.compile(
    r"\b(?:if|whether|unless|neither|nor|or|either|both|which|than|(?:not|n't|cannot)\s(?:\w{1,12}\s){1,3}(?:that\s)?)\s?$",
    re.IGNORECASE,
)
_CONCLUDING = re.compile(
    rf"\s*(?:{_OPENING}|(?:(?:my|the)\s)?(?:final\s(?:answer|choice)|(?:final\s)?(?:conclusion|verdict|decision|"
    r"judge?ment))|my\s(?:answer|choice))\b",
    re.IGNORECASE,
)
_LINE_END = re.compile(r"\n|;(?! \S)")  # shown_thought joins lines with a bare ";", prose puts one space behind it
_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+")
_SLOT = re.compile(r"1|2|one|two|first|second", re.IGNORECASE)
_SLOTS = {"1": 1, "one": 1, "first": 1, "2": 2, "two": 2, "second": 2}
_BEFORE = 48  # characters before a verdict in which a word that takes its assertion away is looked for


def conclusion(text: str) -> int | None:
    """1 or 2: the response that the thought ``text`` concludes for; None where it has no, or no clear, conclusion."""
    lines = [re.sub(r"[ \t*_`\"]+", " ", line) for line in _LINE_END.split(text)]
    for patterns in (_STRONG, _WEAK):
        for line in filter(_SLOT.search, reversed(lines)):
            if verdicts := _line_verdicts(line, patterns):
                return verdicts.pop() if len(verdicts) == 1 else None
    return None


def _line_verdicts(line: str, patterns: tuple[re.Pattern[str], ...]) -> set[int]:
    """The responses that a line speaks for; where sentences open with a concluding word, the last such one's only."""
    found: set[int] = set()
    concluded: set[int] = set()
    for sentence in _SENTENCE_END.split(line):
        verdicts = _sentence_verdicts(sentence, patterns)
        found |= verdicts
        if verdicts and _CONCLUDING.match(sentence):
            concluded = verdicts
    return concluded or found


def _sentence_verdicts(sentence: str, patterns: tuple[re.Pattern[str], ...]) -> set[int]:
    if not _SLOT.search(sentence) or sentence.rstrip().endswith("?"):
        return set()
    verdicts = set()
    for pattern in patterns:
        for match in pattern.finditer(sentence):
            if _UNASSERTED.search(sentence, max(0, match.start() - _BEFORE), match.start()):
                continue
            named = match.groupdict()
            slot = _SLOTS[(named["who"] or named["whow"]).lower()]
            negated = bool(named.get("not")) != bool(named.get("not2"))
            verdicts.add(slot if bool(named["up"]) != negated else 3 - slot)
    return verdicts
