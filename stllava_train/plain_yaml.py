"""Read the plain part of YAML that recipes and lists of prices are written in.

Recipes (`training.recipe_yaml`) and the judges' prices (`preferences.judges.prices`) both come through here.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from stllava_eval.errors import InputError


def read_yaml(text: str, location: str) -> Any:
    """Return the value of a text in the part of YAML 1.2 that recipes need.

    That part has texts, numbers, true, false, null, lists, and mappings whose keys are texts. PyYAML's own YAML 1.1
    takes 2e-4 for a text, `no` for false, 010 for 8 and 1:30 for 90, and where a key is there twice it keeps the last.
    Aliases are refused, because a page of them can fill the memory, and so are tags.

    Args:
        text: The text.
        location: The file, or the change of a command line, for messages.

    Raises:
        InputError: The text is not in this part of YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # ours, below, and none of PyYAML's

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise yaml.MarkedYAMLError(problem="an alias or a tag", problem_mark=event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
            made: dict[str, Any] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.value in made:
                    what = f"{key.value} is there twice" if isinstance(key, yaml.ScalarNode) else "a key is no text"
                    raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
                made[key.value] = self.construct_object(value, deep=True)
            return made

    # what a plain scalar is, by its form: the core schema of YAML 1.2.2, section 10.3.2, without octal and hexadecimal
    # numbers, infinities and NaN; `first` are the characters that such a scalar may begin with
    for tag, pattern, first in (
        ("null", r"(?:null|~|)$", ["n", "~", ""]),
        ("bool", r"(?:true|false)$", ["t", "f"]),
        ("int", r"[-+]?(?:0|[1-9]\d{0,99})$", list("-+0123456789")),
        ("float", r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), first)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "nested too deeply"
        raise InputError(f"{location}{line}: no YAML that recipes are written in ({what}). Fix it.") from error
