"""The page of models: every row's family, arguments and word about sharing, at tiny size."""

import re
from functools import partial

import pytest
from conftest import ROOT
from families import SHARED, UNSHARED, write_family
from loguru import logger
from PIL import Image

from stllava_eval.inference.generic import ASKING_INSTRUCTION
from stllava_eval.inference.open import open_answerer
from stllava_eval.inference.types import Question
from stllava_eval.lmms.model_args import ASKING, CHECKPOINT

PAGE = (ROOT / "docs" / "evaluate" / "models.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| `") and line.count("|") == 7 and "family" not in line
]


def test_the_page_names_every_family_that_is_tested():
    assert {row[1] for row in ROWS} == SHARED.keys() | UNSHARED.keys()
    assert " ".join(PAGE.split()).count(ASKING_INSTRUCTION) == 1


@pytest.mark.parametrize("family", SHARED | UNSHARED)
def test_every_command_of_the_page_runs_and_images_are_shared_where_it_says_so(family, tmp_path):
    folder = str(write_family(family, tmp_path / family))
    for _, of_row, shared, more, *_ in (row for row in ROWS if row[1] == family):
        given = dict(re.findall(r"(\w+)=(\w+)", more))
        assert given.keys() <= {*ASKING, *CHECKPOINT}
        given.pop("enable_thinking", None)  # the tiny template has no switch; test_generic.py has one that does
        limit = min(int(given.pop("max_new_tokens", 6)), 6)
        said: list[str] = []
        sink = logger.add(said.append, format="{message}")
        answerer = open_answerer(folder, **{name: int(value) for name, value in given.items()})
        image = partial(Image.new, "RGB", (64, 48), "red")
        asked = [Question(text, image, limit, image_key=0) for text in ("Is there a mass?", "Why?")]
        assert sorted(dict(answerer.answer(asked, progress=False))) == [0, 1]
        logger.remove(sink)
        assert ("plain batches" in "".join(said)) == (shared == "no"), of_row
