import hashlib
import io
import itertools
import socket
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from stllava_eval.data.sample import concepts, image_files, pictures, questions
from stllava_eval.data.sample.pictures import REGIONS, SETS, SLABS, SPLITS
from stllava_eval.data.sample.questions import all_questions, sample_facts, sample_rows, true_answers
from stllava_eval.errors import InputError
from stllava_eval.scoring.words import folded_words

FIELDS = {
    "vqarad": {"organ", "question_type", "phrase_type", "origin"},
    "slake": {"modality", "location", "content_type", "base_type", "language", "origin"},
    "pathvqa": {"question_type", "origin"},
}


@pytest.fixture(scope="module")
def rows():
    """{(set, split): rows} of all nine."""
    return {(name, split): sample_rows(name, split) for name in SETS for split in SPLITS}


def concept(row) -> str:
    return row.categories.get("content_type") or row.categories["question_type"]


def pixels(row) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row.image)).convert("RGB")).astype(int)


def source(row) -> str:
    return row.image_id.split("-", 5)[5]


def fingerprint(some) -> list[tuple]:
    return [(r.id, r.image_id, r.question, r.reference, r.kind, hashlib.sha256(r.image).hexdigest()) for r in some]


@pytest.mark.parametrize("name", SETS)
def test_a_second_call_returns_the_same_bytes(rows, name):
    for split in SPLITS:
        assert fingerprint(sample_rows(name, split)) == fingerprint(rows[name, split])


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_the_shape_of_its_original(rows, name):
    for split in SPLITS:
        some = rows[name, split]
        assert [r.id for r in some] == [f"{name}-sample-{split}-{number:04d}" for number in range(len(some))]
        for row in some:
            assert set(row.categories) == FIELDS[name]
            assert all(row.categories.values())
            assert row.kind == "closed" if row.reference in ("yes", "no") else row.kind in ("open", "closed")
            assert row.question.endswith("?")
            assert row.reference
        by_image = defaultdict(set)
        for row in some:
            by_image[row.image_id].add(row.image)
        assert all(len(images) == 1 for images in by_image.values())


def test_the_sets_are_as_large_as_the_study_that_they_follow(rows):
    images = {split: sum(len({r.image_id for r in rows[name, split]}) for name in SETS) for split in SPLITS}
    assert images["train"] > 1200
    assert images["validation"] > 180
    test = Counter(r.categories["origin"] for name in SETS for r in rows[name, "test"])
    assert test["held-out region"] > 1200
    assert test["unseen volume"] > 300


@pytest.mark.parametrize("name", SETS)
def test_the_facts_of_an_image_answer_its_rows_and_more(rows, name):
    facts = sample_facts(name, "validation")
    assert {row.image_id for row in rows[name, "validation"]} <= set(facts)
    for row in rows[name, "validation"]:
        answers = true_answers(name, facts[row.image_id])
        assert answers[row.question] == row.reference, row
        assert set(answers) <= all_questions(name)
        assert len(answers) > 12
    for split in SPLITS:
        assert {row.question for row in rows[name, split]} <= all_questions(name)


def test_true_answers_leave_out_what_is_in_doubt_or_not_there():
    answers = true_answers("vqarad", {"organ": "heart", "cross": "yes"})
    assert answers["Which body part is this?"] == "heart"
    assert (answers["Do we see the heart?"], answers["Do we see the leg?"]) == ("yes", "no")
    assert "Do we see the chest?" not in answers  # a heart lies in it
    assert answers["Is there a red cross?"] == "yes"
    assert not any("bar" in question or "plane" in question for question in answers)


def test_words_of_a_question_mean_one_thing():
    for name in SETS:
        meanings = defaultdict(set)
        for asked in questions._concepts(name):
            for question, value in questions._texts(asked):
                meanings[folded_words(question)].add((asked.name, value))
        assert {len(of) for of in meanings.values()} == {1}


def test_a_closed_question_is_yes_or_no_unless_it_names_its_options(rows):
    for row in itertools.chain.from_iterable(rows.values()):
        if row.kind == "closed" and row.reference not in ("yes", "no"):
            assert row.reference in row.question, row


def test_yes_and_no_are_right_equally_often_for_every_concept_split_and_origin(rows):
    for (name, split), some in rows.items():
        counts = Counter(
            (r.categories["origin"], concept(r), r.reference) for r in some if r.reference in ("yes", "no")
        )
        for origin, asked, _ in counts:
            assert counts[origin, asked, "yes"] == counts[origin, asked, "no"], (name, split, origin, asked)


@pytest.mark.parametrize("value", ["an MRI", "a CT scan", "an X-ray", "an ultrasound image", "a bone scan"])
def test_the_value_that_a_question_names_does_not_give_the_answer_away(rows, value):
    """In training "Is this an MRI?" would otherwise be yes more often than not: most images are MRI."""
    for name in ("vqarad", "slake"):
        answers = Counter(r.reference for r in rows[name, "train"] if value in r.question)
        assert answers["yes"] == answers["no"] > 0


