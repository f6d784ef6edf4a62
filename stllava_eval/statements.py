"""A yes/no question and a statement -> whether the statement affirms what the question asks, denies it, or neither.

A question makes a claim: "Is the heart enlarged?" claims that the heart is enlarged. A statement about the same thing
agrees with the claim or contradicts it, even if it does not say "yes" or "no". The rules look at the *head* of the
claim (the thing that is said to exist, or the property), at whether question and statement deny the head, and at
opposites such as normal and abnormal. They are symmetric: denials are read by the same rules as affirmations.

A statement about something else, or one that leaves the matter open ("may", "cannot be excluded"), gives neither.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from stllava_eval.words import DIGITS, folded, remembered, singular, word_set

# The lists of this module are our choice, made on the development part of tests/hand_read_verdicts.jsonl.

NORMAL = dict.fromkeys(word_set("normal normally unremarkable healthy typical intact clear"), 1) | dict.fromkeys(
    word_set(
        """abnormal abnormality abnormalities unhealthy atypical diseased pathology pathologies pathologic pathological
        anomaly anomalies"""
    ),
    -1,
)
"""Words that call something normal (1) or abnormal (-1)."""

# Deviations of an organ. Each of them contradicts "normal", but they do not contradict each other.
_DEVIANT = re.compile(
    r"enlarg|dilat|widen|swollen|swell|deviat|devi$|displac|fractur|thicken|flatten|atroph|collaps|distend|narrow|"
    r"hyperinfl|hypoinfl|obstruct"
)

_FAMILIES = (
    {"ct": "ct", "mri": "mri", "xray": "xray", "ultrasound": "ultrasound", "pet": "pet"},
    {"axial": "axial", "transverse": "axial", "coronal": "coronal", "sagittal": "sagittal"},
    {"t1": "t1", "t2": "t2", "flair": "flair"},
    {"male": "male", "man": "male", "female": "female", "woman": "female"},
)
"""An image or a patient has one member of each family, so naming one member denies the others."""

# "this is a CT" says what the image is, "after the CT" does not
_NAMING = word_set("is was are be shows appears seems looks")
_OTHER_SIDE = {"left": "right", "right": "left", "upper": "lower", "lower": "upper"}
_DENIALS = word_set("no not none <denied> <lacking> <absent> <excluded>")
_INFERRING = word_set("indicates indicate suggests suggest means shows represents is are was")

_AUXILIARIES = word_set("is are was were be been being am has have had does do did can could will would should")
_PREPOSITIONS = word_set(
    """in on of at within under along near from to around between with by for outside underneath beneath above below
    over into through throughout across inside adjacent surrounding"""
)
_PLACING = word_set("in within on under inside outside around of at")
_SHOWING = word_set(
    """there has have had with see sees show shows showing demonstrate demonstrates demonstrating reveal reveals contain
    contains exhibit exhibits display displays displaying"""
)
_STATING = (
    _AUXILIARIES
    | (_SHOWING - {"with"})
    | _DENIALS
    | word_set("appears appear looks look seems seem indicates suggests")
)
_SCAFFOLD = (
    _AUXILIARIES
    | _PREPOSITIONS
    | word_set(
        """a an the this that these those there here it its they them he she his her you your we our i my any some all
        both everything something anything what which who and or as so also only just very quite rather well
        more than image images picture pictures scan scans film films study studies photo view views plane
        planes section slice modality patient patients patient's case evidence evident sign signs indication
        indications presence present finding findings appearance structures features body see sees seen saw
        visible visualize visualized visualised identify identifiable identified note noted notice detect
        detected show shows shown showing demonstrate demonstrates demonstrated demonstrating reveal reveals
        exhibit exhibits depict depicts display displays displaying contain contains containing include
        includes observe observed indicate indicates suggest suggests suggesting suggestive consistent
        compatible appear appears look looks looking seem seems apparent find found exist exists represent
        represents used use given received receive taken made displayed imaged clearly definite obvious
        significant acute mild mildly moderate moderately severe severely small large slight slightly
        minimal subtle marked markedly multiple several single new visible likely probably overall
        particular x however therefore"""
    )
)
"""Words without content of their own, which surround a claim in questions and in answers."""

_SPELLINGS = (
    (re.compile(r"\bx[- ]?rays?\b|\bradiographs?\b|\bcxr\b"), " xray "),
    (re.compile(r"\bmagnetic resonance(?: imaging| images?)?\b|\bmr\b(?: imaging\b)?"), " mri "),
    (re.compile(r"\bcomputed tomography\b|\bcat scan\b"), " ct "),
    (re.compile(r"\bcardiomegaly\b|\bcardiac enlargement\b|\benlargement of the heart\b"), " enlarged heart "),
    (re.compile(r"\bsaggital\b"), " sagittal "),
    (re.compile(r"\bwithin (?:the )?normal (?:size )?limits\b"), " normal "),
    (re.compile(r"\bcan ?not\b|\bcan't\b"), " can not "),
    (re.compile(r"\bwon't\b"), " will not "),
    (re.compile(r"\b(it|that|there|this|he|she|what)'s\b"), r"\1 is"),
    (re.compile(r"n't\b"), " not "),
    # "no" that denies nothing in the image
    (re.compile(r"\b(?:no|without(?: a)?) (?:doubt|question)\b|\bnot only\b|\bno longer\b"), " "),
    (re.compile(r"\b(neither|not|no|never)\b(.*?)\bnor\b"), r"\1\2or"),
    (re.compile(r"\bnever\b"), " not "),
    # denials that precede what they deny, and further below those that follow it
    (
        re.compile(r"\b(?:free of|free from|absence of|lack of|lacking|devoid of|without)\b"),
        " <lacking> ",
    ),
    (
        re.compile(
            r"\b(?:lacks|negative for|fails? to|failed to|rules? out|excludes?|neither|nor|nothing|non(?=[- ]))\b"
        ),
        " <denied> ",
    ),
    (re.compile(r"\b(?:excluded|ruled out)\b"), " <excluded> "),
    (re.compile(r"\b(?:absent|negative|unlikely|nowhere|missing|invisible|removed|resected)\b"), " <absent> "),
)
_OPEN = re.compile(
    r"\b(?:may|might|could be|could have|possibl[ey]|possibility|maybe|perhaps|suspect(?:ed|s)?|suspicio(?:n|us)|"
    r"unclear|uncertain|unsure|equivocal|indeterminate|questionable|whether|if|difficult|hard to|too \w+ to|resolved|"
    r"presence or absence|not (?:\w+ )?(?:sure|certain|clear (?:whether|if))|concern for|concerning for|should|"
    r"please|would)\b"
    r"|\b(?:not|never) (?:be(?:en)? )?(?:<excluded>|rule out|<denied>|confirmed|determined|assessed|evaluated|"
    r"answered)"
    r"|(?:\bnot|<denied>|\bno) (?:\w+ )?(?:determine|tell|exclude|rule|assess|evaluate|confirm|say|know|way|"
    r"information|ability)\b"
)
"""Expressions that leave the matter open."""
_WORD = re.compile(r"<\w+>|[^\W_][^\W_]*(?:'[^\W_]+)?")


@dataclass(frozen=True)
class _Claim:
    """The claim of a question.

    Args:
        kind: The words that can answer it: normal and abnormal, deviations, members of a family, or others.
        heads: The stems of the thing that is said to exist, or of the property; two if the question joins them by "or".
        keys: The stems of the words that the head is said of.
        value: 1 for an affirmative claim; -1 if it is denied or calls something abnormal, but not both.
        denied: Whether the question itself contains a denial, as in "Is there no effusion?".
        known: The stems of all words of the question.
        sides: Left or right, upper or lower, if the question names one of the two.
        compared: The claim's stems in order, if it is a comparison with "than"; otherwise empty.
        exists: Whether it claims that something exists ("Is there ...?") instead of a property ("Is it ...?").
        placed: Whether the question names a place.
    """

    kind: Literal["normal", "deviant", "family", "plain"]
    heads: tuple[str, ...]
    keys: frozenset[str]
    value: int
    denied: bool
    known: frozenset[str]
    sides: frozenset[str]
    compared: tuple[str, ...]
    exists: bool
    placed: bool


def spelled(text: str) -> str:
    """Fold a text, and give modalities, contractions and denials one spelling each."""
    text = folded(text)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return " ".join(text.split())


@remembered
def stem(word: str) -> str:
    """Remove the endings in which a noun, its plural, its adjective and its participle differ.

    At least four letters are kept. Our choice, for this module only: "fractures" and "fractured" mean the same here.

    >>> [stem(word) for word in ("calcifications", "calcified", "masses", "lesion")]
    ['calc', 'calc', 'mass', 'lesion']
    """
    return _ENDING.sub("", singular(word))


_ENDING = re.compile(
    r"(?<=\w{4})(?:ification|ified|ation|ating|ated|ement|ment|ening|ened|ion|ing|ied|ity|ed|ly|er|al|ic|e|y)$"
)


def _words(text: str) -> list[str]:
    return [DIGITS.get(word, word) for word in _WORD.findall(text)]


def affirms(clause: str, question: str) -> bool | None:
    """Return True if a clause affirms the question's claim, False if it denies the claim, None if it does neither.

    Args:
        clause: Part of an answer, as `spelled` returns it. A denial in it applies to the words that follow, unless it
            is one of those that follow what they deny ("absent", "excluded").
        question: A yes/no question.

    >>> affirms("the heart is not enlarged", "Is the heart enlarged?"), affirms("no mass", "Is the heart enlarged?")
    (False, None)
    """
    claim = _claim(question)
    if claim is None:
        return None
    if (left_open := _OPEN.search(clause)) and not {stem(word) for word in left_open.group().split()} - {
        "not"
    } <= claim.known:
        return None
    words = _words(clause)
    stems = [stem(word) for word in words]
    if _elsewhere(words, claim) or not _states(words, claim):
        return None
    if claim.compared:
        return _compared(stems, claim)
    if claim.kind == "family":
        return _of_family(words, claim)
    if claim.kind == "normal":
        value = _normality(words, stems, claim)
        return None if value is None else value == claim.value
    said = _of_heads(words, stems, claim)
    if said is None and claim.kind == "deviant" and claim.value > 0 and _normality(words, stems, claim) == 1:
        return False  # a normal organ is not enlarged, dilated or fractured
    return said


def _states(words: Sequence[str], claim: _Claim) -> bool:
    """Return whether this is a statement: it has a verb or a denial, or only words of the question.

    A long list of words is not a statement, even if "is" is among them.
    """
    if _STATING.isdisjoint(words):
        return _plain_before(words, claim, len(words))
    return sum(word not in _SCAFFOLD and stem(word) not in claim.known for word in words) <= _LONGEST


# A clause with more content words that are not in the question is taken as a list (our choice): sentences have fewer.
_LONGEST = 12


def denies_in_its_claim(question: str) -> bool:
    """Return whether the question's claim is a denial, as in "Is there no effusion?" or "Is the spleen absent?"."""
    if not _DENYING.search(folded(question)):
        return False
    claim = _claim(question)
    return claim is not None and claim.denied


