"""Read which option an answer to a closed question chooses, or None if a person could not decide it.

`metrics.py` turns this verdict into `closed_accuracy` and `unparsed`.

For a yes/no question the first plain verdict counts ("Yes, there is no pneumothorax but an effusion" is a yes). If
there is none, statements are compared with what the question claims (`statements.py`). For a choice, the answer chooses
the option that it names and does not deny. Text around the answer is left out: the repeated prompt and question, and
questions of the model's own with everything after them.

Two verdicts that contradict each other, a possibility, a refusal, and a statement about something else choose nothing.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Literal

from stllava_eval.scoring.statements import NORMAL, affirms, denies_in_its_claim, spelled
from stllava_eval.scoring.words import DIGITS, folded, folded_words, remembered, singular, wanted_words

# ---------------------------------------------------------------------------------------------------------------------
# Refusals

_UNSEEN = (
    r"(?:the |this |that |any |your |an? |actual |original )*"
    r"(?:medical )?(?:image|picture|photo|scan|x-?ray|radiograph)s?\b"
)
_REFUSALS = re.compile(
    # Our choice. "I cannot see a mass" and "I'm unable to find one" are answers, so the patterns name what cannot be
    # done.
    r"\bi (?:do not|don't) know\b"
    r"|\b(?:i (?:cannot|can't|can not|could not|couldn't|won't|will not|do not|don't)(?: be able to)?"
    r"|i(?: am|'m) (?:unable|not able) to|unable to|not able to|sorry, (?:but )?(?:i )?can't) "
    r"(?:(?:answer|analy[sz]e|assess|assist|comment|comply|determine|diagnose|help|interpret|offer|provide|say|tell)\b"
    rf"|(?:have access to|access|open|process|see|view) {_UNSEEN})"
    r"|\b(?:cannot|can't|can not) be (?:answered|assessed|determined)\b"
    r"|\b(?:not possible|impossible) to (?:answer|assess|determine|say|tell)\b"
    r"|\b(?:no|without|lack the|lack any|do(?:es)? not have (?:the|any)) (?:ability|access|means|possibility|way)\b"
    r"|\bno (?:image|picture|scan|x-?ray)s? (?:is|are|was|were|has been|have been) (?:attached|provided|uploaded)\b"
    # Gemini's filter kept the answer back: the system declined (lmms_eval/models/{simple,chat}/gemini.py).
    r"|^\[safety_blocked:"
)
# Phrases after which a model may still answer.
_DISCLAIMERS = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bi(?: am|'m) (?:sorry|not qualified|not a (?:doctor|physician|radiologist|medical))"
)


@remembered
def is_refusal(answer: str) -> bool:
    """Return whether the answer declines to answer, by the patterns above.

    It does not look for a verdict: "I'm not a doctor, but yes" matches too. So the score `refused` of a closed question
    is 1 only if `chosen` also finds no option.

    >>> is_refusal("I’m unable to interpret medical images."), is_refusal("I cannot see a fracture.")
    (True, False)
    """
    text = folded(answer)
    if not any(needle in text for needle in _DECLINING) or not any(needle in text for needle in _DECLINED):
        return False  # saves the search of the patterns, none of which matches then
    return _REFUSALS.search(text) is not None or _DISCLAIMERS.search(text) is not None


# What every refusal has one of ("no" is in "not" and "cannot"), and what it says of which it declines.
_DECLINING = ("no", "n't", "unable", "sorry", "impossible", "without", "lack", "as a", "[safety")
_DECLINED = (
    *("know", "answer", "analy", "assess", "assist", "comment", "comply", "determine", "diagnose", "help", "interpret"),
    *(
        "offer",
        "provide",
        "say",
        "tell",
        "access",
        "open",
        "process",
        "see",
        "view",
        "ability",
        "means",
        "possib",
        "way",
    ),
    *("attached", "uploaded", "sorry", "qualified", "not a ", "as a", "[safety"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Which parts of an answer are read

# Tags, LaTeX commands and the marks of Markdown, which are removed before an answer is read.
_MARKS = re.compile(r"<[^<>]*>|\\[a-z]+|[*_#\"“”{}$|>~]")
# The name of a speaker that a model repeats from its chat template: "Assistant: yes".
_ROLE = re.compile(r"^\s*(?:human|user|assistant|model|ai|response)\s*:\s*")
# Both options side by side, as a prompt lists them: "(yes/no)", "yes or no". They choose nothing.
_OPTIONS_AGAIN = re.compile(
    r"[\[(]\s*(?:yes|true)\s*(?:,|/|or)\s*(?:no|false)\s*[\])]|[\[(]\s*(?:no|false)\s*(?:,|/|or)\s*(?:yes|true)\s*[\])]"
    r"|\b(?:yes|true)\s*(?:/|\bor\b)\s*(?:no|false)\b|\b(?:no|false)\s*(?:/|\bor\b)\s*(?:yes|true)\b"
    r"|\b(?:yes and no|no and yes)\b"
)
# A sentence with the marks that end it. A dot inside a word or number ("1.5") does not end one.
_SENTENCE = re.compile(r"[^.!?\n;]+(?:\.(?=\w)[^.!?\n;]+)*[.!?\n;]*")
# Where a sentence is split into clauses. "so" after "think", "believe" and the like refers back and does not split.
_CLAUSES = re.compile(
    r",|\s+-+\s+(?!(?:none|absent|negative|<absent>)\b)|[–—]|\(|\)"
    r"|\b(?:but|although|though|however|while|whereas|because|therefore"
    r"|(?<!think )(?<!believe )(?<!suppose )(?<!seems )(?<!appears )so)\b"
    r"|\band (?=(?:there|it|this|these|the|i|we|no|yes)\b)"
)
# A list that one word denies as a whole: "no mass, cyst or stone".
_LISTED = re.compile(r"(?:\b(?:no|not)\b|<denied>|<lacking>)[^.;]*?(?:,[^.;]*)+\b(?:or|nor)\b")


def _sentences(answer: str) -> list[str]:
    """Return the sentences that answer, folded, without marks, the prompt, and questions.

    A question after the first statement ends the answer.
    """
    text = _OPTIONS_AGAIN.sub(" ", _MARKS.sub(" ", folded(answer).replace("[", " [ ")))
    text = _ROLE.sub("", _ROLE.sub("", text))
    kept: list[str] = []
    for sentence in _SENTENCE.findall(text):
        words = sentence.strip(" []\n.!;,")
        if words.rstrip(". \n").endswith("?"):
            if any(re.search(r"[a-z]", earlier) for earlier in kept):
                break  # what follows is not part of the answer
            continue
        if not words.startswith(("please", "would you", "let me know", "choose one")):
            kept.append(words)
    return kept


def _clauses(sentence: str) -> list[str]:
    """Split a sentence into clauses, but keep a list that is denied as a whole ("no mass, cyst or stone") in one."""
    text = spelled(sentence)
    while match := _LISTED.search(text):
        listed = match.group()
        text = text.replace(listed, listed.replace(",", " or "), 1)
    return [clause.strip() for clause in _CLAUSES.split(text) if clause.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# Yes and no

# Each alternative of _LEAD may precede a verdict; they are removed one after another.
_LEAD = re.compile(
    r"^(?:(?:final |the |my |short )*(?:answer|verdict|conclusion|response)(?: to (?:the|this|your) question)?"
    r"(?: is| would be)?(?: most likely| likely| probably)?|(?:i|we) (?:think|believe|would say|would answer)(?: that)?"
    r"|i'd say|in (?:conclusion|summary|short)|overall|thus|hence|then|and|well|ok|okay|actually"
    r"|(?:(?:most|very|quite) )?(?:likely|probably)|(?:definitely|certainly|absolutely|of course|indeed)(?=,? \w)"
    r"|sorry|in this (?:image|case)|\(?[a-d1-9][).:])\s*[:=,-]*\s*|^[\s:=>'()\[\]-]+"
)
_END = r"[\s:'\])]*(?:$|:)"
_IT_IS = r"(?:that|this|it|the statement|this statement|the claim) (?:is|'s)"
_YES = re.compile(
    rf"(?:yes|yeah|yep|yup|yea)\b|(?:true|correct|affirmative){_END}|{_IT_IS} (?:true|correct|right){_END}"
    rf"|(?:i (?:would )?(?:think|believe|suppose)|it (?:seems|appears)) so{_END}"
)
_NO = re.compile(
    # "no" is a verdict at the end of its clause and before another clause; before a noun it denies that noun
    r"(?:nope|nah)\b|no(?=[\s:'\])]*(?:$|:)"
    r"| (?:there|its?|it's|this|that|these|those|the|i|we|they|he|she|because|since|as|not)\b"
    r"| to (?:this|that|the|your) question\b)"
    rf"|(?:false|untrue|incorrect){_END}"
    rf"|{_IT_IS} (?:false|incorrect|untrue|wrong|not (?:true|correct|right)){_END}"
    rf"|(?:definitely|certainly|absolutely|of course|(?:(?:most|very) )?(?:probably|likely)|clearly) not{_END}"
    rf"|not (?:really|at all|likely|exactly|quite|entirely|fully|completely|that i can (?:see|tell)){_END}"
    rf"|i (?:(?:would )?think not|(?:do not|don't|would not|wouldn't) (?:think|believe) so){_END}"
)
# These are verdicts only as a whole clause: "Sure!" may begin any answer, and "positive" may describe anything.
_SEEN = r"(?:present|seen|visible|noted|visuali[sz]ed|shown|detected|identified|found|evident|there|observed)"
_ALONE = re.compile(
    rf"(?P<yes>y|positive|likely|(?:is |are |it is |they are )?{_SEEN})"
    r"|(?P<no>n|none|(?:(?:it|this|that) (?:is|seems|appears) )?(?:(?:very|highly|most|rather|quite) )?<absent>"
    r"|(?:(?:it|they|this|that) )?(?:(?:is|are|can|could) )?(?:none|<denied>|not) (?:(?:is|are|was|were|to be|be) )?"
    rf"{_SEEN})"
    r"|(?P<sure>absolutely|definitely|certainly|of course|indeed|sure)"
)
# A short answer of pronoun and verb: "it is", "there are not any".
_ELLIPSIS = re.compile(
    r"(?:it|there|this|that|they|these|those|he|she|i|you|we) (?:is|are|was|were|does|do|did|has|have|can|could)"
    r"(?P<denied> not)?(?: any| one)?"
)


def _said(clause: str) -> bool | None:
    """Return True if a clause begins with a plain yes, False for a plain no, and None otherwise."""
    if _BOTH.fullmatch(clause):
        return None
    rest: str | None = clause
    while rest is not None:
        if _NO.match(rest):
            return False
        if _YES.match(rest):
            return True
        shorter = _LEAD.sub("", rest, count=1)
        rest = shorter if shorter != rest else None
    ending = _ENDING.fullmatch(clause)
    if ending and not _UNDECIDED.search(ending["before"]):
        return ending["said"] == "yes"
    behind = _BEHIND.search(clause)
    return None if behind is None else behind[1] == "yes"


# A clause of nothing but verdicts, two or more: "yes, yes", "yes and no".
_BOTH = re.compile(r"\W*(?:(?:yes|no|true|false)\W+){2,}\W*|\W*(?:(?:yes|no|true|false)\W+)+(?:yes|no|true|false)\W*")
# "It appears to be yes", "The image shows no": a clause's last word is its verdict, behind a word that announces one.
_ENDING = re.compile(
    r"(?P<before>(?:[\w'-]+ ){0,8}"
    r"(?:is|be|a|an|say|answer|shows?|suggests?|indicates?|seems|appears)) "
    r"(?:(?:clearly|definitely|likely|probably|indeed|simply|just) )?(?P<said>yes|no)[\s:'\])]*"
)
# Words that deny or leave open what the verdict at the end of a clause says.
_UNDECIDED = re.compile(r"\b(?:not|never|cannot|neither|nor|if|whether|either|could|may|might|unclear|wrong|\w+n't)\b")
_BEHIND = re.compile(r":\s*(yes|no)$")  # "pleural effusion: no"


def _agreed(readings: Iterable[bool | None]) -> bool | None:
    """Return the verdict on which all readings agree that have one; None if they contradict each other."""
    verdicts = {reading for reading in readings if reading is not None}
    return verdicts.pop() if len(verdicts) == 1 else None


@remembered
def yes_or_no(answer: str, question: str) -> bool | None:
    """Return True if an answer to a yes/no question says yes, False if it says no, None if this cannot be decided.

    >>> yes_or_no("There are no abnormalities.", "Is this image normal?"), yes_or_no("No way to tell.", "Is it a CT?")
    (True, None)
    """
    plain = _QUICK.get(answer)
    if plain is not None:
        return plain
    sentences = _sentences(answer)
    declines = is_refusal(answer)
    verdicts: list[bool] = []
    kept: list[str] = []
    for sentence in sentences:
        if declines and _REFUSALS.search(sentence):
            if not verdicts:
                break  # what a model says after it has declined does not count as an answer
            continue
        kept.append(sentence)
        verdicts += [said for clause in _CLAUSES.split(sentence) if (said := _said(clause)) is not None]
    denied = denies_in_its_claim(question)
    if verdicts and not denied:
        return _agreed(verdicts)
    clauses_of = [_clauses(sentence) for sentence in kept]
    clauses = list(chain.from_iterable(clauses_of))
    if verdicts := verdicts or [said for clause in clauses if (said := _said(clause)) is not None]:
        # "No, there is no effusion" to "Is there no effusion?" can mean either
        stated = _agreed(affirms(clause, question) for clause in clauses) if denied else None
        return _agreed([*verdicts, stated])
    if declines and any(_DISCLAIMERS.search(sentence) for sentence in kept):
        return None
    whole = len(clauses) == 1
    opening = clauses_of[0] if clauses_of else []
    if len(opening) > 1 and (shorter := _LEAD.sub("", kept[0], count=1)) != kept[0]:
        opening = _clauses(shorter)  # "Indeed, it is."
    alone = _alone(opening[0], whole, denied) if len(opening) == 1 else None
    return _agreed([alone, *(affirms(clause, question) for clause in clauses)])


def _alone(clause: str, whole: bool, denied: bool) -> bool | None:
    """Return what a clause without a content word says, such as "Absent." or "It is not."; None for any other.

    Args:
        clause: The clause.
        whole: Whether it is the whole answer.
        denied: Whether the question's claim is a denial.
    """
    before = ""
    while before != clause:
        before, clause = clause, _LEAD.sub("", clause, count=1).strip(" :'()[]")
    if match := _ALONE.fullmatch(clause):
        if match["sure"]:
            return True if whole else None
        return match["yes"] is not None
    if not denied and (match := _ELLIPSIS.fullmatch(clause)):
        return match["denied"] is None
    return None


_QUICK = {f"{word}{mark}": word.lower() == "yes" for word in ("yes", "no", "Yes", "No") for mark in ("", ".")}
"""The most frequent short answers, which are read without a search."""

# ---------------------------------------------------------------------------------------------------------------------
# Choices

# The last "or" of a question, with what is before it and the option behind it.
_LAST_OR = re.compile(r"(.*)\bor\b([^,?]*)", re.DOTALL)
# The question before a list of options: "Which is it, the heart or the lung?"
_CLAUSE_BEFORE_LIST = re.compile(r"\s*(?:which|what|where)\b[^,]*,")
_FILLERS = frozenset({"just", "only", "either", "in", "on", "at", "of", "from"})


@remembered
def choices(question: str) -> tuple[str, ...]:
    """Return the options that a closed question offers, each as words joined by spaces; none if it has no "or".

    Two forms are read, those of VQA-RAD and SLAKE. "Which ..., A, B or C?" is a list with a start and an end. In "Is it
    A, B or C ...?" neither is marked, so the first option is taken to be as long as the second, and the last option to
    be one word (both have two words in "A x or B x"). Words such as "just" and "either" belong to no option.

    >>> choices("Which plane is the image scanned, transverse plane or coronal plane?")
    ('transverse plane', 'coronal plane')
    >>> choices("Are there multiple or just 1 metastatic focus?")
    ('multiple', '1')
    """
    offer = _LAST_OR.match(folded(question))
    if offer is None:
        return ()
    before, last = offer[1], _without_fillers(folded_words(offer[2]))
    clause = _CLAUSE_BEFORE_LIST.match(before)
    start = clause.end() if clause else 0
    texts = re.split(r",|\bor\b", before[start:])
    parts = [part for text in texts if (part := folded_words(text))]
    if not clause and parts:
        # An option has at most two words here, so the last longer part is the clause that ends with the first option.
        first, *middle = parts[max((i for i, part in enumerate(parts) if len(part) > 2), default=0) :]
        middle = [option for part in middle if (option := _without_fillers(part))]
        alike = first[-1:] == last[1:2]
        first_length = len(middle[0]) if middle else 1 + alike
        parts, last = [first[-first_length:], *middle], last[: 1 + alike]
    options = (_without_fillers(option) for option in (*parts, last))
    return tuple(" ".join(option) for option in options if option)


def _without_fillers(words: Sequence[str]) -> tuple[str, ...]:
    kept = list(words)
    while kept and kept[0] in _FILLERS:
        del kept[0]
    return tuple(kept)


# Other names of the options of VQA-RAD and SLAKE that radiologists use (our choice).
_SYNONYMS = {
    "l": "left",
    "r": "right",
    "transverse": "axial",
    "woman": "female",
    "girl": "female",
    "lady": "female",
    "man": "male",
    "boy": "male",
    "gentleman": "male",
    "single": "1",
    "solitary": "1",
    "several": "multiple",
    "many": "multiple",
    "numerous": "multiple",
    "cyst": "cystic",
    "abnormality": "abnormal",
    "anomaly": "abnormal",
    "unremarkable": "normal",
    "bilaterally": "bilateral",
    "hyperinflated": "hyperinflation",
    "hypoinflated": "hypoinflation",
    "hyperdensity": "hyperdense",
    "hypodensity": "hypodense",
    "pulmonary": "lung",
    "cardiac": "heart",
    "hepatic": "liver",
    "renal": "kidney",
    "splenic": "spleen",
}
_LARGER, _SMALLER = (
    frozenset({"bigger", "larger", "greater", "biggest", "largest"}),
    frozenset({"smaller", "smallest", "lesser"}),
)
# Words that deny the options behind them: "not the left", "rather than the heart".
_DENYING = re.compile(
    r"\b(?:not|no|instead of|unlike|as opposed to|different from|differs? from)\b|\brather <than>|<denied>|<lacking>"
)


def _canonical(words: Iterable[str]) -> list[str]:
    """Return the words in the singular, with digits for numbers and one name for each option."""
    singulars = map(singular, words)
    return [DIGITS.get(word, _SYNONYMS.get(word, word)) for word in singulars]


def _choice(answer: str, options: Sequence[str], question: str) -> str | None:
    """Return the option that the answer chooses; None if it chooses none or several."""
    pattern, option_of = _naming(tuple(options))
    kept: set[str] = set()
    denied: set[str] = set()
    sentences = _sentences(answer)
    declines = any(_REFUSALS.search(sentence) for sentence in sentences)
    labels: set[str] = set()
    if not declines:
        read = (_label(sentence, pattern, option_of) for sentence in sentences)
        labels = {label for label in read if label}
    if len(labels) == 1:
        return labels.pop()  # "Abnormal. The heart is enlarged, the lungs are normal.": what explains it is not read
    for sentence in sentences:
        if _REFUSALS.search(sentence):
            if not kept:
                return None
            continue
        for part in _EXPLAINED.split(sentence):
            names = [_named(clause, pattern, option_of, question) for clause in _option_clauses(part)]
            kept = kept.union(*(named for named, _ in names))
            denied = denied.union(*(others for _, others in names))
            if any(named for named, _ in names):
                break
    if len(kept) != 1 and (
        "both" in kept or ("both" in options and len(kept) == 2 and _LEFT_AND_RIGHT.search(folded(answer)))
    ):
        return "both"
    kept -= denied if len(kept - denied) == 1 else set()
    if len(kept) == 1:
        return kept.pop()
    left = [option for option in options if option not in denied]
    return left[0] if not kept and denied and len(left) == 1 else None


def _label(sentence: str, pattern: re.Pattern[str], option_of: dict[str, str]) -> str | None:
    """Return the option if it is all that a sentence says before it explains itself; else None."""
    clauses = _option_clauses(_EXPLAINED.split(sentence, maxsplit=1)[0])
    text = " ".join(_canonical(_TOKEN.findall(clauses[0]))) if clauses else ""
    labels = pattern.findall(text)
    bare = len(labels) == 1 and _LABELS.issuperset(pattern.sub(" ", text).split())
    return option_of[labels[0]] if bare else None


_LABELS = frozenset(
    {"the", "a", "an", "it", "is", "this", "answer", "option", "image", "scan", "side", "view", "final"}
)

_PLAIN_VERDICT = re.compile(r"^(?:yes|no)\b *[,:-]")  # chooses no option and denies none: "No, the patient is male."
# Where a sentence about options is split into clauses.
_OPTION_CLAUSES = re.compile(
    r",(?= *(?:(?:not|but|while|whereas|rather|instead|it|this|that)|(?:the )?\w+(?: \w+)? (?:is|are))\b)"
    r"|\b(?:but|while|whereas|however|although)\b"
)


# An "and" that begins a clause with a verb of its own: "the left is larger and the right is smaller".
_AND = re.compile(r"\band (?=(?:the )?\w+(?: \w+)? (?:is|are)\b)")
# The verbs of such clauses.
_VERB = re.compile(r"\b(?:is|are|shows?|has|have|looks?|appears?)\b")


def _option_clauses(sentence: str) -> list[str]:
    clauses: list[str] = []
    for clause in _OPTION_CLAUSES.split(_PLAIN_VERDICT.sub("", spelled(sentence))):
        joint = _AND.search(clause)
        if joint and _VERB.search(clause[: joint.start()]):  # "the lungs are clear and the heart is enlarged"
            clauses += [clause[: joint.start()], clause[joint.end() :]]
        else:
            clauses.append(clause)
    return [clause for clause in clauses if clause.strip()]


# Words that leave a choice open.
_OPEN_CHOICE = re.compile(
    r"\b(?:could be|may be|might be|cannot|can not|whether|possibly)\b"
    r"|(?<!answer )(?<!choice )\bwould (?:be|appear|look|have|show)\b"  # what another image would show
)
# Both sides in one phrase, which is the option "both": "left and right", "left lung and the right".
_LEFT_AND_RIGHT = re.compile(r"\b(left|right)(?: \w+)? and (?:(?:on )?(?:the )?)?(?!\1)(?:left|right)\b")
# What explains a choice begins here. It is read only where nothing is chosen before it.
_EXPLAINED = re.compile(
    r"\b(?:because|since|given that|due to|where|as (?=(?:the|it|there|this|these|indicated|evidenced|seen|shown)\b))"
    r"|\((?!\w\))|, as\b(?! (?:well|opposed|compared))"
)


def _named(
    clause: str, pattern: re.Pattern[str], option_of: dict[str, str], question: str
) -> tuple[set[str], set[str]]:
    """Return the options that a clause names, and those that it denies; a list such as "A or B" names none."""
    clause = _MORE_THAN_ONE.sub("multiple", clause)
    marked = _canonical(_TOKEN.findall(_THAN.sub("<than>", clause)))
    text = " ".join(marked)
    mentions = [(match.start(), match.end(), option_of[match.group()]) for match in pattern.finditer(text)]
    if not mentions:
        return set(), set()
    mentions = _without_lists(text, mentions)
    if "<than>" in marked and not _DENYING.search(text):
        mentions = _of_comparison(text, mentions, question)
    if _OPEN_CHOICE.search(clause) or _spares(text, question, option_of):
        return set(), set()
    kept: set[str] = set()
    denied: set[str] = set()
    turned = _turned(text, question, option_of)
    behind = False
    for index, (start, end, option) in reversed(list(enumerate(mentions))):
        after = text[end : mentions[index + 1][0] if index + 1 < len(mentions) else None]
        if index + 1 == len(mentions) or not _JOINTS.issuperset(after.split()):
            behind = _DENIED_BEHIND.match(after) is not None  # of "A and B are not seen" A is denied too
        (denied if (bool(_DENYING.search(text[:start])) != behind) != turned else kept).add(option)
    return kept, denied


# A denial behind an option: "the left is not", "pneumonia no". Up to three words may be between them.
_DENIED_BEHIND = re.compile(
    r"(?: (?!(?:and|as|which|that|who|since|when|with|<than>)\b)[\w<>]+){0,3}? "
    r"(?:(?:is|are|was|were|be|do|does|did|has|have|can|could) not\b|<absent>)"
    r"| no(?= ,|$)"
)


# "more than one" is a number, and its "than" compares nothing.
_MORE_THAN_ONE = re.compile(r"\bmore than (?:one|1)\b")
_SIZES = dict.fromkeys(_LARGER, 1) | dict.fromkeys(_SMALLER, -1)
# Words of a comparison: the option before them is the larger one, or the smaller one.
_THAN = re.compile(r"\b(?:than|compared (?:to|with)|relative to|followed by)\b")
# The pieces of a clause: marks of `spelled`, commas, and words.
_TOKEN = re.compile(r"<\w+>|,|[^\W_]+")


_JOINTS = frozenset({"or", "and", "versus", "vs", "the", "a", "an", ",", "image", "scan"})


def _without_lists(text: str, mentions: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Leave out the options that are only listed: "A or B", "between A and B", "of A, B and C"."""
    runs: list[list[tuple[int, int, str]]] = []
    joints: list[str] = []
    for match in mentions:
        start, _, option = match
        between = text[runs[-1][-1][1] : start].split() if runs else []  # the words between two named options
        again = bool(runs) and option in (earlier for _, _, earlier in runs[-1])
        if runs and not again and all(word in _JOINTS for word in between):
            runs[-1].append(match)
            joints[-1] += " ".join(between)
        else:
            runs.append([match])
            joints.append("")
    kept = []
    for run, joint in zip(runs, joints, strict=True):
        introduced = re.search(r"\b(?:between|of|among|from)(?: the| a| an)? $", text[: run[0][0]])
        listed = len(run) > 1 and (introduced or re.search(r"\bor\b|\bvs\b|\bversus\b", joint))
        if not listed or _DENYING.search(text[: run[0][0]]):
            kept += run
    return kept


