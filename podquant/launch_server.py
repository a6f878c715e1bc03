"""`python -m podquant.launch_server --model-path MODEL …`: `podquant serve` under the name SGLang's users know."""

from __future__ import annotations

import sys

from podquant.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