_DENYING = re.compile(
    r"\bno|n't\b|\bwithout\b|\babsent\b|\bmissing\b|\bfree\b|\black|\bnever\b|\bexclude|\binvisible\b"
)


def _of_heads(words: Sequence[str], stems: Sequence[str], claim: _Claim) -> bool | None:
    """Return whether the clause affirms or denies the claim's head; None if it does not speak of it."""
    places = [stems.index(head) for head in claim.heads if head in stems]
    if not places or not _about(words, stems, claim, places[0]):
        return None
    said = {_polarity(words, place) for place in places}
    if len(said) > 1:
        return None
    agrees = said.pop() == claim.value
    affirmed = agrees == (claim.value > 0)
    if not affirmed and len(places) < len(claim.heads):
        return None  # it denies only one of "a fracture or dislocation"
    return agrees


def _normality(words: Sequence[str], stems: Sequence[str], claim: _Claim) -> int | None:
    """Return 1 if the clause calls the claim's subject normal, -1 if it calls it abnormal, else None."""
    for place, word in enumerate(words):
        sign = NORMAL.get(word)
        if sign is None and claim.kind == "normal" and _DEVIANT.match(stems[place]):
            if _polarity(words, place) < 0:
                return None  # an organ that is not enlarged may be abnormal in another way
            sign = -1
        if sign is None:
            continue
        value = sign * _polarity(words, place)
        whole = claim.kind == "normal" and not claim.keys
        if whole and value < 0:
            return value  # an abnormal part makes the image abnormal
        return value if _about(words, stems, claim, len(words) if whole else place) else None
    return None


