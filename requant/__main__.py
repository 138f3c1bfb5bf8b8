"""`python -m requant`."""

from requant.cli import main

if __name__ == "__main__":
    main()