def test_no_image_is_shared_between_splits(rows):
    seen = defaultdict(set)
    for (_, split), some in rows.items():
        for image in {r.image for r in some}:
            seen[hashlib.sha256(np.ascontiguousarray(Image.open(io.BytesIO(image)).convert("RGB"))).hexdigest()].add(
                split
            )
    assert {len(splits) for splits in seen.values()} == {1}


def test_the_radiology_sets_show_different_images(rows):
    files = {name: {r.image for split in SPLITS for r in rows[name, split]} for name in ("vqarad", "slake")}
    assert not files["vqarad"] & files["slake"]


def test_regions_of_a_single_image_lie_apart():
    for one, other in itertools.combinations(REGIONS.values(), 2):
        gaps = [max(other[axis] - one[axis + 1], one[axis] - other[axis + 1]) for axis in (0, 2)]
        assert max(gaps) == pytest.approx(0.04)


def test_a_cut_out_stays_in_its_region():
    # a picture whose brightness is its column: the region test is the columns from 54 % on
    ramp = np.repeat(np.arange(50, 250, dtype=np.uint8)[None], 200, axis=0)
    some = image_files.Source("ramp", lambda: (ramp, {}), {}, (0.1, 0.9))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert pictures._cut(some, REGIONS["train"], rng).pixels.max() < 165  # 150 after a gamma of 0.8
        assert pictures._cut(some, REGIONS["test"], rng).pixels.min() > 135  # 158 after a gamma of 1.25


def test_slabs_of_a_volume_lie_at_least_three_millimetres_apart():
    places = {split: [d for d in range(-90, 90) if pictures.slab(d) == split] for split in SPLITS}
    assert all(places.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert min(abs(a - b) for a in places[one] for b in places[other]) > 3
    assert set(SLABS) == set(SPLITS)


def test_the_symmetric_template_is_cut_on_one_side_only():
    """Its left and right halves are mirror images: a slice and its twin on the other side would leak."""
    middle = pictures._middle()[0]
    cuts = {split: [cut for cut in pictures._template_slices(split) if cut[1] == "sagittal"] for split in SPLITS}
    assert all(cuts.values())
    assert all(voxel >= middle for some in cuts.values() for _, _, voxel in some)


def test_unseen_sources_are_in_no_other_split_and_no_other_origin(rows):
    unseen = {source(r) for some in rows.values() for r in some if r.categories["origin"] == "unseen volume"}
    seen = {source(r) for some in rows.values() for r in some if r.categories["origin"] != "unseen volume"}
    assert unseen
    assert not unseen & seen
    for (_, split), some in rows.items():
        origins = {r.categories["origin"] for r in some}
        assert origins == ({"held-out region", "unseen volume"} if split == "test" else {f"{questions.ORIGINS[split]}"})


def test_training_never_shows_the_whole_of_an_image_that_the_test_split_cuts_from(rows):
    whole = {s.name for s in (*image_files.RADIOLOGY_SOURCES, *image_files.PATHOLOGY_SOURCES) if s.whole}
    later = {source(r) for (_, split), some in rows.items() if split != "train" for r in some}
    assert whole
    assert not whole & later


def test_new_wordings_are_never_trained_and_say_so(rows):
    def shape(row) -> str:
        """The question less the value that it names."""
        values = {
            v for c in (*concepts.RADIOLOGY, *concepts.PATHOLOGY) if c.name == concept(row) for v in c.values.values()
        }
        for value in sorted(values - {""}, key=len, reverse=True):
            row_question = row.question.replace(value, "{}")
            if row_question != row.question:
                return row_question
        return row.question

    trained = {(concept(r), shape(r)) for name in ("vqarad", "slake") for r in rows[name, "train"]}
    phrases = Counter()
    for row in rows["vqarad", "test"]:
        is_new = (concept(row), shape(row)) not in trained
        assert row.categories["phrase_type"] == ("test_para" if is_new else "test_freeform"), row.question
        phrases[row.categories["phrase_type"]] += 1
    assert 0.25 < phrases["test_para"] / phrases.total() < 0.45
    assert {r.categories["phrase_type"] for r in rows["vqarad", "train"]} == {"freeform"}


# --- truths, read once more by other means ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "file", "tags", "modality", "organ"),
    [
        ("data_store", "data/RG1_UNCR.dcm", {"Modality": "CR", "BodyPartExamined": "CHEST"}, "X-ray", "chest"),
        ("data_store", "data/RG3_UNCR.dcm", {"Modality": "CR", "BodyPartExamined": "EXTREMITY"}, "X-ray", "leg"),
        ("data_store", "data/JPEG2000_UNC.dcm", {"StudyDescription": "Whole Body Bone"}, "bone scan", "whole body"),
        ("data_store", "data/MR2_UNCR.dcm", {"Modality": "MR", "StudyDescription": "SHOULDER"}, "MRI", "shoulder"),
        ("data_store", "data/693_UNCR.dcm", {"Modality": "CT", "PatientID": "CQ500-CT-310"}, "CT", "head"),
        (
            "data_store",
            "data/color-pl.dcm",
            {"Modality": "US", "StudyDescription": "Echocardiogram"},
            "ultrasound",
            "heart",
        ),
        ("data_store", "data/explicit_VR-UN.dcm", {"Modality": "CT", "BodyPartExamined": "PANCREAS"}, "CT", "abdomen"),
        (
            "pydicom",
            "data/test_files/J2K_pixelrep_mismatch.dcm",
            {"Modality": "CT", "BodyPartExamined": "HEAD"},
            "CT",
            "head",
        ),
    ],
)
def test_facts_of_a_dicom_image_are_those_of_its_tags(package, file, tags, modality, organ):
    import pydicom

    dataset = pydicom.dcmread(image_files.package_file(package, file), stop_before_pixels=True)
    assert {tag: str(dataset.get(tag)) for tag in tags} == tags
    [found] = [
        s for s in (*image_files.RADIOLOGY_SOURCES, *image_files.UNSEEN_RADIOLOGY) if s.read.args == (package, file)
    ]
    assert (found.facts["modality"], found.facts["organ"]) == (modality, organ)
    if found.facts.get("plane") == "axial":
        across, down = np.array(dataset.ImageOrientationPatient, dtype=float).reshape(2, 3)
        assert abs(np.cross(across, down)[2]) > 0.9


