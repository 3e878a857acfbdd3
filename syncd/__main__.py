"""``python -m syncd`` is the daemon."""

from syncd.daemon import main

if __name__ == "__main__":
    main()
