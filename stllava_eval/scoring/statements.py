"""Decide whether a statement affirms what a yes/no question asks, denies it, or does neither, for `verdict.py`.

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

from stllava_eval.scoring.words import DIGITS, folded, remembered, singular, word_set

# The lists of this module are our choice, made on the development part of tests/hand_read_verdicts.jsonl; what
# tests/independent_read_verdicts.jsonl showed to be missing was added.

NORMAL = dict.fromkeys(word_set("normal normally unremarkable healthy intact clear"), 1) | dict.fromkeys(
    word_set(
        """abnormal abnormality abnormalities unhealthy diseased pathology pathologies pathologic pathological
        wrong anomaly anomalies"""
    ),
    -1,
)
"""Words that call something normal (1) or abnormal (-1)."""

# Deviations of an organ. Each of them contradicts "normal", but they do not contradict each other.
_DEVIANT = re.compile(
    r"enlarg|dilat|widen|swollen|swell|deviat|displac|shift|fractur|thicken|flatten|blunt|atroph|collaps|distend|narrow|"
    r"elevat|increas|decreas|hyperinfl|hypoinfl|obstruct"
)


def _members(text: str) -> dict[str, str]:
    """Each word of a family -> the member that it names: the members are divided by "|", the names by white space."""
    return {word: member.split()[0] for member in text.split("|") for word in member.split()}


_FAMILIES = (
    _members("ct|mri|xray|ultrasound|pet"),
    _members("axial transverse|coronal|sagittal"),
    _members("t1|t2|flair"),
    _members("male man|female woman"),
)
"""An image or a patient has one member of each family, so naming one member denies the others."""

_PROPERTIES = (
    _members("homogeneous homogenous|heterogeneous heterogenous inhomogeneous"),
    _members("welldefined|illdefined"),
    _members("cystic|solid"),
    _members("benign|malignant"),
    _members("hyperdense|hypodense|isodense"),
    _members("hyperintense|hypointense|isointense"),
    _members("unilateral|bilateral"),
    _members("symmetric symmetrical|asymmetric asymmetrical"),
    _members("midline central centered|deviated deviation displaced displacement shifted shift"),
)
"""Of each, a structure has one: to give it another one is to deny the first."""

_NAMING = word_set("is was are be shows appears seems looks")  # "this is a CT" says what it is, "after the CT" does not
_BELOW = word_set("below under underneath beneath")
_OTHER_SIDE = {
    **{"left": word_set("right"), "right": word_set("left"), "upper": word_set("lower"), "lower": word_set("upper")},
    **{"anterior": word_set("posterior"), "posterior": word_set("anterior")},
    **{"inside": word_set("outside"), "outside": word_set("inside")},
    **{"above": _BELOW, **dict.fromkeys(_BELOW, word_set("above"))},
}
# "both" claims something of two; a statement of one denies it or leaves it open
_ONLY = word_set("only just unilateral unilaterally")
_ONE = _ONLY | word_set("left right 1 single")
_EACH = word_set("both bilateral bilaterally each either all")
_DENIALS = word_set("no not none <denied> <lacking> <absent> <excluded>")
_INFERRING = word_set("indicates indicate suggests suggest means shows represents is are was")

_CONCLUDING = word_set("indicates indicating suggests suggesting represents representing reflecting")
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
# What says where in an organ something is; it names no other organ.
_POSITIONS = word_set(
    """left right upper lower middle mid lobe lobes zone zones base bases apex apices region regions side sides quadrant
    field fields segment segments portion part parts area areas level hemisphere xray ct mri ultrasound"""
)
_STATING = (
    _AUXILIARIES | (_SHOWING - {"with"}) | _DENIALS | word_set("appears appear looks look seems seem") | _CONCLUDING
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
        particular x however therefore impression interpretation assessment conclusion"""
    )
)
"""Words without content of their own, which surround a claim in questions and in answers."""

