"""`python -m frechet_merge` is the command `frechet-merge`."""
from frechet_merge.cli import main

main()