def test_a_monochrome1_image_is_shown_with_bone_bright():
    """The corner beside the shin is air: the brightest stored values, and black in a viewer."""
    shown, _ = image_files._dicom("data_store", "data/RG3_UNCR.dcm")
    height, width = shown.shape
    air, shin = shown[height // 4, round(0.37 * width)], shown[height // 4, round(0.48 * width)]
    assert shin > air + 50


def test_a_scan_whose_rows_run_from_back_to_front_is_turned_face_up():
    import pydicom

    dataset = pydicom.dcmread(image_files.package_file("data_store", "data/explicit_VR-UN.dcm"))
    assert [float(v) for v in dataset.ImageOrientationPatient] == [1, 0, 0, 0, -1, 0]
    hounsfield = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    shown, _ = image_files._dicom("data_store", "data/explicit_VR-UN.dcm", window=(40, 400))
    # soft tissue of 40 HU is the middle of the window
    assert shown[np.abs(hounsfield[::-1] - 40) < 1].mean() == pytest.approx(127.5, abs=1)


def test_slices_are_shown_head_or_face_up_and_sagittal_ones_face_right():
    # axes: right, front, up; bright at the front (nose) and brighter at the top
    volume = np.zeros((3, 3, 3))
    volume[:, 2, :] = 1
    volume[:, :, 2] += 2
    assert pictures._upright(volume, "axial", 1).tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert pictures._upright(volume, "coronal", 1).tolist() == [[2, 2, 2], [0, 0, 0], [0, 0, 0]]
    assert pictures._upright(volume, "sagittal", 1).tolist() == [[2, 2, 3], [0, 0, 1], [0, 0, 1]]
    volume = np.zeros((3, 3, 3))
    volume[2] = 1  # the patient's right is on the viewer's left
    assert pictures._upright(volume, "axial", 1)[0].tolist() == [1, 0, 0]


def test_affines_lead_to_right_front_up():
    import nibabel

    file = image_files.package_file("nibabel", "tests/data/example4d.nii.gz")
    image = nibabel.load(file)
    assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
    volume, size = pictures._canonical(file)
    assert (volume == np.asarray(image.dataobj)[::-1, :, :, 0]).all()
    assert size == pytest.approx((2.0, 2.0, 2.2), abs=0.01)


def test_the_level_of_an_axial_slice_is_its_height_in_the_brain():
    brain = pictures._template("t1") > 0
    heights = np.nonzero(brain.any(axis=(0, 1)))[0]
    middle = (heights[0] + heights[-1]) / 2
    for voxel, level in [(int(middle) + 30, "upper"), (int(middle) - 30, "lower"), (int(middle), None)]:
        picture = pictures._template_picture("t1", "axial", voxel, np.random.default_rng(0))
        assert picture.facts.get("level") == level
        assert picture.facts["plane"] == "axial"


def test_a_bar_is_where_the_answer_says_and_a_cross_where_it_says_yes(rows):
    seen = Counter()
    for row in itertools.chain(rows["slake", "test"], rows["vqarad", "test"]):
        if concept(row) == "covered side" and row.kind == "open":
            red, green, blue = np.moveaxis(pixels(row), 2, 0)
            bar = (abs(blue - 255) < 50) & (abs(green - 90) < 50) & (red < 60)
            strips = {"left": bar[:, :20], "right": bar[:, -20:], "top": bar[:20], "bottom": bar[-20:]}
            assert max(strips, key=lambda side: strips[side].mean()) == row.reference
            seen[row.reference] += 1
        if concept(row) == "cross":
            red, green, blue = np.moveaxis(pixels(row), 2, 0)
            lines = (red - np.maximum(green, blue)) > 90
            has_lines = lines.mean(axis=0).max() > 0.5 and lines.mean(axis=1).max() > 0.5
            assert has_lines == (row.reference == "yes"), row.image_id
            seen["cross"] += 1
    assert all(seen[key] > 3 for key in ("left", "right", "top", "bottom", "cross"))


def test_brown_is_found_on_the_side_where_it_is():
    brown, white = (150, 90, 40), (245, 245, 245)
    tile = np.empty((40, 40, 3), np.uint8)
    tile[:, :20], tile[:, 20:] = brown, white
    assert image_files._brown_side(tile, {}) == {"brown side": "left"}
    assert image_files._brown_side(tile[:, ::-1], {}) == {"brown side": "right"}
    tile[:] = brown
    assert image_files._brown_side(tile, {}) == {}


def test_nuclei_are_counted_on_the_annotated_mask():
    mask = image_files._nuclei()[1]["nuclei"]
    assert len(np.unique(mask)) - 1 == 125
    assert image_files._count(mask, {"nuclei": mask}) == {"nuclei": "over 14"}
    number = np.unique(mask)[40]
    ys, xs = np.nonzero(mask == number)
    one = np.where(mask == number, mask, 0)
    assert image_files._count(one, {"nuclei": one}) == {"nuclei": "up to 5"}
    # cut through its middle it is half visible, which counts as one or as none: the same range
    half = one[: int(np.median(ys)), xs.min() : xs.max() + 1]
    assert image_files._count(half, {"nuclei": half}) == {"nuclei": "up to 5"}
    # of six whole nuclei one cut in half leaves the range in doubt, so nothing is asked
    six = np.isin(mask, [n for n in np.unique(mask)[1:] if not _touches_border(mask == n)][:6])
    part = np.where(six, mask, 0)
    last = np.nonzero(part.any(axis=1))[0][-1]
    lowest = part[last].max()
    rows_of_lowest = np.nonzero((part == lowest).any(axis=1))[0]
    cut = part.copy()
    cut[int(np.median(rows_of_lowest)) :][part[int(np.median(rows_of_lowest)) :] == lowest] = 0
    assert image_files._count(part, {"nuclei": part}) == {"nuclei": "6 to 14"}
    assert image_files._count(cut, {"nuclei": cut}) == {}


def _touches_border(shape: np.ndarray) -> bool:
    return bool(shape[0].any() or shape[-1].any() or shape[:, 0].any() or shape[:, -1].any())


def test_the_edge_of_the_fundus_field_is_asked_only_where_it_is_clear():
    inside, edge, hint = np.full((10, 10), 255), np.full((10, 10), 255), np.full((10, 10), 255)
    edge[:5], hint[0, :2] = 0, 0
    assert image_files._field_edge(inside, {"field": inside}) == {"field edge": "no"}
    assert image_files._field_edge(edge, {"field": edge}) == {"field edge": "yes"}
    assert image_files._field_edge(hint, {"field": hint}) == {}


def test_no_is_never_said_of_a_part_that_may_be_in_the_picture():
    assert not questions._excludes(concepts.ORGAN, "whole body", "head")
    assert not questions._excludes(concepts.ORGAN, "heart", "chest")
    assert questions._excludes(concepts.ORGAN, "leg", "head")


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*_):
        raise AssertionError("the sample sets reached for the network")

    for cached in (
        pictures._template,
        image_files._dicom,
        image_files._photograph,
        image_files._fundus,
        image_files._nuclei,
    ):
        cached.cache_clear()
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in SETS:
        assert sample_rows(name, "validation")


def test_an_unknown_set_or_split_is_named():
    with pytest.raises(InputError, match=r"set 'rad'.*unknown.*vqarad, slake, pathvqa"):
        sample_rows("rad", "test")
    with pytest.raises(InputError, match=r"split 'dev'.*unknown.*train, validation, test"):
        sample_rows("slake", "dev")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(image_files, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"scikit-image.*not installed.*pip install.*\[sample\]"):
        image_files.package_file("skimage", "data/ihc.png")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no-such\.png.*scikit-image.*constraints\.txt"):
        image_files.package_file("skimage", "data/no-such.png")