def _of_comparison(text: str, mentions: list[tuple[int, int, str]], question: str) -> list[tuple[int, int, str]]:
    """Of "A is bigger than B", keep A if the question asks for the bigger one, and B if it asks for the smaller one."""
    than = text.index("<than>")
    asked, said = set(folded_words(question)), set(text[:than].split())
    larger, smaller = bool(asked & _LARGER), bool(asked & _SMALLER)
    # where the question names both, they are its options, and what is asked for is neither
    turned = larger != smaller and bool(said & (_SMALLER if larger else _LARGER))
    return [match for match in mentions if (match[0] > than) == turned]  # those behind "than", or those before it


def _spares(text: str, question: str, option_of: dict[str, str]) -> bool:
    """Return whether the clause calls something normal, though the question asks for the abnormal one."""
    values = {NORMAL[word] for word in text.split() if word in NORMAL}
    return (
        values == {1} and NORMAL.keys().isdisjoint({*folded_words(question), *option_of}) and not _DENYING.search(text)
    )


def _turned(text: str, question: str, option_of: dict[str, str]) -> bool:
    """Return whether the clause says the opposite of what the question asks for, such as normal for abnormal."""
    for values in (NORMAL, {} if "<than>" in text else _SIZES):
        asked = {values[word] for word in folded_words(question) if word in values}
        said = {values[word] for word in text.split() if word in values and word not in option_of}
        if len(asked) == len(said) == 1:
            return asked != said
    return False