def _of_family(words: Sequence[str], claim: _Claim) -> bool | None:
    """Return whether the clause affirms or denies the claim's member of a family; naming another member denies it.

    None if the clause names no member of the image or patient that the question asks about.
    """
    (head,) = claim.heads
    family = next(members for members in _FAMILIES if head in members.values())
    found = [(place, family[word]) for place, word in enumerate(words) if word in family]
    if not found:
        return None
    own = [place for place, member in found if member == head]
    place = own[0] if own else found[0][0]
    named = place < 2 or not _NAMING.isdisjoint(words[:place])
    plain = _plain_before(words, claim, place)
    if own and (named or plain) and (plain or claim.keys <= {stem(word) for word in words}):
        return (_polarity(words, place) > 0) == (claim.value > 0)
    if not own and named and _polarity(words, place) > 0:
        return claim.value < 0
    return None


def _compared(stems: Sequence[str], claim: _Claim) -> bool | None:
    """Return whether the clause affirms or denies a comparison: the claim's words in another order deny it.

    A denial in the clause reverses this. None if the clause does not have exactly the claim's words.
    """
    said = tuple(word for word in stems if word in set(claim.compared))
    if sorted(said) != sorted(claim.compared):
        return None
    return (said == claim.compared) == (not _DENIALS & set(stems))