_EDGES = r"(?:circumscribed|defined|demarcated|delineated|marginated)\b"
_SPELLINGS = tuple(
    (tuple(needles.split()), re.compile(pattern), spelling)
    # A pattern matches nothing where none of its needles is in the text: to look for these is much faster.
    for needles, pattern, spelling in (
        (
            "large big",
            r"\b(?:abnormally|unusually|too) (?:large|big)\b|\b(?:larger|bigger) than normal\b",
            " enlarged ",
        ),
        ("ray radiograph cxr", r"\bx[- ]?rays?\b|\bradiographs?\b|\bcxr\b", " xray "),
        ("resonance mr", r"\bmagnetic resonance(?: imaging| images?)?\b|\bmr\b(?: imaging\b)?", " mri "),
        ("tomography cat", r"\bcomputed tomography\b|\bcat scan\b", " ct "),
        (
            "cardiomegaly enlargement",
            r"\bcardiomegaly\b|\bcardiac enlargement\b|\benlargement of the heart\b",
            " enlarged heart ",
        ),
        ("cardiac heart", r"\b(?:cardiac|heart) (?:silhouette|shadow|size)\b|\bcardiac contours?\b", " heart "),
        (
            "lymph",
            r"\b(?:enlarged lymph nodes?|enlargement of (?:the )?lymph nodes|lymphadenopathy)\b",
            " adenopathy ",
        ),
        ("well sharply clearly", rf"\b(?:well|sharply|clearly)[- ]{_EDGES}", " welldefined "),
        ("ill poorly", rf"\b(?:ill|poorly)[- ]{_EDGES}", " illdefined "),
        ("right", r"(?<!the )\bright (?=(?:above|behind|below|beside|in front|next to|under)\b)", ""),  # names no side
        ("clear", r"\bclear of\b", " clear <lacking> "),
        (
            # "clear lungs" are normal, "clear evidence" calls nothing normal
            "clear",
            r"\bclear (?!(?:and|as|at|bilateral\w*|but|chest|except|fields?|for|from|in|lungs?|of|on|or|throughout|to"
            r"|with|without)\b|<)",
            "",
        ),
        ("resolved", r"\b(?:has|have) (?:(?:completely|fully|now|since) )?resolved\b", " <absent> "),
        ("saggital", r"\bsaggital\b", " sagittal "),
        (
            "normal",
            r"\bwithin (?:the )?normal (?:size )?(?:limits|range)\b"
            r"|\b(?:within|at) the (?:upper |lower )?limits? of normal\b",
            " normal ",
        ),
        ("can", r"\bcan ?not\b|\bcan't\b", " can not "),
        ("won't", r"\bwon't\b", " will not "),
        ("'s", r"\b(it|that|there|this|he|she|what)'s\b", r"\1 is"),
        ("n't", r"n't\b", " not "),
        # "no" that denies nothing in the image
        ("no without", r"\b(?:no|without(?: a)?) (?:doubt|question)\b|\bnot only\b", " "),
        ("longer", r"\bno longer\b(?! than)", " not "),
        ("nor", r"\b(neither|not|no|never)\b(.*?)\bnor\b", r"\1\2or"),
        ("never", r"\bnever\b", " not "),
        # denials that stand before what they deny, and such as stand behind it
        (
            "free absence lack devoid without",
            r"\b(?:free of|free from|absence of|lack of|lacking|devoid of|without)\b",
            " <lacking> ",
        ),
        (
            "than instead opposed inconsistent doubt against rul exclud lack negative fail nor neither nothing non",
            r"\b(?:rather than|instead of|as opposed to|inconsistent with|doubt|(?:argues?|speaks?|evidence) against"
            r"|ruling out|excluding|lacks|negative for|fails? to|failed to|rules? out|excludes?|neither|nor|nothing"
            r"|non(?=[- ]))\b",
            " <denied> ",
        ),
        ("excluded ruled", r"\b(?:excluded|ruled out)\b", " <excluded> "),
        (
            "absent negative unlikely nowhere missing invisible removed resected",
            r"\b(?:absent|negative|unlikely|nowhere|missing|invisible|removed|resected)\b",
            " <absent> ",
        ),
    )
)
_OPEN = re.compile(
    r"\b(?:hardly|barely|scarcely|far from|anything but|doubtful|more likely .*than|"
    r"may|might|could be|could have|possibl[ey]|possibility|maybe|perhaps|suspect(?:ed|s)?|suspicio(?:n|us)|"
    r"unclear|uncertain|unsure|equivocal|indeterminate|questionable|whether|if|difficult|hard to|too \w+ to|resolved|"
    r"presence or absence|not (?:\w+ )?(?:sure|certain|clear (?:whether|if))|concern for|concerning for|should|"
    r"please|would)\b"
    r"|\b(?:not|never) (?:be(?:en)? )?(?:<excluded>|rule out|<denied>|confirmed|determined|assessed|evaluated|"
    r"answered)"
    r"|(?:\bnot|<denied>|\bno) (?:\w+ )?(?:determine|tell|exclude|rule|assess|evaluate|confirm|say|know|way|"
    r"information|ability|answer|conclusion|diagnosis|verdict)\b"
)
"""Expressions that leave the matter open."""
# The pieces of a text: marks of `spelled` such as <absent>, and words with their apostrophes.
_WORD = re.compile(r"<\w+>|[^\W_][^\W_]*(?:'[^\W_]+)?")


