"""`python -m diffaccel`: the same as the command `diffaccel`."""

from diffaccel.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