def _about(words: Sequence[str], stems: Sequence[str], claim: _Claim, place: int) -> bool:
    """Return whether the word at `place` is said of the thing that the question asks about.

    The clause has all words of that thing, or no content words before `place` that are not in the question. So a
    "pericardial effusion" does not answer for a "pleural effusion", nor "the ureter is dilated" for the bowel. A clause
    that names another place than the question does not answer it either.
    """
    complete = claim.keys <= set(stems)
    if claim.exists and _DEFINED.match(" ".join(words[place + 1 :])):
        return False
    if claim.placed or not complete:
        at = next((at for at, word in enumerate(words) if at > place and word in _PLACING), None)
        where = [stem(word) for word in words[at:] if word not in _SCAFFOLD] if at is not None else []
        if where and not claim.known & set(where):
            return False
    return complete or _plain_before(words, claim, place)


_DEFINED = re.compile(r"(?:is|are) (?:an?|the|defined|known|called|caused|when|usually|often|typically)\b")


def _plain_before(words: Sequence[str], claim: _Claim, place: int) -> bool:
    """Return whether no content word before `place` is missing from the question."""
    before = list(words[:place])
    if claim.exists and claim.kind != "normal":
        # the subject of "show" is not part of what is shown: "the lungs show an effusion"
        start = max((at for at, word in enumerate(before) if word in _SHOWING or word.startswith("<")), default=-1)
        before = before[start + 1 :]
    return all(
        word in _SCAFFOLD
        or word in NORMAL
        or word.startswith("<")
        or word in ("no", "not")
        or stem(word) in claim.known
        for word in before
    )


def _elsewhere(words: Sequence[str], claim: _Claim) -> bool:
    """Return whether the clause names only the side that the question does not ask about."""
    return any(_OTHER_SIDE[side] in words and side not in words for side in claim.sides) and not claim.compared


_GOES_ON = word_set("and as which that who since when with")  # the words after these no longer concern the head


def _polarity(words: Sequence[str], place: int) -> int:
    """Return 1 if the word at `place` is affirmed, and -1 if it is denied; two denials cancel out."""
    denials = 0
    for at, word in enumerate(words[:place]):
        # "the absence of lung markings indicates ..." denies only the markings
        ended = word == "<lacking>" and not _INFERRING.isdisjoint(words[at:place])
        denials += word in _DENIALS and not ended
    after = list(takewhile(lambda word: word not in _GOES_ON, words[place + 1 :]))
    for at, word in enumerate(after):
        behind = word in ("not", "none") and (at == 0 or after[at - 1] in _AUXILIARIES)
        denials += behind or word in ("<absent>", "<excluded>")
    return -1 if denials % 2 else 1


_TAIL = re.compile(
    r"\b(?:in|on|of|from|by|at|within|for) (?:this|the|that|these|shown|given|above)(?: [\w-]+)? "
    r"(?:images?|pictures?|scans?|films?|study|xray|ct|mri|slice|view|photo|case|patient|body|modality)\b"
)
_EXISTS = re.compile(r"(?:is|are|was|were) there (?P<what>.*)|evidence of (?P<noun>.*)")
_SHOWS = re.compile(
    r"(?:does|do|did|has|have) (?P<who>.+?) (?:show|have|contain|demonstrate|reveal|include|exhibit|depict|display|"
    r"indicate|suggest|represent|receive) (?P<what>.*)"
    r"|(?:do|can|could) (?:you|we|i|one) (?:see|identify|find|observe|detect) (?P<seen>.*)"
)
_IS_SEEN = re.compile(
    r"(?:is|are|was|were|can|could|has|have) (?P<what>.+?) (?:be |been )?(?:clearly )?(?:present|visible|seen|"
    r"visuali[sz]ed|evident|identifiable|noted|detected|shown|found|observed|identified|apparent|<absent>)(?!\w)(?P<rest>.*)"
)
_EVIDENCE = re.compile(
    r"^(?:any |an? |the |some |clear |visible )*(?:evidence|signs?|indications?|presence) (?:of|for) "
)