@dataclass(frozen=True)
class _Claim:
    """The claim of a question.

    Args:
        kind: Which words answer it: those of normal and abnormal, those of a deviation, members of a family, others.
        property: The word of the head.
        heads: What is said to be there or to be so, as stems; two where the question joins them by "or".
        keys: The stems of what it is said of.
        value: 1, or -1 where the claim is denied or calls something abnormal (and 1 where both).
        denied: The question itself denies, as "Is there no effusion?" does.
        known: The stems of all words of the question.
        sides: Left or right, upper or lower, above or below, ..., if the question names one of two.
        both: It is said of both of two.
        compared: The claim's stems in their order, of a comparison with "than".
        exists: It is said to be there ("Is there ...?"), not to be so ("Is it ...?").
        placed: The question says where.
    """

    kind: Literal["normal", "deviant", "family", "plain"]
    property: str
    heads: tuple[str, ...]
    keys: frozenset[str]
    value: int
    denied: bool
    known: frozenset[str]
    sides: frozenset[str]
    both: bool
    compared: tuple[str, ...]
    exists: bool
    placed: bool


@remembered
def spelled(text: str) -> str:
    """Fold a text, and give modalities, contractions and denials one spelling each."""
    text = folded(text)
    for needles, pattern, spelling in _SPELLINGS:
        for needle in needles:
            if needle in text:
                text = pattern.sub(spelling, text)
                break
    return " ".join(text.split())


@remembered
def stem(word: str) -> str:
    """Remove the endings in which a noun, its plural, its adjective and its participle differ.

    At least four letters are kept. Our choice, for this module only: "fractures" and "fractured" mean the same here.

    >>> [stem(word) for word in ("calcifications", "calcified", "masses", "lesion")]
    ['calc', 'calc', 'mass', 'lesion']
    """
    return _DOUBLED.sub(r"\1", _ENDING.sub("", singular(word)))


# Endings that a stem loses, if four letters or more are left. Our choice: a short list instead of Porter's rules.
_ENDING = re.compile(
    r"(?<=\w{4})(?:ification|ified|ation|ating|ated|ement|ment|ening|ened|ion|ing|ied|ity|ed|ly|er|al|ic|a|e|y)$"
)
_DOUBLED = re.compile(r"([bdgmnprt])\1$")  # "flatt" of "flattened" is "flat"


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
    said = _read(words, stems, claim)
    if said and claim.both and _EACH.isdisjoint(words) and not _ONE.isdisjoint(words):
        return None if _ONLY.isdisjoint(words) else False  # one of both affirms nothing, and "only" one denies it
    return said


