"""``python -m example``."""

from contextlib import suppress

if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # importing takes seconds, and so does drawing figures after a first Ctrl-C
        import torch

        from example.compare import main

        # As fast as two for steps as small as these; on a busy machine two are far slower.
        torch.set_num_threads(1)
        main()
