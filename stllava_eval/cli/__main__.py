"""Run `stllava-eval` as `python -m stllava_eval.cli`."""

import sys

from stllava_eval.cli.main import main

sys.exit(main())