def _read(words: Sequence[str], stems: Sequence[str], claim: _Claim) -> bool | None:
    if claim.kind == "family":
        return _of_family(words, claim)
    if claim.kind == "normal":
        value = _normality(words, stems, claim)
        return None if value is None else value == claim.value
    said = _of_heads(words, stems, claim)
    if said is None and claim.kind == "deviant" and claim.value > 0 and _normality(words, stems, claim) == 1:
        return False  # what is normal is not enlarged, dilated or fractured
    return _of_contrary(words, stems, claim) if said is None else said


def _states(words: Sequence[str], claim: _Claim) -> bool:
    """Return whether this is a statement: it has a verb or a denial, or only words of the question.

    A long list of words is not a statement, even if "is" is among them.
    """
    if _STATING.isdisjoint(words):
        return _plain_before(words, claim, len(words)) or _names_one(words, claim)
    return sum(word not in _SCAFFOLD and stem(word) not in claim.known for word in words) <= _LONGEST


def _names_one(words: Sequence[str], claim: _Claim) -> bool:
    """Return whether it is a bare label: "MRI" of the question's family, or "Normal chest X-ray"."""
    if claim.kind == "family":
        family = next(members for members in _FAMILIES if claim.heads[0] in members.values())
        return len({family.get(word) for word in words if word not in _SCAFFOLD}) == 1 and words[0] in family
    return claim.kind == "normal" and words[0] in NORMAL and words[-1] in _IMAGED and len(words) <= _LABEL


_IMAGED = (
    word_set("image picture scan film study photo view examination")
    | word_set("chest thorax brain abdomen pelvis cardiopulmonary intracranial")  # what such an image is of
    | _FAMILIES[0].keys()
)
_LABEL = 4  # words of a label that are read as one (our choice): "Normal frontal chest radiograph"
_LONGEST = 12  # words of its own in a clause that is read (our choice): sentences of models have fewer


def denies_in_its_claim(question: str) -> bool:
    """Return whether the question's claim is a denial, as in "Is there no effusion?" or "Is the spleen absent?"."""
    if not _DENYING.search(folded(question)):
        return False
    claim = _claim(question)
    return claim is not None and claim.denied


# Words that deny something, in a question.
_DENYING = re.compile(
    r"\bno|n't\b|\bwithout\b|\babsent\b|\bmissing\b|\bfree\b|\black|\bnever\b|\bexclude|\binvisible\b"
)


def _of_heads(words: Sequence[str], stems: Sequence[str], claim: _Claim) -> bool | None:
    """Return whether the clause affirms or denies the claim's head; None if it does not speak of it."""
    indices = [stems.index(head) for head in claim.heads if head in stems]
    if not indices or not _about(words, stems, claim, indices[0]):
        return None
    said = {_polarity(words, index) for index in indices}
    if len(said) > 1:
        return None
    agrees = said.pop() == claim.value
    affirmed = agrees == (claim.value > 0)
    if not affirmed and len(indices) < len(claim.heads):
        return None  # it denies only one of "a fracture or dislocation"
    return agrees


def _normality(words: Sequence[str], stems: Sequence[str], claim: _Claim) -> int | None:
    """Return 1 if the clause calls the claim's subject normal, -1 if it calls it abnormal, else None."""
    for index, word in enumerate(words):
        sign = NORMAL.get(word)
        if sign is None and claim.kind == "normal" and _DEVIANT.match(word) and stems[index] not in claim.known:
            if _polarity(words, index) < 0:
                return None  # an organ that is not enlarged may be abnormal in another way
            sign = -1
        if sign is None:
            continue
        value = sign * _polarity(words, index)
        whole = claim.kind == "normal" and not claim.keys
        if whole and value < 0:
            return value  # a part that is abnormal makes the image abnormal
        if whole and _IMAGED.isdisjoint(words) and not _plain_before(words, claim, index):
            return None  # what one organ is, the image need not be
        return value if _about(words, stems, claim, len(words) if whole else index) else None
    return None


