"""What several tests share: a home folder, a small random LLaVA, a few rows of each data set; and that none hangs."""

import faulthandler
import io
import multiprocessing
import os
import random
import signal
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path
from threading import Timer

import psutil
import pytest
import pytest_timeout
import yaml
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = {
    "vqarad": [("Is there a mass?", "yes", "closed"), ("What organ is shown?", "the left lung", "open")],
    "slake": [("Is this a CT or an MRI?", "MRI", "closed"), ("Where is the liver?", "upper left", "open")],
    "pathvqa": [("Are nuclei seen?", "no", "closed"), ("What stain is used?", "hematoxylin and eosin", "open")],
}


# --- no test hangs --------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item, settings):
    """A test that has reached its limit loses its child processes first: it may be waiting for one as it unwinds."""
    done = yield
    fail = signal.getsignal(signal.SIGALRM)
    if callable(fail):  # not where somebody asks for pytest-timeout's other method

        def end(number, frame):
            end_children()
            fail(number, frame)

        signal.signal(signal.SIGALRM, end)
    return done


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that has not ended at one and a half times its limit, its fixtures included, ends the whole run.

    Of several workers it ends its own: pytest-xdist counts the test as failed and gives the others to a new worker.
    """
    settings = pytest_timeout._get_item_settings(item)
    if not settings.timeout:
        return (yield)

    def give_up() -> None:
        end_children()
        if hasattr(item.config, "workerinput"):  # a worker of pytest-xdist, whose standard output nobody reads
            item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture(in_=True)
            faulthandler.dump_traceback(file=sys.__stderr__)
        pytest_timeout.timeout_timer(item, settings)  # the stacks of all threads, exit code 1

    timer = Timer(1.5 * settings.timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


def pytest_unconfigure():
    """A thread that a test has left behind does not keep the run alive for more than a minute."""
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)


def end_children() -> None:
    """Kill every process that this one has started, and theirs."""
    for child in psutil.Process().children(recursive=True):
        child.kill()


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture
def chance() -> random.Random:
    """What decides when a test kills. The seed is in the output of a failed test; STLLAVA_TEST_SEED sets it."""
    seed = os.environ.get("STLLAVA_TEST_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"STLLAVA_TEST_SEED={seed}")
    return random.Random(int(seed))


@pytest.fixture
def warm_processes(request):
    """A context of multiprocessing whose processes start at once: forked from one that has imported the test's module.

    Python keeps one such server a process. The server of another module has imported other things, so it ends first.
    """
    forkserver._forkserver._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([request.module.__name__, *getattr(request.module, "PRELOAD", ())])
    first = context.Process(target=int)  # starts the server, so that no kill comes before it is there
    first.start()
    first.join()
    return context


@pytest.fixture
def signals():
    """What Ctrl-C and a closed terminal send, at work as in a terminal, here and in child processes.

    `nohup make test &` starts the tests with both ignored, and children inherit that: what a test sends would never
    arrive.
    """
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGQUIT: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- what they share ------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty $STLLAVA_HOME."""
    folder = tmp_path / "home"
    monkeypatch.setenv("STLLAVA_HOME", str(folder))
    monkeypatch.delenv("STLLAVA_CHECKPOINT", raising=False)
    monkeypatch.delenv("STLLAVA_RUN", raising=False)
    return folder


