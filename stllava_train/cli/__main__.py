"""Run `stllava-train` as `python -m stllava_train.cli`."""

import sys

from stllava_train.cli.main import main

sys.exit(main())
