"""`python -m frechet_merge` is the command `frechet-merge`."""
from frechet_merge.cli.commands import main

main()
