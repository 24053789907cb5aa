"""`python -m hpt_torch` is `hpt`."""

from hpt_torch.cli import main

main()