def _of_family(words: Sequence[str], claim: _Claim) -> bool | None:
    """Return whether the clause affirms or denies the claim's member of a family; naming another member denies it.

    None if the clause names no member of the image or patient that the question asks about.
    """
    (head,) = claim.heads
    family = next(members for members in _FAMILIES if head in members.values())
    members = [(index, family[word]) for index, word in enumerate(words) if word in family]
    if not members:
        return None
    own = [index for index, member in members if member == head]
    index = own[0] if own else members[0][0]
    named = index < 2 or not _NAMING.isdisjoint(words[:index])
    plain = _plain_before(words, claim, index)
    if own and (named or plain) and (plain or claim.keys <= {stem(word) for word in words}):
        return (_polarity(words, index) > 0) == (claim.value > 0)
    if not own and named and _polarity(words, index) > 0:
        return claim.value < 0
    return None


def _of_contrary(words: Sequence[str], stems: Sequence[str], claim: _Claim) -> bool | None:
    """Return False if the clause gives the subject another property of the claim's family, True if the same one.

    A claim that is itself a denial reverses this. None if the clause names no property of the family.
    """
    family = next((members for members in _PROPERTIES if claim.property in members), None)
    if family is None:
        return None
    own = family[claim.property]
    for index, word in enumerate(words):
        same = family.get(word) == own
        if word in family and (same or stems[index] not in claim.known) and _about(words, stems, claim, index):
            affirmed = _polarity(words, index) > 0
            return (same == affirmed) == (claim.value > 0) if same or affirmed else None
    return None


def _compared(stems: Sequence[str], claim: _Claim) -> bool | None:
    """Return whether the clause affirms or denies a comparison: the claim's words in another order deny it.

    A denial in the clause reverses this. None if the clause does not have exactly the claim's words.
    """
    said = tuple(word for word in stems if word in set(claim.compared))
    if sorted(said) != sorted(claim.compared):
        return None
    return (said == claim.compared) == (not _DENIALS & set(stems))


def _about(words: Sequence[str], stems: Sequence[str], claim: _Claim, index: int) -> bool:
    """Return whether the word at `index` is said of the thing that the question asks about.

    The clause has all words of that thing, or no content words before `index` that are not in the question. So a
    "pericardial effusion" does not answer for a "pleural effusion", nor "the ureter is dilated" for the bowel. A clause
    that names another place than the question does not answer it either.
    """
    complete = claim.keys <= set(stems)
    if claim.exists and _DEFINED.match(" ".join(words[index + 1 :])):
        return False
    if claim.placed or not complete:
        at = next((at for at, word in enumerate(words) if at > index and word in _PLACING), None)
        where = [stem(word) for word in words[at:] if word not in _SCAFFOLD | _POSITIONS] if at is not None else []
        if where and not claim.known & set(where):
            return False
    return complete or _plain_before(words, claim, index)


# How a definition goes on: it says what a finding is, and not that the image shows it.
_DEFINED = re.compile(r"(?:is|are) (?:an?|the|defined|known|called|caused|when|usually|often|typically)\b")


def _plain_before(words: Sequence[str], claim: _Claim, index: int) -> bool:
    """Return whether no content word before `index` is missing from the question."""
    before = list(words[:index])
    if claim.exists and claim.kind != "normal":
        # what shows it does not belong to it: "the lungs show an effusion"
        start = max(
            (at for at, word in enumerate(before) if word in _SHOWING | _CONCLUDING or word.startswith("<")), default=-1
        )
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
    """Return whether the clause speaks of the other side alone."""
    said = set(words)
    return not claim.compared and any(
        side in claim.sides and not other.isdisjoint(said) and side not in said for side, other in _OTHER_SIDE.items()
    )


_GOES_ON = word_set("and as which that who since when with")  # the words after these no longer concern the head


