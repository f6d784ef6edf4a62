"""configs/accelerate: what accelerate reads of them. Nothing is launched: that takes GPUs."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT

from stllava_train.training.recipes import read_recipe

FOLDER = ROOT / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


def launch_line(file: Path) -> list[str]:
    """The words of the line that stands in the file's head."""
    text = "\n".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
    found = re.search(r"^accelerate launch (?:.*\\\n)*.*$", text, re.MULTILINE)
    assert found, file
    return shlex.split(found[0].replace("\\\n", " "))[2:]


def test_there_is_one_for_each_way():
    assert [file.stem for file in FILES] == ["ddp", "fsdp2", "two-nodes", "zero2"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_knows_every_key(file):
    config = load_config_from_file(str(file))  # refuses an unknown one at the top
    assert isinstance(config, ClusterConfig)
    parser = launch_command_parser()
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_own_launch_line_is_understood_and_takes_what_the_file_says(file, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    arguments = launch_command_parser().parse_args(launch_line(file))
    config = load_config_from_file(str(file))
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.mixed_precision == "bf16"
    assert (arguments.num_processes, arguments.num_machines) == (config.num_processes, config.num_machines)
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == {
        "ddp": (True, False, False),
        "two-nodes": (True, False, False),
        "fsdp2": (False, True, False),
        "zero2": (False, False, True),
    }[file.stem]
    for key, value in (config.fsdp_config | config.deepspeed_config).items():
        assert getattr(arguments, key) == value, key
    assert (arguments.module, arguments.training_script) == (True, "stllava_train.cli")
    words = arguments.training_script_args
    assert words[0] == "sft"
    options = dict(zip(words[1::2], words[2::2], strict=True))
    recipe = read_recipe(options["--recipe"], stage=options.get("--stage"))
    assert {"--data", "--out"} <= set(options)
    assert recipe.batch % (recipe.micro_batch * config.num_processes) == 0


def test_layers_to_wrap_are_those_of_the_network():
    from accelerate import init_empty_weights

    from stllava_eval.network.configuration import StllavaMedConfig
    from stllava_eval.network.modeling import StllavaMedForConditionalGeneration

    with init_empty_weights():
        network = StllavaMedForConditionalGeneration(StllavaMedConfig())
    wrapped = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert set(wrapped.split(",")) <= {type(module).__name__ for module in network.modules()}