_RHETORICAL = re.compile(r"(?:is|are|was|were|does|do|did|has|have|can|could|will|would|should) not\b")


@remembered
def _claim(question: str) -> _Claim | None:
    """Return the claim of a yes/no question; None if it has no content word, or asks "Isn't ...?"."""
    text = spelled(question)
    text = text.partition("?")[0] if "?" in text else text
    if _RHETORICAL.match(text):
        return None  # people who mean the same answer "Isn't it enlarged?" with yes and with no
    whole = _words(text)
    text = _TAIL.sub(" ", " ".join(whole))
    denied_behind = 0
    exists = True
    if found := _EXISTS.fullmatch(text) or _SHOWS.fullmatch(text):
        core = next(group for name, group in found.groupdict().items() if group is not None and name != "who")
        before = text[: found.start("who")] if "who" in found.groupdict() and found["who"] else ""
        denied_behind = before.count(" not ")
    elif found := _IS_SEEN.fullmatch(text):
        core = found["what"]
        denied_behind = "<absent>" in text[found.end("what") :]
    else:
        core, exists = text, False
    core_words = _words(_EVIDENCE.sub("", core.strip()))
    kept = _up_to_preposition(core_words) if exists else core_words
    content = [
        word for word in kept if word not in _SCAFFOLD and not word.startswith("<") and word not in ("no", "not")
    ]
    if not content:
        content = [word for word in core_words if word not in _SCAFFOLD and word not in _DENIALS]
    if not content:
        return None
    return _claim_of(content, core_words, whole, int(denied_behind), exists)


def _up_to_preposition(words: list[str]) -> list[str]:
    """Return the words before the first preposition that follows a content word."""
    for place, word in enumerate(words):
        if word in _PREPOSITIONS and any(one not in _SCAFFOLD for one in words[:place]):
            return words[:place]
    return words


def _claim_of(content: list[str], core: list[str], whole: list[str], denied_behind: int, exists: bool) -> _Claim:
    """Build a claim.

    Args:
        content: The content words of what is claimed.
        core: The words of what is claimed.
        whole: The words of the question.
        denied_behind: The number of denials after what is claimed.
        exists: Whether the claim is that something exists.
    """
    kind: Literal["normal", "deviant", "family", "plain"] = "plain"
    head = content[-1]
    if normal := [word for word in content if word in NORMAL]:
        kind, head = "normal", normal[-1]
    elif deviant := [word for word in content if _DEVIANT.match(stem(word))]:
        kind, head = "deviant", deviant[-1]
    elif not exists and (members := [word for word in content if any(word in family for family in _FAMILIES)]):
        kind, head = "family", members[-1]
    place = core.index(head)
    denied = (sum(word in _DENIALS for word in core[:place]) + denied_behind) % 2 == 1
    heads = [head]
    if "or" in core and exists:
        first = [word for word in core[: core.index("or")] if word in content]
        kind, heads = "plain", [*first[-1:], content[-1]]
    stems = [stem(word) for word in heads]
    keys = {stem(word) for word in content} - set(stems)
    if len(heads) > 1:
        keys -= {stem(word) for word in content}
    value = -1 if denied else 1
    if kind == "normal":
        value *= NORMAL[head]
    if kind == "family":
        stems = [next(family[head] for family in _FAMILIES if head in family)]
        keys -= {stem("weighted")}
    compared = tuple(stem(word) for word in content) if "than" in whole else ()
    return _Claim(
        kind,
        tuple(stems),
        frozenset(keys),
        value,
        denied,
        frozenset(stem(word) for word in whole),
        frozenset(_OTHER_SIDE.keys() & set(whole)) if not {"left", "right"} <= set(whole) else frozenset(),
        compared,
        exists,
        exists and any(word in _PREPOSITIONS for word in core[place + 1 :]),
    )