def _polarity(words: Sequence[str], index: int) -> int:
    """Return 1 if the word at `index` is affirmed, and -1 if it is denied; two denials cancel out."""
    denials = 0
    for at, word in enumerate(words[:index]):
        # "the absence of lung markings indicates ..." denies only the markings
        ended = word == "<lacking>" and not _INFERRING.isdisjoint(words[at:index])
        denials += word in _DENIALS and not ended
    after = list(takewhile(lambda word: word not in _GOES_ON, words[index + 1 :]))
    for at, word in enumerate(after):
        behind = word in ("not", "none") and (at == 0 or after[at - 1] in _AUXILIARIES)
        denials += behind or word in ("<absent>", "<excluded>")
    return -1 if denials % 2 else 1


# The end of a question that names its image or patient and adds nothing: "in this image", "of the patient".
_TAIL = re.compile(
    r"\b(?:in|on|of|from|by|at|within|for) (?:this|the|that|these|shown|given|above)(?: [\w-]+)? "
    r"(?:images?|pictures?|scans?|films?|study|xray|ct|mri|slice|view|photo|case|patient|body|modality)\b"
)
# Questions for existence, with what is asked for: "Is there ...?", "Evidence of ...?"
_EXISTS = re.compile(r"(?:is|are|was|were) there (?P<what>.*)|evidence of (?P<noun>.*)")
# Questions whether an image or patient shows something, or whether one can see it.
_SHOWS = re.compile(
    r"(?:does|do|did|has|have) (?P<who>.+?) (?:show|have|contain|demonstrate|reveal|include|exhibit|depict|display|"
    r"indicate|suggest|represent|receive) (?P<what>.*)"
    r"|(?:do|can|could) (?:you|we|i|one) (?:see|identify|find|observe|detect) (?P<seen>.*)"
)
# Questions whether something is present, visible, seen and the like.
_IS_SEEN = re.compile(
    r"(?:is|are|was|were|can|could|has|have) (?P<what>.+?) (?:be |been )?(?:clearly )?(?:present|visible|seen|"
    r"visuali[sz]ed|evident|identifiable|noted|detected|shown|found|observed|identified|apparent|<absent>)(?!\w)(?P<rest>.*)"
)
# Words before a finding that add nothing to it: "any evidence of", "clear signs of".
_EVIDENCE = re.compile(
    r"^(?:any |an? |the |some |clear |visible )*(?:evidence|signs?|indications?|presence) (?:of|for) "
)


# A question with "not" behind its verb: "Isn't it enlarged?"
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
    if match := _EXISTS.fullmatch(text) or _SHOWS.fullmatch(text):
        core = next(group for name, group in match.groupdict().items() if group is not None and name != "who")
        before = text[: match.start("who")] if "who" in match.groupdict() and match["who"] else ""
        denied_behind = before.count(" not ")
    elif match := _IS_SEEN.fullmatch(text):
        core = match["what"]
        denied_behind = "<absent>" in text[match.end("what") :]
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
    for index, word in enumerate(words):
        if word in _PREPOSITIONS and any(earlier not in _SCAFFOLD for earlier in words[:index]):
            return words[:index]
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
    elif deviant := [word for word in content if _DEVIANT.match(word)]:
        kind, head = "deviant", deviant[-1]
    elif not exists and (members := [word for word in content if any(word in family for family in _FAMILIES)]):
        kind, head = "family", members[-1]
    index = core.index(head)
    denied = (sum(word in _DENIALS for word in core[:index]) + denied_behind) % 2 == 1
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
        head,
        tuple(stems),
        frozenset(keys),
        value,
        denied,
        frozenset(stem(word) for word in whole),
        frozenset(side for side, other in _OTHER_SIDE.items() if side in whole and other.isdisjoint(whole)),
        "both" in whole,
        compared,
        exists,
        exists and any(word in _PREPOSITIONS for word in core[index + 1 :]),
    )