def shared_folder() -> Path:
    return Path(os.environ.get("STLLAVA_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden values that lies beside the checkout."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"needs the reference data of the team: {folder} is not there (set STLLAVA_SHARED)")
    return folder


def png(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    """A one-coloured PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def prepared(home) -> Path:
    """A home in which each data set has four images with an open and a closed question each, marked as a sample."""
    write_small_sets()
    return home


def write_small_sets(images: int = 4, shade: int = 0) -> None:
    from stllava_eval.data.catalog import DATASETS, Row
    from stllava_eval.data.splits import write_split

    for name, questions in QUESTIONS.items():
        fields = DATASETS[name].categories
        for split in ("train", "test"):
            rows = [
                Row(
                    id=f"{split}-{image}-{number}",
                    image=png((60 * image, 255 - 60 * image, (90 * image + shade) % 256)),
                    image_id=f"{split}-{image}.png",
                    question=question,
                    reference=reference,
                    kind=kind,
                    categories={field: f"{field} {image % 2}" for field in fields},
                )
                for image in range(images)
                for number, (question, reference, kind) in enumerate(questions)
            ]
            write_split(
                name, split, rows, edition="for tests", official=False, sample=True, source="tests", licence="CC0-1.0"
            )


@pytest.fixture
def validation(home):
    """Validation splits of two images with an open and a closed question each."""
    from stllava_eval.data.catalog import DATASETS, Row
    from stllava_eval.data.splits import write_split

    write_small_sets()

    for name in ("vqarad", "slake"):
        rows = [
            Row(
                id=f"validation-{image}-{kind}",
                image=png((200 - 60 * image, 100, 30 + 90 * image)),
                image_id=f"validation-{image}.png",
                question=question,
                reference=reference,
                kind=kind,
                categories=dict.fromkeys(DATASETS[name].categories, ""),
            )
            for image in range(2)
            for kind, question, reference in (("open", "What organ is shown?", "lung"), ("closed", "Is it?", "yes"))
        ]
        write_split(
            name,
            "validation",
            rows,
            edition="for tests",
            official=False,
            sample=True,
            source="tests",
            licence="CC0-1.0",
        )


# of the tiny networks of the tests: 4 patches of 14 px, and a text model whose answers end in some ten tokens
TINY_VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
TINY_TEXT = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random LLaVA whose answers depend on the image and the question and end by themselves."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, seed=0)
    return folder


def write_checkpoint(folder: Path, seed: int) -> None:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = write_tokenizer(folder)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**TINY_VISION),
            text_config=LlamaConfig(vocab_size=len(tokenizer), **TINY_TEXT),
            image_token_id=3,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():  # wide enough that logits differ from row to row
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
        model.lm_head.weight[2] *= 2  # the end token comes up after some ten tokens
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)


def write_tokenizer(folder: Path):
    """A small tokenizer that knows every byte, in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [question for rows in QUESTIONS.values() for row in rows for question in row[:2]]
    text.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    text.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_llama_tokenizer(folder: Path, legacy: bool | None = True) -> None:
    """A tokenizer.model with LLaMA's ids, of the pieces that our texts need; the other ids hold pieces never met."""
    import json

    from transformers.utils import sentencepiece_model_pb2_new as proto

    known = json.loads((Path(__file__).parent / "llama_pieces.json").read_text(encoding="utf-8"))["pieces"]
    model = proto.ModelProto()
    for number in range(32000):
        piece = model.pieces.add()
        if number < 3:
            piece.piece, piece.type = ("<unk>", "<s>", "</s>")[number], 2 if number == 0 else 3
        elif number < 259:
            piece.piece, piece.type = f"<0x{number - 3:02X}>", 6
        else:
            piece.piece, piece.score, piece.type = known.get(str(number), f"never{number}met"), 259 - number, 1
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = True, False
    model.normalizer_spec.escape_whitespaces = True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {"tokenizer_class": "LlamaTokenizer"} | ({} if legacy is None else {"legacy": legacy})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory) -> Path:
    """A folder with the tokenizer.model of LLaMA, as far as our texts go."""
    folder = tmp_path_factory.mktemp("llama")
    write_llama_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizers(llama_tokenizer):
    """LLaMA's tokenizer by `legacy`."""
    from stllava_eval.network.processing import StllavaMedTokenizer, read_pieces

    return {
        legacy: StllavaMedTokenizer.from_pieces(*read_pieces(llama_tokenizer), legacy=legacy)
        for legacy in (True, False)
    }


@pytest.fixture(scope="session")
def processor(tokenizers):
    """Of images of 28 px in patches of 14, with LLaMA's tokenizer."""
    from stllava_eval.network.processing import make_processor

    return make_processor(tokenizers[True], 28, 14)


@pytest.fixture
def browser(tmp_path):
    from browser import CHROMIUM, Browser

    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM} (apt-get install chromium)")
    with Browser(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def recipe_file(request, checkpoint, tmp_path):
    """Write the small recipe of a module's tests, its `SMALL`, with changes; it starts from the small random LLaVA."""

    def write(**changes) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(request.module.SMALL | {"start": str(checkpoint)} | changes))
        return file

    return write
