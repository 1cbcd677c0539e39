"""``python -m example``, ``python -m example toy`` and ``python -m example study``."""

import sys
from contextlib import suppress

if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # importing takes seconds, and so does drawing figures after a first Ctrl-C
        import torch

        # As fast as two for steps as small as these; on a busy machine two are far slower.
        torch.set_num_threads(1)
        # Each is imported where it is wanted: the toy needs neither the flights nor ignite.
        if sys.argv[1:2] == ["toy"]:
            from example.toy import main as toy

            toy(sys.argv[2:])
        elif sys.argv[1:2] == ["study"]:
            from example.study.command import main as study

            study(sys.argv[2:])
        else:
            from example.compare import main

            main()