@lru_cache(maxsize=1024)
def _naming(options: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Return a pattern that finds the options in a text, and the option that each matched phrase names.

    An option is named in full, or by the words that only it has: "T1" names "T1 weighted" if the other option is "T2
    weighted". The longest phrase wins, so "upper left" does not name "left" as well.
    """
    option_of: dict[str, str] = {}
    for option in options:
        own_words = _canonical(_TOKEN.findall(spelled(option)))
        option_of.setdefault(" ".join(own_words), option)
        shared: set[str] = set()
        for other in options:
            if other != option:
                shared.update(_canonical(_TOKEN.findall(spelled(other))))
        if own := " ".join(word for word in own_words if word not in shared):
            option_of.setdefault(own, option)
        if option in ("both", "bilateral"):
            option_of.setdefault("both" if option == "bilateral" else "bilateral", option)
    phrases = "|".join(re.escape(phrase) for phrase in sorted(option_of, key=len, reverse=True))
    return re.compile(rf"(?<!\S)(?:{phrases})(?!\S)"), option_of


# ---------------------------------------------------------------------------------------------------------------------


def chosen(answer: str, reference: str, question: str = "") -> str | None:
    """Return the option that an answer to a closed question chooses, as words joined by spaces; None if there is none.

    The options are yes and no if the reference is one of them. Otherwise they are what `choices` reads from the
    question, and the reference too if none of these is like it.

    Raises:
        InputError: The reference has no words.

    >>> chosen("Between CT and MRI, this is an MRI.", "MRI", "Is this an MRI or a CT scan?")
    'mri'
    """
    options, _ = _offered(reference, question)
    if options == ("yes", "no"):
        said = yes_or_no(answer, question)
        return None if said is None else ("yes" if said else "no")
    return _choice(answer, options, question)


@remembered
def verdict(answer: str, reference: str, question: str = "") -> Literal["right", "wrong", "unparsed"]:
    """Return whether the answer chooses the reference's option; "unparsed" if it chooses none (see `chosen`).

    Raises:
        InputError: The reference has no words.

    >>> verdict("The left side.", "Left", "Is the lesion on the left or right?")
    'right'
    >>> verdict("There is a fracture.", "no", "Is there a fracture?"), verdict("It is unclear.", "no", "Is it a CT?")
    ('wrong', 'unparsed')
    """
    said = chosen(answer, reference, question)
    if said is None:
        return "unparsed"
    return "right" if said == _offered(reference, question)[1] else "wrong"


@remembered
def _offered(reference: str, question: str) -> tuple[tuple[str, ...], str]:
    """Return the options, and which of them is the reference's."""
    wanted = " ".join(wanted_words(reference))
    if wanted in ("yes", "no"):
        return ("yes", "no"), wanted
    options = choices(question)
    if options:
        pattern, option_of = _naming(options)
        reference_text = " ".join(_canonical(_TOKEN.findall(spelled(reference))))
        named = {option_of[phrase] for phrase in pattern.findall(reference_text)}
        if len(named) == 1:
            return options, named.pop()
    return (*options, wanted), wanted
